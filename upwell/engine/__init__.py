"""Serving the model: scheduler, cache accounting, sampler, and LLM, the Python entry."""

from upwell.engine.async_llm import AsyncLLM
from upwell.engine.engine import Engine, EngineOptions
from upwell.engine.llm import LLM
from upwell.engine.loop import EngineThread
from upwell.engine.outputs import CompletionOutput, Delta, RequestOutput, TokenLogprob
from upwell.engine.params import SamplingParams, TokenMask
from upwell.engine.stats import EngineStats
from upwell.engine.structured import StructuredOutputs
from upwell.engine.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Delta",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "EngineThread",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenLogprob",
    "TokenMask",
    "Tokenizer",
]
