"""Text to ids and back. V4's tokenizer is a byte-level BPE: every token stands for bytes, whatever is around it."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from upwell.errors import CheckpointError


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in printable]
    return table | {chr(0x100 + k): b for k, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """A tokenizer.json. `bytes_of(id)` is what a token adds to the text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str = "tokenizer") -> None:
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise CheckpointError(f"{origin}: decoder is {decoder.get('type')!r}, V4's is 'ByteLevel'")
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content.encode() for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @staticmethod
    def from_directory(path: Path) -> Tokenizer | None:
        """The directory's tokenizer.json; None if there is none. Raises CheckpointError on one that can't be read."""
        file = path / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), str(file))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: can't be read as a tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        kept = (i for i in ids if not (skip_special_tokens and i in self.special_ids))
        return b"".join(map(self.bytes_of, kept)).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._tokenizer.to_str()

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id that the vocabulary doesn't have."""
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else bytes(_BYTE_OF_CHAR[char] for char in token)

    def id_of(self, token: str) -> int | None:
        """The id of a token given by its name ('<think>'), None if there is none."""
        return self._tokenizer.token_to_id(token)
