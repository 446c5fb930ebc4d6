"""upwell bench on a tiny checkpoint: what it prints and records is consistent, and what can't be is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_v4 import save

from upwell import load_model
from upwell.bench import forward
from upwell.bench.record import quantile, table
from upwell.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"))


def test_decode_records_every_sample(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "decode.png"
    flags = ["--batch", "1", "2", "--context", "20", "--steps", "3", "--rounds", "2", "--json", "--plot", str(picture)]
    assert main(["bench", "decode", "--model", str(checkpoint), "--device", "cpu", *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["tokens"]) for row in record["rows"]] == [("decode 20+3 x1", 3), ("decode 20+3 x2", 6)]
    for row in record["rows"]:
        assert len(row["seconds"]) == 2 and row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
    assert record["build"]["commit"] and record["machine"]["threads"] >= 1 and record["model"]["layers"] == 6
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_prefill_beside_transformers(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokens", "40", "--rounds", "1", "--compare", "transformers"]
    assert main(["bench", "prefill", "--model", str(checkpoint), "--device", "cpu", *flags]) == 0
    printed = capsys.readouterr()
    assert "transformers" in printed.out and "prefill 40 x1" in printed.out and "logits agree" in printed.err


def test_transformers_takes_the_faster_of_both_dtypes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(checkpoint, dtype=torch.float32)
    model.multiply_in(torch.bfloat16)
    theirs = forward.Transformers(model)
    narrow = [m.dtype for m in theirs._models].index(torch.bfloat16)
    clock = iter([0.0, 9.0, 0.0, 8.0, 0.0, 7.0, 0.0, 2.0])  # of both expert paths, in FP32 and in BF16
    monkeypatch.setattr(forward.time, "perf_counter", lambda: next(clock))
    with torch.inference_mode():
        run = theirs.decode(torch.zeros(1, 6, dtype=torch.long), 2)
        theirs.tune(run)
        assert theirs.model is theirs._models[narrow] and theirs.model.config._experts_implementation == "grouped_mm"
        run()
    model.multiply_in(torch.float32)
    assert [m.dtype for m in forward.Transformers(model)._models] == [torch.float32]


def test_serve(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--requests", "4", "--prompt-tokens", "4", "20", "--output-tokens", "3", "6", "--joining-tokens", "60",
             "--rounds", "1", "--json", "--plot", str(tmp_path / "serve.svg")]  # fmt: skip
    assert main(["bench", "serve", "--model", str(checkpoint), "--device", "cpu", *flags]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    apart, together = rows["one after another"], rows["together"]
    assert together["ratio"] == pytest.approx(together["tokens_per_second"] / apart["tokens_per_second"])  # one round
    joining = rows["between tokens, while it joins"]
    assert joining["p99_over_median_before"] == joining["p99"] / rows["between tokens, before"]["p50"]
    assert rows["time to first token"]["count"] == 4 and rows["between tokens, while it joins"]["count"] > 0
    assert all(row["p50"] <= row["p99"] <= row["most"] for row in rows.values() if "p50" in row)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["prefill", "--tokens", "0"], "--tokens is 0, must be at least 1"),
        (["serve", "--prompt-tokens", "9", "3"], "--prompt-tokens 9 3: the first is the least"),
        (["decode", "--context", "99999999"], "more than the model's"),
    ],
)
def test_refused(checkpoint: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags, "--model", str(checkpoint), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_quantiles_and_tables() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], q) for q in (0.25, 0.5, 0.99)] == [1.0, 2.0, 4.0]
    assert table([["", "a"], ["row", "10"]]) == "      a\nrow  10"
