"""The model's layers and head through the C++ kernels: same results as the modules, one call for all layers.

A plan holds the addresses of a model's weights. It serves FP32 activations on CPU without gradient, numerics
"exact", weights in any format; everything else runs in the modules. Products are FP32's, or round their operands to
BF16 where the model is told to (Transformer.multiply_in).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator
from ctypes import POINTER, cast, pointer
from dataclasses import dataclass, field
from itertools import accumulate, chain, repeat
from operator import attrgetter, getitem, is_
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from upwell.config import BLOCK_TOKENS
from upwell.devices import dtype_on
from upwell.formats.int4 import unpack_int4
from upwell.model.cache import KVCache, LayerCache, Step
from upwell.model.offload import GUESSED_TOKENS, Callbacks
from upwell.ops import experts_native, native
from upwell.ops.linear import dense_weight
from upwell.ops.memory import untouched

if TYPE_CHECKING:
    from upwell.model.transformer import Block, Transformer

CHUNK = 512  # tokens a call takes through all layers: what its activations need stays in cache
_version = attrgetter("_version")
_PACKED_BYTES = 2 << 30  # FP32 weights up to this size are packed, that is held a second time as the kernels read them
_PACKED_INTEGERS = 512 << 20  # and so many integers: INT8, or FP32 where INT4 by groups is decoded
_A_BYTE = {torch.int8: 1, torch.uint8: 2}  # integers that a byte holds
_CACHED_BYTES = 8 << 20  # dense weights of one layer that stay in a CPU's shared cache
_DECODED_BYTES = 128 << 20  # packed models up to this size in FP32 are held so, too, for calls of many tokens
_ARENA = 1 << 23  # floats
_SEQUENCE = 5  # words of a Sequence
_FEW_ROWS = native.PANEL // 2
_PANELS = {native.PANELS, native.PAIRS, native.QUADS}


class _Unsupported(Exception):
    """This model has something that the kernels don't take."""


class _Watch:
    """Tensors that a plan points to, where each came from, and the versions of those that were copied."""

    def __init__(self, watched: list[tuple[dict[str, Any], str, Any, int]]) -> None:
        self.owners, self.names, self.tensors, versions = map(list, zip(*watched, strict=True))
        copied = [(t, v) for t, v in zip(self.tensors, versions, strict=True) if v >= 0]
        self.copied, self.versions = [t for t, _ in copied], [v for _, v in copied]

    def current(self) -> bool:
        """The model still holds these tensors, and copies are up to date."""
        same = all(map(is_, map(getitem, self.owners, self.names), self.tensors))
        return same and list(map(_version, self.copied)) == self.versions


@dataclass
class Plan:
    """Structs with the addresses of one model's tensors, and what keeps these alive."""

    model: native.Model
    layers: Any  # array of native.Layer
    mtp: list[Any]  # an array of one Layer for each MTP block
    head: native.HeadCall
    mtp_heads: list[native.HeadCall]
    kept: list[Any]
    of_layers: _Watch
    of_heads: _Watch
    callbacks: list[Callbacks]  # of experts that are on disk: all layers', then each MTP block's
    caches: WeakKeyDictionary[KVCache, Any] = field(default_factory=WeakKeyDictionary)
    lock: Lock = field(default_factory=Lock)
    workspace: Tensor = field(default_factory=lambda: torch.empty(0))
    decoded: tuple[Any, Any, list[Any]] | None = None  # small packed weights in panels: pointer to model, layers, MTP

    def __post_init__(self) -> None:
        self._at_model = pointer(self.model)

    def of(self, tokens: int, threads: int, mtp: int | None = None) -> tuple[Any, Any]:
        """Model (a pointer) and layers (or those of an MTP block) for a call of so many tokens."""
        model, layers, blocks = self._at_model, self.layers, self.mtp
        if self.decoded:
            many = tokens >= threads * (3 if threads <= 2 else 12)  # see by_tokens (csrc/blocks.h)
            if many or (self.model.rounds and native.bf16_dots()):
                model, layers, blocks = self.decoded
        return model, layers if mtp is None else blocks[mtp]

    def room(self, nbytes: int) -> int:
        if self.workspace.numel() * 4 < nbytes:
            self.workspace = untouched((nbytes // 4 + 1024,))
        return self.workspace.data_ptr()


class _Builder:
    """Collects the addresses of a model's tensors. `pack`: whether FP32 matrices are copied into panels; `decode`:
    whether others are, decoded; `rounds`: panels are BF16's; `quads`: whether integers are, None: no, else those that
    are there already, by address."""

    def __init__(
        self, pack: bool, rounds: bool, quads: dict[int, native.Matrix] | None, decode: bool = False
    ) -> None:
        self.pack, self.rounds, self.quads, self.decode = pack, rounds, quads, decode
        self.kept: list[Any] = []
        self.formats: set[int] = set()
        self.weights = 0  # of the matrices
        self.arena, self.used = torch.empty(0), 0  # floats
        self.watched: list[tuple[dict[str, Any], str, Any, int]] = []
        self.paged: list[Any] = []  # tables of layers whose experts are on disk

    def watch(self, module: nn.Module, name: str, copied: bool) -> Tensor:
        owner = module._parameters if name in module._parameters else module._buffers
        tensor = owner[name]
        if tensor is None:
            raise _Unsupported(name)
        self.watched.append((owner, name, tensor, tensor._version if copied else -1))
        return tensor.detach()

    def vector(self, module: nn.Module, name: str = "weight") -> int:
        """Address of a tensor as contiguous FP32."""
        parameter = module._parameters.get(name)
        own: Tensor | None = module._buffers[name] if parameter is None else parameter
        assert own is not None
        copied = own.dtype != torch.float32 or not own.is_contiguous()
        return self.address(self.watch(module, name, copied).float().contiguous())

    def address(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def room(self, words: int) -> int:
        """The address of so many words of 32 bits."""
        if self.used + words > self.arena.numel():
            self.arena, self.used = untouched((max(_ARENA, words),)), 0
            self.kept.append(self.arena)
        at = self.arena.data_ptr() + 4 * self.used
        self.used += -(-words // 16) * 16
        return at

    def panels(self, weight: Tensor, groups: int, exact: bool = False) -> native.Matrix:
        """Each group's rows packed for the kernels (csrc/layout.h). exact: as FP32 in any case."""
        rows, cols = weight.shape[0] // groups, weight.shape[1]
        pairs = self.rounds and not exact
        size = -(-rows // native.PANEL) * native.PANEL * (-(-cols // 2) if pairs else cols)
        at = self.room(groups * size)
        lib = native.library()
        assert lib is not None
        pack = lib.upwell_pack_pairs if pairs else lib.upwell_pack
        for group in range(groups):
            pack(weight[group * rows :].data_ptr(), rows, cols, at + 4 * group * size)
        return native.Matrix(at, None, groups * rows, cols, native.PAIRS if pairs else native.PANELS)

    def matrix(self, weight: Tensor, scale: Tensor | None, groups: int = 1, exact: bool = False) -> native.Matrix:
        made = self.laid_out(weight, scale, groups, exact)
        if made.rows > _FEW_ROWS:
            self.formats.add(made.format)
        self.weights += made.rows * made.cols
        return made

    def laid_out(self, weight: Tensor, scale: Tensor | None, groups: int, exact: bool) -> native.Matrix:
        of_integers = scale is not None and scale.is_floating_point()
        if scale is not None and native.by_row(weight, scale):
            return self.integers(weight, scale)
        if self.decode or (of_integers and self.quads is not None):
            weight, scale = dense_weight(weight, scale, torch.float32).contiguous(), None
        if self.pack and weight.dtype == torch.float32 and weight.is_contiguous() and weight.device.type == "cpu":
            few = groups == 1 and len(weight) <= _FEW_ROWS
            return self.rows(weight, exact) if few else self.panels(weight, groups, exact)
        return self.raw(weight, scale)

    def rows(self, weight: Tensor, exact: bool = False) -> native.Matrix:
        """A matrix of few rows, of which a panel would be mostly empty: FP32, or BF16 where products are rounded and
        the CPU multiplies it."""
        rounds = self.rounds and not exact and native.bf16_dots()
        return self.raw(weight.bfloat16() if rounds else weight, None)

    def integers(self, weight: Tensor, scale: Tensor) -> native.Matrix:
        """INT8 [out, in] or packed INT4 [out, in/2] with a scale a row."""
        scale = scale.float().contiguous()
        as_it_lies = native.integers(weight, scale)
        if as_it_lies is None or not weight.is_contiguous() or weight.device.type != "cpu":
            raise _Unsupported("integers")
        if self.quads is None:
            self.kept += weight, scale
            return as_it_lies
        made = self.quads.get(weight.data_ptr())
        if made is None:
            rows, cols = as_it_lies.rows, as_it_lies.cols
            at = self.room(-(-rows // native.PANEL) * native.PANEL * -(-cols // 4))
            native.pack_quads(unpack_int4(weight) if weight.dtype == torch.uint8 else weight, at)
            scales = self.address(nn.functional.pad(scale, (0, -rows % native.PANEL)))
            made = self.quads[weight.data_ptr()] = native.Matrix(at, scales, rows, cols, native.QUADS)
        return made

    def raw(self, weight: Tensor, scale: Tensor | None) -> native.Matrix:
        kind = native.format_of(weight, scale)
        if kind is None or not weight.is_contiguous() or weight.device.type != "cpu":
            raise _Unsupported(str(weight.dtype))
        rows, cols = weight.shape
        if kind == 3:
            cols *= 2
        at = None
        if kind >= 2:
            if scale is None or (kind == 3 and cols % 32):
                raise _Unsupported("scale")
            at = self.address(scale.contiguous())
        return native.Matrix(self.address(weight), at, rows, cols, kind)

    def linear(self, module: nn.Module, groups: int = 1, unrounded: bool = False) -> native.Matrix:
        """unrounded: what multiplies it is never rounded to INT8, so integers are decoded."""
        if getattr(module, "quantize_input", False):
            raise _Unsupported("quantize_input")
        weight = self.watch(module, "weight", True)
        scale = self.watch(module, "scale", True) if module._buffers.get("scale") is not None else None
        odd = groups > 1 and weight.dtype == torch.float8_e4m3fn and weight.shape[0] // groups % 128
        if odd or (unrounded and scale is not None and scale.is_floating_point()):
            dense = dense_weight(weight, scale, torch.float32)
            return self.panels(dense, groups) if self.pack else self.raw(dense, None)
        return self.matrix(weight, scale, groups)

    def mix(self, module: nn.Module) -> native.Mix:
        fn = self.rows(self.watch(module, "fn", self.rounds))
        return native.Mix(fn, self.vector(module, "base"), self.vector(module, "scale"))

    def compressor(self, module: Any) -> native.Compressor:
        return native.Compressor(
            self.linear(module.wkv), self.linear(module.wgate), self.vector(module, "ape"), self.vector(module.norm),
            module.dim, module.wkv.out_features, module.ratio,
        )  # fmt: skip

    def experts(self, moe: Any) -> Any:
        matrices = []
        routed = moe.experts
        if routed.quantize_input:
            raise _Unsupported("quantize_input")
        if getattr(moe, "places", None) is not None:
            return None  # computed by the rank that has them, between the kernels' calls
        self.watched += [(routed.__dict__, name, getattr(routed, name), -1) for name in ("packed", "paged")]
        if routed.paged is not None:
            sizes = routed.hidden, routed.inter
            if not experts_native.fits(routed.paged.pages.kind, *sizes):
                raise _Unsupported("FP4's groups")
            matrices += list(experts_native.table(routed.paged.pages.kind, routed.n, *sizes))
            self.formats.add(matrices[0].format)
        elif routed.packed is not None:
            for expert in routed.packed:
                matrices += [self.matrix(*expert[name]) for name in ("w1", "w3", "w2")]
        else:
            w13, w2 = self.watch(routed, "w13", True), self.watch(routed, "w2", True)
            names = ("w13_scale", "w2_scale") if routed.w13_scale is not None else ()
            scales = [self.watch(routed, name, True) for name in names]
            matrices += [self.matrix(*part) for part in experts_native.cut(w13, w2, *scales)]
        shared = moe.shared_experts
        matrices += [self.linear(shared.w1), self.linear(shared.w3), self.linear(shared.w2)]
        stored = (native.Matrix * len(matrices))(*matrices)
        self.kept.append(stored)
        if routed.paged is not None:
            self.paged.append(stored)
        return cast(stored, POINTER(native.Matrix))

    def head(self, shape: native.Model, owner: Any, out: native.Matrix) -> native.HeadCall:
        """Hyper head and norm of the model or of an MTP block, and the output head `out` that they share."""
        mix = self.mix(owner.hc_head)
        return native.HeadCall(pointer(shape), mix.fn, mix.base, mix.scale, self.vector(owner.norm), out)

    def layer(self, block: Block) -> native.Layer:
        attn, gate = block.attn, block.ffn.gate
        out = native.Layer()
        out.ratio = attn.ratio
        out.mix_attn, out.mix_ffn = self.mix(block.hc_attn), self.mix(block.hc_ffn)
        out.attn_norm, out.ffn_norm = self.vector(block.attn_norm), self.vector(block.ffn_norm)
        out.q_norm, out.kv_norm = self.vector(attn.q_norm), self.vector(attn.kv_norm)
        out.sink = self.vector(attn, "attn_sink")
        for name in ("wq_a", "wq_b", "wkv", "wo_b"):
            setattr(out, name, self.linear(getattr(attn, name)))
        out.wo_a = self.linear(attn.wo_a, attn.groups, unrounded=True)
        if attn.compressor is not None:
            out.compressor = self.compressor(attn.compressor)
        if attn.indexer is not None:
            out.has_index = 1
            out.index_compressor = self.compressor(attn.indexer.compressor)
            out.index_wq_b = self.linear(attn.indexer.wq_b)
            out.index_weights = self.linear(attn.indexer.weights_proj)
        out.gate = self.matrix(self.watch(gate, "weight", True), None, exact=True)  # no choice hangs by rounding
        if gate.bias is not None:
            out.gate_bias = self.vector(gate, "bias")
        if gate.tid2eid is not None:
            table = self.watch(gate, "tid2eid", False)
            if table.dtype != torch.int64 or not table.is_contiguous():
                raise _Unsupported("tid2eid")
            out.tid2eid = self.address(table)
        out.experts = self.experts(block.ffn)
        return out


def precision(
    device: torch.device, dtype: torch.dtype | None, numerics: str
) -> tuple[torch.dtype | None, torch.dtype]:
    """In what a model asked for in `dtype` is held and multiplied: BF16 on a CPU with kernels is FP32 with products of
    BF16 operands."""
    held = dtype_on(device, dtype)
    if held == torch.bfloat16 and device.type == "cpu" and numerics == "exact" and native.library() is not None:
        return torch.float32, torch.bfloat16
    return held, torch.float32


def plan(model: Transformer, step: Step | None = None, heads: bool = False) -> Plan | None:
    """The model's plan, made or remade where needed; None where the kernels can't serve this model now.

    Only what the caller runs is checked for changes: layers or `heads`. A `step` that only goes on with sequences
    isn't checked, which would cost a small model a tenth of it: its weights are those that the cache was made with.
    """
    if torch.is_grad_enabled() or native.library() is None or torch.compiler.is_compiling():
        return None
    held: Plan | bool | None = model.__dict__.get("_plan", False)
    if isinstance(held, Plan):
        begun = step is not None and 0 not in step.starts
        if begun or (held.of_heads if heads else held.of_layers).current():
            return held
    if held is None:
        return None
    made = _make(model)
    model.__dict__["_plan"] = made
    return made


def _dense_bytes(block: Any) -> int:
    """Of one layer's weights that every token goes through, in FP32, or INT8 where they are integers."""
    parts = [p for part in (block.attn, block.ffn.shared_experts) for p in part.parameters()]
    return sum(p.numel() * (1 if p.dtype == torch.int8 else 4) for p in parts)


def _make(model: Transformer) -> Plan | None:
    c = model.local
    is_part = c is not model.config
    weight = model.embed.weight
    if (
        weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.stride(1) != 1
        or model.numerics != "exact"
        or c.hc_mult > 8 or c.o_groups > 64 or c.qk_rope_head_dim > 512
    ):  # fmt: skip
        return None
    rounds = model.products == torch.bfloat16
    integers = sum(p.numel() * _A_BYTE.get(p.dtype, 0) for p in model.parameters())
    pack = sum(p.nbytes for p in model.parameters() if p.dtype == torch.float32) <= _PACKED_BYTES
    build = _Builder(pack, rounds, {} if integers <= _PACKED_INTEGERS else None)
    blocks: list[Any] = list(model.layers)
    dense = max(_dense_bytes(block) for block in blocks)
    shape = native.Model(
        c.hidden_size, c.hc_mult, c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, c.sliding_window,
        c.q_lora_rank, c.o_lora_rank, c.o_groups, c.index_n_heads, c.index_head_dim, c.index_topk,
        c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size,
        blocks[0].ffn.shared_experts.w1.out_features, c.hc_sinkhorn_iters, model.head.out_features, c.csa_ratio,
        int(rounds), 0, int(model.cached == torch.int8),
        c.hc_eps, c.rms_norm_eps, c.swiglu_limit, c.routed_scaling_factor,
        build.vector(model, "freqs"), build.vector(model, "compress_freqs"),
    )  # fmt: skip
    try:
        layers = (native.Layer * len(blocks))(*(build.layer(block) for block in blocks))
        mtp = [(native.Layer * 1)(build.layer(block)) for block in model.mtp]  # type: ignore[arg-type]
        count = len(build.watched)
        out = build.linear(model.head)
        head, *mtp_heads = (build.head(shape, owner, out) for owner in (model, *model.mtp))
    except _Unsupported:
        return None
    are_panels = build.formats <= _PANELS
    shape.by_tokens = int(not is_part and are_panels and dense <= _CACHED_BYTES)
    watches = _Watch(build.watched[:count]), _Watch(build.watched[count:])
    callbacks = []
    if model.pages is not None:
        tables, n = build.paged, len(blocks)
        callbacks = [Callbacks(model.pages, tables[:n], 0)]
        callbacks += [Callbacks(model.pages, [table], i) for i, table in enumerate(tables[n:], n)]
    made = Plan(shape, layers, mtp, head, mtp_heads, build.kept, *watches, callbacks)
    if not (is_part or callbacks or are_panels) and 4 * build.weights <= _DECODED_BYTES:
        wide, of_many = _Builder(True, rounds, build.quads, decode=True), native.Model.from_buffer_copy(shape)
        made.decoded = (
            pointer(of_many), (native.Layer * len(blocks))(*(wide.layer(block) for block in blocks)),
            [(native.Layer * 1)(wide.layer(block)) for block in model.mtp],  # type: ignore[arg-type]
        )  # fmt: skip
        of_many.by_tokens = int(dense <= _CACHED_BYTES)
        made.kept += wide.kept
    return made


def _cache_layers(layers: list[LayerCache]) -> Any:
    out = (native.LayerCache * len(layers))()
    for at, layer in zip(out, layers, strict=True):
        at.window = layer.window.data_ptr()
        if layer.entries is not None and layer.tail is not None:
            at.entries, at.tail_ring = layer.entries.data_ptr(), layer.tail.ring
            at.tail_kv, at.tail_gate = layer.tail.kv.data_ptr(), layer.tail.gate.data_ptr()
        if layer.index_keys is not None and layer.index_tail is not None:
            at.index_keys, at.index_tail_ring = layer.index_keys.data_ptr(), layer.index_tail.ring
            at.index_tail_kv, at.index_tail_gate = layer.index_tail.kv.data_ptr(), layer.index_tail.gate.data_ptr()
    return out


@dataclass
class Piece:
    """Tokens that one call takes through the layers: `rows` of the flattened input, of these sequences."""

    sequences: array[int]  # csrc/layout.h's Sequence, field by field
    first: int  # the first one's number among the step's
    tokens: int
    rows: slice | Tensor
    tables: array[int]  # what the sequences point to

    @property
    def address(self) -> int:
        return self.sequences.buffer_info()[0]

    @property
    def count(self) -> int:
        return len(self.sequences) // _SEQUENCE


def pieces(input_ids: Tensor, step: Step) -> Iterator[Piece]:
    """The tokens of all sequences, cut into calls of at most CHUNK."""
    tables = array("q", chain.from_iterable(step.tables))
    at_table, count = tables.buffer_info()[0], len(step.lengths)
    if count == input_ids.numel() <= CHUNK:  # a decode step, the short way
        at_tables = accumulate((8 * len(table) for table in step.tables), initial=at_table)
        fields = zip(step.slots, step.starts, repeat(1), range(count), at_tables)  # ends with the shortest
        yield Piece(array("q", chain.from_iterable(fields)), 0, count, slice(0, count), tables)
        return
    padded = 0 if step.is_ragged(input_ids) else input_ids.shape[1]  # a sequence's rows of the input; 0: its tokens
    sequences, spans, tokens, first = array("q"), [], 0, 0
    owners = zip(step.slots, step.starts, step.lengths, step.tables, strict=True)
    for number, (slot, start, length, table) in enumerate(owners):
        done = 0
        while done < length:
            count = min(CHUNK - tokens, length - done)
            sequences.extend((slot, start + done, count, tokens, at_table))
            spans.append((first + done, count))
            done, tokens = done + count, tokens + count
            if tokens == CHUNK:
                yield _piece(sequences, number, spans, tokens, tables)
                sequences, spans, tokens = array("q"), [], 0
        at_table += 8 * len(table)
        first += padded or length
    if tokens:
        yield _piece(sequences, len(step.lengths) - 1, spans, tokens, tables)


def _piece(
    sequences: array[int], last: int, spans: list[tuple[int, int]], tokens: int, tables: array[int]
) -> Piece:
    return Piece(sequences, last + 1 - len(spans), tokens, _rows(spans, tokens), tables)


def _rows(spans: list[tuple[int, int]], count: int) -> slice | Tensor:
    """The rows of spans (first, how many), `count` in all."""
    first = spans[0][0]
    if spans[-1][0] + spans[-1][1] == first + count:
        return slice(first, first + count)
    return torch.cat([torch.arange(a, a + n) for a, n in spans])


def caches_of(plan: Plan, cache: KVCache, mtp: int | None) -> Any:
    """The layers' caches, of the model or of MTP block `mtp`."""
    caches = plan.caches.get(cache)
    if caches is None:
        caches = [_cache_layers(cache.layers), *(_cache_layers([layer]) for layer in cache.mtp)]
        plan.caches[cache] = caches
    return caches[0 if mtp is None else 1 + mtp]


def takes(model: Transformer, cache: KVCache) -> bool:
    """The kernels extend this cache."""
    return cache.dtype == (model.cached or torch.float32) and cache.device.type == "cpu"


def run_layers(
    plan: Plan, input_ids: Tensor, cache: KVCache, step: Step, embed: Tensor | None = None,
    streams: Tensor | None = None, mtp: int | None = None, load: Tensor | None = None, only_last: bool = False,
) -> Tensor:  # fmt: skip
    """Streams [B*S, h, D] after all layers (or MTP block `mtp`), which extend the cache. They begin as rows of
    embed [V, D], or as `streams`, which are overwritten. only_last: those after each sequence's last token, [B, h, D],
    and no more of the last layer than they and the cache need; begun as rows of embed.

    load [layers + MTP blocks, E]: tokens by expert, counted on. The cache has to be one that the kernels take.
    """
    ids = input_ids.contiguous().view(-1)
    only_last = only_last and len(ids) > len(step.lengths)
    if streams is None:
        streams = torch.empty(min(CHUNK, len(ids)) if only_last else len(ids), plan.model.streams, plan.model.hidden)
    lasts = streams.new_empty(len(step.lengths), *streams.shape[1:]) if only_last else None
    with plan.lock:
        caches = caches_of(plan, cache, mtp)
        table, stride = (None, 0) if embed is None else (embed.data_ptr(), embed.stride(0))
        counts = None if load is None else load[0 if mtp is None else len(plan.layers) + mtp].data_ptr()
        threads, width = torch.get_num_threads(), plan.model.streams * plan.model.hidden
        for piece in pieces(input_ids, step):
            rows, first, part, part_ids = piece.rows, 0, streams, ids
            if isinstance(rows, slice):
                first = rows.start
            else:
                part, part_ids = streams if only_last else streams[rows], ids[rows]
            at_streams = part.data_ptr() + (0 if only_last else 4 * first * width)
            model, layers = plan.of(piece.tokens, threads, mtp)
            call = native.Call(
                model, layers, caches, len(layers), piece.address, piece.count, piece.tokens, BLOCK_TOKENS,
                part_ids.data_ptr() + 8 * first, table, stride, at_streams, load=counts, only_last=only_last,
            )  # fmt: skip
            run(plan, call, plan.callbacks[0 if mtp is None else 1 + mtp] if plan.callbacks else None)
            if lasts is not None:  # a sequence that goes on in the next piece comes again
                ctypes.memmove(lasts.data_ptr() + 4 * width * piece.first, at_streams, 4 * width * piece.count)
            elif not isinstance(rows, slice):
                streams[rows] = part
    return streams if lasts is None else lasts


def run(plan: Plan, call: native.Call, paged: Callbacks | None = None) -> None:
    """One call, with the plan's workspace. paged: where experts are on disk."""
    lib = native.library()
    assert lib is not None
    threads = torch.get_num_threads()
    lib.upwell_set_threads(threads)
    at_call = ctypes.addressof(call)
    call.workspace = plan.room(lib.upwell_workspace_bytes(at_call, threads))
    if paged is None:
        wrong = lib.upwell_forward(at_call)
    else:
        call.take = paged.take
        if call.tokens <= GUESSED_TOKENS:
            call.expect = paged.expect
        with paged.called():
            wrong = lib.upwell_forward(at_call)
    if wrong >= 0:
        raise IndexError(f"token {wrong} of the call has an id outside the vocabulary of {call.model[0].vocab}")


def run_head(plan: Plan, streams: Tensor, vocab: int, mtp: int | None = None) -> Tensor:
    """streams [T, h, D] -> logits [T, V], by the model's hyper head or MTP block `mtp`'s."""
    lib = native.library()
    assert lib is not None
    streams = streams.contiguous()
    logits = torch.empty(streams.shape[0], vocab)
    with plan.lock:
        call = plan.head if mtp is None else plan.mtp_heads[mtp]
        call.tokens, call.streams, call.logits = streams.shape[0], streams.data_ptr(), logits.data_ptr()
        threads = torch.get_num_threads()
        lib.upwell_set_threads(threads)
        at_call = ctypes.addressof(call)
        call.workspace = plan.room(lib.upwell_head_workspace_bytes(at_call, threads))
        lib.upwell_head(at_call)
    return logits
