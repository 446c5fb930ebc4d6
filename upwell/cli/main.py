"""Parses the command line and runs one command. A command's module is imported only when it is named."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from upwell.errors import UpwellError

COMMANDS = {
    "ask": "answer a question from a table: CSV, Parquet, JSON, Excel, SQLite",
    "serve": "serve a model by the APIs of OpenAI and Anthropic",
    "key": "make an API key for the server",
    "run": "continue a prompt",
    "chat": "talk to a model",
    "bench": "measure prefill, decode or serving",
    "doctor": "show versions, kernels, memory and usable devices",
    "inspect": "show a model's layers, parameters, bytes and cache",
    "convert": "convert a checkpoint: BF16 or W8A8 for Ascend A2 and A3, FP8 or FP4",
    "eval": "measure a model's quality, and what a conversion lost",
    "verify": "compare a converted checkpoint with its checksums",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for the user's errors, 1 for ours, 130 for Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # An installed torch_npu would be imported by torch itself, and fail without CANN, whatever the device asked for.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    named = next((word for word in argv if word in COMMANDS), None)
    parser = _parser(named)
    try:
        arguments = parser.parse_args(argv)
        if arguments.version:
            from upwell.cli.version import describe

            print(describe())
            return 0
        if named is None or arguments.command is None:
            parser.print_help()
            return 0
        code: int | None = importlib.import_module(f"upwell.cli.{arguments.command}").run(arguments)
        sys.stdout.flush()
        return code or 0
    except UpwellError as error:
        print(f"upwell: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader is gone (`| head`). Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser(named: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="upwell", description="Run DeepSeek V4 on Ascend NPUs, CPUs and CUDA cards.")
    parser.add_argument("--version", action="store_true", help="show versions, device and kernels")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        if name == named:
            importlib.import_module(f"upwell.cli.{name}").add_parser(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser
