"""Ranks as processes, started as users start them: by Upwell itself and by torchrun; and what happens when one dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import psutil
import pytest
import torch

from upwell import LLM, SamplingParams, load_model
from upwell.devices.control import Follow, Lead
from upwell.engine import EngineThread
from upwell.engine.llm import nano_path
from upwell.errors import DeviceError, InputError, RankError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PROMPT = "SELECT a FROM t WHERE"


def single(max_tokens: int) -> str:
    llm = LLM.from_model(load_model(nano_path(), dtype=torch.float32), tokenizer=_tokenizer())
    return llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))[0].text


def _tokenizer() -> Any:
    from upwell.engine import Tokenizer

    return Tokenizer.from_directory(nano_path())


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "python" in p.name()]


def test_torchrun_starts_the_ranks_and_rank_0_prints(tmp_path: Path) -> None:
    load = tmp_path / "load.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "upwell", "run", PROMPT, "--model", str(nano_path()), "--ep", "2", "--expert-load", str(load),
        "--dtype", "float32", "--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == single(12) + "\n"
    tokens = len(_tokenizer().encode(PROMPT)) + 11  # the last one drawn is never computed
    counts = re.findall(r'"(\S+)": \[([^\]]*)\]', load.read_text())
    assert [name for name, _ in counts] == [f"layers.{i}" for i in range(6)] + ["mtp.0"]
    assert [sum(map(int, row.split(","))) for _, row in counts] == [2 * tokens] * 6 + [0]


def test_a_dead_rank_ends_the_server_with_one_line_and_503() -> None:
    command = [
        sys.executable, "-m", "upwell", "serve", "--model", str(nano_path()), "--dtype", "float32", "--port", "0",
        "--tp", "2", "--ep", "2", "--device", "cpu",
    ]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert server.stdout is not None and server.stderr is not None
    try:
        found = re.search(r"on (http://\S+) ", server.stdout.readline())
        assert found, server.stderr.read()
        url = found[1]
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        short = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert short.status_code == 200, short.text
        assert short.json()["choices"][0]["text"] == single(12)
        (follower,) = children(server)
        replies: list[httpx.Response] = []
        long = {**body, "max_tokens": 20000}

        def ask() -> None:
            replies.append(httpx.post(f"{url}/v1/completions", json=long, timeout=120))

        asking = threading.Thread(target=ask)
        asking.start()
        until = time.monotonic() + 60
        running = re.compile(r"num_requests_running\S* [1-9]")
        while not running.search(httpx.get(f"{url}/metrics").text) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        killed = time.monotonic()
        follower.send_signal(signal.SIGKILL)
        asking.join(30)
        assert time.monotonic() - killed < 30 and replies
        assert replies[0].status_code == 503
        assert "rank 1 of 2 ended" in replies[0].json()["error"]["message"]
        assert httpx.get(f"{url}/health").status_code == 503
        refused = httpx.post(f"{url}/v1/completions", json=body)
        assert refused.status_code == 503 and "rank 1 of 2 ended" in refused.json()["error"]["message"]
        assert server.wait(120) == 1  # 5 s it answers 503; the rest is the interpreter's end
        assert server.stderr.read() == "upwell: rank 1 of 2 ended (its part of the model is gone: start again)\n"
    finally:
        for process in [*children(server), server] if server.poll() is None else []:
            process.kill()
        server.wait()


def test_rank_0_s_end_is_that_of_all(tmp_path: Path) -> None:
    script = tmp_path / "leave.py"
    script.write_text(
        "import os, sys\nfrom upwell import LLM\nfrom upwell.engine.llm import nano_path\n"
        "if __name__ == '__main__':\n"
        "    llm = LLM(nano_path(), device='cpu', tp=2)\n"
        "    print(llm.lead.size, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    own: list[psutil.Process] = []
    until = time.monotonic() + 120
    while not own and time.monotonic() < until:
        own = children(process)
        time.sleep(0.05)
    assert process.stdout.readline() == "2\n"
    assert process.wait(30) == -9
    assert psutil.wait_procs(own, timeout=30)[1] == []


def test_a_rank_that_raises_is_told_with_its_words() -> None:
    llm = LLM(device="cpu", tp=2)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    assert llm.generate(PROMPT, params)[0].text == single(12)
    assert llm.lead is not None
    llm.lead.tell("nonsense", {})
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2 failed: AttributeError: .*nonsense"):
        llm.generate(PROMPT + " b > 3", params)
    assert time.monotonic() - began < 30
    llm.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def lines() -> tuple[Lead, list[Follow]]:
    lead = Lead(3)
    address = lead.listen("127.0.0.1")
    follows = [Follow(address, rank, ended=lambda: None) for rank in (1, 2)]
    lead.accept(30, lambda: None)
    return lead, follows


def test_commands_arrive_whole_and_answers_come_back() -> None:
    lead, follows = lines()
    tensors = [torch.randn(3, 4).bfloat16(), torch.empty(0, 5), torch.arange(7), torch.tensor(2.5)]
    lead.tell("do", {"n": [1, 2], "none": None}, tensors)
    for k, follow in enumerate(follows):
        message = follow.receive()
        assert (message.name, message.values) == ("do", {"n": [1, 2], "none": None})
        for got, want in zip(message.tensors, tensors, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
        follow.answer({"k": k})
    assert {rank: m.values["k"] for rank, m in lead.answers().items()} == {1: 0, 2: 1}
    lead.close()
    assert [follow.receive().name for follow in follows] == ["stop", "stop"]


@pytest.mark.parametrize("how", ["fails", "ends"])
def test_the_first_rank_to_go_is_named_and_the_others_are_let_go(how: str) -> None:
    gone = threading.Event()
    lead = Lead(3)
    address = lead.listen("127.0.0.1")
    follows = [Follow(address, 1, ended=lambda: None), Follow(address, 2, ended=gone.set)]
    lead.accept(30, lambda: None)
    heard: Queue[RankError] = Queue()
    lead.on_failure(heard.put)
    if how == "fails":
        follows[0].fail("ValueError: too hot")
    else:
        follows[0].close()
    error = lead.reason()
    assert str(error).startswith("rank 1 of 3 failed: ValueError: too hot" if how == "fails" else "rank 1 of 3 ended")
    assert error.http_status == 503 and error.exit_code == 1
    assert gone.wait(10)  # the other one's line is closed, at which its process ends
    assert heard.get(timeout=10) is error and heard.empty()
    with pytest.raises(RankError, match="rank 1 of 3"):
        lead.tell("do", {})
    with pytest.raises(RankError, match="rank 1 of 3"):
        lead.answers()
    late: list[RankError] = []
    lead.on_failure(late.append)
    assert late == [error]


def test_only_the_job_s_own_ranks_come_in() -> None:
    lead = Lead(2)
    host, port, secret = lead.listen("127.0.0.1").split()
    stranger = Follow(f"{host} {port} {'0' * 32}", 1, ended=lambda: None)
    own = Follow(f"{host} {port} {secret}", 1, ended=lambda: None)
    lead.accept(30, lambda: None)
    lead.tell("do", {})
    assert own.receive().name == "do"
    assert stranger._commands.empty()
    lead.close()


def test_a_lost_rank_ends_what_an_idle_or_stuck_engine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread waits in an exchange that never ends, as it may on a device."""
    from tiny_v4 import build_llm

    from upwell.engine import loop

    monkeypatch.setattr(loop, "GRACE_SECONDS", 0.2)
    error = RankError("rank 1 of 2 ended")
    idle = EngineThread(build_llm().engine)
    idle.lose(error)
    idle._thread.join(10)
    assert not idle.is_alive and not idle._thread.is_alive()
    llm, release = build_llm(), threading.Event()
    monkeypatch.setattr(llm.engine, "step", lambda: release.wait(60))
    stuck = EngineThread(llm.engine)
    ended, errors = threading.Event(), []

    def sink(delta: Any) -> None:
        errors.append(delta.error)
        ended.set()

    stuck.submit(llm.engine.request([5, 6], SamplingParams(max_tokens=4), sink))
    time.sleep(0.1)
    stuck.lose(error)
    assert ended.wait(10) and errors == [error] and not stuck.is_alive
    with pytest.raises(RankError):
        stuck.submit(llm.engine.request([5, 6], SamplingParams(max_tokens=4), sink))
    release.set()


def test_what_cannot_be_started_is_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="'cuda:1' is one device"):
        LLM(device="cuda:1", tp=2)
    with pytest.raises(InputError, match="num_attention_heads is 8, which tp 3"):
        LLM(device="cpu", tp=3)
    with pytest.raises(InputError, match="redundant_experts is 2, without ep"):
        LLM(device="cpu", redundant_experts=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="are 2 ranks, torchrun has started 4"):
        LLM(device="cpu", tp=2)
