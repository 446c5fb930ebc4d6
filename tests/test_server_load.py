"""Five seconds of benchmarks/server_load.py: rude clients among 24 streams on a tiny V4 of random weights."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from served import Served
from tiny_v4 import build_llm

from upwell.server.responders import ModelResponder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from server_load import load, wait_until_free


def test_streams_among_rude_clients() -> None:
    server = Served(ModelResponder(build_llm(max_num_seqs=8, cache_tokens=8192, max_queue=100)))
    try:
        report = asyncio.run(load(server.port, streams=24, seconds=5, tokens=20))
        assert report.endings["finished"] > 20 and report.endings["left"] and report.endings["garbage"]
        assert report.statuses["200"] and not any(status.startswith("5") for status in report.statuses)
        assert report.different == 0, "a finished stream isn't what it is alone"
        assert asyncio.run(wait_until_free(server.port))
        server.wait_until_free()
    finally:
        server.stop()
