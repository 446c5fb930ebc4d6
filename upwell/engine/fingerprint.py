"""Which model this is, as a name: what one model left in a cache on disk must never serve another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

import upwell
from upwell.model import Transformer
from upwell.ops import native

_WHOLE = 256 << 20  # bytes of weights up to which all are read; of more, samples
_SAMPLE = 1024  # bytes from the begin, the middle and the end of a tensor


def fingerprint(model: Transformer) -> str:
    """32 hex digits over geometry, numerics, dtype, versions, kernels and weights (samples of large models' tensors).

    Versions and kernels count because they decide the last bits of what is cached.
    """
    told = hashlib.blake2b(digest_size=16)
    isa = "" if (lib := native.library()) is None else lib.upwell_isa().decode()
    computes = (model.numerics, model.dtype, model.products, model.cached, model.device.type)
    told.update(repr((model.config, *computes, upwell.__version__, torch.__version__, isa)).encode())
    if model.pages is not None:
        told.update(model.pages.identity().encode())
    whole = sum(tensor.nbytes for _, tensor in _weights(model)) <= _WHOLE
    for name, tensor in _weights(model):
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        middle = max(0, len(flat) // 2 - _SAMPLE // 2)
        parts = [flat] if whole else [flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:]]
        for part in parts:
            told.update(part.cpu().numpy().data)
    return told.hexdigest()


def _weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        away = getattr(module, "away", None)
        module = module if away is None else away.experts
        if away is not None:
            yield from ((f"{name}.{key}", tensor) for key, tensor in module.state_dict().items())
        for e, expert in enumerate(getattr(module, "packed", None) or []):
            for key in sorted(expert):
                for k, tensor in enumerate(expert[key]):
                    yield f"{name}.{e}.{key}.{k}", tensor
