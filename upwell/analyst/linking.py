"""Linking: which spans of a question name columns, cells, numbers or dates of this table.

Deterministic and quick (about a millisecond a question). The index of a table's words is built once
and kept with its linker. Linking only marks; what a marked span means is the model's to decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from functools import lru_cache

from upwell.analyst.associations import known_word
from upwell.analyst.literals import find_dates, find_numbers, find_ordinals, find_texts
from upwell.analyst.mentions import ColumnIndex, Token, tokenize
from upwell.analyst.schema import ColumnKind, TableProfile
from upwell.analyst.slots import (
    MAX_DATES,
    MAX_NUMBERS,
    MAX_TEXTS,
    MAX_VALUES,
    LinkedQuestion,
    Mark,
    NumberSlot,
    Slots,
    TextSlot,
    ValueSlot,
)
from upwell.analyst.words import ASK, COMMON, DEMONYMS, TOKEN, UNIT_OF, TypoIndex, stem

MAX_MARKED = 3  # columns marked behind one span
_KIND_RANK = {ColumnKind.CAT: 0, ColumnKind.KEY: 1, ColumnKind.TEXT: 2}
_LONGEST_VALUE = 8  # tokens


def link(question: str, profile: TableProfile) -> LinkedQuestion:
    """Mark a question against a table. Pure: the same input gives the same marks."""
    return linker_for(profile).link(question)


@lru_cache(maxsize=16)
def linker_for(profile: TableProfile) -> Linker:
    return Linker(profile)


@dataclass(frozen=True, slots=True)
class _ValueMatch:
    first: int  # token
    last: int  # token, inclusive
    slot: ValueSlot


class Linker:
    """The word index of one table."""

    def __init__(self, profile: TableProfile) -> None:
        self.profile = profile
        self.columns = ColumnIndex(profile)
        # Stems of a cell -> the columns and spellings that have them.
        self.values: dict[tuple[str, ...], list[tuple[int, str]]] = {}
        self.longest: dict[str, int] = {}  # by first stem: the longest value, in tokens
        self.value_words: dict[str, str] = {}  # stem -> word as cells spell it, lower-case
        self.part_words: dict[str, set[int]] = {}  # stem -> name columns with it in longer cells
        self._typos: TypoIndex | None = None
        ends = [d for c in profile.columns for d in (c.minimum, c.maximum)]
        years = {d.year for d in ends if isinstance(d, date)}
        self.only_year = years.pop() if len(years) == 1 else None
        self._index_values()

    def _index_values(self) -> None:
        for i, column in enumerate(self.profile.columns):
            if not column.is_text or column.kind not in _KIND_RANK:
                continue
            named = column.kind is not ColumnKind.TEXT
            for value in column.values:
                words = TOKEN.findall(value.lower())
                if not 0 < len(words) <= _LONGEST_VALUE:
                    continue
                key = tuple([stem(word) for word in words])
                self._add_value(key, i, value)
                if len(key) > 1:
                    if key[0] == "the":
                        self._add_value(key[1:], i, value)
                    if named:
                        for part in key:
                            self.part_words.setdefault(part, set()).add(i)
                for part, word in zip(key, words, strict=True):
                    self.value_words.setdefault(part, word)

    def _add_value(self, key: tuple[str, ...], column: int, value: str) -> None:
        self.values.setdefault(key, []).append((column, value))
        if len(key) > self.longest.get(key[0], 0):
            self.longest[key[0]] = len(key)

    @property
    def typos(self) -> TypoIndex:
        if self._typos is None:
            self._typos = TypoIndex(set(self.value_words.values()))
        return self._typos

    def link(self, question: str) -> LinkedQuestion:
        tokens = tokenize(question)
        stems = [self._known_stem(token) for token in tokens]
        quoted = find_texts(question)
        mentions = self.columns.find(tokens)
        named = [{c for m in mentions if m.first <= i <= m.last for c in m.columns}
                 for i in range(len(tokens))]  # fmt: skip
        matches = self._find_values(question, tokens, stems, named, [span for span, _ in quoted])
        # "usd" within "usd rate" is a word of the column's name.
        matches = [m for m in matches if not any(
            not c.partial and c.first <= m.first and m.last <= c.last and c.last - c.first > m.last - m.first
            for c in mentions)]  # fmt: skip
        marks: list[Mark] = []
        taken: list[tuple[int, int]] = []  # characters whose digits are no numbers
        for mention in mentions:
            inside = any(m.first <= mention.first and mention.last <= m.last and m.last > m.first
                         and (mention.last - mention.first) < (m.last - m.first)
                         for m in matches)  # fmt: skip
            if inside:
                continue
            start, end = tokens[mention.first].start, tokens[mention.last].end
            if not mention.partial:
                taken.append((start, end))
            marks.append(Mark("C", 0, mention.columns[:MAX_MARKED], mention.partial, start, end))
        values = matches[:MAX_VALUES]
        for k, match in enumerate(values):
            start, end = tokens[match.first].start, tokens[match.last].end
            if match.last > match.first or not question[start:end].isdigit():
                taken.append((start, end))
            for a, b in (span for span, _ in quoted):
                if (a + 1, b - 1) == (start, end):  # the mark follows the closing quote
                    end = b
            marks.append(Mark("V", k, match.slot.columns[:MAX_MARKED], start=start, end=end))
        dates = find_dates(question, self.only_year)[:MAX_DATES]
        for k, (span, _) in enumerate(dates):
            marks.append(Mark("D", k, start=span[0], end=span[1]))
        quote_spans = [span for span, _ in quoted if question[span[0]] in "\"'`“‘«"]
        numbers = find_numbers(question, taken + quote_spans + [span for span, _ in dates])
        numbers = sorted(numbers + self._beside_columns(question, tokens, named), key=_by_span)
        for k, (span, _) in enumerate(numbers[:MAX_NUMBERS]):
            marks.append(Mark("N", k, start=span[0], end=span[1]))
        literal = [(span, TextSlot(text.text, self._holders(text.text))) for span, text in quoted]
        marks += self._units(question, numbers, marks)
        texts = sorted(literal + self._part_texts(tokens, named, matches, quoted),
                       key=lambda item: item[0])[:MAX_TEXTS]  # fmt: skip
        for k, (span, text) in enumerate(texts):
            marks.append(Mark("T", k, text.columns[:MAX_MARKED], start=span[0], end=span[1]))
        slots = Slots(
            tuple(match.slot for match in values),
            tuple(number for _, number in numbers[:MAX_NUMBERS]),
            tuple(day for _, day in dates),
            tuple(text for _, text in texts),
        )
        return LinkedQuestion(question, _segments(question, marks), slots)

    def _known_stem(self, token: Token) -> str:
        """The token's stem, or the stem of the cell's word that it misspells or derives from."""
        if token.stem in self.value_words or token.lower in COMMON or len(token.lower) < 5:
            return token.stem
        if self.columns.knows(token):
            return token.stem
        return self._corrected(token.lower) or token.stem

    def _corrected(self, word: str) -> str | None:
        # Demonyms and the like: Japanese -> Japan, Italian -> Italy, Canadian -> Canada, northern -> north.
        if (place := stem(DEMONYMS.get(word, word))) in self.value_words:
            return place
        for ending, tails in (("ern", ("",)), ("ese", ("", "a")), ("ian", ("", "y", "ia", "a")), ("an", ("", "a")),
                              ("n", ("",)), ("ish", ("", "land")), ("i", ("",))):  # fmt: skip
            base = word[: -len(ending)] if word.endswith(ending) else ""
            if len(base) >= 4:
                for tail in tails:
                    if (known := stem(base + tail)) in self.value_words:
                        return known
        if known_word(word):  # "cheaper" is no slip for "cheapest"
            return None
        found = self.typos.find(word) or self.typos.find(stem(word))
        return stem(found) if found else None

    def _find_values(
        self,
        question: str,
        tokens: list[Token],
        stems: list[str],
        named: list[set[int]],
        quotes: list[tuple[int, int]],
    ) -> list[_ValueMatch]:
        """Cells named in the question, the longest first from each place."""
        found: list[_ValueMatch] = []
        i = 0
        while i < len(tokens):
            for length in range(min(self.longest.get(stems[i], 0), len(tokens) - i), 0, -1):
                entries = self.values.get(tuple(stems[i : i + length]))
                if not entries:
                    continue
                if length == 1:
                    entries = self._trusted(i, tokens, named, entries, quotes)
                start, end = tokens[i].start, tokens[i + length - 1].end
                slot = self._value_slot(question[start:end], entries, named, i, length)
                if slot is not None:
                    found.append(_ValueMatch(i, i + length - 1, slot))
                    i += length - 1
                    break
            i += 1
        return found

    def _trusted(
        self,
        i: int,
        tokens: list[Token],
        named: list[set[int]],
        entries: list[tuple[int, str]],
        quotes: list[tuple[int, int]],
    ) -> list[tuple[int, str]]:
        """Of cells of one word, those that this word really means: "in" is rarely Indiana."""
        token = tokens[i]
        word, text = token.lower, token.text
        if any(start <= token.start and token.end <= end for start, end in quotes):
            return entries
        if token.stem in self.columns.table:  # the rows' own noun: "how many moons" doesn't ask about the Moon
            entries = [e for e in entries if e[1].strip().lower() == word]
            if i == 0 or tokens[i - 1].lower != "the":
                return []
        entries = [e for e in entries if self._inflects(word, e)]
        beside = {c for j in (i - 2, i - 1, i + 1, i + 2) if 0 <= j < len(tokens) for c in named[j]}
        near = [entry for entry in entries if entry[0] in beside]
        if word.isdigit() and len(word) < 5 and word[0] != "0":
            return near  # "top 3" is a number, "size 3" may be a cell
        if len(word) <= 2 and not word.isdigit():
            exact = [e for e in entries if e[1].strip() == text]
            if text in ("A", "I") or not any(map(str.isupper, text)):
                exact = [e for e in exact if e in near]
            return exact
        if word not in COMMON:
            return entries
        if word in ASK and _stands_as_name(i, tokens):  # "how many options does find have"
            near = near or [e for e in entries if e[1].strip().lower() == word and
                            self.profile.columns[e[0]].kind is ColumnKind.KEY]  # fmt: skip
        capital = text[0].isupper() and i > 0
        return [e for e in entries if e in near or (capital and e[1].strip() == text)]

    def _inflects(self, word: str, entry: tuple[int, str]) -> bool:
        """Whether a word may stand for a cell that shares its stem. A name isn't conjugated: "packages" is no row
        called "packaging"; a category may be ("cancelled" for "cancel")."""
        if self.profile.columns[entry[0]].kind is ColumnKind.CAT:
            return True
        cell = entry[1].strip().lower()
        known = stem(cell) != stem(word)  # by a typo or as a demonym, which _known_stem has weighed
        return known or cell == word or cell.rstrip("s") == word.rstrip("s") or _singular(word) == _singular(cell)

    def _value_slot(
        self,
        text: str,
        entries: list[tuple[int, str]],
        named: list[set[int]],
        at: int,
        length: int,
    ) -> ValueSlot | None:
        if not entries:
            return None
        by_column: dict[int, list[str]] = {}
        for column, value in entries:
            by_column.setdefault(column, []).append(value)
        near = {c for j in range(max(at - 3, 0), min(at + length + 3, len(named))) for c in named[j]}
        columns = sorted(
            by_column,
            key=lambda c: (c not in near, _KIND_RANK[self.profile.columns[c].kind], c),
        )
        said = text.lower()
        spellings = []
        for column in columns:
            cells = by_column[column]
            # Cells alike but for case and spaces are one value; others only share a stem.
            chosen = next((c for c in cells if c.strip().lower() == said), cells[0]).strip().lower()
            spellings.append(tuple(c for c in cells if c.strip().lower() == chosen))
        return ValueSlot(text, tuple(columns), tuple(spellings))

    def _beside_columns(
        self, question: str, tokens: list[Token], named: list[set[int]]
    ) -> list[tuple[tuple[int, int], NumberSlot]]:
        """Ordinals beside a numeric column that they may number: "third class", "2nd quarter"."""
        found = []
        for span, number in find_ordinals(question):
            at = next((i for i, t in enumerate(tokens) if t.start == span[0]), None)
            if at is None:
                continue
            after = named[at + 1] if at + 1 < len(tokens) else set()
            if any(self.profile.columns[c].is_numeric for c in after - named[at]):
                found.append((span, number))
        return found

    def _units(self, question: str, numbers: list[tuple[tuple[int, int], NumberSlot]], marks: list[Mark]) -> list[Mark]:
        """A unit behind a number is a loose sign of the only column whose name ends in it: "200 kb" of size_kb."""
        found = []
        for (_, end), _ in numbers:
            unit = TOKEN.match(question, end + (question[end : end + 1] == " "))
            if unit is None or any(m.kind == "C" and m.start < unit.end() and unit.start() < m.end for m in marks):
                continue
            columns = self.columns.measured_in.get(UNIT_OF.get(unit[1].lower(), ""), ())
            if len(columns) == 1 and not any(m.kind == "C" and columns[0] in m.columns for m in marks):
                found.append(Mark("C", 0, tuple(columns), True, unit.start(1), unit.end(1)))
        return found

    def _holders(self, text: str) -> tuple[int, ...]:
        """Columns of names whose cells hold these words, as a part or as all of a cell."""
        parts = [stem(word) for word in TOKEN.findall(text.lower())]
        if not parts:
            return ()
        within = set.intersection(*(self.part_words.get(part, set()) for part in parts))
        held = within | {c for c, _ in self.values.get(tuple(parts), ())}
        if not held:  # no word of its own: "starts with py"
            said = text.lower()
            held = {i for i, column in enumerate(self.profile.columns) if column.kind is ColumnKind.KEY
                    and column.is_text and any(said in value.lower() for value in column.values)}  # fmt: skip
        return tuple(sorted(held))

    def _part_texts(
        self,
        tokens: list[Token],
        named: list[set[int]],
        matches: list[_ValueMatch],
        quoted: list[tuple[tuple[int, int], TextSlot]],
    ) -> list[tuple[tuple[int, int], TextSlot]]:
        """Words that are only a part of some row's name: "toyota" where cells are "toyota corolla"."""
        covered = {i for m in matches for i in range(m.first, m.last + 1)}
        table = {stem(word) for word in TOKEN.findall(self.profile.name.lower())}
        found: list[tuple[tuple[int, int], TextSlot]] = []
        for i, token in enumerate(tokens):
            columns = self.part_words.get(token.stem)
            if not columns or i in covered or named[i] or token.stem in table:
                continue
            if token.lower in COMMON or len(token.lower) < 3 or token.lower.isdigit():
                continue
            if any(a <= token.start < b for (a, b), _ in quoted):
                continue
            text = TextSlot(self.value_words[token.stem], tuple(sorted(columns)))
            found.append(((token.start, token.end), text))
        return found


def _singular(word: str) -> str:
    return stem(word) if word.endswith(("s", "x")) else word


_NAME_BEFORE = frozenset("does did do is was has of for called named".split())
_NAME_BEHIND = frozenset("have get take come need use cost weigh and in or".split())


def _stands_as_name(i: int, tokens: list[Token]) -> bool:
    """Whether a common word stands where a row's name would: "does find have", "the size of last?"."""
    if i == 0 or tokens[i - 1].lower not in _NAME_BEFORE:
        return False
    behind = tokens[i + 1].lower if i + 1 < len(tokens) else ""
    return not behind or behind in _NAME_BEHIND or behind.endswith("ed")


def _by_span(item: tuple[tuple[int, int], NumberSlot]) -> tuple[tuple[int, int], float]:
    return item[0], item[1].value


_MARK_ORDER = {kind: i for i, kind in enumerate("CVNDT")}


def _segments(question: str, marks: list[Mark]) -> tuple[tuple[str, tuple[Mark, ...]], ...]:
    """Cut the question behind every marked span."""
    marks.sort(key=lambda m: (m.end, _MARK_ORDER[m.kind], m.partial, -m.start, m.index))
    segments: list[tuple[str, tuple[Mark, ...]]] = []
    at = 0
    group: list[Mark] = []
    for mark in marks:
        if group and mark.end != group[-1].end:
            segments.append((question[at : group[-1].end], tuple(group)))
            at, group = group[-1].end, []
        group.append(mark)
    if group:
        segments.append((question[at : group[-1].end], tuple(group)))
        at = group[-1].end
    if at < len(question):
        segments.append((question[at:], ()))
    return tuple(segments)
