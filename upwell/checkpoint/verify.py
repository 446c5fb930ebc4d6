"""Checksums of a checkpoint directory: written with a conversion, compared by `upwell verify`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from upwell.errors import CheckpointError

CHECKSUMS = "checksums.json"
_CHUNK = 8 << 20


def write_checksums(directory: Path, known: dict[str, str]) -> None:
    """Write checksums.json: SHA-256 and size of every file; `known` digests aren't computed again."""
    entries = {}
    for file in sorted(directory.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name != CHECKSUMS:
            entries[file.name] = {"sha256": known.get(file.name) or sha256(file), "bytes": file.stat().st_size}
    (directory / CHECKSUMS).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def verify(directory: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Compare every file with checksums.json; returns how many. Raises CheckpointError naming each that differs."""
    listing = directory / CHECKSUMS
    if not listing.is_file():
        raise CheckpointError(f"{directory}: has no {CHECKSUMS}", "upwell convert writes it")
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))
        total = sum(int(entry["bytes"]) for entry in entries.values())
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{listing}: can't be read: {error}") from None
    wrong, done = [], 0
    for name, entry in entries.items():
        file = directory / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {file.stat().st_size:,} bytes, not {entry['bytes']:,}")
        elif sha256(file) != entry["sha256"]:
            wrong.append(f"{name} is damaged")
        done += int(entry["bytes"])
        progress(done, total)
    if wrong:
        raise CheckpointError(f"{directory}: {'; '.join(wrong)}", "convert or download again")
    return len(entries)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
