"""Random weights: a start for training, and models of any geometry for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import nn

from upwell.model.transformer import Transformer


@torch.no_grad()
def init_weights(model: Transformer, seed: int, std: float = 0.02) -> Transformer:
    """Fill every parameter and routing table in place, deterministic by `seed`: normal(0, std) for matrices and
    embeddings, 1 for norms, small mHC projections around an identity-like residual mix. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if "norm" in name.split(".")[-2:][0] or name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif leaf == "base":
            _init_mix_base(parameter, model.config.hc_mult)
        elif leaf == "scale":
            parameter.fill_(0.1)
        elif leaf in ("attn_sink", "ape"):
            parameter.zero_()
        else:
            # Sublayers start by adding little: else their common part drowns the tokens, and routers collapse.
            gain = 0.1 if leaf == "w2" or ".w2." in name or ".wo_b." in name else 3.0 if "embed" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (std * gain))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            _init_hash_table(buffer, model.config.n_routed_experts, generator)
    return model


def _init_mix_base(base: nn.Parameter, h: int) -> None:
    """Streams start equal: the sublayer reads their mean, writes to all, and each stream mostly keeps itself."""
    base.zero_()
    if base.numel() > h:
        base[2 * h :] = (torch.eye(h) * 4.0).flatten()
    base[:h] = torch.logit(torch.tensor(1.0 / h))


def _init_hash_table(table: torch.Tensor, experts: int, generator: torch.Generator) -> None:
    """Each token gets k different experts: a random rotation of consecutive ones, the load even over tokens."""
    vocab, k = table.shape
    first = torch.randperm(vocab, generator=generator) % experts
    stride = 1 + torch.randint(0, max(1, (experts - 1) // max(k, 1)), (vocab,), generator=generator)
    table.copy_((first[:, None] + torch.arange(k)[None, :] * stride[:, None]) % experts)
