"""API keys: who may ask, and how much. A keys file holds hashes only.

A keys file has one JSON object a line: {"name": "ana", "sha256": "...", "requests_per_minute": 60,
"tokens_per_minute": 100000}; the limits may be left out. `upwell key NAME` makes a key and its line. Keys are random
and long, so a plain hash of one can't be turned back by trying.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upwell.errors import InputError
from upwell.server.errors import RateLimitError, UnknownKeyError

_HASH = re.compile(r"[0-9a-f]{64}")
Clock = Callable[[], float]


def new_key() -> str:
    """A fresh random key."""
    return "upwell-" + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Bucket:
    """`per_minute` units flow in evenly, up to a minute's worth. What is spent may make it negative: it is known
    only afterwards how many tokens a request takes."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self._rate, self._most, self._clock = per_minute / 60, float(per_minute), clock
        self._level, self._seen = float(per_minute), clock()

    def wait(self, units: float) -> float:
        """Seconds until `units` are there; 0 if they are."""
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._seen) * self._rate)
        self._seen = now
        return max(0.0, (units - self._level) / self._rate)

    def spend(self, units: float) -> None:
        self._level -= units


@dataclass
class Key:
    """A key's name and limits; limits of None are none."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    clock: Clock = field(default=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        self._requests = Bucket(self.requests_per_minute, self.clock) if self.requests_per_minute else None
        self._tokens = Bucket(self.tokens_per_minute, self.clock) if self.tokens_per_minute else None

    def admit(self) -> None:
        """Count a request. Raises RateLimitError where its requests or tokens of this minute are used up."""
        for bucket, what, limit in (
            (self._requests, "requests", self.requests_per_minute), (self._tokens, "tokens", self.tokens_per_minute)
        ):  # fmt: skip
            seconds = bucket.wait(1) if bucket is not None else 0.0
            if seconds > 0:
                raise RateLimitError(f"key {self.name!r} has used its {limit} {what} a minute", math.ceil(seconds))
        if self._requests is not None:
            self._requests.spend(1)

    def spend(self, tokens: int) -> None:
        """Count the tokens of a request that is over."""
        if self._tokens is not None:
            self._tokens.wait(0)
            self._tokens.spend(tokens)


class KeyRing:
    """The keys a server knows. Every one is compared, in constant time: how long it takes tells nothing."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = list(keys)
        if not self._keys:
            raise InputError("there are no API keys", "make one with `upwell key NAME`")

    @staticmethod
    def of(plain: Iterable[str] = (), file: Path | None = None) -> KeyRing | None:
        """Keys from the command line (without limits) and a file; None for neither. Raises InputError."""
        keys = []
        for k, key in enumerate(plain, 1):
            if not key.strip():
                raise InputError("--api-key is empty")
            keys.append(Key(f"key-{k}", hash_key(key)))
        if file is not None:
            keys += read_keys(file)
        return KeyRing(keys) if keys or file is not None else None

    def find(self, presented: str | None) -> Key:
        """Raises UnknownKeyError."""
        if presented is None:
            raise UnknownKeyError("this server wants an API key", "send it as Authorization: Bearer KEY, or x-api-key")
        digest = hash_key(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None:
            raise UnknownKeyError("this API key isn't known here")
        return found


def read_keys(path: Path) -> list[Key]:
    """Raises InputError naming the line that can't be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read the keys file {path}: {error}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            keys.append(_read_line(line, f"{path}, line {number}"))
    return keys


def _read_line(line: str, where: str) -> Key:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} isn't JSON: {error}") from None
    limits = ("requests_per_minute", "tokens_per_minute")
    if not isinstance(entry, dict) or not {"name", "sha256"} <= set(entry) <= {"name", "sha256", *limits}:
        raise InputError(f"{where} must be an object with name, sha256 and maybe {' and '.join(limits)}")
    if not isinstance(entry["name"], str) or not entry["name"]:
        raise InputError(f"{where}: name is {entry['name']!r}, must be text")
    if not isinstance(entry["sha256"], str) or not _HASH.fullmatch(entry["sha256"]):
        raise InputError(f"{where}: sha256 isn't 64 hexadecimal digits", "make the line with `upwell key NAME`")
    for name in limits:
        value = entry.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"{where}: {name} is {value!r}, must be a whole number above 0")
    return Key(**entry)
