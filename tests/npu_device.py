"""A device named npu on host memory (PrivateUse1), for checking what the CPU forgives: tensors left on the other
device, and waits for the device. install() changes the whole process: use it in one of its own.

Numbers are computed by the CPU's kernels, so this says nothing about an NPU's numerics, dtypes or speed.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
# As on hardware: a copy may cross devices, and CPU indices are taken.
CROSSING = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
CPU_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# The host has to know a number from the device before it can go on: a scalar, or the shape of the result.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::equal", "aten::is_nonzero", "aten::item",
    "aten::repeat_interleave.Tensor",
}  # fmt: skip
# Factories take no tensor, so no wrapper leads them here: each is registered.
FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "full", "scalar_tensor",
    "randint", "randint.low", "randint.generator", "randint.low_generator", "randn", "randn.generator", "rand", "eye",
)  # fmt: skip

waits: Counter[str] = Counter()  # place in upwell and operator -> times the host waited there


class NPUTensor(torch.Tensor):
    """A tensor that says it is on npu:0; `host` holds its numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> NPUTensor:
        wrapper: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device="npu:0",
        )  # fmt: skip
        wrapper.host = host
        return wrapper

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"NPUTensor({self.host})"

    def tolist(self) -> Any:  # torch refuses it for subclasses
        waits[f"{_place()} tolist"] += 1
        _refuse_in_capture("tolist")
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operator: the devices checked, the numbers computed on the host, the result put back on npu."""
    if func is aten._has_compatible_shallow_copy_type.default:
        return isinstance(args[0], NPUTensor) == isinstance(args[1], NPUTensor)
    leaves = tree_leaves((args, kwargs))
    own = [a for a in leaves if isinstance(a, NPUTensor)]
    foreign = [a for a in leaves if isinstance(a, torch.Tensor) and not isinstance(a, NPUTensor) and a.dim() > 0]
    if own and foreign and func not in CROSSING and func not in CPU_INDICES:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, npu:0 and "
            f"{foreign[0].device}! (when checking arguments for {func.name()})"
        )
    to_host = any(isinstance(a, torch.device) and a.type == "cpu" for a in leaves) or (
        func is aten.copy_.default and not isinstance(args[0], NPUTensor)
    )
    masks = func in CPU_INDICES and any(t.dtype == torch.bool for t in own[1:])
    if own and (to_host or masks or func.name() in WAITING):
        waits[f"{_place()} {func.name()}"] += 1
        _refuse_in_capture(func.name())
    if own and foreign:
        _refuse_in_capture(func.name())  # a copy from pageable host memory
    back = {id(a.host): a for a in own}

    def unwrap(a: Any) -> Any:
        if isinstance(a, NPUTensor):
            return a.host
        return torch.device("cpu") if isinstance(a, torch.device) else a

    def wrap(o: Any) -> Any:
        return back.get(id(o)) if id(o) in back else NPUTensor(o) if isinstance(o, torch.Tensor) else o

    args, kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    out = func(*args, **kwargs)
    if Graph.capturing is not None:
        Graph.capturing.operations.append((func, args, kwargs, out))
    return out if to_host else tree_map(wrap, out)


class Graph:
    """What NPUGraph is to hardware: the operators of a capture with the tensors they read and wrote. Replaying does the
    same operators on the same memory: a number that the host put in during capture stays as it was."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        graphs.append(self)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


graphs: list[Graph] = []


@contextmanager
def _capture(graph: Graph) -> Iterator[None]:
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


def _refuse_in_capture(name: str) -> None:
    if Graph.capturing is not None:
        raise RuntimeError(f"{name} at {_place()} waits for the host: not possible while a graph is captured")


def _place() -> str:
    """The innermost line of upwell on the stack."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        if "/upwell/" in frame.filename and "/devices/operators.py" not in frame.filename:  # a recorder's frame
            return f"{frame.filename.rsplit('/upwell/', 1)[1]}:{frame.lineno}"
    return "elsewhere"


class _Backend(_DummyBackendModule):
    """What torch asks of torch.npu, and what upwell does."""

    soc = "Ascend910B1"
    NPUGraph = Graph
    graph = staticmethod(_capture)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_name(self, index: int = 0) -> str:
        return self.soc

    def synchronize(self, device: Any = None) -> None:
        waits[f"{_place()} synchronize"] += 1

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def _is_in_bad_fork(self) -> bool:
        return False


_libraries: list[torch.library.Library] = []  # a library's registrations end with the object


def install() -> None:
    """Make the device. Before upwell is imported: a tensor of this kind can't be made in inference mode, so that
    becomes no_grad, under which composite operators are also taken apart, as an audit needs."""
    torch.inference_mode = torch.no_grad  # type: ignore[misc,assignment]
    _setup_privateuseone_for_python_backend(rename="npu", backend_module=_Backend())  # type: ignore[no-untyped-call]
    everything, factories = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((everything, factories))
    everything.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    for name in FACTORIES:
        base, _, overload = name.partition(".")
        op = getattr(getattr(aten, base), overload or "default")
        factories.impl(name, _factory(op), "PrivateUse1")
    for name in ("_copy_from", "copy_"):
        factories.impl(name, _copy_from if name == "_copy_from" else _copy_into, "PrivateUse1")


def _factory(op: Any) -> Any:
    return lambda *args, **kwargs: NPUTensor(op(*args, **{**kwargs, "device": "cpu"}))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> Any:
    return run(aten.copy_.default, (target, source), {})


def _copy_into(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    return run(aten.copy_.default, (target, source), {})
