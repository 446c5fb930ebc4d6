"""The mixture of experts of every layer: a router (learned or by token hash), routed experts, one shared expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from upwell.config import ModelConfig
from upwell.model.layers import Linear
from upwell.model.offload import Expert, HostExperts, PagedLayer
from upwell.ops import linear_autograd, moe_native, routing_native
from upwell.ops.fake_quant import fake_fp8
from upwell.ops.linear import linear
from upwell.ops.moe import expert_hidden, grouped_experts, integer_experts, route, router_scores, swiglu


class Gate(nn.Module):
    """Router: weight [E, D]; learned layers have a correction bias [E] FP32, hash layers a table tid2eid [V, k]."""

    def __init__(self, config: ModelConfig, is_hash: bool) -> None:
        super().__init__()
        self.k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.bias: Tensor | None
        self.tid2eid: Tensor | None
        # The bias balances load and gets no gradient (its update is a rule of training), so it is a buffer.
        self.register_buffer("bias", None if is_hash else torch.zeros(config.n_routed_experts))
        self.register_buffer("tid2eid", torch.zeros(config.vocab_size, self.k, dtype=torch.long) if is_hash else None)

    def forward(self, x: Tensor, input_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [T, D], input_ids [T] (hash layers alone need them) -> experts [T, k], weights [T, k] FP32."""
        router = self.router(input_ids)
        if linear_autograd.usable(x, self.weight):
            return routing_native.route(linear(x, self.weight), *router)
        return route(router_scores(x, self.weight), *router)

    def router(self, input_ids: Tensor | None) -> moe_native.Router:
        """How experts are chosen, for moe_native."""
        given = self.tid2eid[input_ids] if self.tid2eid is not None else None
        return moe_native.Router(self.k, self.scaling, self.bias, given)


class Experts(nn.Module):
    """The routed experts. Dense weights are stacked (w13 [E, 2I, D], w2 [E, D, I]) and can be trained, INT8 and INT4
    ones are stacked with their scales (ops.moe.integer_experts); FP8 and FP4 ones stay as the checkpoint has them, one
    tensor an expert, mapped from its file, or paged in from it when they are chosen. `away`: they are computed on the
    host (offload.py)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n, self.limit = config.n_routed_experts, config.swiglu_limit
        self.inter, self.hidden = inter, hidden = config.moe_intermediate_size, config.hidden_size
        self.w13 = nn.Parameter(torch.empty(self.n, 2 * inter, hidden))
        self.w2 = nn.Parameter(torch.empty(self.n, hidden, inter))
        self.w13_scale: Tensor | None
        self.w2_scale: Tensor | None
        self.register_buffer("w13_scale", None)  # [E, 2I], [E, D], or by groups
        self.register_buffer("w2_scale", None)
        self.packed: list[Expert] | None = None
        self.paged: PagedLayer | None = None
        self.away: HostExperts | None = None
        self.quantize_input = False

    def pack(self, packed: list[Expert]) -> None:
        """Use packed weights: for each expert (weight, scale) of w1, w2, w3; drops the dense ones."""
        self.packed = packed
        self._drop_dense(packed[0]["w1"][0].device)

    def page(self, paged: PagedLayer) -> None:
        """Use packed weights that come from disk."""
        self.paged = paged
        self._drop_dense(torch.device("cpu"))

    def send_away(self, away: HostExperts, device: torch.device) -> None:
        """Have them computed on the host, for a layer on `device`."""
        self.away = away
        self._drop_dense(device)

    def _drop_dense(self, device: torch.device) -> None:
        empty = torch.empty(0, device=device)  # the dense ones may be on the meta device
        self.w13, self.w2 = nn.Parameter(empty, False), nn.Parameter(empty.clone(), False)

    @property
    def is_dense(self) -> bool:
        return self.packed is None and self.paged is None and self.away is None

    @property
    def packed_kind(self) -> torch.dtype | None:
        """The dtype of packed weights, FP8 or (FP4, two a byte) uint8; None for others."""
        if self.paged is not None:
            return self.paged.pages.kind
        return None if self.packed is None else self.packed[0]["w1"][0].dtype

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [T, D], experts/weights [T, k] -> [T, D]: the weighted sum of each token's experts."""
        if self.away is not None:
            return self.away(x, experts, weights)
        if self.w13_scale is not None and self.w2_scale is not None:
            return integer_experts(
                x, experts, weights, self.w13, self.w13_scale, self.w2, self.w2_scale, self.limit
            )
        if self.is_dense:
            return grouped_experts(x, experts, weights, self.w13, self.w2, self.limit)
        return self._packed(x, experts, weights)

    def _packed(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if self.quantize_input:
            x = fake_fp8(x, 128)
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        for e, expert in self._chosen(experts.unique().tolist()):
            token, place = (experts == e).nonzero(as_tuple=True)
            (w1, s1), (w3, s3), (w2, s2) = expert["w1"], expert["w3"], expert["w2"]
            hidden = expert_hidden(x[token], w1, w3, self.limit, s1, s3) * weights[token, place, None]
            hidden = hidden.to(x.dtype)
            if self.quantize_input:
                hidden = fake_fp8(hidden, 128)
            parts[e] = token, linear(hidden, w2, s2).float()
        for e in sorted(parts):  # in one order, whichever expert was in memory first
            out.index_add_(0, *parts[e])
        return out.to(x.dtype)

    def _chosen(self, chosen: list[int]) -> Iterator[tuple[int, Expert]]:
        if self.paged is not None:
            return self.paged.visit(chosen)
        assert self.packed is not None
        return ((e, self.packed[e]) for e in chosen)


class SharedExpert(nn.Module):
    """The expert every token takes, weight 1: w2(silu(min(w1 x, limit)) * clamp(w3 x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inter = config.moe_intermediate_size * config.n_shared_experts
        self.w1 = Linear(config.hidden_size, inter)
        self.w2 = Linear(inter, config.hidden_size)
        self.w3 = Linear(config.hidden_size, inter)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x).float(), self.w3(x).float(), self.limit).to(x.dtype))


class MoE(nn.Module):
    """x [T, D], input_ids [T] -> [T, D]."""

    def __init__(self, config: ModelConfig, is_hash: bool) -> None:
        super().__init__()
        self.gate = Gate(config, is_hash)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)
        self.load: Tensor | None = None  # [E] INT64: tokens that chose each expert, counted on where given

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        gate, routed, shared = self.gate, self.experts, self.shared_experts
        dense = routed.w13, routed.w2, shared.w1.weight, shared.w3.weight, shared.w2.weight
        if routed.is_dense and routed.limit == shared.limit and moe_native.usable(x, gate.weight, *dense):
            out, experts = moe_native.mixture(
                x, gate.weight, gate.router(input_ids), *dense[:2], dense[2:], routed.limit
            )
        else:
            experts, weights = gate(x, input_ids)
            out = routed(x, experts, weights) + shared(x)
        if self.load is not None:
            self.load += torch.bincount(experts.flatten(), minlength=self.load.numel())
        return out
