"""upwell verify: a converted checkpoint against its checksums."""

from __future__ import annotations

import argparse
from pathlib import Path

from upwell.checkpoint.verify import verify
from upwell.cli.progress import Bar


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("verify", help="compare a converted checkpoint with its checksums")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a directory with checksums.json")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with Bar("verifying") as bar:
        files = verify(arguments.directory, bar.show)
    print(f"{arguments.directory}: {files} files are as written")
    return 0
