"""upwell serve"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upwell.cli.model_flags import (
    add_model_flags,
    add_parallel_flags,
    add_prefix_cache_flags,
    add_speculation_flag,
    load_llm,
)
from upwell.errors import InputError

if TYPE_CHECKING:
    from upwell.server.responders import ModelResponder

NANO_NAME = "upwell-nano"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a model by the APIs of OpenAI and Anthropic")
    add_model_flags(parser)
    parser.add_argument("--served-model-name", nargs="+", metavar="NAME",
                        help="names in the API, the first its own (default: the directory's)")  # fmt: skip
    parser.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of a prompt and its reply")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences that run at once")
    parser.add_argument("--max-queue", type=int, metavar="N", help="most requests that wait; more are refused with 429")
    parser.add_argument("--request-timeout", type=float, metavar="S", help="seconds a request may take in the engine")
    add_parallel_flags(parser)
    add_prefix_cache_flags(parser)
    add_speculation_flag(parser)
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    network.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    network.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM: serve HTTPS")
    network.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's key, PEM")
    network.add_argument("--allowed-origins", nargs="+", default=[], metavar="ORIGIN",
                         help="web pages of these origins may call the API (CORS; default: none)")  # fmt: skip
    network.add_argument("--max-body-mib", type=int, default=32, metavar="N", help="largest request (default: 32)")
    network.add_argument("--drain-timeout", type=float, default=30.0, metavar="S",
                         help="seconds that running requests get after SIGTERM (default: 30)")  # fmt: skip
    access = parser.add_argument_group("access")
    access.add_argument("--api-key", action="append", default=[], metavar="KEY", help="ask for this key; repeatable")
    access.add_argument("--api-keys-file", type=Path, metavar="FILE", help="hashed keys, one a line (`upwell key`)")
    access.add_argument("--insecure", action="store_true", help="let other machines ask without a key")
    watching = parser.add_argument_group("logs")
    watching.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="warning",
                          help="info logs each request (default: warning)")  # fmt: skip
    watching.add_argument("--log-format", choices=["text", "json"], default="text")
    watching.add_argument("--audit-log", type=Path, metavar="FILE", help="append a JSON line a request")
    watching.add_argument("--audit-prompts", action="store_true", help="with the prompts")
    watching.add_argument("--otlp-traces-endpoint", metavar="URL", help="send OpenTelemetry traces there")


def run(arguments: argparse.Namespace) -> int:
    from upwell.engine.sharing import follow_if_told
    from upwell.server.app import create_app
    from upwell.server.run import Listener, open_listener, serve, stop_when_lost, with_allowed_hosts
    from upwell.server.settings import ServerSettings

    for name in ("max_body_mib", "drain_timeout", "request_timeout", "max_num_seqs"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name.replace('_', '-')} is {value:g}, must be above 0")
    if arguments.audit_prompts and arguments.audit_log is None:
        raise InputError("--audit-prompts is given without --audit-log")
    follow_if_told()
    listener = Listener(
        arguments.host, arguments.port, arguments.tls_cert, arguments.tls_key, arguments.insecure,
        arguments.log_level, arguments.log_format,
    )  # fmt: skip
    settings = ServerSettings(
        api_keys=tuple(arguments.api_key),
        api_keys_file=arguments.api_keys_file,
        allowed_origins=tuple(arguments.allowed_origins),
        audit_log=arguments.audit_log,
        audit_prompts=arguments.audit_prompts,
        max_body=arguments.max_body_mib * 2**20,
        drain_timeout=arguments.drain_timeout,
        otlp_endpoint=arguments.otlp_traces_endpoint,
    )
    settings = with_allowed_hosts(listener, settings)
    bound = open_listener(listener, settings)
    names = arguments.served_model_name or [NANO_NAME if arguments.model is None else arguments.model.resolve().name]
    responder = _responder(arguments)
    app = create_app(responder, names, settings)
    stop_when_lost(app, responder.thread)
    serve(app, bound, listener, settings, names)
    if responder.thread.lost is not None:
        raise responder.thread.lost
    return 0


def _responder(arguments: argparse.Namespace) -> ModelResponder:
    from upwell.server.responders import ModelResponder, NanoResponder

    llm = load_llm(arguments)
    if arguments.model is not None:
        return ModelResponder(llm, arguments.max_model_len, arguments.request_timeout)
    from upwell.analyst.schema_text import QueryWriter
    from upwell.server.blocking import ThreadedLLM

    responder = NanoResponder(llm, arguments.max_model_len, arguments.request_timeout)
    responder.write_query = QueryWriter(ThreadedLLM(responder.thread, llm.tokenizer)).write
    return responder
