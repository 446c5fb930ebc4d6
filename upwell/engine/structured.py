"""Structured output: the ids that keep a completion inside a JSON schema, a regular expression, a grammar or a list.

llguidance compiles and walks the grammar; what it knows of the model is the tokenizer's file. A grammar is compiled
once and kept; each completion walks a copy of its own, which can step back when drafted tokens are rejected.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upwell.chat.protocol import END_THINK, THINK
from upwell.engine.tokenizer import Tokenizer
from upwell.errors import EngineError, InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 128  # compiled grammars
# Between JSON's tokens: nothing, a space, or a new line with its indent. Any more, and a model can spend its whole
# answer on white space.
_WHITESPACE = r"( |\n {0,64}|\n\t{0,16})"


@dataclass(frozen=True)
class StructuredOutputs:
    """What a completion must be; exactly one field is given. Names as in vLLM. Raises InputError.

    json: a JSON schema, as a mapping or as text. regex: the whole completion matches (Rust's syntax, no look-around).
    grammar: Lark's or llama.cpp's notation (GBNF). choice: one of these texts. json_object: any JSON object.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise InputError(f"structured_outputs has {given or 'nothing'}, must have exactly one of {names}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"structured_outputs.{name} is {getattr(self, name)!r}, must be text")
        if self.choice is not None:
            items = self.choice
            if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) for item in items):
                raise InputError(f"structured_outputs.choice is {items!r}, must be a list of one text or more")
            object.__setattr__(self, "choice", tuple(items))
        if not isinstance(self.json_object, bool):
            raise InputError(f"structured_outputs.json_object is {self.json_object!r}, must be true or false")

    @property
    def kind(self) -> str:
        """The field that is given."""
        return next(f.name for f in fields(self) if getattr(self, f.name) not in (None, False))


def _schema(given: Any) -> Any:
    """A schema as JSON values. Raises InputError with the place where text isn't JSON."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise InputError(f"structured_outputs.json isn't JSON at {place}: {error.msg}") from None
    if not isinstance(given, Mapping):
        raise InputError(f"structured_outputs.json is {given!r}, must be a JSON schema: an object")
    return given


class GrammarMask:
    """A token mask (params.TokenMask) over one grammar, for one completion. `after`: the token that ends reasoning,
    before which everything is allowed."""

    def __init__(self, matcher: LLMatcher, vocab: int, eos_token_id: int, after: int | None) -> None:
        self._matcher, self._after, self._eos = matcher, after, eos_token_id
        self._words = -(-vocab // 32)
        self._walked: list[int] = []

    def __call__(self, output: list[int]) -> Tensor | list[int] | None:
        """The ids allowed after `output`, one bit each: INT32 [vocab / 32], lowest bit first. None allows all. At the
        grammar's end the one that says so."""
        if not self._walk(output):
            return None
        if self._matcher.is_stopped():
            self._check()
            return [self._eos]
        bits = torch.empty(self._words, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.nbytes)
        self._check()
        return bits

    def forced(self, output: list[int]) -> list[int]:
        """How the text that must follow `output` is best written; other tokens for the same text may be allowed."""
        return self._matcher.compute_ff_tokens() if self._walk(output) else []

    def accepts(self, output: list[int], tokens: list[int]) -> int:
        """How many of `tokens`, from the first, may follow `output`."""
        return self._matcher.validate_tokens(tokens) if self._walk(output) else len(tokens)

    def _walk(self, output: list[int]) -> bool:
        """Bring the matcher to the end of `output`; False while reasoning goes on."""
        if self._after is not None:
            if self._after not in output:
                return False
            output = output[output.index(self._after) + 1 :]
        walked = self._walked
        same = len(walked)
        if output[:same] != walked:
            same = next(i for i, (a, b) in enumerate(zip([*output, None], walked, strict=False)) if a != b)
            self._matcher.rollback(len(walked) - same)
            del walked[same:]
        if len(output) > same:
            self._matcher.consume_tokens(output[same:])
            walked += output[same:]
            self._check()
        return True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"the grammar failed: {self._matcher.get_error().splitlines()[0]}")


class GrammarCompiler:
    """Compiles structured outputs for one tokenizer. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_token_id: int) -> None:
        self._tokenizer, self._vocab, self._eos = tokenizer, vocab, eos_token_id
        self._think, self._end_think = tokenizer.id_of(THINK), tokenizer.id_of(END_THINK)
        self._lock = Lock()
        self._llguidance: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, wanted: StructuredOutputs) -> LLMatcher:
        """The grammar at its start. Raises InputError with the place of what can't be compiled."""
        from llguidance import LLMatcher

        with self._lock:
            key = f"{wanted.kind} {_text(wanted)}"
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            if self._llguidance is None:
                self._llguidance = self._read_tokenizer()
            matcher = LLMatcher(self._llguidance, _grammar(wanted), log_level=0)
            if matcher.is_error():
                raise InputError(_refusal(wanted, matcher.get_error()))
            self._kept[key] = matcher
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return matcher

    def mask(self, matcher: LLMatcher, prompt: Sequence[int]) -> GrammarMask:
        """A mask for one completion of `prompt`. Where the prompt ends in open reasoning, it begins after that."""
        thinks = next((token for token in reversed(prompt) if token in (self._think, self._end_think)), None)
        after = self._end_think if thinks is not None and thinks == self._think else None
        return GrammarMask(matcher.deep_copy(), self._vocab, self._eos, after)

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        try:
            return LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab, eos_token=self._eos)
        except Exception as error:  # the library raises what it likes
            raise EngineError(f"structured output can't use this model's tokenizer: {error}") from None


def _text(wanted: StructuredOutputs) -> str:
    value = getattr(wanted, wanted.kind)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=False)


def _grammar(wanted: StructuredOutputs) -> str:
    """In llguidance's own form. Raises InputError where GBNF can't be read."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        texts = (json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
    if wanted.grammar is not None:
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar))
        except Exception as error:  # the translation raises several kinds
            raise InputError(f"structured_outputs.grammar can't be read: {error}") from None
    return _json_grammar({"type": "object"} if wanted.json is None else wanted.json)


def _json_grammar(schema: Any) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})


def _refusal(wanted: StructuredOutputs, message: str) -> str:
    """One line: what, where, why."""
    if wanted.json is not None:
        pointer, reason = _locate(wanted.json)
        return f"structured_outputs.json can't be compiled at {pointer}: {reason}"
    where = re.match(r"(?:at )?(\d+)\((\d+)\): ", message)
    if wanted.regex is not None:
        caret = re.search(r"^    ( *)\^", message, re.MULTILINE)
        place = f" at character {len(caret[1]) + 1}" if caret and "regex parse error" in message else ""
        return f"structured_outputs.regex {wanted.regex!r} can't be compiled{place}: {_reason(message)}"
    place = f" at line {where[1]}, column {where[2]}" if where else ""
    return f"structured_outputs.{wanted.kind} can't be compiled{place}: {_reason(message)}"


def _reason(message: str) -> str:
    """llguidance's message without its places and pictures."""
    found = re.search(r"^error: (.*)$", message, re.MULTILINE)
    first = found[1] if found else message.strip().splitlines()[0]
    first = re.sub(r"^(?:at )?\d+\(\d+\): ", "", first)
    return re.sub(r' \(at ".*', "", first)


def _locate(schema: Any) -> tuple[str, str]:
    """JSON pointer to the innermost part that can't be compiled, and why."""
    from llguidance import LLMatcher

    shared = {k: schema[k] for k in ("$defs", "definitions") if isinstance(schema, Mapping) and k in schema}

    def failure(part: Any) -> str:
        whole = {**shared, **part} if isinstance(part, Mapping) else part
        return str(LLMatcher.validate_grammar(_json_grammar(whole)))

    pointer, reason = "#", failure(schema)
    while True:
        # A part may fail alone for the lack of what it refers to: that is no reason for the whole.
        failing = [(at, part, why) for at, part in _parts(schema) if (why := failure(part))]
        failing = [f for f in failing if f[2] == reason] or [f for f in failing if not f[2].startswith("Pointer")]
        if not failing:
            return pointer, _reason(reason)
        at, schema, reason = failing[0]
        pointer = f"{pointer}/{at}"


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside one, each with its place."""
    if not isinstance(schema, Mapping):
        return
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(schema.get(key), Mapping):
            for name, part in schema[key].items():
                yield f"{key}/{name.replace('~', '~0').replace('/', '~1')}", part
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(schema.get(key), list):
            yield from ((f"{key}/{k}", part) for k, part in enumerate(schema[key]))
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            yield key, schema[key]
