"""Where routed experts live when a device is too small for them: what the user asked for, checked. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from upwell.errors import InputError

Place = Literal["host", "disk"]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Offload:
    """experts: in host memory, or on disk with at most `memory` bytes of them in host memory. usage: a file that keeps
    which experts are used most, read at the start and written at the end."""

    experts: Place
    memory: int | None = None
    usage: Path | None = None


def parse_offload(
    offload: str | None, memory: str | int | None, usage: str | Path | None = None
) -> Offload | None:
    """`offload` is "experts=host" or "experts=disk", `memory` bytes or a size such as "4GiB". Raises InputError."""
    if offload is None:
        for name, value in (("expert_memory", memory), ("expert_usage", usage)):
            if value is not None:
                raise InputError(f"{name} is given without offload", "it goes with offload experts=disk")
        return None
    what, _, place = offload.partition("=")
    if what != "experts" or place not in ("host", "disk"):
        raise InputError(f"offload is {offload!r}", "it is experts=host or experts=disk")
    if place == "host":
        if memory is not None or usage is not None:
            raise InputError("experts=host keeps all experts in host memory", "expert_memory is for experts=disk")
        return Offload("host")
    if memory is None:
        raise InputError("offload experts=disk needs expert_memory", "how much of them to keep in memory, e.g. 4GiB")
    return Offload("disk", parse_size(memory), None if usage is None else Path(usage))


def parse_size(size: str | int) -> int:
    """Bytes of 4GiB, 512M, 1.5g or a plain number: all in powers of 1024. Raises InputError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", str(size).upper())
    if found is None or isinstance(size, bool):
        raise InputError(f"size {str(size)!r} isn't understood", "e.g. 4GiB, 512MiB, or bytes")
    nbytes = int(float(found.group(1)) * _UNITS[found.group(2)])
    if nbytes < 1:
        raise InputError(f"size {str(size)!r} is nothing", "e.g. 4GiB")
    return nbytes
