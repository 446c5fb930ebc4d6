"""Synthetic questions on synthetic tables: the training data of upwell-nano."""

from upwell.nano.generate.lexicon import Domain, load_domains
from upwell.nano.generate.stream import Example, examples

__all__ = ["Domain", "Example", "examples", "load_domains"]
