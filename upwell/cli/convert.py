"""upwell convert: a checkpoint into the format a chip computes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from upwell.checkpoint.recipes import LAYOUTS, RECIPES, TARGETS
from upwell.cli.progress import Bar
from upwell.errors import CheckpointError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint: BF16, W8A8, W4A8 or W4A16 for Ascend A2 and A3, FP8 or FP4",
        description="Convert a V4 checkpoint, shard by shard. A run that was stopped goes on when started again.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a V4 checkpoint directory")
    parser.add_argument("target", type=Path, metavar="DST", help="a new directory")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the format to write")
    parser.add_argument("--layout", default="upwell", choices=LAYOUTS, help="whose loader is to read it")
    parser.add_argument("--recipe", default="upwell", choices=tuple(RECIPES),
                        help="which weights become integers, and how (default: upwell)")  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FILE",
                        help="prompts (.jsonl) or a text (.txt) that INT4 experts are rounded for (slow)")  # fmt: skip
    parser.add_argument("--shards", type=int, metavar="N", help="how many files (default: of about 4 GB)")
    parser.add_argument("--jobs", type=int, metavar="N", help="how many are written at once (default: one a processor)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from upwell.checkpoint.convert import Conversion, convert

    texts = None if arguments.calibration is None else _texts(arguments.calibration, arguments.source)
    job = Conversion(
        arguments.source, arguments.target, arguments.to, arguments.layout, arguments.recipe, arguments.shards,
        arguments.jobs, texts,
    )  # fmt: skip
    with Bar("converting") as bar:
        done = convert(job, bar.show, _calibrating)
    print(
        f"{done['kind']}: {done['files']} files, {done['bytes'] / 1e9:,.2f} GB, {done['quantized']} weights quantized "
        f"({job.to}, {job.layout}) in {job.target_dir}"
    )
    return 0


def _texts(file: Path, source: Path) -> list[list[int]]:
    """The token ids of --calibration's texts, by the source's tokenizer."""
    from upwell.bench.documents import Cut, read_documents
    from upwell.checkpoint.calibrate import LONGEST
    from upwell.checkpoint.match import read_config
    from upwell.engine import Tokenizer

    config, tokenizer = read_config(source), Tokenizer.from_directory(source)
    if tokenizer is None:
        raise CheckpointError(f"{source}: has no tokenizer.json, as --calibration needs", "put the model's own there")
    longest = min(LONGEST, config.max_position_embeddings)
    cut = Cut(config.bos_token_id, min(512, longest), min(512, longest) - 1)
    return [document.ids for document in read_documents(file, tokenizer, cut, longest)]


def _calibrating(done: int, total: int) -> None:
    print(f"calibrating: {done} of {total} layers", file=sys.stderr)
