"""Numbers, dates and quoted text in a question, found by plain code with their spans."""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, timedelta
from functools import partial
from itertools import pairwise

from upwell.analyst.slots import DateSlot, NumberSlot, TextSlot
from upwell.analyst.words import STOP, TOKEN

Span = tuple[int, int]

_MONTHS = "january february march april may june july august september october november december"
MONTHS = {name[:n]: i for i, name in enumerate(_MONTHS.split(), 1) for n in (3, len(name))}
MONTHS["sept"] = 9
_MONTH = "(" + "|".join(sorted(MONTHS, key=len, reverse=True)) + r")\.?"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"((?:1[5-9]|20|21)\d\d)"


def _period(year: int, month: int, months: int) -> tuple[date, date]:
    last = month + months - 1
    return date(year, month, 1), date(year, last, monthrange(year, last)[1]) + timedelta(days=1)


def _one_day(year: int, month: int, day: int) -> tuple[date, date]:
    start = date(year, month, day)
    return start, start + timedelta(days=1)


def _slashed(m: re.Match[str]) -> tuple[date, date]:
    # Month first unless that can't be: 13/2/2020 is a day in February.
    a, b, year = int(m[1]), int(m[2]), int(m[3])
    month, day = (b, a) if a > 12 or m[0].count(".") else (a, b)
    return _one_day(year, month, day)


_ORDINAL = {"first": 1, "1st": 1, "second": 2, "2nd": 2, "third": 3, "3rd": 3, "fourth": 4, "4th": 4}
_NTH = "(" + "|".join(_ORDINAL) + ")"


def _quarter(year: str, nth: str) -> tuple[date, date]:
    return _period(int(year), 3 * int(nth) - 2, 3)


_DATES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], tuple[date, date]]], ...] = tuple(
    (re.compile(rf"(?<![\w.]){pattern}(?!\w)", re.IGNORECASE), make)
    for pattern, make in (
        (r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})", lambda m: _one_day(int(m[1]), int(m[2]), int(m[3]))),
        (r"(\d{1,2})[/.](\d{1,2})[/.](\d{4})", _slashed),
        (
            rf"{_DAY}(?: of)? {_MONTH},? {_YEAR}",
            lambda m: _one_day(int(m[3]), MONTHS[m[2].lower()], int(m[1])),
        ),
        (
            rf"{_MONTH} {_DAY},? {_YEAR}",
            lambda m: _one_day(int(m[3]), MONTHS[m[1].lower()], int(m[2])),
        ),
        (rf"{_MONTH}(?: of|,)? {_YEAR}", lambda m: _period(int(m[2]), MONTHS[m[1].lower()], 1)),
        (rf"{_YEAR}-(0[1-9]|1[0-2])(?!-\d)", lambda m: _period(int(m[1]), int(m[2]), 1)),
        (rf"q([1-4])(?: of|,)?[ /-]?{_YEAR}", lambda m: _quarter(m[2], m[1])),
        (rf"{_YEAR}[ -]?q([1-4])", lambda m: _quarter(m[1], m[2])),
        (rf"{_NTH} quarter(?: of)? {_YEAR}", lambda m: _quarter(m[2], str(_ORDINAL[m[1].lower()]))),
        (rf"h([12])(?: of)? ?{_YEAR}", lambda m: _period(int(m[2]), 6 * int(m[1]) - 5, 6)),
        (
            rf"(first|second) half(?: of)? {_YEAR}",
            lambda m: _period(int(m[2]), 6 * _ORDINAL[m[1].lower()] - 5, 6),
        ),
    )
)
_DAY_IN_YEAR = re.compile(rf"(?<![\w.])(?:{_MONTH} {_DAY}|{_DAY}(?: of)? {_MONTH})(?!\w)", re.I)
_MONTH_ALONE = re.compile(rf"\b(?:in|during|of|for|since|after|before|and) {_MONTH}(?!\w)", re.I)


def find_dates(question: str, only_year: int | None = None) -> list[tuple[Span, DateSlot]]:
    """Dates and periods. `only_year`: the year of the table's dates when they share one, so that
    "in March" has a meaning."""
    found: list[tuple[Span, DateSlot]] = []

    def add(span: Span, make: Callable[[], tuple[date, date]]) -> None:
        if any(span[0] < end and start < span[1] for (start, end), _ in found):
            return
        try:
            start, end = make()
        except ValueError:  # 31 February
            return
        found.append((span, DateSlot(question[span[0] : span[1]], start, end)))

    if any(map(str.isdigit, question)):
        for pattern, build in _DATES:
            for m in pattern.finditer(question):
                add(m.span(), partial(build, m))
    if only_year is not None:
        for m in _DAY_IN_YEAR.finditer(question):
            month, day = (m[1], m[2]) if m[1] else (m[4], m[3])
            add(m.span(), partial(_one_day, only_year, MONTHS[month.lower()], int(day)))
        for m in _MONTH_ALONE.finditer(question):
            add(m.span(1), partial(_period, only_year, MONTHS[m[1].lower()], 1))
    return sorted(found, key=lambda item: item[0])


_SCALE = {
    "k": 1e3, "thousand": 1e3, "m": 1e6, "mn": 1e6, "mio": 1e6, "million": 1e6, "b": 1e9,
    "bn": 1e9, "billion": 1e9, "trillion": 1e12, "hundred": 1e2, "dozen": 12.0,
    "lakh": 1e5, "crore": 1e7,
}  # fmt: skip
_NUMBER = re.compile(
    r"(?<![\w.])([$€£¥]\s?)?([-−]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+))"
    r"(?:(k|mn|mio|m|bn|b)\b| ?(%)| (percent|pct)\b"
    r"|[ -](hundred|thousand|million|billion|trillion|dozen|mn|bn|lakh|crore)s?\b|(['’]?s)\b|(?!\w))",
    re.IGNORECASE,
)
_UNIT_WORDS = {
    word: i
    for i, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
} | {w: 10 * i for i, w in enumerate("thirty forty fifty sixty seventy eighty ninety".split(), 3)}
_SCALE_WORDS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}
_ORDINALS = {word: i for i, word in enumerate("first second third fourth fifth sixth seventh eighth ninth".split(), 1)}
_ONE_IS_PRONOUN = frozenset(
    "which this that the each no any every some another what last first next only every".split()
)
_AFTER_PRONOUN = frozenset("of with is are was has have had that who which in from by and or".split())


def find_numbers(question: str, taken: list[Span]) -> list[tuple[Span, NumberSlot]]:
    """Numbers in digits or words, outside the spans that dates or values have taken."""
    found: list[tuple[Span, NumberSlot]] = []

    def free(start: int, end: int) -> bool:
        spans = taken + [span for span, _ in found]
        return not any(start < b and a < end for a, b in spans)

    for m in _NUMBER.finditer(question):
        if not free(*m.span()):
            continue
        digits = m[2].replace("−", "-").replace(",", "")
        suffix = (m[3] or m[6] or "").lower()
        value = float(digits) * _SCALE.get(suffix, 1.0)
        plain = not (suffix or m[1] or m[4] or m[5] or "," in m[2] or "." in m[2])
        year = plain and len(digits) == 4 and 1500 <= value < 2200
        if m[7] and (not plain or value % 10):  # 7s, 1,000s
            continue
        slot = NumberSlot(m[0], _tidy(value), year, bool(m[4] or m[5]))
        found.append((m.span(), slot))
        if m[7]:  # the 1990s: from 1990 to 1999
            if not year:
                found.pop()
                continue
            found.append((m.span(), replace(slot, value=slot.value + 9)))
    tokens = list(TOKEN.finditer(question))
    words = [m[1].lower() for m in tokens]
    # Words apart by more than a space or hyphen belong to different numbers.
    breaks = [b for a, b in pairwise(range(len(tokens))) if question[tokens[a].end() : tokens[b].start()].strip(" -")]
    i = 0
    while i < len(words):
        j, value = _word_number(words, i, next((b for b in breaks if b > i), len(words)))
        if j > i and free(tokens[i].start(), tokens[j - 1].end()):
            span = (tokens[i].start(), tokens[j - 1].end())
            found.append((span, NumberSlot(question[span[0] : span[1]], value)))
        i = max(j, i + 1)
    return sorted(found, key=lambda item: (item[0], item[1].value))


def _word_number(words: list[str], i: int, stop: int) -> tuple[int, int]:
    """Read number words from place i, before `stop`; returns (place after them, value), (i, 0) if none."""
    start, total, current, seen = i, 0, 0, False
    if words[i] in ("a", "an") and i + 1 < len(words) and words[i + 1] in _SCALE_WORDS:
        current, i = 1, i + 1
    while i < stop:
        word = words[i]
        if word in _UNIT_WORDS:
            current += _UNIT_WORDS[word]
        elif word in _SCALE_WORDS and (seen or current):
            current = max(current, 1) * _SCALE_WORDS[word]
            if _SCALE_WORDS[word] >= 1000:
                total, current = total + current, 0
        elif word == "and" and seen and i + 1 < stop and words[i - 1] == "hundred":
            i += 1
            continue
        else:
            break
        seen = True
        i += 1
    if not seen:
        return start, 0
    if i == start + 1 and words[start] == "one":
        before = words[start - 1] if start else ""
        after = words[i] if i < len(words) else ""
        if before in _ONE_IS_PRONOUN or not after or after in _AFTER_PRONOUN:
            return start, 0
    return i, total + current


def find_ordinals(question: str) -> Iterator[tuple[Span, NumberSlot]]:
    """Ordinals ("3rd", "third"): numbers only beside a column that they number, as in 3rd class."""
    for m in re.finditer(r"\b(\d{1,2})(?:st|nd|rd|th)\b|\b(" + "|".join(_ORDINALS) + r")\b", question, re.I):
        value = int(m[1]) if m[1] else _ORDINALS[m[2].lower()]
        yield m.span(), NumberSlot(m[0], value)


def _tidy(value: float) -> int | float:
    rounded = round(value, 9)
    return int(rounded) if rounded == int(rounded) else rounded


_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|‘([^’]+)’|«([^»]+)»|(?<!\w)'([^']+)'(?!\w)|`([^`]+)`")
_LEAD = re.compile(
    r"\b(?:contain(?:s|ing|ed)?|includ(?:es|ing)|mention(?:s|ing)|"
    r"(?:start|begin|end)(?:s|ning|ing)?(?: out)? (?:with|in|on|by)|match(?:es|ing))"
    r"(?: the)?(?: (?:word|words|letter|letters|text|string|phrase|term|characters?))? +",
    re.IGNORECASE,
)
_IN_NAME = re.compile(
    r"\b(?:with|have|has|having|mention|mentions) (?:the (?:word|letters?|text) )?([\w&.'-]+(?: [\w&.'-]+)?) "
    r"(?:in|as part of) (?:the|its|their|his|her) (?:\w+ )?"
    r"(?:names?|titles?|label|text|descriptions?|notes?|comments?|subject|address|email)\b",
    re.IGNORECASE,
)


def find_texts(question: str) -> list[tuple[Span, TextSlot]]:
    """Quoted strings, and the words right after "containing", "starting with" and the like."""
    found = []
    for m in _QUOTED.finditer(question):
        text = next(group for group in m.groups() if group is not None).strip()
        if text:
            found.append((m.span(), TextSlot(text)))
    quoted = [span for span, _ in found]
    for m in _LEAD.finditer(question):
        span = _literal_after(question, m.end())
        if span and not any(span[0] < b and a < span[1] for a, b in quoted):
            found.append((span, TextSlot(question[span[0] : span[1]])))
    for m in _IN_NAME.finditer(question):
        if not any(m.start(1) < b and a < m.end(1) for (a, b), _ in found):
            found.append((m.span(1), TextSlot(m[1])))
    return sorted(found, key=lambda item: item[0])


# "starting with the highest" sorts; it quotes nothing.
_RANKS = frozenset(
    """highest lowest most least largest smallest biggest best worst newest oldest latest earliest
    first last more less at""".split()
)


def _literal_after(question: str, at: int) -> Span | None:
    """The word at `at`, with the capitalised ones right behind it."""
    first = re.compile(r"[^\s,;?!\"“'‘]+").match(question, at)
    if not first:
        return None
    end = at + len(first[0].rstrip("."))
    word = question[at:end]
    if word.islower() and (word in STOP or word in _RANKS) and len(word) > 1:
        return None
    for m in re.compile(r" ([A-Z][\w&'-]*)").finditer(question, end):
        if m.start() != end or not word[:1].isupper():
            break
        end = m.end()
    return at, end
