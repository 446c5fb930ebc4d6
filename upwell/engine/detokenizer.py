"""Tokens to text as they come: a character appears when its bytes are complete, a stop string never does."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from upwell.chat.overlap import overlap
from upwell.engine.tokenizer import Tokenizer


class Detokenizer:
    """One completion's text. push() returns what became certain; once `stopped`, nothing more comes."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._stops, self._skip = tokenizer, tuple(stops), skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may be the start of a stop string
        self.stopped = False

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Text that this token made certain. `may_stop` False: stop strings don't count yet."""
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        return self._advance(self._utf8.decode(self._tokenizer.bytes_of(token_id)), may_stop)

    def finish(self) -> str:
        """The rest: what was held back; incomplete bytes become U+FFFD."""
        if self.stopped:
            return ""
        text = self._advance(self._utf8.decode(b"", final=True), True)
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _advance(self, piece: str, may_stop: bool) -> str:
        text = self._held + piece
        if not self._stops or not may_stop:
            self._held = ""
            return text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
