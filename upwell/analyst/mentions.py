"""Column mentions: spans of a question that name a column, exactly or loosely.

Exact: all telling words of the column's name, or its letters joined ("sepal length" for
sepal_length_cm, "lifeexp" for lifeExp). Loose: some of them, an acronym, an abbreviation, a typo.
Synonyms are not looked up: those are the model's to learn.
"""

from __future__ import annotations

from dataclasses import dataclass

from upwell.analyst.schema import ColumnKind, TableProfile
from upwell.analyst.slots import Mark
from upwell.analyst.words import ASK, COMMON, STOP, TOKEN, UNIT_OF, UNITS, TypoIndex, stem

NEGATIONS = ("un", "non")  # before a flag's word
# Two letters fit too many words to be guessed; these are what headers commonly shorten so.
_TWO_LETTERS = {
    short: stem(long)
    for short, long in (
        ("hp", "horsepower"), ("dt", "date"), ("wt", "weight"), ("ht", "height"), ("yr", "year"),
        ("nr", "number"), ("wh", "warehouse"), ("mo", "month"), ("wk", "week"), ("hr", "hour"),
        ("st", "street"), ("tz", "timezone"), ("rt", "rate"), ("sz", "size"), ("gb", "gigabyte"),
    )
}  # fmt: skip
_COUNTS = frozenset("n nr num cnt".split())  # "n_files" are files
_MAX_GAP = 2  # stop words allowed inside a mention: "length of the sepal"


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    lower: str
    stem: str
    start: int
    end: int


def tokenize(question: str) -> list[Token]:
    tokens = []
    for m in TOKEN.finditer(question):
        text = m[1]
        lower = text.lower()
        tokens.append(Token(text, lower, stem(lower), m.start(1), m.end(1)))
    return tokens


@dataclass(frozen=True, slots=True)
class Mention:
    """Tokens first..last (inclusive) name one of `columns`, the likeliest first."""

    first: int
    last: int
    columns: tuple[int, ...]
    partial: bool


def negates(mark: Mark, question: str, profile: TableProfile) -> bool:
    """Whether a column's mark is its word with a negation before it: "unpaid" for paid."""
    word = question[mark.start : mark.end].lower()
    own = (part for c in mark.columns for part in profile.columns[c].words)
    return mark.kind == "C" and word.startswith(NEGATIONS) and not any(part.startswith(NEGATIONS) for part in own)


def telling_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """The stems of a name's words without stop words, a counting prefix (n_files) and a trailing unit."""
    kept = [word for word in words if word not in STOP]
    if len(kept) > 1 and kept[0] in _COUNTS:
        kept.pop(0)
    while len(kept) > 1 and kept[-1] in UNITS:
        kept.pop()
    return tuple(dict.fromkeys(stem(word) for word in kept or words))


class ColumnIndex:
    """The words of all column names of a table."""

    def __init__(self, profile: TableProfile) -> None:
        self.names = [column.words for column in profile.columns]
        self.telling = [telling_words(words) for words in self.names]
        self.flags = {c for c, column in enumerate(profile.columns) if column.kind is ColumnKind.FLAG}
        # "cars" in a question about the table of cars is no sign of the column "car name".
        self.table = {stem(word) for word in TOKEN.findall(profile.name.lower())}
        self.by_stem: dict[str, list[int]] = {}
        self.joined: dict[str, list[int]] = {}
        self.acronyms: dict[str, list[int]] = {}
        self.by_initials: dict[str, list[int]] = {}  # short names that initials may spell
        plain: dict[str, str] = {}
        for c, (words, telling) in enumerate(zip(self.names, self.telling, strict=True)):
            for part in telling:
                self.by_stem.setdefault(part, []).append(c)
            for word in words:
                plain.setdefault(word, stem(word))
            for name in {"".join(words), "".join(w for w in words if w not in UNITS)}:
                if len(name) > 1 and name not in STOP:
                    self.joined.setdefault(name, []).append(c)
            if len(words) > 2:
                self.acronyms.setdefault("".join(word[0] for word in words), []).append(c)
            for word in words:
                if 3 <= len(word) <= 5:
                    self.by_initials.setdefault(word, []).append(c)
        self.measured_in: dict[str, list[int]] = {}  # unit -> the quantities whose name ends in it
        for c, words in enumerate(self.names):
            if len(words) > 1 and words[-1] in UNIT_OF and profile.columns[c].is_numeric:
                self.measured_in.setdefault(UNIT_OF[words[-1]], []).append(c)
        self.plain = {word: part for word, part in plain.items() if part in self.by_stem}
        self.typos = TypoIndex(set(self.plain))
        self._loose: dict[str, tuple[str, ...]] = {}

    def knows(self, token: Token) -> bool:
        return token.stem in self.by_stem or bool(self.loose(token.lower))

    def without_negation(self, word: str) -> str | None:
        """The stem of a flag's word that this one negates: "unpaid" of paid."""
        for prefix in NEGATIONS:
            part = stem(word.removeprefix(prefix))
            if word.startswith(prefix) and any(c in self.flags for c in self.by_stem.get(part, ())):
                return part
        return None

    def loose(self, word: str) -> tuple[str, ...]:
        """Stems of column words that this word abbreviates, spells out or misspells (at most 2)."""
        found = self._loose.get(word)
        if found is None:
            found = self._loose[word] = self._find_loose(word)
        return found

    def _find_loose(self, word: str) -> tuple[str, ...]:
        if len(word) < 2 or word in COMMON or word in UNITS or not word.isalpha():
            return ()
        found = [part for known, part in self.plain.items() if _abbreviates(known, word)]
        if not found:
            typo = self.typos.find(word)
            found = [self.plain[typo]] if typo else []
        return tuple(dict.fromkeys(found))[:2]

    def find(self, tokens: list[Token]) -> list[Mention]:
        """All mentions, by place; those inside a better one of the same words are dropped."""
        exact: dict[tuple[int, int], list[int]] = {}
        partial: dict[tuple[int, int], dict[int, float]] = {}
        hits: dict[int, list[tuple[int, str, bool]]] = {}  # column -> (token, stem, loose)
        for i, token in enumerate(tokens):
            if token.lower in STOP:
                continue
            bare = self.without_negation(token.lower)
            if token.stem in self.by_stem:
                for c in self.by_stem[token.stem]:
                    hits.setdefault(c, []).append((i, token.stem, False))
            elif bare:
                for c in self.by_stem[bare]:
                    hits.setdefault(c, []).append((i, bare, False))
            else:
                for part in self.loose(token.lower):
                    for c in self.by_stem[part]:
                        hits.setdefault(c, []).append((i, part, True))
            for c in self.acronyms.get(token.lower, ()):
                partial.setdefault((i, i), {})[c] = 1.0
        for c, places in hits.items():
            for cluster in _clusters(tokens, places):
                stems = {part for _, part, _ in cluster}
                span = (cluster[0][0], cluster[-1][0])
                if len(stems) == len(self.telling[c]) and not any(weak for _, _, weak in cluster):
                    exact.setdefault(span, []).append(c)
                elif any(_telling(tokens[i], p, self.table) for i, p, _ in cluster):
                    share = len(stems) / len(self.telling[c])
                    partial.setdefault(span, {})[c] = share
        self._find_joined(tokens, exact, partial)
        return _resolve(exact, partial)

    def _find_joined(
        self,
        tokens: list[Token],
        exact: dict[tuple[int, int], list[int]],
        partial: dict[tuple[int, int], dict[int, float]],
    ) -> None:
        """Names written as one word or apart, and initials: "miles per gallon" for mpg."""
        for i in range(len(tokens)):
            letters = initials = ""
            for j in range(i, min(i + 5, len(tokens))):
                letters += tokens[j].lower
                initials += tokens[j].lower[0]
                if letters in self.joined and not (j == i and tokens[i].lower in COMMON):
                    columns = exact.setdefault((i, j), [])
                    columns += [c for c in self.joined[letters] if c not in columns]
                if j > i + 1 and initials in self.by_initials and tokens[i].lower not in STOP:
                    for c in self.by_initials[initials]:
                        partial.setdefault((i, j), {})[c] = 1.0


def _telling(token: Token, part: str, table: set[str]) -> bool:
    """Whether a word is a sign of a column by itself: no "total", "2" or name of the table."""
    return token.lower not in ASK and len(token.lower) > 1 and part not in table and part.isalpha()


def _clusters(tokens: list[Token], places: list[tuple[int, str, bool]]) -> list[list[tuple[int, str, bool]]]:
    """Runs of a column's words with nothing but a few stop words and units between them."""
    clusters: list[list[tuple[int, str, bool]]] = []
    for place in places:
        i, part, _ = place
        if clusters:
            last = clusters[-1]
            before = last[-1][0]
            gap = tokens[before + 1 : i]
            joins = len(gap) <= _MAX_GAP and all(t.lower in STOP or t.lower in UNITS for t in gap)
            if joins and part not in {p for _, p, _ in last} and i != before:
                last.append(place)
                continue
        clusters.append([place])
    return clusters


def _resolve(
    exact: dict[tuple[int, int], list[int]], partial: dict[tuple[int, int], dict[int, float]]
) -> list[Mention]:
    spans = list(exact)
    mentions = []
    for span, columns in exact.items():
        # "name" within "customer name" is no mention of its own when both are exact.
        if not any(_inside(span, other) and span != other for other in spans):
            mentions.append(Mention(*span, tuple(sorted(columns)), partial=False))
    kept = [(m.first, m.last) for m in mentions]
    for span, shares in partial.items():
        if any(_inside(span, other) for other in kept):
            continue
        longer = [s for s in partial if s != span and _inside(span, s)]
        columns = [c for c in shares if not any(c in partial[s] for s in longer)]
        if longer and all(max(partial[s].values()) >= max(shares.values()) for s in longer):
            continue
        if columns:
            ranked = sorted(columns, key=lambda c: (-shares[c], c))
            if shares[ranked[0]] == 1.0:  # "options" is all of n_opts and half of has_long_opts
                ranked = [c for c in ranked if shares[c] == 1.0]
            mentions.append(Mention(*span, tuple(ranked), partial=True))
    mentions.sort(key=lambda m: (m.last, m.partial, m.first))
    return mentions


def _inside(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= span[0] and span[1] <= other[1]


def _abbreviates(known: str, word: str) -> bool:
    """Whether one of a column's word and a question's word shortens the other (temp, qty, pclass)."""
    short, long = (known, word) if len(known) < len(word) else (word, known)
    if len(short) < 2 or len(long) < len(short) + 1 or short in COMMON or not known.isalpha():
        return False
    if long.startswith(short):
        return len(short) >= 3 and len(long) >= len(short) + 2
    if long.endswith(short):  # "class" for pclass, "govt" for realgovt
        return len(short) >= 4 and short == word
    if len(short) == 2:
        return _TWO_LETTERS.get(short) == stem(long)
    if short[0] != long[0] or len(short) > 5 or len(long) < len(short) + 2:
        return False
    # Dropped vowels: qty, dept, mgr. Every letter in order, and mostly consonants.
    vowels = sum(letter in "aeiou" for letter in short)
    if vowels > (1 if short == known and len(short) > 3 else 0):
        return False
    rest = iter(long)
    return all(letter in rest for letter in short)
