"""upwell eval: how well a model predicts a text and answers questions, before and after a conversion."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from upwell.cli.model_flags import add_kv_cache_flag


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure a model's quality, and what a conversion lost",
        description="Perplexity of a text, distance from a reference, answers to nano's questions.",
    )
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL", help="checkpoints (default: upwell-nano)")
    parser.add_argument("--against", type=Path, metavar="MODEL", help="the reference, such as the checkpoint converted")
    parser.add_argument("--data", type=Path, metavar="FILE",
                        help="a text (.txt), or .jsonl of texts, or of prompts with completions")  # fmt: skip
    parser.add_argument("--window", type=int, default=2048, help="tokens of a text seen at once (default: 2048)")
    parser.add_argument("--stride", type=int, help="tokens from one window to the next (default: half the window)")
    parser.add_argument("--questions", type=Path, metavar="DIR",
                        help="nano's test set: benchmarks/questions of a checkout; its judge.py is run")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda[:i], npu[:i] (default: auto)")
    parser.add_argument("--dtype", default="auto", help="as `upwell serve` takes it (default: auto)")
    add_kv_cache_flag(parser)  # the reference keeps its own
    parser.add_argument("--json", action="store_true", help="print the whole record as JSON")


def run(arguments: argparse.Namespace) -> int:
    from upwell.bench.evaluate import Evaluation, describe, evaluate
    from upwell.bench.record import result
    from upwell.devices import resolve_device, resolve_dtype, resolve_kv_cache_dtype
    from upwell.engine.llm import nano_path

    job = Evaluation(
        arguments.models or [nano_path()], arguments.against, arguments.data, arguments.questions, arguments.window,
        arguments.stride, resolve_device(arguments.device), resolve_dtype(arguments.dtype),
        resolve_kv_cache_dtype(arguments.kv_cache_dtype),
    )  # fmt: skip
    record: dict[str, Any] = {}

    def seen(model: Any) -> None:  # the record describes the first model; none is kept
        if "benchmark" not in record:
            record.update(result("eval", ["upwell", *sys.argv[1:]], model, str(job.against or job.models[0]), []))

    record["rows"] = evaluate(job, lambda line: print(line, file=sys.stderr), seen)
    print(json.dumps(record, indent=1) if arguments.json else describe(record["rows"]))
    return 0
