"""What a model's quality is measured on, as token ids: a text cut into windows, or prompts with their completions.

A file .txt is one text. Each line of a .jsonl is {"text": ...}, or {"prompt": ..., "completion": ...}, of which the
completion alone is scored. Every sequence begins with the model's beginning-of-sequence token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upwell.engine import Tokenizer
from upwell.errors import InputError

WINDOW = 2048  # tokens a text's window holds, the first one included


@dataclass(frozen=True)
class Document:
    """ids[begin:] are to be predicted, each from all before it. `completion`: they are right or wrong together."""

    ids: list[int]
    begin: int
    completion: bool = False


@dataclass(frozen=True)
class Cut:
    """How texts become sequences a model takes: `window` tokens, and `stride` tokens from one window to the next.

    Window k holds the first token and tokens k * stride ... k * stride + window - 2 of the text; it scores those that
    no window before it scored. So each token of the text counts once, and (but in the first window) has at least
    window - stride tokens before it.
    """

    bos: int
    window: int
    stride: int

    def __post_init__(self) -> None:
        if self.window < 2:
            raise InputError(f"--window is {self.window}, must be at least 2")
        if not 1 <= self.stride < self.window:
            raise InputError(f"--stride is {self.stride}, must be from 1 to {self.window - 1}, less than the window")

    def text(self, ids: list[int]) -> Iterator[Document]:
        if ids[:1] == [self.bos]:
            ids = ids[1:]
        scored = 0
        for first in range(0, max(1, len(ids)), self.stride):
            part = ids[first : first + self.window - 1]
            if first + len(part) > scored:
                yield Document([self.bos, *part], 1 + scored - first)
            scored = first + len(part)
            if scored >= len(ids):
                return

    def completion(self, prompt: list[int], completion: list[int]) -> Document:
        ids = prompt if prompt[:1] == [self.bos] else [self.bos, *prompt]
        return Document(ids + completion, len(ids), True)


def read_documents(file: Path, tokenizer: Tokenizer, cut: Cut, longest: int) -> list[Document]:
    """The file's documents of at most `longest` tokens. Raises InputError, one line naming file and line."""
    if file.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{file}: ends in {file.suffix or 'nothing'}", "give a text (.txt) or lines of JSON (.jsonl)")
    if cut.window > longest:
        raise InputError(f"--window is {cut.window}, the model takes {longest} tokens")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: isn't UTF-8 (byte {error.start})") from None
    documents: list[Document] = []
    if file.suffix == ".txt":
        documents += cut.text(tokenizer.encode(text))
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                documents += _line(line, f"{file}:{number}", tokenizer, cut)
    for document in documents:
        if len(document.ids) > longest:
            raise InputError(f"{file}: a prompt with its completion has {len(document.ids)} tokens, at most {longest}")
    documents = [document for document in documents if len(document.ids) > document.begin]
    if not documents:
        raise InputError(f"{file}: holds nothing to score")
    return documents


def _line(line: str, where: str, tokenizer: Tokenizer, cut: Cut) -> Iterator[Document]:
    try:
        item: Any = json.loads(line)
    except ValueError:
        raise InputError(f"{where}: isn't JSON") from None
    keys = set(item) if isinstance(item, dict) else set()
    if keys not in ({"text"}, {"prompt", "completion"}) or not all(isinstance(item[key], str) for key in keys):
        raise InputError(f'{where}: isn\'t {{"text": "..."}} or {{"prompt": "...", "completion": "..."}}')
    if "text" in item:
        yield from cut.text(tokenizer.encode(item["text"]))
    else:
        yield cut.completion(tokenizer.encode(item["prompt"]), tokenizer.encode(item["completion"]))
