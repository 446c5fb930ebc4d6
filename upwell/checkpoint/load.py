"""A checkpoint directory becomes a Transformer: packed weights stay packed, and mapped from their files.

FP8 matrices and FP4 (or FP8) experts are used as the files have them, wo_a among them: decoded to BF16 it would take
twice its size out of memory that can't be dropped, where mapped pages can. Dense tensors whose dtype needs no change
are mapped too. The mapping is private: writing to a weight never reaches the file. For an NPU without FP8 and FP4
(Ascend A2, A3) packed weights are decoded on the host, to the model's dtype.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from upwell.checkpoint.expert_pages import ExpertPages
from upwell.checkpoint.geometry import Kind
from upwell.checkpoint.match import INTEGER_SCALE, Plan, Weight, plan_checkpoint
from upwell.checkpoint.names import from_official
from upwell.checkpoint.offload import Offload
from upwell.checkpoint.parts import part_of
from upwell.checkpoint.shards import Stored
from upwell.config import ModelConfig, Numerics
from upwell.devices import npu
from upwell.errors import CheckpointError, InputError
from upwell.model import Transformer
from upwell.model.layers import Linear
from upwell.model.moe import Experts
from upwell.model.offload import HostExperts, PagedLayer
from upwell.model.parallel import ParallelTransformer, Ranks
from upwell.model.sharding import Cut, Shard
from upwell.ops.linear import dense_weight
from upwell.ops.rope import inverse_frequencies

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "I8": torch.uint8,
    "U8": torch.uint8,
    "I64": torch.int64,
}

_LINE = 64
_LARGE = 256 << 20  # bytes


def load_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    numerics: Numerics = "exact",
    offload: Offload | None = None,
) -> Transformer:
    """The model of a checkpoint directory, in official or transformers' names, ready for inference.

    dtype: float32 or bfloat16 for activations and unquantized weights; None takes the checkpoint's own. Norms, mHC,
    sinks, position biases and routing biases are FP32 always. `offload`: where the routed experts stay. Everything
    is checked before anything large is allocated: raises CheckpointError or ConfigError, naming file and tensor.
    """
    plan = _plan(path, dtype)
    with torch.device("meta"):
        model = Transformer(plan.config, numerics)
    _Filler(model, plan, dtype, torch.device(device), offload).fill()
    return model.eval()


def load_part(
    path: str | os.PathLike[str],
    ranks: Callable[[ModelConfig], Ranks],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    numerics: Numerics = "exact",
) -> ParallelTransformer:
    """One rank's part of a checkpoint's model, as `load_model`; nothing else of it is kept in memory.

    `ranks` makes of the checkpoint's config who shares it and how. Raises InputError where it can't be shared so.
    """
    plan = _plan(path, dtype)
    own = ranks(plan.config)
    with torch.device("meta"):
        model = ParallelTransformer(plan.config, own, numerics)
    _Filler(model, plan, dtype, torch.device(device), None, own.shard).fill()
    return model.eval()


def _plan(path: str | os.PathLike[str], dtype: torch.dtype | None) -> Plan:
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise InputError(f"dtype {dtype} isn't supported", "use torch.float32 or torch.bfloat16")
    return plan_checkpoint(Path(path))


class MappedFiles:
    """safetensors files mapped into memory, each once; tensors are views of the mapping."""

    def __init__(self) -> None:
        self._bytes: dict[Path, Tensor] = {}

    def tensor(self, stored: Stored) -> Tensor:
        """The stored tensor without a copy (with one where its offset in the file isn't a multiple of its item)."""
        if stored.file not in self._bytes:
            with stored.file.open("rb") as stream:
                mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            self._bytes[stored.file] = torch.frombuffer(mapping, dtype=torch.uint8)
        raw = self._bytes[stored.file][stored.start : stored.end]
        dtype = DTYPES[stored.dtype]
        if stored.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)


class ReadFiles(MappedFiles):
    """Tensors in memory of their own, for a process whose memory is counted: a mapping would count whole files."""

    def tensor(self, stored: Stored) -> Tensor:
        dtype = DTYPES[stored.dtype]
        # As far from a cache line's start as in the mapping: a BLAS library's sums may depend on it, in the last bits.
        skew = 0 if stored.start % dtype.itemsize else stored.start % _LINE
        own = torch.empty(stored.nbytes + _LINE, dtype=torch.uint8)[skew : skew + stored.nbytes]
        raw = own.numpy().data  # a memoryview
        with stored.file.open("rb", buffering=0) as stream:
            done = 0
            while done < stored.nbytes:
                got = os.preadv(stream.fileno(), [raw[done:]], stored.start + done)
                if not got:
                    raise CheckpointError(f"{stored} is cut off", "download this shard again")
                done += got
            os.posix_fadvise(stream.fileno(), stored.start, stored.nbytes, os.POSIX_FADV_DONTNEED)
        return own.view(dtype).view(stored.shape)


class _Filler:
    """Puts a plan's tensors, or a rank's part of them, into a model that was built on the meta device."""

    def __init__(
        self, model: Transformer, plan: Plan, dtype: torch.dtype | None, device: torch.device, offload: Offload | None,
        shard: Shard | None = None,
    ) -> None:  # fmt: skip
        self.model, self.plan, self.device, self.offload = model, plan, device, offload
        self.shard = shard or Shard(plan.config)
        self.official = model.numerics == "official"
        self.decodes = device.type == "npu" and not npu.chip_of(device).fp8  # FP8 and FP4, not integers
        self.files = ReadFiles() if offload is not None and offload.experts == "disk" else MappedFiles()
        embed = next(weight for slot, (weight, _) in plan.single if slot.name == "embed.weight")
        self.dtype = dtype or DTYPES[embed.dtype]

    def fill(self) -> None:
        for slot, weight in self.plan.single:
            self._set_tensor(from_official(slot.name), slot.kind, weight, self.shard.cut(slot.name))
        if self.offload is None:
            self._fill_experts()
        elif self.offload.experts == "disk":
            self._page_experts(self.offload)
        else:
            with self._on_host():
                self._fill_experts()
        if self.offload is not None and self.device.type != "cpu":
            for layer in (*self.plan.stacked, *self.plan.experts):
                self._send_away(self._experts(layer))
        self._set_frequencies()

    def _fill_experts(self) -> None:
        for layer, (w13, w2) in self.plan.stacked.items():
            self._set_stacks(self._experts(layer), self._held(layer), w13, w2)
        for layer, parts in self.plan.experts.items():
            self._set_experts(self._experts(layer), self._held(layer), parts)

    @contextmanager
    def _on_host(self) -> Iterator[None]:
        device, decodes = self.device, self.decodes
        self.device, self.decodes = torch.device("cpu"), False
        yield
        self.device, self.decodes = device, decodes

    def _page_experts(self, offload: Offload) -> None:
        other = [(w13, "stacked experts") for w13, _ in self.plan.stacked.values()]
        for parts in self.plan.experts.values():
            tensor, scale = parts["w1"][0]
            if scale is None or scale.dtype in INTEGER_SCALE:
                other.append((tensor, f"experts of {tensor.dtype}"))
        if other:
            tensor, what = other[0]
            raise InputError(
                f"{tensor}: {what} can't be paged from disk, only FP4 and FP8 ones",
                "take the official checkpoint, or offload experts=host",
            )
        assert offload.memory is not None
        pages = ExpertPages(
            list(self.plan.experts.values()), offload.memory, self.plan.config.num_experts_per_tok, offload.usage
        )
        self.model.pages = pages
        for i, layer in enumerate(self.plan.experts):
            module = self._experts(layer)
            module.page(PagedLayer(pages, i))
            module.quantize_input = self.official

    def _send_away(self, module: Experts) -> None:
        """The module that holds the experts stays on the host; the model's own hands over to it."""
        held = copy(module)
        held._parameters, held._buffers = dict(module._parameters), dict(module._buffers)
        for name in module._buffers:
            module._buffers[name] = None
        module.packed = module.paged = None
        module.send_away(HostExperts(held), self.device)

    def _held(self, layer: str) -> tuple[int, ...]:
        """The experts that are here, of `layers.0.ffn.experts`."""
        return self.shard.experts(layer.removesuffix(".ffn.experts"))

    def _set_tensor(self, name: str, kind: Kind, weight: Weight, cut: Cut | None) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        tensor, scale = weight
        if scale is not None:
            assert isinstance(module, Linear)
            # wo_a is stored as FP8 but its input is never rounded (the official code decodes it to BF16).
            module.quantize_input = self.official and not path.endswith("wo_a")
            stored, own_scale = self._stored(weight, cut)
            if own_scale is None or (self.decodes and scale.dtype not in INTEGER_SCALE):
                module.weight = self._parameter(dense_weight(stored, own_scale, self.dtype).to(self.device))
                return
            module.weight, module.scale = nn.Parameter(stored.to(self.device), False), own_scale.to(self.device)
            module.quantize_input &= scale.dtype not in INTEGER_SCALE  # integer weights round their input themselves
        elif kind == "table":
            setattr(module, leaf, self._as_stored(tensor))
        else:
            value, _ = self._stored(weight, cut)
            if not self._stays_mapped(module, value):
                value = value.to(dtype=self._dtype_of(kind))
            value = value.to(self.device)
            setattr(module, leaf, self._parameter(value) if leaf in module._parameters else value)

    def _stays_mapped(self, module: nn.Module, value: Tensor) -> bool:
        return isinstance(module, Linear) and self._stays_narrow(value.nbytes)

    def _stays_narrow(self, nbytes: int) -> bool:
        """Large BF16 matrices (the output head, experts) in an FP32 model on a CPU: reading them is what a step costs,
        and the product is the same as with a widened copy."""
        return self.dtype == torch.float32 and self.device.type == "cpu" and nbytes >= _LARGE

    def _dtype_of(self, kind: Kind) -> torch.dtype:
        if kind in ("float", "norm") or (kind == "router" and self.official):
            return torch.float32
        return self.dtype

    def _set_stacks(self, module: Experts, held: tuple[int, ...], w13: Stored, w2: Stored) -> None:
        up, down = self.files.tensor(w13), self.files.tensor(w2)
        if self.shard.exchanges:
            up, down = up[list(held)], down[list(held)]
        elif self.shard.world > 1:
            (first, last), inter = self.shard.inter, up.shape[1] // 2
            up = torch.cat((up[:, first:last], up[:, inter + first : inter + last]), dim=1)
            down = down[:, :, first:last].contiguous()
        dtype = up.dtype if self._stays_narrow(up.nbytes) else self.dtype
        module.w13 = self._parameter(up.to(self.device, dtype))
        module.w2 = self._parameter(down.to(self.device, dtype))

    def _set_experts(self, module: Experts, held: tuple[int, ...], parts: dict[str, list[Weight]]) -> None:
        cuts: dict[str, Cut | None] = dict.fromkeys(("w1", "w2", "w3"))
        if self.shard.world > 1 and not self.shard.exchanges:
            rows = Cut(rows=self.shard.inter)
            cuts = {"w1": rows, "w2": Cut(cols=self.shard.inter), "w3": rows}
        scale = parts["w1"][0][1]
        if scale is not None and scale.dtype in INTEGER_SCALE:
            self._set_integer_experts(module, held, parts, cuts)
            return
        if scale is not None and not self.decodes:
            module.pack([{leaf: self._packed(parts[leaf][e], cuts[leaf]) for leaf in cuts} for e in held])
            module.quantize_input = self.official
            return
        # Dense experts are stacked: one product per expert over a contiguous stack, and trainable.
        dtype = self.dtype
        if scale is None and self._stays_narrow(module.w13.numel() * 2):
            dtype = DTYPES[parts["w1"][0][0].dtype]
        w13 = torch.empty(module.w13.shape, dtype=dtype, device=self.device)
        w2 = torch.empty(module.w2.shape, dtype=dtype, device=self.device)
        inter = w13.shape[1] // 2
        for place, e in enumerate(held):
            w13[place, :inter] = self._decoded(parts["w1"][e], cuts["w1"])
            w13[place, inter:] = self._decoded(parts["w3"][e], cuts["w3"])
            w2[place] = self._decoded(parts["w2"][e], cuts["w2"])
        module.w13, module.w2 = self._parameter(w13), self._parameter(w2)

    def _set_integer_experts(
        self, module: Experts, held: tuple[int, ...], parts: dict[str, list[Weight]], cuts: dict[str, Cut | None]
    ) -> None:
        """INT8 or INT4 weights and their scales, stacked as grouped products take them: scales of groups lie with a
        group's rows side by side."""
        inter = module.w13.shape[1] // 2

        def stack(leaf: str, rows: int) -> tuple[Tensor, Tensor]:
            weight, scale = self._packed(parts[leaf][0], cuts[leaf])
            scales = torch.empty(module.n, *scale.shape[1:], rows, dtype=scale.dtype, device=self.device)
            return weight.new_empty(module.n, rows, weight.shape[1]), scales.movedim(-1, 1)

        (w13, s13), (w2, s2) = stack("w1", 2 * inter), stack("w2", module.w2.shape[1])
        for place, e in enumerate(held):
            w13[place, :inter], s13[place, :inter] = self._packed(parts["w1"][e], cuts["w1"])
            w13[place, inter:], s13[place, inter:] = self._packed(parts["w3"][e], cuts["w3"])
            w2[place], s2[place] = self._packed(parts["w2"][e], cuts["w2"])
        module.w13, module.w2 = nn.Parameter(w13, requires_grad=False), nn.Parameter(w2, requires_grad=False)
        module.w13_scale, module.w2_scale = s13, s2

    def _set_frequencies(self) -> None:
        config = self.plan.config
        r = config.qk_rope_head_dim
        self.model.freqs = inverse_frequencies(r, config.rope_theta, None).to(self.device)
        self.model.compress_freqs = inverse_frequencies(r, config.compress_rope_theta, config.yarn).to(self.device)

    def _experts(self, layer: str) -> Experts:
        module = self.model.get_submodule(layer)
        assert isinstance(module, Experts)
        return module

    def _stored(self, weight: Weight, cut: Cut | None) -> tuple[Tensor, Tensor | None]:
        """A tensor, or its part, and its scale, in host memory."""
        if cut is not None:
            return part_of(self.files, weight, cut, self.dtype)
        tensor, scale = weight
        stored = self.files.tensor(tensor)
        if scale is None:
            return stored, None
        if scale.dtype == "F32" and tensor.dtype == "I8":
            stored = stored.view(torch.int8)  # INT8; FP4's I8 and INT4's U8 hold two codes a byte
        return stored, self.files.tensor(scale)

    def _packed(self, weight: Weight, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
        stored, scale = self._stored(weight, cut)
        if scale is None:
            raise InputError(
                f"{weight[0]} can't be split by its blocks over {self.shard.world} ranks",
                "use --ep, which leaves experts whole",
            )
        return stored.to(self.device), scale.to(self.device)

    def _decoded(self, weight: Weight, cut: Cut | None = None) -> Tensor:
        """The weight in host memory, decoded to the model's dtype if it is packed."""
        stored, scale = self._stored(weight, cut)
        return stored if scale is None else dense_weight(stored, scale, self.dtype)

    def _as_stored(self, stored: Stored) -> Tensor:
        return self.files.tensor(stored).to(self.device)

    @staticmethod
    def _parameter(value: Tensor) -> nn.Parameter:
        return nn.Parameter(value)
