"""An LLM for callers that wait, over the engine's thread: their prompts are computed beside everybody else's."""

from __future__ import annotations

import queue
from collections.abc import Sequence

from upwell.engine import Delta, EngineThread, RequestOutput, SamplingParams, Tokenizer, TokenMask
from upwell.engine.llm import Prompt
from upwell.engine.sequence import Request, Sink
from upwell.errors import InputError


class ThreadedLLM:
    """The part of LLM that the analyst needs. Any thread but the engine's may call it."""

    def __init__(self, thread: EngineThread, tokenizer: Tokenizer) -> None:
        self._thread, self.tokenizer = thread, tokenizer

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, token_mask: Sequence[TokenMask | None]
    ) -> list[RequestOutput]:
        """Complete each prompt (token ids) under its mask. Raises what the engine raises."""
        arrived: queue.SimpleQueue[tuple[RequestOutput, Delta]] = queue.SimpleQueue()

        def sink(output: RequestOutput) -> Sink:
            return lambda delta: arrived.put((output, delta))

        outputs: list[RequestOutput] = []
        running: list[Request] = []
        try:
            for prompt, mask in zip(prompts, token_mask, strict=True):
                if isinstance(prompt, str):
                    raise InputError("a prompt is text", "give its tokens")
                ids = list(prompt["prompt_token_ids"])
                outputs.append(RequestOutput.empty(None, ids, params))
                request = self._thread.engine.request(ids, params, sink(outputs[-1]), token_mask=mask)
                self._thread.submit(request)
                running.append(request)
            while not all(output.finished for output in outputs):
                output, delta = arrived.get()
                if delta.error is not None:
                    raise delta.error
                output.outputs[delta.index].add(delta)
        except BaseException:
            for request in running:
                self._thread.cancel(request)
            raise
        return outputs
