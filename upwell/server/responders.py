"""Who answers: any V4 checkpoint through the engine's thread, or the embedded model, which has a trade of its own.

The APIs differ in their JSON; here a request is what they have in common, and a reply is its pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from upwell.chat import ReplyParser, encode_messages
from upwell.chat.embedded import NANO_NOTICE
from upwell.chat.encoding import Thinking
from upwell.chat.grammar import reply_grammar
from upwell.chat.parsing import Content, Event, ToolCall
from upwell.chat.protocol import DSML
from upwell.engine import LLM, Delta, EngineThread, SamplingParams, StructuredOutputs, TokenLogprob
from upwell.engine.mailbox import Inbox, PostOffice
from upwell.engine.outputs import FinishReason
from upwell.engine.stats import EngineStats
from upwell.errors import InputError
from upwell.server.errors import ContextLengthError

STREAM_INTERVAL = 0.1  # seconds between two events of a stream: what comes faster than anyone reads comes together


@dataclass(frozen=True)
class Conversation:
    """A chat in the APIs' common terms. `tools` are OpenAI's; `choice` is a mode, or the name of the one tool to call.

    `schema` is a JSON schema that the reply must follow. `continue_last`: the last message begins the reply.
    """

    messages: Sequence[Mapping[str, Any]]
    thinking: Thinking = "off"
    tools: Sequence[Mapping[str, Any]] = ()
    choice: Literal["auto", "none", "required"] | str = "auto"
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    continue_last: bool = False

    @property
    def offered(self) -> list[Mapping[str, Any]]:
        """The functions that the reply may call."""
        functions: list[Mapping[str, Any]] = [tool.get("function", tool) for tool in self.tools]
        if self.choice == "none":
            return []
        if self.choice in ("auto", "required"):
            return functions
        return [function for function in functions if function.get("name") == self.choice]

    def grammar(self, dsml_id: int | None = None) -> str | None:
        """The grammar of what follows the reasoning; None where its form is free. `dsml_id` as in reply_grammar."""
        offered = self.offered
        if self.choice not in ("auto", "none", "required") and not offered:
            raise InputError(f"tool_choice is {self.choice!r}, which isn't one of the tools")
        if self.choice == "required" and not offered:
            raise InputError("tool_choice is 'required', but there are no tools")
        if self.choice not in ("auto", "none"):
            return reply_grammar(None, offered, self.parallel, dsml_id)
        if self.schema is not None:
            return reply_grammar(self.schema, offered, self.parallel, dsml_id)
        return None


@dataclass(slots=True)
class Piece:
    """Part of choice `index` of a reply. `stop` is the stop string that ended it; its first and last tokens were made
    at `since` and `at`, by time.monotonic()."""

    index: int
    events: tuple[Event, ...] = ()
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | None = None
    at: float = 0.0
    since: float = 0.0


@dataclass
class Reply:
    """A reply under way, its pieces as they come, those of one moment together. `abandon` ends it at once, from the
    event loop; `pieces` then end early. `scheduled`: when it left the queue, by time.monotonic(); None if it hasn't."""

    prompt_tokens: int
    pieces: AsyncGenerator[list[Piece], None]
    abandon: Callable[[], None]
    scheduled: Callable[[], float | None]


class Responder(Protocol):
    max_model_len: int

    def chat(self, conversation: Conversation, params: SamplingParams) -> Reply:
        """Check the request (InputError) and start answering it. In the event loop."""

    def complete(self, prompt: str | list[int], params: SamplingParams) -> Reply:
        """Continue a text or its tokens."""

    def prompt_tokens(self, conversation: Conversation) -> list[int]:
        """The tokens of a conversation as the model reads it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def token_text(self, token_id: int) -> bytes:
        """The bytes of a token, for logprobs."""

    def stats(self) -> EngineStats: ...

    @property
    def is_healthy(self) -> bool: ...

    def close(self, timeout: float = 30.0) -> None:
        """Finish what runs, for at most `timeout` seconds, and take nothing new."""


class ModelResponder:
    """Any V4 checkpoint. `max_model_len`: the most tokens of a prompt and its reply, where less than the model's.
    `timeout`: seconds that a request may take in the engine."""

    def __init__(self, llm: LLM, max_model_len: int | None = None, timeout: float | None = None) -> None:
        self._llm = llm
        self._tokenizer = llm.tokenizer
        self._timeout = timeout
        longest = llm.engine.max_model_len
        if max_model_len is not None and not 1 <= max_model_len <= longest:
            raise InputError(f"max_model_len is {max_model_len}, must be from 1 to {longest}: model and cache")
        self.max_model_len = max_model_len or longest
        self.thread = EngineThread(llm.engine)
        dsml = self._tokenizer.id_of(DSML)
        self._dsml_id = dsml if dsml in self._tokenizer.special_ids else None
        self._office: PostOffice | None = None

    @property
    def is_healthy(self) -> bool:
        return self.thread.is_alive

    def close(self, timeout: float = 30.0) -> None:
        self.thread.stop(timeout)

    def stats(self) -> EngineStats:
        return self._llm.engine.stats()

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text)
        except (UnicodeEncodeError, TypeError):  # the library raises the one or the other
            raise InputError("the text has half of a surrogate pair in it", "send well-formed Unicode") from None

    def decode(self, ids: list[int]) -> str:
        vocabulary = self._llm.engine.config.vocab_size
        for token in ids:
            if not 0 <= token < vocabulary:
                raise InputError(f"tokens has {token}, which isn't in the vocabulary of {vocabulary}")
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_text(self, token_id: int) -> bytes:
        return self._tokenizer.bytes_of(token_id)

    def prompt_tokens(self, conversation: Conversation) -> list[int]:
        return self.encode(
            encode_messages(
                conversation.messages,
                thinking=conversation.thinking,
                tools=[] if conversation.choice == "none" else conversation.tools,
                response_format=conversation.schema,
                continue_last=conversation.continue_last,
            )
        )

    def chat(self, conversation: Conversation, params: SamplingParams) -> Reply:
        ids = self.prompt_tokens(conversation)
        # The special tokens stay in the text: </think> and the calls' markup are what the parser looks for.
        params = replace(params, skip_special_tokens=False)
        grammar = conversation.grammar(self._dsml_id)
        if grammar is not None:
            if params.structured_outputs is not None:
                raise InputError("structured_outputs is given beside a response format or a forced tool call")
            params = replace(params, structured_outputs=StructuredOutputs(grammar=grammar))
        thinking = conversation.thinking != "off" and not conversation.continue_last
        tools = bool(conversation.offered)
        parsers = [ReplyParser(thinking, tools) for _ in range(params.n)]
        return self._start(ids, params, parsers, conversation.parallel)

    def complete(self, prompt: str | list[int], params: SamplingParams) -> Reply:
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        return self._start(ids, params, [ReplyParser(False, False) for _ in range(params.n)])

    def _start(
        self, ids: list[int], params: SamplingParams, parsers: list[ReplyParser], parallel: bool = True
    ) -> Reply:
        room = self.max_model_len - len(ids)
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if wanted > room:
            raise ContextLengthError(len(ids), wanted, self.max_model_len)
        if params.max_tokens is None:
            params = replace(params, max_tokens=room)
        if self._office is None:
            self._office = PostOffice(self.thread, asyncio.get_running_loop(), STREAM_INTERVAL)
        inbox = Inbox()
        running = self.thread.engine.request(ids, params, self._office.sink(inbox), timeout=self._timeout)
        self.thread.submit(running)

        def abandon() -> None:
            self.thread.cancel(running)
            inbox.close()

        async def pieces() -> AsyncGenerator[list[Piece], None]:
            left = params.n
            outputs = [_Output(self._tokenizer.decode, params.stops, parser, parallel) for parser in parsers]
            try:
                while left and (deltas := await inbox.take()):
                    good, error = [], None
                    for delta in deltas:
                        if delta.error is not None:
                            error = delta.error
                            break
                        left -= delta.finish_reason is not None
                        good.append(outputs[delta.index].piece(delta))
                    if good:
                        yield good
                    if error is not None:
                        raise error
            finally:
                if left:
                    self.thread.cancel(running)

        return Reply(len(ids), pieces(), abandon, lambda: running.scheduled_at)


class _Output:
    """One completion's deltas, parsed."""

    def __init__(self, decode: Callable[..., str], stops: Sequence[str], parser: ReplyParser, parallel: bool) -> None:
        self._decode, self._stops, self._parser, self._parallel = decode, stops, parser, parallel
        self._ids: list[int] = []

    def piece(self, delta: Delta) -> Piece:
        events = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish()
        if not self._parallel:  # one call was asked for: the first counts
            events = [event for event in events if not isinstance(event, ToolCall) or event.index == 0]
        if self._stops:
            self._ids += delta.token_ids
        stop = self._stopped_by() if delta.finish_reason == "stop" else None
        since = delta.at if delta.since is None else delta.since
        return Piece(delta.index, tuple(events), len(delta.token_ids), delta.logprobs, delta.finish_reason, stop,
                     delta.at, since)  # fmt: skip

    def _stopped_by(self) -> str | None:
        """The stop string in the last tokens: the text itself ends before it."""
        if not self._stops:
            return None
        longest = max(len(stop.encode()) for stop in self._stops)
        tail = self._decode(self._ids[-longest - 1 :], skip_special_tokens=False)
        found = [(tail.find(stop), stop) for stop in self._stops if stop in tail]
        return min(found)[1] if found else None


class NanoResponder(ModelResponder):
    """upwell-nano: a chat that shows a table's schema gets a query; every other one hears what the model is.

    `write_query` reads messages and gives a query, or None where they show no schema. It runs in a thread of its own.
    """

    def __init__(self, llm: LLM, max_model_len: int | None = None, timeout: float | None = None) -> None:
        super().__init__(llm, max_model_len, timeout)
        self.write_query: Callable[[Sequence[Mapping[str, Any]]], str | None] | None = None

    def chat(self, conversation: Conversation, params: SamplingParams) -> Reply:
        prompt = self.prompt_tokens(conversation)  # refuses what a model would refuse
        if conversation.grammar() is not None or params.structured_outputs is not None:
            raise InputError(
                "upwell-nano writes no JSON and calls no tools", "start Upwell with a V4 checkpoint: --model PATH"
            )

        async def pieces() -> AsyncGenerator[list[Piece], None]:
            query = None
            if self.write_query is not None:
                query = await asyncio.to_thread(self.write_query, conversation.messages)
            for index in range(params.n):
                tokens = 0 if query is None else len(self.encode(query))
                yield [Piece(index, (Content(query or NANO_NOTICE),), tokens, finish_reason="stop")]

        return Reply(len(prompt), pieces(), lambda: None, lambda: None)
