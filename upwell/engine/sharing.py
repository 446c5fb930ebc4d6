"""A checkpoint opened as one model, on this process or shared by several, with experts counted and placed by a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from upwell.checkpoint.load import load_model
from upwell.checkpoint.match import read_config
from upwell.checkpoint.offload import Offload
from upwell.config import ModelConfig, Numerics
from upwell.devices import resolve_device
from upwell.devices.control import Lead
from upwell.engine import ranks
from upwell.errors import InputError
from upwell.model import Transformer
from upwell.model.compiled import precision
from upwell.model.placement import ExpertLoad, place


@dataclass(frozen=True)
class OpenModel:
    """A model and what it takes to end it. `lead`: the line to the other ranks, where there are any."""

    model: Transformer
    close: Callable[[], None]
    lead: Lead | None = None


def follow_if_told() -> None:
    """In a process that torchrun has started as another rank than 0: serve rank 0, then exit."""
    if ranks.launched() > 1 and int(os.environ["RANK"]) > 0:
        os._exit(ranks.follow())  # torch.distributed's threads may wait for ranks that are gone


def open_model(
    path: Path, device: str, dtype: torch.dtype | None, numerics: Numerics, tp: int, ep: int, load: Path | None,
    redundant: int, offload: Offload | None = None, kv_cache_dtype: torch.dtype | None = None,
) -> OpenModel:  # fmt: skip
    """What LLM takes, as it says there. Raises InputError."""
    if ranks.launched() > 1 and tp == ep == 1:
        tp = ranks.launched()
    if redundant and (ep == 1 or load is None):
        raise InputError(f"redundant_experts is {redundant}, without ep above 1 and an expert_load file to place by")
    if offload is not None and max(tp, ep) > 1:
        raise InputError(f"offload is given with tp {tp} and ep {ep}", "leave one of them out")
    if redundant < 0:
        raise InputError(f"redundant_experts is {redundant}, must be at least 0")
    counted = None
    if load is not None:
        config = read_config(path)
        names = layer_names(config)
        if load.exists():
            counted = ExpertLoad.read(load, names, config.n_routed_experts)
    if max(tp, ep) == 1:
        where = resolve_device(device)
        held, products = precision(where, dtype, numerics)
        model = load_model(path, held, where, numerics, offload)
        model.multiply_in(products)
        model.cache_in(kv_cache_dtype)
        if load is None:
            return OpenModel(model, lambda: None)
        counts = model.count_experts()
        return OpenModel(model, lambda: _write(load, layer_names(model.config), counts.tolist(), counted))
    placement = {}
    if counted is not None and ep > 1:
        placement = {name: place(row, ep, redundant) for name, row in counted.layers.items()}
    job = ranks.Job(path, device, dtype, numerics, ranks.Sharing(tp, ep, placement), kv_cache_dtype)
    if load is not None:
        job.count_experts()

    def close() -> None:
        if load is not None and job.lead.error is None:
            _write(load, layer_names(job.model.config), job.expert_load()[0].tolist(), counted)
        job.close()

    return OpenModel(job.model, close, job.lead)


def layer_names(config: ModelConfig) -> list[str]:
    """As an expert load names them."""
    mtp = [f"mtp.{i}" for i in range(config.num_nextn_predict_layers)]
    return [*(f"layers.{i}" for i in range(config.num_hidden_layers)), *mtp]


def _write(file: Path, names: list[str], counts: list[list[int]], earlier: ExpertLoad | None) -> None:
    new = ExpertLoad(dict(zip(names, counts, strict=True)))
    (new if earlier is None else new.plus(earlier)).write(file)
