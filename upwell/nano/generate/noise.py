"""How people type: polite wrappings, sloppy case, missing or doubled punctuation, a few typos."""

# ruff: noqa: E501 - long lists of wordings
# fmt: off

from __future__ import annotations

import re
from random import Random

_WH = ("what", "which", "who", "how", "where", "when", "in which", "whats")
_BEFORE_QUESTION = ("can you tell me {x}", "could you tell me {x}", "please tell me {x}", "i want to know {x}", "i'd like to know {x}", "tell me {x}", "do you know {x}",
                    "hi, {x}", "hello, {x}", "quick question: {x}", "i was wondering {x}", "so {x}", "ok, {x}", "and {x}", "hey {x}", "i need to know {x}", "can you find out {x}",
                    "{x} please", "{x}, please", "{x} thanks", "just curious, {x}", "according to the table, {x}", "{x} according to this data", "{x} in this table", "{x} in the data",
                    "in this dataset, {x}", "from this table, {x}")  # fmt: skip
_BEFORE_PHRASE = ("please {x}", "{x} please", "{x}, please", "can you {x}", "could you {x}", "could you please {x}", "i want you to {x}", "hi, please {x}", "{x} thanks", "would you {x}")
_BEFORE_NOUN = ("i need {x}", "i want {x}", "can i get {x}", "could i have {x}", "i'd like {x}", "looking for {x}", "need {x}", "{x} please", "get me {x}", "we need {x}", "{x} pls",
                "query: {x}", "{x} in this table", "i am looking for {x}")  # fmt: skip
_VERBS = frozenset("show list give find count get display calculate compute compare rank sort name tell report pull order return determine work look order arrange plot".split())


def typed(sentence: str, rng: Random, keep: frozenset[str] = frozenset(), polite: float = 0.1) -> str:
    """The sentence as somebody would type it; words in `keep` (lower-case) get no typo."""
    text = sentence
    lower = text.lower()
    if polite and rng.random() < 0.09:
        text = _telegraphic(text)
        lower = text.lower()
    elif rng.random() < polite:
        first = lower.split()[0] if lower else ""
        if lower.startswith(_WH):
            text = rng.choice(_BEFORE_QUESTION).format(x=text)
        elif first in _VERBS:
            text = rng.choice(_BEFORE_PHRASE).format(x=text)
        elif first not in ("is", "was", "are", "do", "can", "could", "please", "i", "per", "for", "among", "in", "by", "of", "looking", "considering", "out", "only", "names", "just", "with", "across", "within"):
            text = rng.choice(_BEFORE_NOUN).format(x=text)
    if rng.random() < 0.045:
        text = _typo(text, rng, keep)
    roll = rng.random()
    if roll < 0.45:
        text = text[:1].upper() + text[1:]
    elif roll < 0.62:
        text = text.lower()
    elif roll < 0.625:
        text = text.upper()
    question = lower.startswith((*_WH, "is ", "was ", "are ", "do ", "can ", "could ")) or ", wh" in lower or ", how" in lower
    roll = rng.random()
    if question:
        text += "?" if roll < 0.62 else "??" if roll < 0.625 else "." if roll < 0.635 else " ?" if roll < 0.65 else ""
    elif roll < 0.2:
        text += "."
    elif roll < 0.25:
        text += "?"
    return text


_FILLER = re.compile(
    r"^(?:what is|what's|what are|show me|give me|show|tell me|find|i need|which are|can you give me)(?: the| all)? "
    r"|\b(?:the|a|an|are there|do we have|their|is there)\b ?",
    re.IGNORECASE,
)


def _telegraphic(text: str) -> str:
    """Without the words that a search box does not need."""
    short = " ".join(_FILLER.sub("", text).split()).strip(" ,")
    return short if len(short.split()) > 1 else text


def _typo(text: str, rng: Random, keep: frozenset[str]) -> str:
    """One word with two letters swapped, one dropped, doubled or replaced."""
    words = text.split(" ")
    fit = [i for i, w in enumerate(words) if len(w) >= 5 and w.isalpha() and w.lower() not in keep]
    if not fit:
        return text
    i = rng.choice(fit)
    word = words[i]
    at = rng.randint(1, len(word) - 2)
    way = rng.random()
    if way < 0.35:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif way < 0.65:
        word = word[:at] + word[at + 1 :]
    elif way < 0.85:
        word = word[:at] + word[at] + word[at:]
    else:
        word = word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :]
    words[i] = word
    return " ".join(words)
