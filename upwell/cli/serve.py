"""upwell serve"""

from __future__ import annotations

import argparse
from typing import Any

from upwell.cli.model_flags import add_model_flags, add_prefix_cache_flags, add_speculation_flag, engine_options


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a model by OpenAI's API")
    add_model_flags(parser)
    add_prefix_cache_flags(parser)
    add_speculation_flag(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument("--served-model-name", metavar="NAME", help="name in the API (default: the directory's)")


def run(arguments: argparse.Namespace) -> int:
    from upwell.devices import resolve_dtype
    from upwell.server.run import serve

    dtype = resolve_dtype(arguments.dtype)
    serve(
        arguments.model, arguments.host, arguments.port, arguments.device, dtype, arguments.served_model_name,
        engine_options(arguments),
    )  # fmt: skip
    return 0
