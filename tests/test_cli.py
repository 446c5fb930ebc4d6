"""The command line: starts at once, says errors in one line, ends with the right code."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from tiny_v4 import save

from upwell import cli
from upwell.analyst.ask import Answer
from upwell.chat.embedded import NANO_NOTICE
from upwell.cli import ask
from upwell.cli.main import COMMANDS
from upwell.errors import InputError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def upwell(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "upwell.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("tiny")))


def test_help_is_quick_and_complete() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, "-X", "importtime", "-m", "upwell.cli", "--help"], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and all(f"\n    {name} ".encode() in shown.stdout for name in COMMANDS)
    assert b"upwell" in shown.stderr and b"torch" not in shown.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0 and f"usage: upwell {command}" in capsys.readouterr().out


def test_version_names_torch_device_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert cli.main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("upwell 0.1.0") and torch.__version__ in shown
    assert "device" in shown and "kernels: " in shown


def test_unknown_command_is_the_users_error() -> None:
    shown = upwell("fly")
    assert shown.returncode == 2 and "fly" in shown.stderr


def test_run_prints_a_seeds_text(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    def text(seed: int) -> str:
        flags = ["--model", tiny, "--device", "cpu", "--max-tokens", "20", "--ignore-eos", "--seed", str(seed)]
        assert cli.main(["run", "once", *flags]) == 0
        return capsys.readouterr().out

    assert len(text(4)) > 5 and text(4) == text(4) != text(5)


def test_chat_keeps_the_conversation(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(said: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        assert cli.main(["chat", "--model", tiny, "--max-tokens", "10", "--temperature", "0"]) == 0
        return capsys.readouterr().out

    both, alone = text("hi\n\nthere\n"), text("hi\n")
    assert both.startswith(alone) and len(both) > len(alone)


def test_chat_with_nano_says_what_it_is() -> None:
    shown = upwell("chat")
    assert (shown.returncode, shown.stdout) == (0, NANO_NOTICE + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "x", "--model", "/nowhere"], "/nowhere"),
        (["run", "x", "--device", "tpu"], "no device 'tpu' (devices: auto, cpu"),
        (["run", "x", "--dtype", "int3"], "no dtype 'int3'"),
        (["run", "x", "--temperature", "-1"], "temperature is -1.0, must be a number at least 0"),
        (["ask", "x.csv"], "give a question or --questions FILE"),
        (["ask", "x.csv", "q", "--limit", "0"], "--limit is 0"),
        (["ask", "examples/sales.csv", "how many?", "--device", "tpu"], "no device 'tpu' (devices: auto, cpu"),
        (["ask", "x.csv", "--questions", "/nowhere.txt"], "/nowhere.txt: no such file"),
        (["serve", "--port", "99999"], "99999"),
    ],
)
def test_errors_are_one_line_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("upwell: ") and message in shown.err and shown.err.count("\n") == 1
    assert shown.out == ""


def _heed_interrupts() -> None:
    """A job in the background of a shell inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_with_130(tiny: str) -> None:
    command = [sys.executable, "-m", "upwell.cli", "run", "x", "--model", tiny, "--max-tokens", "5000", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
                               preexec_fn=_heed_interrupts)  # fmt: skip
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error


def test_a_reader_that_leaves_is_no_error(tiny: str) -> None:
    run = f"{sys.executable} -m upwell.cli run x --model {tiny} --max-tokens 400 --ignore-eos | head -c 1"
    ended = subprocess.run(["sh", "-c", run], capture_output=True, env=ENVIRONMENT)
    assert ended.returncode == 0 and ended.stderr == b""


def test_ask_shows_tables_that_line_up() -> None:
    rows = [["Zürich", 1234567.5, None], ["北京", 0.00012345, "a\nb\x1b[31m"], ["x" * 100, 3, "c"]]
    shown = ask.table(["city", "people", "note"], rows).split("\n")
    assert len(shown) == 5 and shown[2].split() == ["Zürich", "1,234,567.5", "-"]
    assert "0.0001234" in shown[3] and "\x1b" not in shown[3]
    assert {ask._width(line[: line.index(word)]) for line, word in zip(shown[2:], ["-", "a b", "c"], strict=True)} == {
        ask._width(shown[0][: shown[0].index("note")])
    }
    assert json.dumps({"d": ask._plain(date(2020, 1, 2))}) == '{"d": "2020-01-02"}'


class ScriptedAsker:
    """Stands where the analyst stands: these tests are about the command, not about the answers."""

    def __init__(self, device: str) -> None:
        assert device == "cpu"

    def open(self, path: Path, table: str | None = None) -> None:
        assert (path.name, table) == ("t.csv", None)

    def ask(self, question: str) -> Answer:
        if question == "too long":
            raise InputError("the question has 9 characters")
        if question == "write a poem":
            return Answer(question, "refused", message="That isn't a question this table can answer.")
        rows = [["a", 1], ["b", 2], ["c", 3]]
        return Answer(question, "answer", "n by x", "SELECT x, n FROM t", ["x", "n"], rows, 0.9)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upwell.analyst.ask.Asker", ScriptedAsker)


@pytest.mark.usefixtures("scripted")
def test_ask_prints_reading_sql_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "t.csv", "n by x", "--limit", "2"]) == 0
    table = "x  n\n-  -\na  1\nb  2"
    assert capsys.readouterr().out == f"n by x\n  SELECT x, n FROM t\n{table}\n... 1 more rows (--limit)\n"
    assert cli.main(["ask", "t.csv", "n by x", "--sql"]) == 0
    assert capsys.readouterr().out == "SELECT x, n FROM t\n"
    with pytest.raises(SystemExit):
        cli.main(["ask", "t.csv", "n by x", "--sql", "--json"])


@pytest.mark.usefixtures("scripted")
def test_ask_answers_a_file_of_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("n by x\n\nwrite a poem\ntoo long\n")
    assert cli.main(["ask", "t.csv", "--questions", str(questions), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["status"] for a in answers] == ["answer", "refused", "refused"]
    fields = {"question", "status", "reading", "sql", "columns", "rows", "confidence", "message"}
    assert all(set(a) == fields for a in answers)
    assert answers[0]["rows"] == [["a", 1], ["b", 2], ["c", 3]] and "9 characters" in answers[2]["message"]
    assert cli.main(["ask", "t.csv", "too long"]) == 2


def test_doctor_says_what_is_here_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    import platform

    import torch

    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["python"] == platform.python_version() and found["torch"] == torch.__version__
    assert found["devices"]["cpu"]["usable"] and found["threads"] == torch.get_num_threads()
    for name in ("cuda", "npu"):
        device = found["devices"][name]
        assert device["usable"] == getattr(torch, name, torch.cuda).is_available() or device["missing"]
        assert device["usable"] or name in device["missing"]
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        flags = set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
    if found["isa"] is not None and "UPWELL_KERNELS" not in os.environ:
        has = {"bf16": {"avx512_bf16", "avx512vbmi"} <= flags or "bf16" in flags,
               "int8": not flags.isdisjoint({"avx512_vnni", "asimddp"})}  # fmt: skip
        assert found["dots"] == [kind for kind, here in has.items() if here]
    with open("/proc/meminfo", encoding="utf-8") as lines:
        assert found["memory"]["total"] == int(next(lines).split()[1]) * 1024
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "kernels  CPU kernels: " in shown and torch.__version__ in shown and "\nnpu " in shown
