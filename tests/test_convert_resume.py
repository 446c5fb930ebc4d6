"""upwell convert --jobs, --shards, and runs that are killed: whatever happens, the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from upwell.checkpoint.convert import Conversion, convert
from upwell.checkpoint.recipes import Layout, Target
from upwell.checkpoint.resume import STATE
from upwell.checkpoint.save import Piece, split_evenly
from upwell.cli import main
from upwell.errors import CheckpointError, InputError

CASES = [("w8a8", "upwell", 1), ("w4a8", "upwell", 1), ("w4a8", "vllm-ascend", 3), ("w4a16", "upwell", 3)]


def files(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


# Kills itself with SIGKILL at the `last`-th of its steps: a shard's piece, a sync, a rename, a document.
RUN = """
import os, signal, sys
from pathlib import Path
from upwell.checkpoint import convert as module
source, out, to, layout, jobs = sys.argv[1:]
count = 0
def step():
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
def counted(function):
    def call(*args, **kwargs):
        step()
        return function(*args, **kwargs)
    return call
for name in ("fsync", "replace"):
    setattr(os, name, counted(getattr(os, name)))
Path.write_text, Path.unlink = counted(Path.write_text), counted(Path.unlink)
job = module.Conversion(Path(source), Path(out), to, layout, shards=4, jobs=int(jobs))
last, kills, finishing = 0, 0, False
while True:
    if not finishing and len(list(Path(out).glob("*.safetensors"))) == 4:  # from here on at every step again
        last, finishing = 0, True
    last += 1 if finishing or last < 8 else 11
    child = os.fork()
    if child == 0:
        module.convert(job, lambda done, total: step())
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status != signal.SIGKILL:
        print(kills, status)
        break
    kills += 1
"""


@pytest.mark.parametrize(("to", "layout", "jobs"), CASES)
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    official: Path, tmp_path: Path, to: Target, layout: Layout, jobs: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    convert(Conversion(official, whole, to, layout, shards=4, jobs=2))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", RUN, str(official), str(broken), to, layout, str(jobs)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    kills, status = map(int, ended.stdout.split())
    assert status == 0 and kills > 10, ended.stderr
    assert files(broken) == files(whole)


def test_whole_shards_are_kept_and_another_conversion_refused(official: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Conversion(official, tmp_path / "out", "w8a8", shards=4, jobs=1), stop)
    kept = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert kept and (tmp_path / "out" / STATE).is_file() and not (tmp_path / "out" / "config.json").exists()
    before = {file: file.stat().st_mtime_ns for file in kept}
    for other in (Conversion(official, tmp_path / "out", "bf16", shards=4),
                  Conversion(official, tmp_path / "out", "w8a8", shards=3)):  # fmt: skip
        with pytest.raises(InputError, match="another conversion stopped here"):
            convert(other)
    told: list[int] = []
    convert(Conversion(official, tmp_path / "out", "w8a8", shards=4, jobs=3), lambda done, total: told.append(done))
    assert {file: file.stat().st_mtime_ns for file in kept} == before  # whole shards aren't made again
    assert told == sorted(told) and told[0] >= sum(file.stat().st_size for file in kept) * 0.9


def test_a_shard_that_fails_ends_the_run_with_its_error(official: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(official, copy)

    def cut(done: int, total: int) -> None:  # after the headers were read
        if done > total * 0.3:
            os.truncate(copy / "model.safetensors", (copy / "model.safetensors").stat().st_size // 2)

    with pytest.raises(CheckpointError, match="the file ended while it was read"):
        convert(Conversion(copy, tmp_path / "out", "w8a8", shards=4, jobs=3), cut)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_as_many_as_asked_for(official: Path, tmp_path: Path, count: int) -> None:
    made = convert(Conversion(official, tmp_path / "out", "w4a8", shards=count))
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert made["files"] == len(sizes) == count
    assert max(sizes) < 1.5 * sum(sizes) / count


def test_uneven_pieces_leave_no_shard_empty() -> None:
    pieces = [Piece(((str(i), "U8", (size,)),), lambda: ()) for i, size in enumerate((1, 1, 1, 1000, 1))]
    for count in range(1, 6):
        split = split_evenly(pieces, count)
        assert len(split) == count and all(split) and [p for shard in split for p in shard] == pieces
    with pytest.raises(InputError, match="5 parts"):
        split_evenly(pieces, 6)


@pytest.mark.parametrize("flag", ["--jobs", "--shards"])
def test_numbers_below_one_are_refused(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main(["convert", str(official), str(tmp_path / "out"), "--to", "bf16", flag, "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "must be at least 1" in error


def test_disk_space_is_checked_first(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"GB to write, 0\.0 GB free"):
        convert(Conversion(official, tmp_path / "out", "bf16"))
    assert not list((tmp_path / "out").glob("*.safetensors"))
