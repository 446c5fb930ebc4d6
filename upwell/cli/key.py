"""upwell key: an API key and its line for the keys file."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from upwell.errors import InputError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("key", help="make an API key for `upwell serve --api-keys-file`")
    parser.add_argument("name", help="whose it is: the name in logs and metrics")
    parser.add_argument("--requests-per-minute", type=int, metavar="N")
    parser.add_argument("--tokens-per-minute", type=int, metavar="N", help="of prompts and answers together")


def run(arguments: argparse.Namespace) -> int:
    from upwell.server.keys import hash_key, new_key

    key = new_key()
    entry = {"name": arguments.name, "sha256": hash_key(key)}
    for limit in ("requests_per_minute", "tokens_per_minute"):
        value = getattr(arguments, limit)
        if value is not None and value < 1:
            raise InputError(f"--{limit.replace('_', '-')} is {value}, must be above 0")
        if value is not None:
            entry[limit] = value
    print(f"The key, shown this once: {key}", file=sys.stderr)
    print(json.dumps(entry))  # `upwell key ana >> keys.jsonl`
    return 0
