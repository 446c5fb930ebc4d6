"""Words: splitting names, a light stemmer, typo distance, and the words questions are made of.

Everything here is deterministic and cheap: linking runs it for every training example too.
"""

from __future__ import annotations

import re
from functools import lru_cache

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])")
_PIECE = re.compile(r"[^\W_]+")
# A number stays whole ("3.11"), a possessive 's belongs to its word and is dropped from it.
TOKEN = re.compile(r"(\d+(?:[.,]\d+)*|[^\W\d_][^\W_]*)(?:['’]s\b)?")


@lru_cache(maxsize=65536)
def split_name(name: str) -> tuple[str, ...]:
    """Lower-case words of a column's name: snake_case, camelCase, digits and punctuation split."""
    return tuple(_PIECE.findall(_CAMEL.sub(" ", name).lower()))


_IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse",
    "feet": "foot", "teeth": "tooth", "geese": "goose", "data": "data", "lives": "life",
    "wives": "wife", "leaves": "leaf", "series": "series", "species": "species", "bus": "bus",
    "gas": "gas", "news": "news", "indices": "index", "vertices": "vertex", "countries": "country",
    "movies": "movi", "cookies": "cooki", "ties": "tie", "pies": "pie", "dies": "die",
    "heavier": "heavy", "lighter": "light", "cheaper": "cheap", "taller": "tall",
    "sold": "sell", "won": "win", "built": "build", "paid": "pay", "spent": "spend",
}  # fmt: skip


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A light stem of a lower-case word: plural, -ing, -ed, -est, final e. Not for display."""
    fixed = _IRREGULAR.get(word)
    if fixed is not None:
        return fixed
    n = len(word)
    if n <= 3 or not word.isalpha():
        return word
    if word.endswith("ies") and n > 4:
        word = word[:-3] + "y"
    elif word.endswith(("sses", "xes", "zes", "ches", "shes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    n = len(word)
    if n > 5 and word.endswith("ing"):
        word = _base(word[:-3])
    elif n > 4 and word.endswith("ied"):
        word = word[:-3] + "y"
    elif n > 4 and word.endswith("ed") and not word.endswith("eed"):
        word = _base(word[:-2])
    elif n > 5 and word.endswith("iest"):
        word = word[:-4] + "y"
    elif n > 6 and word.endswith("est"):
        word = _undouble(word[:-3])
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


def _base(word: str) -> str:
    """A verb without its ending: planned is plan, and hired is hire rather than hir."""
    if len(word) == 3 and word[1] in "aeiou" and word[0] not in "aeiou" and word[2] not in "aeiouwxy":
        return word + "e"
    return _undouble(word)


def _undouble(word: str) -> str:
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
        return word[:-1]
    return word


def stems(text: str) -> tuple[str, ...]:
    """Stems of all tokens of a text, as linking compares them."""
    return tuple([stem(word) for word in TOKEN.findall(text.lower())])


def within_distance(a: str, b: str, limit: int) -> bool:
    """Whether the Damerau-Levenshtein distance (swap of neighbours counts 1) is <= limit."""
    if abs(len(a) - len(b)) > limit:
        return False
    older: list[int] = []
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        best = i
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
            best = min(best, cost)
        if best > limit:
            return False
        older, previous = previous, row
    return previous[-1] <= limit


def typo_limit(length: int) -> int:
    """How many slips of the finger are forgiven in a word of this length."""
    return 0 if length < 5 else 1 if length < 9 else 2


class TypoIndex:
    """Known words by length and first letter; finds the one a misspelt word stands for."""

    def __init__(self, words: set[str]) -> None:
        self._buckets: dict[tuple[int, str], list[str]] = {}
        for word in sorted(words):
            if len(word) >= 5 and word.isalpha():
                self._buckets.setdefault((len(word), word[0]), []).append(word)

    def find(self, word: str) -> str | None:
        """The nearest known word within the typo limit (first letter kept or swapped)."""
        limit = typo_limit(len(word))
        if not limit or not word.isalpha():
            return None
        # The first letter may only move to the second place: people rarely miss it.
        firsts = {word[0], word[1]}
        for distance in range(1, limit + 1):
            for shift in range(-distance, distance + 1):
                for first in sorted(firsts):
                    for known in self._buckets.get((len(word) + shift, first), ()):
                        if word[0] not in known[:2] or (distance > 1 and word[0] != known[0]):
                            continue
                        if within_distance(word, known, distance):
                            return known
        return None


STOP = frozenset(
    """a an the of in on at by for to from with and or but nor not no is are was were be been being am
    do does did done has have had having will would can could should shall may might must it its
    this that these those there their them they he she him her his hers we us our you your i me my
    who whom whose which what when where why how if then than as so such into onto over under per
    about above below between among across after before during since until till off out up down via
    both each every either neither any some all none other others another only just also too very
    please s t let lets hey hi ok okay vs versus""".split()
)
# Words that say what to compute or compare; a column's name may hold them ("total bill"), but
# alone they are no sign of that column, and never a misspelling of a value.
ASK = frozenset(
    """average avg mean median sum total totals overall combined altogether count counts counted
    number numbers amount many much most least more less fewer fewest greater greatest larger
    largest bigger biggest smaller smallest higher highest lower lowest high low maximum max
    minimum min top bottom best worst better worse first last latest earliest newest oldest older
    newer longest shortest longer shorter heaviest lightest tallest cheapest priciest fastest slowest
    exceed exceeds exceeding least exactly equal equals same different distinct unique share
    percentage percent proportion fraction ratio rate part breakdown break group grouped grouping
    split sort sorted order ordered rank ranked ranking list lists show give tell find get display
    return print compare compared comparison trend trends over time yearly monthly quarterly weekly
    daily annual annually include includes including included contain contains containing start
    starts starting begin begins beginning end ends ending named called like missing blank empty
    null unknown known available exist exists existing record records row rows entry entries item
    items thing things data dataset table value values one two three four five six seven eight nine
    ten eleven twelve twenty thirty forty fifty hundred thousand million billion dozen yes true
    false new old long short large small big great good bad same whole entire typical typically
    usually respectively across within without according based along together want need know see
    look looking make made take took come comes came going goes went think make ever never always
    again still even well back down here there where their about would could should these those
    which while until every other after below under above between across through during before
    since against among beyond except than then them they what when with were from have that this
    give main popular common frequent often times ascending descending asc desc increasing
    decreasing alphabetical alphabetically chronological chronologically arrange arranged ranks
    sorting ordering""".split()
)
COMMON = STOP | ASK
# Peoples whose word no ending turns into the place's.
DEMONYMS = {
    "french": "france", "dutch": "netherlands", "spanish": "spain", "greek": "greece", "swiss": "switzerland",
    "danish": "denmark", "swedish": "sweden", "turkish": "turkey", "british": "britain", "welsh": "wales",
    "irish": "ireland", "norwegian": "norway", "belgian": "belgium", "czech": "czechia", "thai": "thailand",
    "peruvian": "peru", "brazilian": "brazil", "chinese": "china", "lebanese": "lebanon", "german": "germany",
    "scottish": "scotland", "filipino": "philippines", "ukrainian": "ukraine", "argentine": "argentina",
}  # fmt: skip
UNITS = frozenset(
    """cm mm km m ft in inch inches mi mile kg g mg lb lbs oz t ton tons usd eur gbp dollar dollars
    euro euros pct percent ms sec secs second seconds mins minute minutes hr hrs hour hours day
    days mph kmh kph kwh mwh kw mw gb mb kb tb hz khz mhz ghz c f k l ml sqft sqm m2 km2 m3 deg
    degree degrees pa hpa psi v w""".split()
)

_SPELLINGS = """kg kilo kilos kilogram kilograms; g gram grams; lb lbs pound pounds; cm centimeter centimeters
centimetre centimetres; mm millimeter millimeters; m meter meters metre metres; km kilometer kilometers kilometre
kilometres; mi mile miles; ft feet foot; in inch inches; min mins minute minutes; s sec secs second seconds; h hr hrs
hour hours; d day days; wk week weeks; mo month months; yr yrs year years; ms; kb kilobyte kilobytes; mb megabyte
megabytes; gb gigabyte gigabytes; usd dollar dollars; eur euro euros; gbp; pct percent; l liter liters litre litres;
ml; kw; kwh; mph; kmh kph; hz; c degrees; ha hectare hectares"""
# A unit's spellings -> the first of them.
UNIT_OF = {word: group.split()[0] for group in _SPELLINGS.split(";") for word in group.split()}
