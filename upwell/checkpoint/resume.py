"""The state of a conversion on disk, by which a killed one goes on: a small file in the target directory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from upwell.errors import InputError

STATE = ".upwell-convert.json"
_TEMPORARY = f"{STATE}.tmp"


@dataclass
class State:
    """Which shards of this very conversion (`key`) are complete, with their checksums. Threads may add to it."""

    directory: Path
    key: str
    done: dict[str, str] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @staticmethod
    def open(directory: Path, key: str) -> State:
        """Begin, or go on where the directory holds this conversion. Raises InputError if it holds anything else."""
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory}: isn't a directory", "name a directory to write to")
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / STATE
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["key"] != key:
                raise InputError(f"{directory}: another conversion stopped here", "remove it, or name another DST")
            done = {name: digest for name, digest in known["done"].items() if (directory / name).is_file()}
            return State(directory, key, done)
        if any(entry.name != _TEMPORARY for entry in directory.iterdir()):
            raise InputError(f"{directory}: isn't empty", "name a new directory")
        state = State(directory, key)
        state._write()
        return state

    def add(self, name: str, digest: str) -> None:
        """Shard `name` is whole and in its place."""
        with self._lock:
            self.done[name] = digest
            self._write()

    def end(self) -> None:
        """The conversion is complete."""
        (self.directory / STATE).unlink()

    def _write(self) -> None:
        temporary = self.directory / _TEMPORARY
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump({"key": self.key, "done": self.done}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.directory / STATE)
