"""What each format of `upwell convert` costs nano in quality: perplexity, distance from the source, right answers.

    python benchmarks/formats.py --json benchmarks/results/formats.json      # --jobs 2: two formats at once

The texts are generated questions on domains that training never saw, with their plans; calibration reads others, on the
training's domains. Answers are judged on benchmarks/questions. Every format is held against the source.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from upwell.bench.evaluate import describe
from upwell.engine.llm import nano_path
from upwell.nano.heldout import write_prompts

HERE = Path(__file__).parent
FORMATS: dict[str, list[str]] = {
    "bf16": ["--to", "bf16"],
    "fp8": ["--to", "fp8"],
    "w8a8-vllm-ascend": ["--to", "w8a8", "--recipe", "vllm-ascend"],
    "w8a8-msmodelslim": ["--to", "w8a8", "--recipe", "msmodelslim"],
    "w8a8-upwell": ["--to", "w8a8", "--recipe", "upwell"],
    "w4a8-plain": ["--to", "w4a8", "--recipe", "upwell"],
    "w4a8-calibrated": ["--to", "w4a8", "--recipe", "upwell", "--calibration", "{calibration}"],
    "w4a16-plain": ["--to", "w4a16"],
    "w4a16-calibrated": ["--to", "w4a16", "--calibration", "{calibration}"],
}
UPWELL = [sys.executable, "-m", "upwell.cli"]


def convert(source: Path, work: Path, name: str) -> Path:
    flags = [flag.format(calibration=work / "calibration.jsonl") for flag in FORMATS[name]]
    subprocess.run([*UPWELL, "convert", str(source), str(work / name), *flags], check=True, stdout=sys.stderr)
    return work / name


def evaluate(source: Path, models: list[Path], data: Path, questions: bool) -> dict[str, Any]:
    asked = ["--questions", str(HERE / "questions")] if questions else []
    command = [*UPWELL, "eval", *map(str, models), "--against", str(source), "--data", str(data), *asked, "--json"]
    record: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=nano_path(), metavar="PATH", help="default: nano as shipped")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME")
    parser.add_argument("--texts", type=int, default=400, help="generated questions (default: 400)")
    parser.add_argument("--questions", action=argparse.BooleanOptionalAction, default=True, help="ask the test set too")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a part of the formats (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_prompts(work / "plans.jsonl", args.texts)
        write_prompts(work / "calibration.jsonl", 128, training=True)
        models = [convert(args.model, work, name) for name in args.formats]
        # By turns, so that each process has some that run in the kernels and some that don't.
        parts = [part for part in (models[k :: args.jobs] for k in range(args.jobs)) if part]
        with ThreadPoolExecutor(len(parts)) as pool:
            records = list(
                pool.map(lambda part: evaluate(args.model, part, work / "plans.jsonl", args.questions), parts)
            )
    rows = {Path(row["model"]).name: row for record in records for row in record["rows"]}
    record = records[0] | {"benchmark": "formats", "command": ["python", *sys.argv]}
    record["seconds"] = round(time.perf_counter() - began)
    record["rows"] = [rows[args.model.name], *(rows[name] for name in args.formats)]
    for row in record["rows"]:
        row["model"] = Path(row["model"]).name
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(describe(record["rows"]))


if __name__ == "__main__":
    main()
