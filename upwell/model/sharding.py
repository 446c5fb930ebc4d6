"""Which part of a model each rank holds: arithmetic on shapes and official tensor names.

`tp` ranks split an attention's heads (queries, sinks, both output projections); where they are more than the groups of
the output projection, several share a group's heads. The cache is one latent for all heads, so every rank has it, and
computes what goes into it: wq_a, wkv, compressors and the indexer are on all. All `world` ranks split embedding, output
head and, without expert parallelism, every expert's inner width. With it (`ep` = world) routed experts lie whole on the
ranks that `placement` says, and the shared one on all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from upwell.config import ModelConfig
from upwell.errors import InputError
from upwell.model.placement import Placement, contiguous

_FP8_BLOCK, _FP4_GROUP = 128, 32  # values that share a scale: where they can, parts begin there

Span = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """Rows and columns of a matrix that a rank holds; None: all."""

    rows: Span | None = None
    cols: Span | None = None


def span(total: int, parts: int, part: int, unit: int = 1) -> Span:
    """Part number `part` of `total` in `parts` even ones that begin at multiples of `unit`."""
    units = -(-total // unit)
    return min(total, units * part // parts * unit), min(total, units * (part + 1) // parts * unit)


@dataclass(frozen=True)
class Shard:
    """One rank's part. `placement`: of each MoE layer by name (`layers.0`, `mtp.0`), where not contiguous."""

    config: ModelConfig
    rank: int = 0
    tp: int = 1
    ep: int = 1
    placement: dict[str, Placement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c, tp, world = self.config, self.tp, self.world
        if tp < 1 or self.ep < 1:
            raise InputError(f"tp is {tp} and ep is {self.ep}, both must be at least 1")
        if self.ep not in (1, world) or world % tp:
            raise InputError(
                f"ep is {self.ep} and tp is {tp}: the ranks are the same",
                "give ep 1, or ep as a multiple of tp",
            )
        if c.num_attention_heads % tp:
            raise InputError(f"num_attention_heads is {c.num_attention_heads}, which tp {tp} doesn't divide")
        if c.o_groups % tp and tp % c.o_groups:
            raise InputError(f"o_groups is {c.o_groups}: neither divides tp {tp} nor is divided by it")
        if self.exchanges and world > c.n_routed_experts:
            raise InputError(f"ep is {world}, but a layer has {c.n_routed_experts} experts")
        if not self.exchanges and world > c.moe_intermediate_size:
            raise InputError(f"tp is {world}, but moe_intermediate_size is {c.moe_intermediate_size}", "use --ep")
        if world > c.vocab_size:
            raise InputError(f"{world} ranks are more than the vocab_size of {c.vocab_size}")

    @property
    def world(self) -> int:
        return max(self.tp, self.ep)

    @property
    def exchanges(self) -> bool:
        """Experts lie whole on ranks, and tokens go to them."""
        return self.ep > 1

    @property
    def local(self) -> ModelConfig:
        """The geometry of this rank's attention and experts."""
        c = self.config
        inter = c.moe_intermediate_size if self.exchanges else self.inter[1] - self.inter[0]
        return replace(
            c, num_attention_heads=c.num_attention_heads // self.tp, o_groups=max(1, c.o_groups // self.tp),
            moe_intermediate_size=inter,
        )  # fmt: skip

    @property
    def inter(self) -> Span:
        """Of each routed expert's inner width, where it is split."""
        return self._inner(self.config.moe_intermediate_size)

    @property
    def shared(self) -> Span:
        """Of the shared expert's inner width (with expert parallelism, when few tokens are computed by all)."""
        return self._inner(self.config.moe_intermediate_size * self.config.n_shared_experts)

    @property
    def vocab(self) -> Span:
        return span(self.config.vocab_size, self.world, self.rank)

    def placed(self, layer: str) -> Placement:
        """Where the layer's experts are."""
        return self.placement.get(layer) or contiguous(self.config.n_routed_experts, self.world)

    def experts(self, layer: str) -> tuple[int, ...]:
        """The routed experts of a layer that this rank has a part of."""
        return self.placed(layer)[self.rank] if self.exchanges else tuple(range(self.config.n_routed_experts))

    def check_official(self) -> None:
        """Official numerics round 128 inputs of a product together: parts must begin there. Raises InputError."""
        c, per = self.config, max(1, self.tp // self.config.o_groups)
        latent = self.local.o_groups * c.o_lora_rank
        if self.tp > 1 and (per > 1 or latent % _FP8_BLOCK):
            raise InputError(
                f"official numerics round {_FP8_BLOCK} values together: o_groups {c.o_groups} of o_lora_rank "
                f"{c.o_lora_rank} can't be split by tp {self.tp}", "use a smaller tp, or numerics 'exact'"
            )  # fmt: skip
        if not self.exchanges and self.world > 1 and (self.inter[0] % _FP8_BLOCK or self.inter[1] % _FP8_BLOCK):
            raise InputError(
                f"official numerics round {_FP8_BLOCK} values together: moe_intermediate_size "
                f"{c.moe_intermediate_size} can't be split by tp {self.tp}", "use --ep, or numerics 'exact'"
            )  # fmt: skip

    def cut(self, name: str) -> Cut | None:
        """The part of a tensor, by its official name, that isn't a routed expert's; None: all of it."""
        if self.world == 1:
            return None
        if name in ("embed.weight", "head.weight"):
            return Cut(rows=self.vocab)
        _, _, rest = name.partition(".ffn.shared_experts.")
        if rest:
            if self.exchanges:
                return None
            return Cut(cols=self.shared) if rest == "w2.weight" else Cut(rows=self.shared)
        _, _, rest = name.partition(".attn.")
        return self._attention_cut(rest) if self.tp > 1 else None

    def _attention_cut(self, name: str) -> Cut | None:
        c, part = self.config, self.rank % self.tp
        heads = span(c.num_attention_heads, self.tp, part)
        if name == "attn_sink":
            return Cut(rows=heads)
        if name == "wq_b.weight":
            return Cut(rows=(heads[0] * c.head_dim, heads[1] * c.head_dim))
        if name not in ("wo_a.weight", "wo_b.weight"):
            return None
        sharing = max(1, self.tp // c.o_groups)  # ranks that have the same group
        width = max(1, c.o_groups // self.tp) * c.o_lora_rank
        latent = (part // sharing * width, (part // sharing + 1) * width)
        if name == "wo_b.weight":
            return Cut(cols=latent)
        width = c.num_attention_heads * c.head_dim // c.o_groups
        return Cut(rows=latent, cols=span(width, sharing, part % sharing) if sharing > 1 else None)

    def _inner(self, total: int) -> Span:
        unit = next(u for u in (_FP8_BLOCK, _FP4_GROUP, 1) if total % u == 0 and total // u >= self.world)
        return span(total, self.world, self.rank, unit)
