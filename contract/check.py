"""Traces upwell over the real torch_npu wheel: prefill, decode, a captured step and MTP of a small V4 on npu:0.

    python -m contract.check

Under FakeTensorMode nothing is computed, but every operator runs through torch_npu's own schema and meta kernel, so
names, arguments, shapes and devices are the wheel's. The meta kernels let many dtypes and layouts pass: each fused call
is held to its page's conditions too (tests/npu_reference.py). Run where torch_npu can be imported (contract/stubs.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import npu_reference

import upwell.ops.npu as fused_operators
from upwell.config import ModelConfig
from upwell.devices.npu import Chip, chip
from upwell.devices.operators import OperatorRecord, audit
from upwell.model import KVCache, Step, Transformer
from upwell.model.cache import DecodeInputs
from upwell.ops.linear import int8_linear
from upwell.ops.moe import integer_experts

SOCS = ("Ascend910B1", "Ascend910_9382", "Ascend950PR_9599")
# Flash's head, index and rotary dims, which the attention and indexer operators ask for; all else small.
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "deepseek_v4", "vocab_size": 300, "hidden_size": 128, "moe_intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 512, "q_lora_rank": 64,
        "num_experts_per_tok": 3, "n_routed_experts": 8, "o_groups": 2, "o_lora_rank": 32, "index_n_heads": 8,
        "index_head_dim": 128, "index_topk": 4, "sliding_window": 128, "num_hash_layers": 1,
        "qk_rope_head_dim": 64, "compress_ratios": [0, 4, 128], "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 2048,
    }
)  # fmt: skip


def trace(target: Chip) -> set[str]:
    """Run everything for one chip; returns the npu:: operators that were called. Raises AssertionError."""
    names = npu_reference.NAMES
    ops = SimpleNamespace(**{name: npu_reference.checked(name, getattr(torch_npu, name)) for name in names})
    fused_operators._fused_of = lambda device: fused_operators.Fused(target, ops)  # type: ignore[assignment]
    with FakeTensorMode(), torch.no_grad(), OperatorRecord() as record:
        device = torch.device("npu:0")
        with device:
            model = as_loaded(Transformer(CONFIG).eval())
        cache = KVCache(CONFIG, 4, 2, torch.bfloat16, device)
        # Up to 64 tokens a step: above that the plain experts of a chip without the fused ones ask for their counts.
        for starts in ([0, 0], [250, 90]):
            streams = model.streams(ids(2, 32), cache, Step([0, 1], starts, [32, 20], [[0, 1], [2]], device))
            expect(model.logits(streams), (64, 300), torch.float32)
        step = Step([0, 1], [282, 110], [1, 1], [[0, 1], [2]], device)
        expect(model.logits(model.streams(ids(2, 1), cache, step)), (2, 300), torch.float32)
        numbers = (torch.zeros(shape, dtype=torch.long, device=device) for shape in ((2,), (2,), (2, 2)))
        captured = Step([0, 0], [0, 0], [1, 1], [[], []], device, on_device=DecodeInputs(*numbers))
        expect(model.streams(ids(2, 1), cache, captured), (2, CONFIG.hc_mult, 128), torch.bfloat16)
        drafted, _ = model.draft(ids(2, 1), streams[:2], cache, step)
        expect(drafted, (2, 300), torch.float32)
        x, weight = (torch.empty(5, 64, dtype=d, device=device) for d in (torch.bfloat16, torch.int8))
        expect(int8_linear(x, weight, torch.empty(5, device=device)), (5, 5), torch.bfloat16)
        x = torch.empty(4, 64, dtype=torch.bfloat16, device=device)
        w13, w2 = (torch.empty(s, dtype=torch.int8, device=device) for s in ((6, 32, 64), (6, 64, 16)))
        s13, s2 = (torch.empty(s, device=device) for s in ((6, 32), (6, 64)))
        picks, shares = ids(4, 2), torch.empty(4, 2, device=device)
        expect(integer_experts(x, picks, shares, w13, s13, w2, s2, 10.0), (4, 64), torch.bfloat16)
        w13, w2 = (torch.empty(s, dtype=torch.uint8, device=device) for s in ((6, 64, 32), (6, 64, 16)))
        for dtype, groups13, groups2 in ((torch.bfloat16, (2,), (1,)), (torch.float32, (), ())):  # W4A16, W4A8
            s13 = torch.empty(6, *groups13, 64, dtype=dtype, device=device).movedim(-1, 1)
            s2 = torch.empty(6, *groups2, 64, dtype=dtype, device=device).movedim(-1, 1)
            expect(integer_experts(x, picks, shares, w13, s13, w2, s2, 10.0), (4, 64), torch.bfloat16)
        try:
            model.norm(torch.empty(2, 128, dtype=torch.bfloat16))
        except Exception:
            pass
        else:
            raise AssertionError("a CPU tensor among NPU tensors raised nothing")
    failures = [finding for finding in audit(record.used, target) if finding.fails]
    assert not failures, failures
    return {name.split("::")[1].split(".")[0] for name, _ in record.used if name.startswith("npu::")}


def as_loaded(model: Transformer) -> Transformer:
    """The dtypes that loading gives: BF16 weights; norms, mHC, sinks and position biases FP32."""
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() > 1 and leaf not in ("fn", "ape"):
                module._parameters[leaf] = torch.nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long, device="npu:0")


def expect(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
    assert found == (shape, dtype, "npu"), found


_tensor = torch.tensor


def _host_then_device(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """torch.tensor would start the device that it is given, which stubs can't; `.to` is an operator, so faked."""
    made = _tensor(data, **options)
    return made if device is None else made.to(device)


def main(socs: Iterable[str] = SOCS) -> None:
    torch.tensor = _host_then_device  # type: ignore[assignment]
    for soc in socs:
        target = chip(soc)
        called = trace(target)
        wanted = {name for name, families in fused_operators.PRODUCTS.items() if target.family in families}
        assert called & set(fused_operators.PRODUCTS) == wanted, f"{soc}: never called: {wanted - called}"
        print(f"{soc}: {len(wanted)} fused operators traced: {', '.join(sorted(wanted))}", flush=True)


if __name__ == "__main__":
    main()
