"""V4 as a reader of the paper would write it."""

from upwell.model.cache import KVCache, Step
from upwell.model.transformer import Transformer

__all__ = ["KVCache", "Step", "Transformer"]
