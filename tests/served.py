"""Servers for tests: an app on a free port in a thread, `upwell serve` as a process, and a scripted model.

Weights that say something sensible are far too large for a test. So where a test needs a reply with reasoning, calls or
JSON in it, the model is *scripted*: a tiny V4's engine (scheduler, cache, sampler, detokenizer, all of it) whose logits
are replaced, at the engine's runner, by ones that say a given text. Greedy or not, it says just that.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import anthropic
import httpx
import openai
import torch
import uvicorn
from tiny_v4 import EOS, build_llm
from torch import Tensor

from upwell.engine import LLM, Engine
from upwell.engine.sequence import Request
from upwell.server.app import create_app
from upwell.server.protocol import LimitedProtocol
from upwell.server.responders import ModelResponder, Responder
from upwell.server.settings import ServerSettings

Script = Callable[[str], str]
"""From a prompt to the reply."""


class Served:
    """An app on a free port, in a thread; with clients of both APIs."""

    def __init__(self, responder: Responder, name: str = "tiny", settings: ServerSettings | None = None, **more: Any):
        self.responder, self.name = responder, name
        self.app = create_app(responder, name, settings, **more)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, http=LimitedProtocol, ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=5
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0)

    @property
    def engine(self) -> Engine:
        assert isinstance(self.responder, ModelResponder)
        return self.responder.thread.engine

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **more)

    def wait_until_free(self) -> None:
        """Until no sequence holds a block: what a client left must be free within a step."""
        deadline = time.monotonic() + 30
        while (stats := self.engine.stats()).blocks_free < stats.blocks_total or stats.running or stats.waiting:
            assert time.monotonic() < deadline, f"blocks are still held: {stats}"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def scripted_llm(script: Script, **options: Any) -> LLM:
    """An LLM that replies to a prompt with `script(prompt)` and ends."""
    llm = build_llm(**({"max_num_seqs": 4, "cache_tokens": 8192, "enable_prefix_caching": False} | options))
    llm.engine.speculator = None  # it would read more from the model than the script says
    runner, tokenizer = llm.engine.runner, llm.tokenizer
    replies: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()

    def streams(batch: list[tuple[Any, int]]) -> Tensor:
        wanted = []
        for sequence, n in batch:
            prompt = sequence.request.prompt_token_ids
            if sequence.request not in replies:
                text = script(tokenizer.decode(prompt, skip_special_tokens=False))
                replies[sequence.request] = [*tokenizer.encode(text), EOS]
            reply = replies[sequence.request]
            said = sequence.computed + n - len(prompt)
            wanted.append(reply[min(max(said, 0), len(reply) - 1)])
        return torch.tensor(wanted)

    def logits(wanted: Tensor) -> Tensor:
        scores = torch.full((len(wanted), llm.engine.config.vocab_size), -50.0)
        scores[torch.arange(len(wanted)), wanted] = 50.0
        return scores

    runner.streams, runner.logits = streams, logits  # type: ignore[method-assign]
    runner.fork = lambda source, target: None  # type: ignore[method-assign]
    return llm


def spawn(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`upwell serve` as a user starts it; returns it and its URL once it says that it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "upwell.cli", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"serves (\S+) on (https?://\S+) ", line)
    assert match, line + (process.stderr.read() if process.stderr else "")
    return process, match[2]
