"""Serving the model: scheduler, cache accounting, sampler, and LLM, the Python entry."""

from upwell.engine.engine import Engine
from upwell.engine.llm import LLM
from upwell.engine.loop import EngineThread
from upwell.engine.outputs import CompletionOutput, Delta, RequestOutput, TokenLogprob
from upwell.engine.params import SamplingParams, TokenMask
from upwell.engine.structured import StructuredOutputs
from upwell.engine.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "Delta",
    "Engine",
    "EngineThread",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenLogprob",
    "TokenMask",
    "Tokenizer",
]
