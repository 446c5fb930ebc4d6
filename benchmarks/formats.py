"""What each format of `upwell convert`, and a KV cache in INT8, costs nano in quality: perplexity, distance from the
source, right answers.

    python benchmarks/formats.py --json benchmarks/results/formats.json      # --jobs 2: two processes

The texts are generated questions on domains that training never saw, with their plans; calibration reads others, on the
training's domains. Answers are judged on benchmarks/questions. Every format is held against the source. A run that was
stopped goes on with the formats that it hasn't finished, if the same is asked for again: the others' numbers lie beside
the record, in formats.json.part, until all are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from upwell.bench.evaluate import describe
from upwell.engine.llm import nano_path
from upwell.nano.heldout import write_prompts

HERE = Path(__file__).parent
FORMATS: dict[str, list[str]] = {
    "w8a8-upwell": ["--to", "w8a8", "--recipe", "upwell"],
    "w8a8-vllm-ascend": ["--to", "w8a8", "--recipe", "vllm-ascend"],
    "w8a8-msmodelslim": ["--to", "w8a8", "--recipe", "msmodelslim"],
    "w4a8-plain": ["--to", "w4a8"],
    "w4a8-calibrated": ["--to", "w4a8", "--calibration", "{calibration}"],
    "w4a16-plain": ["--to", "w4a16"],
    "w4a16-calibrated": ["--to", "w4a16", "--calibration", "{calibration}"],
    "bf16": ["--to", "bf16"],
    "fp8": ["--to", "fp8"],
}
CACHE = "int8-cache"  # the source itself, its KV cache in INT8
TOGETHER = 3  # formats that one process measures against one run of the source
UPWELL = [sys.executable, "-m", "upwell.cli"]


def convert(source: Path, work: Path, name: str) -> Path:
    flags = [flag.format(calibration=work / "calibration.jsonl") for flag in FORMATS[name]]
    subprocess.run([*UPWELL, "convert", str(source), str(work / name), *flags], check=True, stdout=sys.stderr)
    return work / name


def evaluate(source: Path, models: list[Path], data: Path, questions: bool, *flags: str) -> dict[str, Any]:
    asked = [*flags, *(["--questions", str(HERE / "questions")] if questions else [])]
    command = [*UPWELL, "eval", *map(str, models), "--against", str(source), "--data", str(data), *asked, "--json"]
    record: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for row in record["rows"]:
        row["model"] = Path(row["model"]).name
    return record


class Finished:
    """Records of the formats that are done, in a file beside the one that is to be written, under what was asked."""

    def __init__(self, target: Path | None, asked: list[Any]) -> None:
        self.file = None if target is None else target.with_name(f"{target.name}.part")
        self.asked, self.records, self.lock = asked, list[dict[str, Any]](), Lock()
        if self.file is not None and self.file.is_file():
            held = json.loads(self.file.read_text(encoding="utf-8"))
            self.records = held["records"] if held["asked"] == asked else []

    def formats(self) -> set[str]:
        return {row["model"] for record in self.records for row in record["rows"]}

    def add(self, record: dict[str, Any]) -> None:
        with self.lock:
            self.records.append(record)
            if self.file is not None:
                document = json.dumps({"asked": self.asked, "records": self.records})
                temporary = self.file.with_suffix(".tmp")
                temporary.write_text(document, encoding="utf-8")
                temporary.replace(self.file)

    def remove(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=nano_path(), metavar="PATH", help="default: nano as shipped")
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS, CACHE], default=[*FORMATS, CACHE],
                        metavar="NAME")  # fmt: skip
    parser.add_argument("--texts", type=int, default=400, help="generated questions (default: 400)")
    parser.add_argument("--questions", action=argparse.BooleanOptionalAction, default=True, help="ask the test set too")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a part of the formats (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args()
    weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in args.model.glob("*.safetensors")]
    finished = Finished(args.json, [str(args.model), weights, args.texts, args.questions])
    left = [name for name in args.formats if name not in finished.formats()]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(directory)
        write_prompts(work / "plans.jsonl", args.texts)
        write_prompts(work / "calibration.jsonl", 128, training=True)

        def measure(names: list[str]) -> None:
            if names == [CACHE]:
                flags = "--kv-cache-dtype", "int8"
                record = evaluate(args.model, [args.model], work / "plans.jsonl", args.questions, *flags)
                record["rows"][1]["model"] = CACHE
                finished.add(record)
                return
            models = [convert(args.model, work, name) for name in names]
            finished.add(evaluate(args.model, models, work / "plans.jsonl", args.questions))

        weights_formats = [name for name in left if name != CACHE]
        parts = [weights_formats[k : k + TOGETHER] for k in range(0, len(weights_formats), TOGETHER)]
        parts += [[CACHE]] if CACHE in left else []
        list(pool.map(measure, parts))
    rows = {row["model"]: row for record in finished.records for row in record["rows"]}
    record = finished.records[0] | {"benchmark": "formats", "command": ["python", *sys.argv]}
    record["rows"] = [rows[args.model.name], *(rows[name] for name in args.formats)]
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    finished.remove()
    print(describe(record["rows"]))


if __name__ == "__main__":
    main()
