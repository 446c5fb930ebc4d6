"""upwell run: continue a prompt, streaming."""

from __future__ import annotations

import argparse
from typing import Any

from upwell.cli.model_flags import (
    add_model_flags,
    add_parallel_flags,
    add_prefix_cache_flags,
    add_sampling_flags,
    add_speculation_flag,
    load_llm,
    sampling_params,
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("run", help="continue a prompt")
    parser.add_argument("prompt", help="text to continue")
    add_model_flags(parser)
    add_parallel_flags(parser)
    add_prefix_cache_flags(parser)
    add_speculation_flag(parser)
    add_sampling_flags(parser, max_tokens=256)


def run(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    llm = load_llm(arguments)
    for delta in llm.stream(arguments.prompt, params):
        print(delta.text, end="", flush=True)
    print()
    llm.close()
    return 0
