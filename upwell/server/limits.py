"""What the server asks of the engine beyond a prompt: priorities, time limits, grammars, figures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from upwell.engine import Engine, EngineThread, SamplingParams
from upwell.engine.sequence import Request, Sink
from upwell.errors import InputError


@dataclass(frozen=True)
class EngineLimits:
    """`timeout`: seconds a request may take in the engine, None for as long as it likes."""

    timeout: float | None = None


@dataclass(frozen=True)
class Stats:
    """Figures of an engine; counts are since its start."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    preemptions: int = 0
    draft_proposed: int = 0
    draft_accepted: int = 0


def engine_stats(engine: Engine) -> Stats:
    if hasattr(engine, "stats"):
        told = engine.stats()
        return Stats(**{name: getattr(told, name) for name in Stats.__dataclass_fields__})
    scheduler = engine.scheduler
    return Stats(len(scheduler.running), len(scheduler.waiting), scheduler.blocks.total, scheduler.blocks.free)


def submit(thread: EngineThread, ids: list[int], params: SamplingParams, sink: Sink, limits: EngineLimits) -> Request:
    options = {} if limits.timeout is None else {"timeout": limits.timeout}
    request = thread.engine.request(ids, params, sink, **options)
    thread.submit(request)
    return request


def with_grammar(params: SamplingParams, grammar: str) -> SamplingParams:
    try:
        from upwell.engine import StructuredOutputs
    except ImportError:
        raise InputError("this version constrains no output") from None
    return replace(params, structured_outputs=StructuredOutputs(grammar=grammar))
