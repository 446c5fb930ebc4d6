"""The server under load, on loopback: 200 streams with rude clients among them, and what HTTP costs beside the engine.

    python benchmarks/server_load.py                    # both bars on upwell-nano, about 4 minutes
    python benchmarks/server_load.py --seconds 5 --streams 20 --skip-cost

Two bars. Load: no 5xx, resident memory flat within 5% after the first 30 s, all blocks free at the end, and every
finished stream equal to its lone run, while a tenth of the clients leave in the middle, a tenth read slowly and a tenth
send garbage. Cost: 64 streams over HTTP reach at least 90% of the tokens a second that the engine alone makes of the
same requests with as many kernel threads, one less than there are cores. The CPU time a token is told beside it: it
can't hide behind a core that is otherwise idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
CASES = 16  # different requests
COST_STREAMS = 64
COST_TOKENS = 128
GARBAGE = (
    b"\x00\xff\x13 no HTTP at all\r\n\r\n",
    b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 6\r\n\r\n{"pro"',
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n",
    b"GET /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le",
)


@dataclass
class Report:
    """What a load run saw."""

    statuses: Counter[str] = field(default_factory=Counter)  # of all answers
    endings: Counter[str] = field(default_factory=Counter)  # finished, left, slow, garbage
    different: int = 0  # finished streams that aren't their lone run
    tokens: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds, resident bytes

    def growth(self, settled: float) -> float:
        """Largest later memory relative to that at `settled` seconds, minus 1."""
        later = [size for at, size in self.memory if at >= settled]
        return max(later) / later[0] - 1 if later else 0.0


def case(number: int, tokens: int) -> dict[str, Any]:
    """One of the requests, always the same for its number."""
    rng = random.Random(number)
    prompt = [rng.randrange(2, 250) for _ in range(rng.randrange(4, 60))]
    return {"prompt": prompt, "max_tokens": tokens + number, "seed": number, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip


async def send(port: int, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """POST a completion; returns the connection after the answer's head, and its status."""
    reader, writer = await asyncio.open_connection(HOST, port)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    answered = await reader.readuntil(b"\r\n\r\n")
    return reader, writer, int(answered.split(b" ", 2)[1])


def read_events(raw: bytes) -> tuple[str, int]:
    """Text and tokens of a whole streamed answer (chunked)."""
    text, tokens = [], 0
    for line in re.findall(rb"^data: (\{.*\})\r?$", raw, re.MULTILINE):
        event = json.loads(line)
        if "error" in event:
            return f"error: {event['error']['message']}", 0
        text += [choice["text"] for choice in event["choices"]]
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    return "".join(text), tokens


async def whole(port: int, body: dict[str, Any]) -> tuple[str, int, int]:
    reader, writer, status = await send(port, body)
    raw = await reader.read()
    writer.close()
    return *read_events(raw), status


async def client(port: int, lone: list[str], tokens: int, until: float, seed: int, report: Report) -> None:
    """One of the streams: asks again and again, in one of the manners."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        manner = rng.choices(("finished", "left", "slow", "garbage"), (7, 1, 1, 1))[0]
        number = rng.randrange(len(lone))
        try:
            if manner == "garbage":
                await rude(port, rng.choice(GARBAGE), report)
            else:
                reader, writer, status = await send(port, case(number, tokens))
                report.statuses[str(status)] += 1
                if manner == "left":
                    await asyncio.wait_for(reader.read(200), 60)
                    writer.transport.abort()
                else:
                    parts = []
                    while part := await reader.read(1 << 16 if manner == "finished" else 512):
                        parts.append(part)
                        if manner == "slow":
                            await asyncio.sleep(0.02)
                    writer.close()
                    text, made = read_events(b"".join(parts))
                    report.tokens += made
                    report.different += status == 200 and text != lone[number]
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            report.statuses[type(error).__name__] += 1
        report.endings[manner] += 1


async def rude(port: int, data: bytes, report: Report) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(data)
    with suppress(TimeoutError, ConnectionError):
        answer = await asyncio.wait_for(reader.read(1000), 0.5)
        if answer.startswith(b"HTTP/1.1 "):
            report.statuses[answer[9:12].decode()] += 1
    writer.transport.abort()


async def load(port: int, streams: int, seconds: float, tokens: int, process: psutil.Process | None = None) -> Report:
    """The lone runs first; then `streams` clients for `seconds`."""
    report = Report()
    lone = []
    for number in range(CASES):
        text, _, status = await whole(port, case(number, tokens))
        report.statuses[str(status)] += 1
        lone.append(text)
    began = time.monotonic()

    async def watch() -> None:
        while process is not None:
            report.memory.append((time.monotonic() - began, process.memory_info().rss))
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client(port, lone, tokens, began + seconds, k, report) for k in range(streams)))
    watcher.cancel()
    return report


async def metric(port: int, name: str) -> float:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    found = re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    assert found, f"no metric {name}"
    return float(found[1])


async def wait_until_free(port: int, seconds: float = 30.0) -> bool:
    """Whether the cache is empty within `seconds`."""
    until = time.monotonic() + seconds
    while await metric(port, "vllm:kv_cache_usage_perc") > 0 or await metric(port, "vllm:num_requests_running") > 0:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.1)
    return True


def cost_body(number: int, tokens: int) -> dict[str, Any]:
    return case(number, tokens) | {"max_tokens": tokens}


async def http_round(port: int, tokens: int) -> int:
    """COST_STREAMS streams, begun together; the tokens made."""
    bodies = [cost_body(k, tokens) for k in range(COST_STREAMS)]
    return sum(count for _, count, _ in await asyncio.gather(*(whole(port, body) for body in bodies)))


def engine_rounds(model: Path | None, tokens: int) -> None:
    """A round of the same requests by the engine alone for each line of stdin; prints tokens, seconds, CPU seconds."""
    from upwell import LLM, SamplingParams

    llm = LLM(model, device="cpu", max_num_seqs=COST_STREAMS, enable_prefix_caching=False)
    print("ready", flush=True)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        counted = Counter[str]()

        def sink(delta: Any, counted: Counter[str] = counted) -> None:
            counted["tokens"] += len(delta.token_ids)

        for k in range(COST_STREAMS):
            body = cost_body(k, tokens)
            params = SamplingParams(max_tokens=tokens, seed=body["seed"], ignore_eos=True)
            llm.engine.add(llm.engine.request(body["prompt"], params, sink))
        while llm.engine.has_work:
            llm.engine.step()
        print(counted["tokens"], time.perf_counter() - began, time.process_time() - cpu, flush=True)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def cost(model: Path | None, pairs: int, rounds: int) -> dict[str, Any]:
    """What HTTP takes of the engine's speed, medians over all rounds of all pairs of processes: one process may be a
    tenth faster than the next for as long as it lives, by where its memory lies."""
    threads = max(1, (os.cpu_count() or 1) - 1)
    speeds: dict[str, list[float]] = {name: [] for name in ("engine", "served", "engine_cpu", "served_cpu")}
    for _ in range(pairs):
        compare(model, rounds, threads, speeds)
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "streams": COST_STREAMS, "tokens": COST_TOKENS, "kernel_threads": threads, "samples": speeds,
        "percent": round(100 * (1 - middle["served"] / middle["engine"]), 1),
        "cpu_percent": round(100 * (1 - middle["served_cpu"] / middle["engine_cpu"]), 1),
    }  # fmt: skip


def compare(model: Path | None, rounds: int, threads: int, speeds: dict[str, list[float]]) -> None:
    """Rounds of the engine alone and of the server in turn. The kernels of both take all cores but one; that one is
    left to HTTP and to the client. Tokens a second, by the clock and by the process's CPU time (not the client's)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    again = [sys.executable, __file__, "--engine-only", *model_flag(model)]
    alone = subprocess.Popen(again, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    process, port = start(model, COST_STREAMS, "--no-enable-prefix-caching", env=environment)
    try:
        assert alone.stdin is not None and alone.stdout is not None
        alone.stdout.readline()
        watched = psutil.Process(process.pid)
        asyncio.run(http_round(port, 8))
        for _ in range(rounds):
            alone.stdin.write("\n")
            alone.stdin.flush()
            made, seconds, cpu = map(float, alone.stdout.readline().split())
            speeds["engine"].append(made / seconds)
            speeds["engine_cpu"].append(made / cpu)
            began, cpu = time.perf_counter(), cpu_seconds(watched)
            served = asyncio.run(http_round(port, COST_TOKENS))
            speeds["served"].append(served / (time.perf_counter() - began))
            speeds["served_cpu"].append(served / (cpu_seconds(watched) - cpu))
    finally:
        alone.kill()
        process.terminate()
        process.wait(60)


def model_flag(model: Path | None) -> list[str]:
    return ["--model", str(model)] if model else []


def start(
    model: Path | None, streams: int, *flags: str, env: dict[str, str] | None = None
) -> tuple[subprocess.Popen[str], int]:
    """`upwell serve` and its port."""
    command = [sys.executable, "-m", "upwell.cli", "serve", "--port", "0", "--max-num-seqs", str(COST_STREAMS),
               "--max-queue", str(4 * streams), *model_flag(model), *flags]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    found = re.search(r":(\d+) ", process.stdout.readline())
    assert found, "the server didn't start"
    return process, int(found[1])


def hold(
    process: subprocess.Popen[str], port: int, arguments: argparse.Namespace, bar: Callable[[str, Any, bool], None]
) -> None:
    """The load's bars."""
    watched = psutil.Process(process.pid)
    report = asyncio.run(load(port, arguments.streams, arguments.seconds, arguments.tokens, watched))
    bar("statuses", dict(report.statuses), not any(status.startswith("5") for status in report.statuses))
    bar("endings", dict(report.endings), report.endings["finished"] > 0)
    bar("streams_unlike_their_lone_run", report.different, report.different == 0)
    settled = min(30.0, arguments.seconds / 2)
    growth = report.growth(settled)
    bar(f"memory_growth_percent_after_{settled:g}_s", round(100 * growth, 2), growth <= 0.05)
    bar("all_blocks_free_at_the_end", (free := asyncio.run(wait_until_free(port))), free)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint with a tokenizer (default: upwell-nano)")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--cost-models", type=Path, nargs="+", help="for the cost (default: upwell-nano)")
    parser.add_argument("--rounds", type=int, default=3, help="of the cost, a pair (default: 3)")
    parser.add_argument("--pairs", type=int, default=3, help="of processes, for the cost (default: 3)")
    parser.add_argument("--skip-load", action="store_true")
    parser.add_argument("--skip-cost", action="store_true")
    parser.add_argument("--engine-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if arguments.engine_only:
        engine_rounds(arguments.model, COST_TOKENS)
        return
    from upwell.bench.record import cpu_name

    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "cpu": cpu_name(),
                              "passed": True}  # fmt: skip

    def bar(name: str, value: Any, ok: bool) -> None:
        result[name] = value
        result["passed"] &= ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {value}", flush=True)

    if not arguments.skip_cost:
        models = [("upwell-nano" if model is None else model.name, model) for model in arguments.cost_models or [None]]
        for name, model in models:
            result.setdefault("cost", {})[name] = told = cost(model, arguments.pairs, arguments.rounds)
            bar(f"http_cost_percent of {name}", told["percent"], told["percent"] <= 10)
            print(f"     {told['cpu_percent']} percent more CPU time a token", flush=True)
    if not arguments.skip_load:
        process, port = start(arguments.model, arguments.streams)
        try:
            hold(process, port, arguments, bar)
        finally:
            process.terminate()
            process.wait(60)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
