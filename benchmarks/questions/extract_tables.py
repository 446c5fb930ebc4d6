"""Extracts the test set's tables from installed packages into tables/*.csv.

Needs plotly, scikit-learn, matplotlib, tzdata. The CSVs are committed: what depends on the machine
(the installed packages, the versions of the others) is frozen there, and the gold SQL was written
against the committed files. Rerunning is for adding a table: `python extract_tables.py NAME ...`
writes only the named ones.
"""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

import colorsys
import csv
import gzip
import http
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from importlib import metadata, resources
from pathlib import Path
from zoneinfo import ZoneInfo

TABLES = Path(__file__).parent / "tables"

Rows = list[Sequence[object]]
Table = tuple[Sequence[str], Rows]


def _plotly(name: str, decimals: int | None = None) -> Table:
    """A dataset of plotly as it is, reals cut to `decimals` where they carry noise digits."""
    path = resources.files("plotly") / "package_data" / "datasets" / f"{name}.csv.gz"
    with path.open("rb") as raw, gzip.open(raw, "rt", encoding="utf-8") as text:
        header, *rows = csv.reader(text)
    if decimals is None:
        return header, list(rows)
    return header, [[_cut(cell, decimals) for cell in row] for row in rows]


def _cut(cell: str, decimals: int) -> str:
    return f"{float(cell):.{decimals}f}" if re.fullmatch(r"-?\d+\.\d+", cell) else cell


def _wine() -> Table:
    from sklearn.datasets import load_wine

    data = load_wine()
    cultivars = ["barolo", "grignolino", "barbera"]  # the three cultivars of the UCI data set
    rows: Rows = [
        [*values.tolist(), cultivars[kind]]
        for values, kind in zip(data.data, data.target, strict=True)
    ]
    return [*data.feature_names, "cultivar"], rows


def _breast_cancer() -> Table:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    names = [str(name) for name in data.feature_names]
    keep = [i for i, name in enumerate(names) if name.startswith("mean")][:7]
    keep += [names.index("worst radius"), names.index("worst area")]
    rows: Rows = [
        [f"P{i:03d}", *(values[k].item() for k in keep), str(data.target_names[kind])]
        for i, (values, kind) in enumerate(zip(data.data, data.target, strict=True), 1)
    ]
    return ["patient id", *(names[k] for k in keep), "diagnosis"], rows


def _diabetes() -> Table:
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    long = {"bp": "blood_pressure", "s1": "total_cholesterol", "s2": "LDL", "s3": "HDL",
            "s6": "glucose"}  # fmt: skip
    keep = [i for i, name in enumerate(data.feature_names) if name not in ("s4", "s5")]
    header = [long.get(data.feature_names[i], data.feature_names[i]) for i in keep]
    rows: Rows = []
    for values, target in zip(data.data, data.target, strict=True):
        cells: list[object] = [round(values[i].item(), 2) for i in keep]
        cells[header.index("age")] = int(values[0])
        cells[header.index("sex")] = int(values[1])  # the source doesn't say which is which
        rows.append([*cells, int(target)])
    return [*header, "progression"], rows


def _google() -> Table:
    import matplotlib
    import numpy as np

    path = Path(matplotlib.get_data_path()) / "sample_data" / "goog.npz"
    with np.load(path) as loaded:
        prices = loaded["price_data"]
    header = ["Date", "Open Price", "High", "Low", "Close", "Shares Traded", "Adj. Close*"]
    rows: Rows = [
        [str(p["date"])[:10], *(round(float(p[k]), 2) for k in ("open", "high", "low", "close")),
         int(p["volume"]), round(float(p["adj_close"]), 2)]
        for p in prices
    ]  # fmt: skip
    return header, rows


def _tech_stocks() -> Table:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "Stocks.csv"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    header, *rows = csv.reader(lines)
    kept = [row for row in rows if row[0].endswith("-01") and row[0] >= "2000"]  # one a month
    return header, [[row[0], *(_cut(cell, 2) for cell in row[1:])] for row in kept]


def _packages() -> Table:
    header = ["name", "version", "license", "requires_python", "n_requires", "n_files", "size_kb",
              "pure_python", "has_cli", "dev_status"]  # fmt: skip
    rows: Rows = []
    for dist in sorted(metadata.distributions(), key=lambda d: d.name.lower()):
        files = dist.files or []
        size = sum(f.size or 0 for f in files)
        stati = [c for c in dist.metadata.get_all("Classifier") or [] if "Development Status" in c]
        wheel = dist.read_text("WHEEL") or ""
        rows.append([
            dist.name, dist.version, _licence(dist),
            _field(dist, "Requires-Python"), len(dist.requires or []), len(files),
            round(size / 1024, 1), "yes" if "Root-Is-Purelib: true" in wheel else "no",
            "yes" if any(e.group == "console_scripts" for e in dist.entry_points) else "no",
            stati[0].split(" - ")[-1] if stati else "",
        ])  # fmt: skip
    return header, rows


def _field(dist: metadata.Distribution, name: str) -> str:
    return str(dist.metadata[name]) if name in dist.metadata else ""


def _licence(dist: metadata.Distribution) -> str:
    """The licence as one of a few families: the metadata spell each in many ways."""
    classifiers = dist.metadata.get_all("Classifier") or []
    said = " ".join([
        _field(dist, "License-Expression") or _field(dist, "License")[:60],
        *(c for c in classifiers if c.startswith("License")),
    ])  # fmt: skip
    said = said.replace("Mozilla", "MPL").replace("Python Software Foundation", "PSF")
    families = [family for family in ("Apache", "MPL", "BSD", "MIT", "PSF") if family in said]
    if families:
        return min(families, key=said.index)  # the one named first
    return "other" if said.strip() else ""


def _time_zones() -> Table:
    root = resources.files("tzdata") / "zoneinfo"
    countries = dict(
        line.split("\t")
        for line in (root / "iso3166.tab").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    rows: Rows = []
    for line in (root / "zone.tab").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        code, position, zone = line.split("\t")[:3]
        latitude, longitude = re.fullmatch(r"([+-]\d+)([+-]\d+)", position).groups()  # type: ignore[union-attr]
        winter, summer = (datetime(2024, m, 1, tzinfo=ZoneInfo(zone)) for m in (1, 7))
        offsets = [w.utcoffset().total_seconds() / 3600 for w in (winter, summer)]  # type: ignore[union-attr]
        rows.append([
            zone, zone.split("/")[0], countries[code], code, min(offsets),
            "true" if offsets[0] != offsets[1] else "false", winter.tzname(),
            _degrees(latitude, 2), _degrees(longitude, 3),
        ])  # fmt: skip
    header = ["zone", "area", "country", "cc", "utc_offset", "observesDST", "abbreviation",
              "lat", "lon"]  # fmt: skip
    return header, sorted(rows, key=lambda row: str(row[0]))


def _degrees(iso6709: str, digits: int) -> float:
    """+DDMM or +DDDMMSS to decimal degrees; `digits` is how many the degrees take."""
    sign, body = (-1 if iso6709[0] == "-" else 1), iso6709[1:]
    degrees, minutes, seconds = body[:digits], body[digits : digits + 2], body[digits + 2 :] or "0"
    return sign * round(int(degrees) + int(minutes) / 60 + int(seconds) / 3600, 3)


def _characters() -> Table:
    blocks = {
        "Basic Latin": (0x21, 0x7E), "Latin-1 Supplement": (0xA1, 0xFF),
        "Latin Extended-A": (0x100, 0x17F), "Greek and Coptic": (0x370, 0x3FF),
        "General Punctuation": (0x2010, 0x205E), "Currency Symbols": (0x20A0, 0x20C0),
        "Number Forms": (0x2150, 0x218B), "Arrows": (0x2190, 0x21FF),
        "Mathematical Operators": (0x2200, 0x22FF),
    }  # fmt: skip
    kinds = {"L": "letter", "M": "mark", "N": "number", "P": "punctuation", "S": "symbol"}
    rows: Rows = []
    for block, (first, last) in blocks.items():
        for point in range(first, last + 1):
            char = chr(point)
            kind = kinds.get(unicodedata.category(char)[0])
            if kind is None or char == '"':  # the bare quote trips some CSV readers' sniffing
                continue
            case = "upper" if char.isupper() else "lower" if char.islower() else ""
            number = unicodedata.numeric(char, None)
            rows.append([
                f"U+{point:04X}", char, unicodedata.name(char), block, kind,
                unicodedata.category(char), case, "Y" if unicodedata.mirrored(char) else "N",
                "" if number is None else round(number, 4), len(char.encode()),
            ])  # fmt: skip
    header = ["Code Point", "Char", "Name", "Block", "Kind", "Gen. Category", "Case", "Mirrored",
              "Numeric Value", "UTF-8 Bytes"]  # fmt: skip
    return header, rows


def _http_status() -> Table:
    classes = ["Informational", "Success", "Redirection", "Client Error", "Server Error"]
    rows: Rows = [
        [int(s), s.name, s.phrase, s.description, classes[s // 100 - 1], s >= 400]
        for s in http.HTTPStatus
    ]
    return ["code", "constant", "phrase", "description", "class", "is_error"], rows


def _colors() -> Table:
    from matplotlib.colors import CSS4_COLORS, to_hex

    rows: Rows = []
    for name, code in sorted(CSS4_COLORS.items()):
        red, green, blue = (int(to_hex(code)[i : i + 2], 16) for i in (1, 3, 5))
        hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        rows.append([name, code, red, green, blue, round(hue * 360), round(saturation * 100, 1),
                     round(value * 100, 1)])  # fmt: skip
    return ["color", "hex", "R", "G", "B", "hue", "saturation_pct", "brightness_pct"], rows


SOURCES: dict[str, Callable[[], Table]] = {
    "gapminder": lambda: _plotly("gapminder"),
    "tips": lambda: _plotly("tips"),
    "iris": lambda: _plotly("iris"),
    "election": lambda: _plotly("election"),
    "wind": lambda: _plotly("wind"),
    "carshare": lambda: _plotly("carshare", 4),
    "experiment": lambda: _plotly("experiment", 2),
    "wine": _wine,
    "breast_cancer": _breast_cancer,
    "diabetes": _diabetes,
    "google": _google,
    "tech_stocks": _tech_stocks,
    "packages": _packages,
    "time_zones": _time_zones,
    "characters": _characters,
    "http_status": _http_status,
    "colors": _colors,
}


def _write(path: Path, header: Iterable[str], rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main(names: Sequence[str]) -> None:
    TABLES.mkdir(exist_ok=True)
    for name in names or SOURCES:
        header, rows = SOURCES[name]()
        path = TABLES / f"{name}.csv"
        _write(path, header, rows)
        print(f"{name:14} {len(rows):5} rows {path.stat().st_size:7} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
