"""The C++ kernels (csrc/): loading, choice of instruction set, threads, and the structs they are called with.

A plain C library by ctypes, which releases the GIL during calls. Without it everything runs in plain PyTorch.
UPWELL_KERNELS=off disables it; UPWELL_KERNELS=NAME, one of ISAS, forces an instruction set.
"""

from __future__ import annotations

import ctypes
import os
import re
from array import array
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from enum import IntFlag
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from upwell.errors import UpwellError

ISAS = ("baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "dotprod", "bf16")


class Matrix(ctypes.Structure):
    """csrc/layout.h, field by field; so are the structs below."""

    _fields_ = [("data", c_void_p), ("scale", c_void_p), ("rows", c_int64), ("cols", c_int64), ("format", c_int64)]


class Mix(ctypes.Structure):
    _fields_ = [("fn", Matrix), ("base", c_void_p), ("scale", c_void_p)]


class Compressor(ctypes.Structure):
    _fields_ = [("wkv", Matrix), ("wgate", Matrix), ("ape", c_void_p), ("norm", c_void_p), ("dim", c_int64),
                ("width", c_int64), ("ratio", c_int64)]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        ("ratio", c_int64), ("mix_attn", Mix), ("mix_ffn", Mix),
        *((name, c_void_p) for name in ("attn_norm", "ffn_norm", "q_norm", "kv_norm", "sink")),
        *((name, Matrix) for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")),
        ("compressor", Compressor), ("index_compressor", Compressor), ("index_wq_b", Matrix),
        ("index_weights", Matrix), ("has_index", c_int64), ("gate", Matrix), ("gate_bias", c_void_p),
        ("tid2eid", c_void_p), ("experts", POINTER(Matrix)),
    ]  # fmt: skip


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in (
            "hidden", "streams", "heads", "dim", "rope", "window", "q_rank", "o_rank", "groups", "index_heads",
            "index_dim", "index_topk", "experts", "experts_per_token", "inter", "shared_inter", "sinkhorn_iters",
            "vocab", "csa_ratio", "rounds", "by_tokens", "bytes")),
        *((name, c_double) for name in ("hc_eps", "norm_eps", "swiglu_limit", "routed_scaling")),
        ("freqs", c_void_p), ("compress_freqs", c_void_p),
    ]  # fmt: skip


class LayerCache(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in (
            "window", "entries", "tail_kv", "tail_gate", "index_keys", "index_tail_kv", "index_tail_gate")),
        ("tail_ring", c_int64), ("index_tail_ring", c_int64),
    ]  # fmt: skip


TAKE = ctypes.CFUNCTYPE(c_int64, c_int64, c_int64, POINTER(c_int32), c_int64)
EXPECT = ctypes.CFUNCTYPE(None, c_int64, POINTER(c_int32), c_int64)


class Call(ctypes.Structure):
    _fields_ = [
        ("model", POINTER(Model)), ("layers", POINTER(Layer)), ("caches", POINTER(LayerCache)),
        ("layer_count", c_int64), ("sequences", c_void_p), ("sequence_count", c_int64), ("tokens", c_int64),
        ("block_tokens", c_int64), ("ids", c_void_p), ("embed", c_void_p), ("embed_stride", c_int64),
        ("streams", c_void_p), ("workspace", c_void_p),
        ("workspace_floats", c_int64), ("picks", c_void_p), ("take", TAKE), ("expect", EXPECT),
        ("load", c_void_p), ("parts", c_int64), *((name, c_void_p) for name in ("x", "y", "post", "comb")),
        ("only_last", c_int64),
    ]  # fmt: skip


class Ring(ctypes.Structure):
    _fields_ = [("rows", c_void_p), *((name, c_int64) for name in ("layers", "slots", "places", "bytes"))]


class ExpertsCall(ctypes.Structure):
    _fields_ = [
        ("model", POINTER(Model)), ("experts", POINTER(Matrix)), ("layer", c_int64), ("tokens", c_int64),
        *((name, c_void_p) for name in ("x", "route", "route_weights", "y", "workspace")), ("take", TAKE),
    ]  # fmt: skip


class Parts(IntFlag):
    """What a call does of each layer (csrc/layout.h)."""

    ENTER_ATTENTION = 1
    ATTENTION = 2
    LEAVE_ATTENTION = 4
    ENTER_EXPERTS = 8
    EXPERTS = 16
    LEAVE_EXPERTS = 32


class HeadCall(ctypes.Structure):
    _fields_ = [
        ("model", POINTER(Model)), ("fn", Matrix), ("base", c_void_p), ("scale", c_void_p), ("norm", c_void_p),
        ("head", Matrix), ("tokens", c_int64), ("streams", c_void_p), ("logits", c_void_p), ("workspace", c_void_p),
    ]  # fmt: skip


PANEL = 32  # rows of a packed weight that lie interleaved (csrc/layout.h)
PANELS, PAIRS, QUADS = 4, 5, 8  # formats of such weights: FP32, BF16 by pairs of columns, INT8 by four


class ProductCall(ctypes.Structure):
    _fields_ = [
        ("m", Matrix), ("x", c_void_p), ("tokens", c_int64), ("out", c_void_p), ("workspace", c_void_p),
        ("rounds", c_int64),
    ]  # fmt: skip


@cache
def _loaded() -> ctypes.CDLL | None:
    wish = os.environ.get("UPWELL_KERNELS", "")
    if wish == "off":
        return None
    folder = Path(__file__).parent
    paths = [p for suffix in EXTENSION_SUFFIXES if (p := folder / f"_kernels{suffix}").exists()]
    if not paths:
        return None
    try:
        lib = ctypes.CDLL(str(paths[0]))
    except OSError:  # built for another machine
        return None
    _check_structs(lib)
    lib.upwell_isa.restype = c_char_p
    lib.upwell_set_isa.argtypes = [c_char_p]
    for name in ("upwell_workspace_bytes", "upwell_head_workspace_bytes"):
        function = getattr(lib, name)
        function.argtypes, function.restype = [c_void_p, c_int], c_int64
    lib.upwell_forward.argtypes, lib.upwell_forward.restype = [c_void_p], c_int64
    lib.upwell_head.argtypes, lib.upwell_head.restype = [c_void_p], None
    lib.upwell_pack.argtypes, lib.upwell_pack.restype = [c_void_p, c_int64, c_int64, c_void_p], None
    lib.upwell_pack_pairs.argtypes, lib.upwell_pack_pairs.restype = [c_void_p, c_int64, c_int64, c_void_p], None
    lib.upwell_pack_quads.argtypes, lib.upwell_pack_quads.restype = [c_void_p, c_int64, c_int64, c_void_p], None
    lib.upwell_set_threads.argtypes = [c_int]
    lib.upwell_product.argtypes, lib.upwell_product.restype = [c_void_p], None
    lib.upwell_product_workspace_bytes.argtypes = [c_int64, c_int]
    lib.upwell_product_workspace_bytes.restype = c_int64
    lib.upwell_experts.argtypes, lib.upwell_experts.restype = [c_void_p], None
    lib.upwell_experts_workspace_bytes.argtypes = [c_void_p, c_int64, c_int]
    lib.upwell_experts_workspace_bytes.restype = c_int64
    lib.upwell_copy_rings.restype = None
    lib.upwell_copy_rings.argtypes = [
        c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p,
    ]  # fmt: skip
    lib.upwell_read.argtypes, lib.upwell_read.restype = [c_void_p, c_int64], c_uint64
    _share_openmp(lib)
    if wish and lib.upwell_set_isa(wish.encode()) != 0:
        raise UpwellError(
            f"UPWELL_KERNELS={wish}: this machine or build has no such kernels",
            f"use off or one of {', '.join(ISAS)} that the CPU supports, or unset it",
        )
    return lib


def _check_structs(lib: ctypes.CDLL) -> None:
    """A library of other sources would read our structs wrongly."""
    ours = sum(ctypes.sizeof(struct) for struct in (Call, Layer, Model, Ring))
    if not hasattr(lib, "upwell_struct_bytes") or lib.upwell_struct_bytes() != ours:
        raise UpwellError("the CPU kernels here were built from other sources", "install Upwell again")


def _share_openmp(lib: ctypes.CDLL) -> None:
    """Let the kernels use the thread pool of torch's own OpenMP runtime; without one they are single-threaded."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    found = re.search(r"(/\S*libgomp\S*)", maps)
    if found is None:
        return
    gomp = ctypes.CDLL(found.group(1))
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    lib.upwell_set_openmp(*(ctypes.cast(getattr(gomp, name), c_void_p) for name in names))


def library() -> ctypes.CDLL | None:
    """The kernels, or None where they aren't built or UPWELL_KERNELS=off."""
    return _loaded()


FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.uint8: 3, torch.int8: 6}
INT4 = 7  # the format of packed bytes whose scales are one a row
MOST_COLUMNS = 1 << 16  # of an integer weight: sums of so many products of bytes stay in 32 bits


def format_of(weight: torch.Tensor, scale: torch.Tensor | None) -> int | None:
    """The format of a weight [out, in], or of stacked ones, as it lies (csrc/layout.h); None where the kernels have
    none: INT4 by groups, others. Integers' scales, one a row, have to be FP32 for them."""
    if scale is not None and scale.is_floating_point():
        return {torch.int8: FORMATS[torch.int8], torch.uint8: INT4}.get(weight.dtype) if by_row(weight, scale) else None
    return None if weight.dtype == torch.int8 else FORMATS.get(weight.dtype)


def by_row(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Integers with a scale for each row: what multiplies them is rounded, too (ops.linear.integer_linear)."""
    return scale.is_floating_point() and scale.dim() == weight.dim() - 1


def integers(weight: torch.Tensor, scale: torch.Tensor) -> Matrix | None:
    """A contiguous INT8 [out, in] or packed INT4 [out, in/2] as it lies, and its contiguous FP32 scale [out], which
    have to stay there; None where the kernels don't take it: by groups, or with rows too long for sums in 32 bits."""
    kind, cols = format_of(weight, scale), weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    if kind is None or cols > MOST_COLUMNS:
        return None
    return Matrix(weight.data_ptr(), scale.data_ptr(), weight.shape[0], cols, kind)


def pairs(weight: torch.Tensor) -> torch.Tensor:
    """A contiguous FP32 weight [out, in] rounded to BF16, as `product` takes it with `out`: INT32 [words]."""
    lib = library()
    assert lib is not None and weight.is_contiguous() and weight.dtype == torch.float32
    rows, cols = weight.shape
    packed = torch.empty(-(-rows // PANEL) * PANEL * (-(-cols // 2)), dtype=torch.int32)
    lib.upwell_pack_pairs(weight.data_ptr(), rows, cols, packed.data_ptr())
    return packed


def pack_quads(weight: torch.Tensor, at: int) -> None:
    """A contiguous INT8 weight [out, in] in panels, to an address (csrc/layout.h, kQuads)."""
    lib = library()
    assert lib is not None and weight.is_contiguous() and weight.dtype == torch.int8
    lib.upwell_pack_quads(weight.data_ptr(), *weight.shape, at)


def quads(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous INT8 weight [out, in] and its scale [out] in panels, as `product` takes them with `out`: INT32
    [words], and FP32, one a row of whole panels."""
    rows, cols = weight.shape
    packed = torch.empty(-(-rows // PANEL) * PANEL * (-(-cols // 4)), dtype=torch.int32)
    pack_quads(weight, packed.data_ptr())
    return packed, torch.nn.functional.pad(scale.float(), (0, -rows % PANEL))


def product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None, out_features: int | None = None,
    rounds: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x [T, in] FP32 times a contiguous CPU weight [out, in] of any format (see ops.linear.linear; INT4 by row only)
    -> [T, out] FP32.

    With `out_features`, weight is what `pairs` made, and x is rounded to BF16, too, or with a scale what `quads` made.
    With `rounds`, x is rounded beside packed weights where that is faster: where `bf16_dots`, on aarch64 from six rows
    on.
    """
    lib = library()
    assert lib is not None and weight.is_contiguous() and x.dtype == torch.float32
    rows, cols = out_features or weight.shape[0], x.shape[1]
    x, out, threads = x.contiguous(), torch.empty(x.shape[0], rows), torch.get_num_threads()
    if scale is not None:
        scale = (scale.float() if scale.is_floating_point() else scale).contiguous()
    workspace = torch.empty(lib.upwell_product_workspace_bytes(cols, threads) // 4)
    kind = format_of(weight, scale) if out_features is None else PAIRS if scale is None else QUADS
    assert kind is not None
    matrix = Matrix(weight.data_ptr(), None if scale is None else scale.data_ptr(), rows, cols, kind)
    lib.upwell_set_threads(threads)
    call = ProductCall(matrix, x.data_ptr(), x.shape[0], out.data_ptr(), workspace.data_ptr(), int(rounds))
    lib.upwell_product(ctypes.addressof(call))
    return out


class Span(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("words", c_int64)]


def read_memory(tensors: list[torch.Tensor]) -> int:
    """Read every byte of contiguous CPU tensors once, with the kernels' threads; returns the bytes. For benchmarks.

    Raises UpwellError where the kernels aren't built.
    """
    lib = library()
    if lib is None:
        raise UpwellError("no CPU kernels here to read memory with", "install where a C++ compiler is")
    spans = (Span * len(tensors))(*[Span(t.data_ptr(), t.nbytes // 8) for t in tensors])
    lib.upwell_set_threads(torch.get_num_threads())
    lib.upwell_read(spans, len(tensors))
    return sum(8 * span.words for span in spans)


def copy_rings(
    rings: ctypes.Array[Ring], slots: array[int], positions: array[int], which: array[int] | None, saved: array[int]
) -> None:
    """Rows of all rings, at pairs of slot and position, into `saved`; with `which` those pairs' from there back."""
    lib = library()
    assert lib is not None
    some = (None, 0) if which is None else (which.buffer_info()[0], len(which))
    at_slots, at_positions = slots.buffer_info()[0], positions.buffer_info()[0]
    lib.upwell_copy_rings(
        ctypes.addressof(rings), len(rings), at_slots, at_positions, len(slots), *some, saved.buffer_info()[0]
    )


def set_isa(name: str) -> bool:
    """Force an instruction set (tests); False where this machine lacks it."""
    lib = library()
    return lib is not None and lib.upwell_set_isa(name.encode()) == 0


def bf16_dots() -> bool:
    """The kernels multiply BF16 by the CPU's own dot products, twice as fast as FP32."""
    lib = library()
    return lib is not None and bool(lib.upwell_bf16_dots())


def integer_dots() -> bool:
    """The kernels multiply INT8 by the CPU's own dot products, four times as fast as FP32."""
    lib = library()
    return lib is not None and bool(lib.upwell_integer_dots())


def describe() -> str:
    """One line for --version and doctor."""
    lib = library()
    if lib is not None:
        return f"CPU kernels: {lib.upwell_isa().decode()}, {torch.get_num_threads()} threads"
    if os.environ.get("UPWELL_KERNELS") == "off":
        return "CPU kernels: off (UPWELL_KERNELS=off), plain PyTorch"
    return "CPU kernels: not built (no C++ compiler at install), plain PyTorch"
