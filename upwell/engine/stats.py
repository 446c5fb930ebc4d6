"""What an engine has done and is doing, as numbers for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """`running`, `waiting` (sequences) and blocks are of this moment; the rest is counted since the engine began.

    `prefix_hit_tokens` of the `prefix_queried_tokens` of prompts were not computed. `prompt_tokens` counts each
    request's prompt once. `draft_accepted` of `draft_proposed` speculated tokens were taken.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    preemptions: int = 0
    draft_proposed: int = 0
    draft_accepted: int = 0
