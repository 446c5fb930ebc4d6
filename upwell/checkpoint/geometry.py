"""Every tensor a V4 of a given config has: its official name, its shape and how it is stored. No torch.

Loading checks a checkpoint against this list, writing follows it, and `inspect` counts with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from upwell.config import ModelConfig

# How the official release stores a tensor, and how it is held in memory:
#   matrix  FP8 e4m3 in 128 x 128 blocks with a UE8M0 scale; stays packed
#   expert  FP4 e2m1 in groups of 32 with a UE8M0 scale (FP8 as `matrix` in base models); stays packed
#   plain   BF16; the model's dtype in memory        norm    BF16; FP32 in memory
#   router  BF16; FP32 in memory with official numerics
#   float   FP32                                     table   I64
Kind = Literal["matrix", "expert", "plain", "norm", "router", "float", "table"]

FP8_BLOCK = 128
FP4_GROUP = 32
_PLAIN_BYTES: dict[Kind, int] = {"float": 4, "table": 8}


@dataclass(frozen=True)
class Slot:
    """One tensor; or `count` equal ones, of the experts, with `{}` in the name for the expert's number."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    count: int = 1

    @property
    def numel(self) -> int:
        return prod(self.shape) * self.count

    @property
    def official_bytes(self) -> int:
        """Bytes in the official release, scales included."""
        if self.kind == "matrix":
            return prod(self.shape) + prod(fp8_scale_shape(self.shape))
        if self.kind == "expert":
            return self.count * (prod(fp4_packed_shape(self.shape)) + prod(fp4_scale_shape(self.shape)))
        return self.bf16_bytes

    @property
    def bf16_bytes(self) -> int:
        """Bytes with nothing quantized: BF16, but for what is always FP32 or I64."""
        return self.numel * _PLAIN_BYTES.get(self.kind, 2)


def fp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // FP8_BLOCK) for n in shape)


def fp4_packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2)


def fp4_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // FP4_GROUP)


def slots(config: ModelConfig) -> Iterator[Slot]:
    """Every tensor of the model, MTP blocks last."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Slot("embed.weight", (vocab, hidden), "plain")
    for i, ratio in enumerate(config.compress_ratios):
        yield from block_slots(config, f"layers.{i}.", ratio, config.is_hash_layer(i))
    yield Slot("norm.weight", (hidden,), "norm")
    yield from hyper_head_slots(config, "")
    yield Slot("head.weight", (vocab, hidden), "plain")
    for i in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{i}."
        yield from block_slots(config, prefix, 0, False)
        for name in ("e_proj", "h_proj"):
            yield Slot(f"{prefix}{name}.weight", (hidden, hidden), "matrix")
        for name in ("enorm", "hnorm", "norm"):
            yield Slot(f"{prefix}{name}.weight", (hidden,), "norm")
        yield from hyper_head_slots(config, prefix)


def is_mtp(name: str) -> bool:
    return name.startswith("mtp.")


def block_slots(config: ModelConfig, prefix: str, ratio: int, is_hash: bool) -> Iterator[Slot]:
    """A layer's, an MTP block's, or a DSpark stage's (checkpoint/dspark.py)."""
    hidden, h = config.hidden_size, config.hc_mult
    yield from _attention(config, f"{prefix}attn.", ratio)
    yield from _moe(config, f"{prefix}ffn.", is_hash)
    for part in ("attn", "ffn"):
        yield Slot(f"{prefix}{part}_norm.weight", (hidden,), "norm")
        yield Slot(f"{prefix}hc_{part}_fn", ((2 + h) * h, h * hidden), "float")
        yield Slot(f"{prefix}hc_{part}_base", ((2 + h) * h,), "float")
        yield Slot(f"{prefix}hc_{part}_scale", (3,), "float")


def _attention(config: ModelConfig, prefix: str, ratio: int) -> Iterator[Slot]:
    hidden, dim, rank = config.hidden_size, config.head_dim, config.q_lora_rank
    width, latent = config.num_attention_heads * dim, config.o_groups * config.o_lora_rank
    yield Slot(f"{prefix}wq_a.weight", (rank, hidden), "matrix")
    yield Slot(f"{prefix}q_norm.weight", (rank,), "norm")
    yield Slot(f"{prefix}wq_b.weight", (width, rank), "matrix")
    yield Slot(f"{prefix}wkv.weight", (dim, hidden), "matrix")
    yield Slot(f"{prefix}kv_norm.weight", (dim,), "norm")
    yield Slot(f"{prefix}attn_sink", (config.num_attention_heads,), "float")
    yield Slot(f"{prefix}wo_a.weight", (latent, width // config.o_groups), "matrix")
    yield Slot(f"{prefix}wo_b.weight", (hidden, latent), "matrix")
    if ratio:
        yield from _compressor(config, f"{prefix}compressor.", ratio, dim)
    if ratio == config.csa_ratio:
        c, n = config.index_head_dim, config.index_n_heads
        yield Slot(f"{prefix}indexer.wq_b.weight", (n * c, rank), "matrix")
        yield Slot(f"{prefix}indexer.weights_proj.weight", (n, hidden), "plain")
        yield from _compressor(config, f"{prefix}indexer.compressor.", ratio, c)


def _compressor(config: ModelConfig, prefix: str, ratio: int, dim: int) -> Iterator[Slot]:
    width = dim * (2 if ratio == config.csa_ratio else 1)
    yield Slot(f"{prefix}wkv.weight", (width, config.hidden_size), "plain")
    yield Slot(f"{prefix}wgate.weight", (width, config.hidden_size), "plain")
    yield Slot(f"{prefix}ape", (ratio, width), "float")
    yield Slot(f"{prefix}norm.weight", (dim,), "norm")


def _moe(config: ModelConfig, prefix: str, is_hash: bool) -> Iterator[Slot]:
    hidden, inter, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield Slot(f"{prefix}gate.weight", (experts, hidden), "router")
    if is_hash:
        yield Slot(f"{prefix}gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), "table")
    else:
        yield Slot(f"{prefix}gate.bias", (experts,), "float")
    shared = inter * config.n_shared_experts
    for name, out, into in (("w1", inter, hidden), ("w2", hidden, inter), ("w3", inter, hidden)):
        yield Slot(f"{prefix}experts.{{}}.{name}.weight", (out, into), "expert", experts)
    for name, out, into in (("w1", shared, hidden), ("w2", hidden, shared), ("w3", shared, hidden)):
        yield Slot(f"{prefix}shared_experts.{name}.weight", (out, into), "matrix")


def hyper_head_slots(config: ModelConfig, prefix: str) -> Iterator[Slot]:
    """hc_head_*: the model's own with no prefix, or a drafter's."""
    h = config.hc_mult
    yield Slot(f"{prefix}hc_head_fn", (h, h * config.hidden_size), "float")
    yield Slot(f"{prefix}hc_head_base", (h,), "float")
    yield Slot(f"{prefix}hc_head_scale", (1,), "float")
