"""Checkpoints with a DSpark drafter (DeepSeek-V4-Flash-0731, Pro-0813): V4 with other blocks under `mtp`.

Each stage `mtp.N` is a block as MTP's; the first has the projection of the target layers' hidden states (main_proj,
main_norm), the last norm, hyper head, Markov head and confidence head. Upwell converts them for vllm-ascend, whose
loader (models/deepseek_v4/dspark.py) takes these names, and doesn't run the drafter itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from upwell.checkpoint.geometry import Slot, block_slots, hyper_head_slots
from upwell.checkpoint.match import Plan, match, read_config
from upwell.checkpoint.shards import read_shards
from upwell.config import ModelConfig
from upwell.errors import ConfigError

_STAGE = re.compile(r"mtp\.(\d+)\.")


def plan_dspark(directory: Path) -> Plan:
    """As plan_checkpoint, of a checkpoint with a DSpark drafter. Raises CheckpointError and ConfigError."""
    config = read_config(directory).with_mtp(0)
    stored = read_shards(directory)
    stages = 1 + max(int(found[1]) for name in stored if (found := _STAGE.match(name)))
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    try:
        targets, rank = len(raw["dspark_target_layer_ids"]), int(raw["dspark_markov_rank"])
    except (KeyError, TypeError, ValueError) as error:
        file = directory / "config.json"
        raise ConfigError(f"{file}: has a DSpark drafter and no readable dspark_* keys: {error!r}") from None
    return match(config, stored, directory, tuple(_drafter(config, stages, targets, rank)))


def _drafter(config: ModelConfig, stages: int, targets: int, markov_rank: int) -> Iterator[Slot]:
    hidden, vocab = config.hidden_size, config.vocab_size
    for i in range(stages):
        yield from block_slots(config, f"mtp.{i}.", 0, False)
        if i == 0:
            yield Slot("mtp.0.main_proj.weight", (hidden, targets * hidden), "matrix")
            yield Slot("mtp.0.main_norm.weight", (hidden,), "norm")
    last = f"mtp.{stages - 1}."
    yield Slot(f"{last}norm.weight", (hidden,), "norm")
    yield from hyper_head_slots(config, last)
    for name in ("markov_w1", "markov_w2"):
        yield Slot(f"{last}markov_head.{name}.weight", (vocab, markov_rank), "plain")
    yield Slot(f"{last}confidence_head.proj.weight", (1, hidden + markov_rank), "plain")
