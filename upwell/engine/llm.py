"""LLM: the Python entry. Loads a checkpoint and generates, in the calling thread; not to be shared by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Unpack

import torch

from upwell.chat.encoding import Thinking, encode_messages
from upwell.config import Numerics
from upwell.devices.control import Lead
from upwell.engine.engine import Engine, EngineOptions
from upwell.engine.outputs import Delta, RequestOutput
from upwell.engine.params import SamplingParams, TokenMask
from upwell.engine.sequence import Request
from upwell.engine.tokenizer import Tokenizer
from upwell.errors import CheckpointError, InputError
from upwell.model import Transformer

Prompt = str | Mapping[str, Any]
"""Text, or {"prompt_token_ids": [...]}, or {"prompt": text}."""


def nano_path() -> Path:
    """The embedded model's directory. Raises CheckpointError where this installation has none."""
    path = Path(str(resources.files("upwell"))) / "nano" / "weights"
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"the embedded model isn't in this installation: {path} has no config.json", "give a checkpoint directory"
        )
    return path


class LLM:
    """A V4 checkpoint ready to generate. No path: the embedded upwell-nano.

    offload "experts=host" leaves the routed experts in host memory, computed there; "experts=disk" pages them in, with
    at most `expert_memory` ("4GiB") of them in memory; `expert_usage` is a file that keeps which are used most.
    dtype None: FP32 on a CPU, else as the checkpoint has it; bfloat16 on a CPU rounds the operands of its kernels'
    products (docs/kernels.md). numerics "official" rounds activations as the official code does.
    kv_cache_dtype INT8 keeps the cache in INT8 on a CPU with kernels: a quarter of the memory (docs/kernels.md).
    `options` are Engine's: `max_num_seqs` sequences at once share a cache of `cache_tokens` tokens, and so on.

    tp, ep: so many processes, each with a part of the model (docs/parallel.md): tp splits heads and inner widths, ep
    leaves experts whole and sends tokens to them. `expert_load` is a file: experts are placed by the load it tells, and
    what this run counts is added to it at `close()`; `redundant_experts` more places of each layer are for hot ones.
    Where torchrun has started this process as another rank, this doesn't return: it serves rank 0, then exits.
    """

    lead: Lead | None = None  # rank 0's line to the others, where the model is shared

    def __init__(
        self,
        path: str | Path | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        numerics: Numerics = "exact",
        tp: int = 1,
        ep: int = 1,
        expert_load: str | Path | None = None,
        redundant_experts: int = 0,
        offload: str | None = None,
        expert_memory: str | int | None = None,
        expert_usage: str | Path | None = None,
        kv_cache_dtype: torch.dtype | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        from upwell.checkpoint.offload import parse_offload
        from upwell.engine import sharing

        away = parse_offload(offload, expert_memory, expert_usage)
        if away is not None and options.get("graphs"):
            raise InputError("graphs and offload don't go together", "a graph can't hold what the host computes")

        sharing.follow_if_told()
        where = nano_path() if path is None else Path(path)
        load = None if expert_load is None else Path(expert_load)
        shared = sharing.open_model(
            where, device, dtype, numerics, tp, ep, load, redundant_experts, away, kv_cache_dtype
        )
        try:
            self._start(shared.model, Tokenizer.from_directory(where), options)
        except BaseException:
            shared.close()
            raise
        self.lead = shared.lead
        self.engine.at_close.append(shared.close)

    @classmethod
    def from_model(
        cls, model: Transformer, tokenizer: Tokenizer | None = None, **options: Unpack[EngineOptions]
    ) -> LLM:
        """An LLM over a model that is in memory already."""
        llm = cls.__new__(cls)
        llm._start(model, tokenizer, options)
        return llm

    def close(self) -> None:
        """Finish what is written to disk, and end the other ranks. The LLM isn't used after it."""
        self.engine.close()

    def _start(self, model: Transformer, tokenizer: Tokenizer | None, options: EngineOptions) -> None:
        self.model = model.eval()
        self.engine = Engine(model, tokenizer, **options)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InputError for a directory without tokenizer.json."""
        if self.engine.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer.json", 'give {"prompt_token_ids": [...]}')
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        token_mask: TokenMask | Sequence[TokenMask | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the prompts' order. `token_mask`: one for all, or one a prompt."""
        items = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        masks = list(token_mask) if isinstance(token_mask, Sequence) else [token_mask] * len(items)
        if len(masks) != len(items):
            raise InputError(f"token_mask has {len(masks)} entries for {len(items)} prompts")
        params = params or SamplingParams()
        outputs, requests = [], []
        for item, mask in zip(items, masks, strict=True):
            output, request = self._prepare(item, params, mask)
            outputs.append(output)
            requests.append(request)
        failures: list[Exception] = []
        sinks = {id(request): _collect(output, failures) for request, output in zip(requests, outputs, strict=True)}
        for request in requests:
            request.sink = sinks[id(request)]
        try:
            for request in requests:
                self.engine.add(request)
            while not failures and not all(output.finished for output in outputs):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)
        if failures:
            raise failures[0]
        return outputs

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, token_mask: TokenMask | None = None
    ) -> Iterator[Delta]:
        """Complete one prompt, piece by piece. Closing the iterator cancels the request."""
        params = params or SamplingParams()
        _, request = self._prepare(prompt, params, token_mask)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[Delta]:
        arrived: deque[Delta] = deque()
        request.sink = arrived.append
        self.engine.add(request)
        open_outputs = request.params.n
        try:
            while open_outputs:
                while not arrived:
                    self.engine.step()
                delta = arrived.popleft()
                if delta.error is not None:
                    raise delta.error
                open_outputs -= delta.finish_reason is not None
                yield delta
        finally:
            self.engine.cancel(request)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        thinking: Thinking = "off",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> RequestOutput:
        """Answer a conversation of OpenAI-style messages. The text is the raw reply: chat.parsing takes it apart."""
        return self.generate([self.chat_prompt(messages, thinking, tools)], params)[0]

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: Thinking = "off",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Prompt:
        """The prompt V4 sees for a conversation."""
        text = encode_messages(messages, thinking=thinking, tools=tools)
        return {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text)}

    def reset_prefix_cache(self) -> None:
        """Forget computed prefixes: to be called when the model's weights have been changed in place."""
        if self.engine.prefix is not None:
            self.engine.prefix.clear()

    def _prepare(self, item: Prompt, params: SamplingParams, mask: TokenMask | None) -> tuple[RequestOutput, Request]:
        prompt, ids = self.tokens(item)
        request = self.engine.request(ids, params, sink=_nowhere, prompt=prompt, token_mask=mask)
        return RequestOutput.empty(prompt, ids, params), request

    def tokens(self, item: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, where it has one, and token ids. Raises InputError."""
        if isinstance(item, str):
            return item, self.tokenizer.encode(item)
        unknown = set(item) - {"prompt", "prompt_token_ids"}
        if unknown or not item:
            raise InputError(
                f"a prompt has the keys {sorted(item)}", 'it is text, {"prompt": text} or {"prompt_token_ids": [...]}'
            )
        text = item.get("prompt")
        if "prompt_token_ids" not in item:
            return text, self.tokenizer.encode(str(text))
        ids = list(item["prompt_token_ids"])
        if not all(isinstance(i, int) for i in ids):
            raise InputError("prompt_token_ids has something that isn't an integer")
        return text, ids


def _nowhere(delta: Delta) -> None:
    """The sink of a request that isn't running yet."""


def _collect(output: RequestOutput, failures: list[Exception]) -> Any:
    def sink(delta: Delta) -> None:
        output.outputs[delta.index].add(delta)
        if delta.error is not None:
            failures.append(delta.error)

    return sink
