"""upwell chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from upwell.cli.model_flags import (
    add_model_flags,
    add_parallel_flags,
    add_sampling_flags,
    load_llm,
    sampling_params,
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk to a model")
    add_model_flags(parser)
    add_parallel_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions for the whole conversation")
    parser.add_argument("--thinking", choices=["off", "high", "max"], default="off", help="reason before answering")
    add_sampling_flags(parser, max_tokens=2048)


def run(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        from upwell.chat.embedded import NANO_NOTICE

        print(NANO_NOTICE)
        return 0
    from upwell.chat import Content, Reasoning, ReplyParser

    params = sampling_params(arguments, skip_special_tokens=False)
    llm = load_llm(arguments)
    messages: list[dict[str, str]] = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    while (text := _read()) is not None:
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        parser = ReplyParser(arguments.thinking != "off", tools=False)
        said = {Reasoning: "", Content: ""}
        for delta in llm.stream(llm.chat_prompt(messages, arguments.thinking), params):
            events = parser.push(delta.text) + (parser.finish() if delta.finish_reason else [])
            for event in events:
                if isinstance(event, (Reasoning, Content)):
                    if isinstance(event, Content) and said[Reasoning] and not said[Content]:
                        print("\n---")  # where the reasoning ends and the answer begins
                    said[type(event)] += event.text
                    print(event.text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": said[Content], "reasoning_content": said[Reasoning]})
    llm.close()
    return 0


def _read() -> str | None:
    """The user's next line; None at the end of input. The prompt is shown to a person only."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
