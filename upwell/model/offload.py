"""Routed experts that aren't on the model's device: in host memory, or paged in from disk.

A layer asks its pages for the experts it chose, computes those that are there while the others are read, and gives
them back. What is computed is the same as with all experts in memory; only the order of the experts is another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from upwell.ops import experts_native, native

if TYPE_CHECKING:
    from upwell.model.moe import Experts
    from upwell.model.transformer import Transformer

GUESSED_TOKENS = 8  # of a step, for which a learned layer's choice is guessed before its attention

Expert = dict[str, tuple[Tensor, Tensor]]
"""w1, w2, w3 -> (packed weight, scale)."""


class Pages(Protocol):
    """The experts of all layers, of which some are in memory. Layers are counted through, MTP blocks last.

    One visit at a time, under `lock`: begin, then next until all experts were given, then end.
    """

    lock: RLock
    kind: torch.dtype  # of the packed weights

    def begin(self, layer: int, experts: list[int]) -> None:
        """A layer needs these experts; reading those that aren't there begins."""

    def next(self) -> list[int]:
        """Some of them, at least one, that are in memory, and stay there until the next call. Raises EngineError."""

    def end(self) -> None:
        """The layer is done."""

    def expect(self, layer: int, experts: Iterable[int]) -> None:
        """A layer will likely need these soon."""

    def places(self, layer: int, expert: int) -> experts_native.Places: ...

    def weights(self, layer: int, expert: int) -> Expert: ...

    def identity(self) -> str:
        """Tells these weights from others."""

    def close(self) -> None: ...


class PagedLayer:
    """One layer's experts among the pages."""

    def __init__(self, pages: Pages, index: int) -> None:
        self.pages, self.index = pages, index

    def visit(self, experts: list[int]) -> Iterator[tuple[int, Expert]]:
        """Each of the experts once, in the order in which they are there."""
        with self.pages.lock:
            self.pages.begin(self.index, experts)
            try:
                given = 0
                while given < len(experts):
                    ready = self.pages.next()
                    given += len(ready)
                    for e in ready:
                        yield e, self.pages.weights(self.index, e)
            finally:
                self.pages.end()


class Callbacks:
    """What the kernels call while they compute: it brings a layer's experts in and points their matrices there.

    tables: each layer's matrices, from layer `first` on.
    """

    def __init__(self, pages: Pages, tables: list[Any], first: int) -> None:
        self.pages, self.tables, self.first = pages, tables, first
        self.take, self.expect = native.TAKE(self._take), native.EXPECT(self._expect)
        self._error: BaseException | None = None

    @contextmanager
    def called(self) -> Iterator[None]:
        """Around a call of the kernels. Raises what a callback met, which ended the call."""
        with self.pages.lock:
            self._error = None
            try:
                yield
            finally:
                self.pages.end()
            if self._error is not None:
                raise self._error

    def _take(self, layer: int, start: int, active: Any, count: int) -> int:
        try:
            if start == 0:
                self.pages.begin(self.first + layer, active[:count])
            ready = self.pages.next()
            for e in ready:
                experts_native.point(self.tables[layer], e, self.pages.places(self.first + layer, e))
            return experts_native.put_first(active, start, count, ready)
        except BaseException as error:  # it can't pass through C
            self._error = error
            return -1

    def _expect(self, layer: int, experts: Any, count: int) -> None:
        try:
            self.pages.expect(self.first + layer, experts[:count])
        except BaseException as error:
            self._error = error


class HostExperts:
    """A layer's routed experts in host memory while the layer is on another device: activations go there and back.

    `experts` is the module that holds them; packed ones and integers are computed by the CPU kernels, which take FP32.
    """

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        hidden, inter = experts.hidden, experts.inter
        self._kernels: experts_native.Mixture | None = None
        self._kept: list[Tensor] = []  # what the kernels read
        self._callbacks: Callbacks | None = None
        if experts.w13_scale is not None and experts.w2_scale is not None:
            stacked = experts.w13.detach(), experts.w2.detach(), experts.w13_scale, experts.w2_scale
            if (made := experts_native.integers(*stacked)) is not None:
                self._matrices, self._kept = made
                self._kernels = experts_native.Mixture(experts.n, hidden, inter, experts.limit)
            return
        kind = experts.packed_kind
        if kind is None or experts.quantize_input or not experts_native.fits(kind, hidden, inter):
            return
        self._kernels = experts_native.Mixture(experts.n, hidden, inter, experts.limit)
        self._matrices = experts_native.table(kind, experts.n, hidden, inter)
        if experts.paged is not None:
            self._callbacks = Callbacks(experts.paged.pages, [self._matrices], experts.paged.index)
            return
        assert experts.packed is not None
        for e, expert in enumerate(experts.packed):
            tensors = [t.contiguous() for leaf in experts_native.LEAVES for t in expert[leaf]]
            self._kept += tensors
            experts_native.point(self._matrices, e, tuple(t.data_ptr() for t in tensors))  # type: ignore[arg-type]

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [T, D], experts and weights [T, k], on any device -> [T, D] there, in x's dtype."""
        host = x.to("cpu"), experts.to("cpu"), weights.to("cpu")
        if self._kernels is None:
            return self.experts(*host).to(x.device)
        rows = host[0].float(), *host[1:]
        if self._callbacks is None:
            out = self._kernels(*rows, self._matrices)
        else:
            with self._callbacks.called():
                out = self._kernels(*rows, self._matrices, take=self._callbacks.take)
        return out.to(x.dtype).to(x.device)


def expect_hash_layers(model: Transformer, pages: Pages, input_ids: Tensor) -> None:
    """Hash layers choose by token alone: what a step will need of them is known before it begins."""
    for i, block in enumerate(model.layers):
        table = block.ffn.gate.tid2eid  # type: ignore[union-attr]
        if table is not None:
            pages.expect(i, table[input_ids.flatten()].unique().tolist())  # type: ignore[index]


def expect_choice(pages: Pages, layer: int, block: Any, streams: Tensor) -> None:
    """What a learned layer's router would choose on the streams [T, h, D] as they are before its attention. On another
    device that is a wait for the layer before, which computing experts on the host is too."""
    if block.ffn.gate.tid2eid is None:
        x, *_ = block.hc_ffn.enter(streams, block.ffn_norm)
        chosen, _ = block.ffn.gate(x, None)
        pages.expect(layer, set(chosen.flatten().tolist()))
