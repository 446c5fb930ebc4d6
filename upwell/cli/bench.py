"""upwell bench: how fast a model runs here."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from upwell.cli.model_flags import add_model_flags
from upwell.errors import InputError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure prefill, decode or serving")
    kinds = parser.add_subparsers(dest="bench", required=True, metavar="prefill|decode|serve")
    prefill = kinds.add_parser("prefill", help="tokens a second of prompts")
    prefill.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="lengths (default: 512 2048)")
    prefill.add_argument("--batch", type=int, default=1, help="prompts at once (default: 1)")
    decode = kinds.add_parser("decode", help="tokens a second of completions")
    decode.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences at once (default: 1 8)")
    decode.add_argument("--context", type=int, default=512, help="tokens before them (default: 512)")
    decode.add_argument("--steps", type=int, default=64, help="tokens a sample (default: 64)")
    serve = kinds.add_parser("serve", help="many requests together, and what a long prompt does to them")
    serve.add_argument("--requests", type=int, default=64, help="default: 64")
    serve.add_argument("--prompt-tokens", type=int, nargs=2, default=[16, 512], metavar=("LEAST", "MOST"))
    serve.add_argument("--output-tokens", type=int, nargs=2, default=[32, 256], metavar=("LEAST", "MOST"))
    serve.add_argument("--joining-tokens", type=int, default=4096, help="prompt that joins; 0: none (default: 4096)")
    serve.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                       help="cpu: CPU time of one thread, where others use the machine too")  # fmt: skip
    for kind in (prefill, decode, serve):
        add_model_flags(kind)
        rounds = 3 if kind is serve else 7
        kind.add_argument("--rounds", type=int, default=rounds, help=f"samples (default: {rounds})")
        kind.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
        kind.add_argument("--json", action="store_true", help="print the whole record as JSON")
        kind.add_argument("--plot", type=Path, metavar="FILE", help="draw the record: .png, .svg or .pdf")
    for kind in (prefill, decode):
        kind.add_argument("--compare", choices=["transformers"], help="the same weights through another engine too")


def run(arguments: argparse.Namespace) -> int:
    numbers = {name: value for name, value in vars(arguments).items() if name in _LEAST and value is not None}
    for name, value in numbers.items():
        for one in value if isinstance(value, list) else [value]:
            if one < _LEAST[name]:
                raise InputError(f"--{name.replace('_', '-')} is {one}, must be at least {_LEAST[name]}")

    from upwell.bench.record import header, result

    model, where = _model(arguments)
    rows = _serve(arguments, model) if arguments.bench == "serve" else _forward(arguments, model)
    record = result(arguments.bench, ["upwell", *sys.argv[1:]], model, where, rows)
    if arguments.json:
        print(json.dumps(record, indent=1))
    else:
        print(header(record))
        print(_table(arguments.bench, rows))
    if arguments.plot is not None:
        from upwell.bench.plot import plot

        plot(record, arguments.plot)
    return 0


_LEAST = {
    "tokens": 1, "batch": 1, "context": 1, "steps": 1, "requests": 1, "prompt_tokens": 1, "output_tokens": 1,
    "joining_tokens": 0, "rounds": 1, "threads": 1,
}  # fmt: skip


def _model(arguments: argparse.Namespace) -> tuple[Any, str]:
    import torch

    from upwell.bench.forward import place
    from upwell.cli.model_flags import load_llm

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return load_llm(arguments).model, place(arguments.model)


def _forward(arguments: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    import torch

    from upwell.bench import forward

    batch = arguments.batch if isinstance(arguments.batch, int) else max(arguments.batch)
    longest = max(arguments.tokens) if arguments.bench == "prefill" else arguments.context
    most = model.config.max_position_embeddings
    if longest > most:
        raise InputError(f"{longest} tokens are more than the model's {most}")
    ids = torch.randint(2, model.config.vocab_size, (batch, longest), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    ours = forward.Ours(model)
    sides: list[forward.Runs] = [ours]
    if arguments.compare is not None:
        theirs = forward.Transformers(model)
        share = forward.agreement(ours, theirs, ids[:1, :64])
        print(f"logits agree to {share:.1e} of their scale", file=sys.stderr)
        exact = model.dtype == model.products == torch.float32  # and no integers, whose inputs are rounded
        exact &= all(parameter.dtype not in (torch.int8, torch.uint8) for parameter in model.parameters())
        if not share < (1e-3 if exact else 0.1):
            raise InputError(f"transformers' logits differ by {share:.1e} of their scale: not the same model")
        sides.append(theirs)
    if arguments.bench == "prefill":
        return forward.prefill(sides, ids, arguments.tokens, arguments.rounds)
    return forward.decode(sides, ids, arguments.batch, arguments.steps, arguments.rounds)


def _serve(arguments: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    from upwell.bench.serve import Load, serve

    for name in ("prompt_tokens", "output_tokens"):
        least, most = getattr(arguments, name)
        if least > most:
            raise InputError(f"--{name.replace('_', '-')} {least} {most}: the first is the least")
    clock = time.perf_counter
    if arguments.clock == "cpu":
        import torch

        if torch.get_num_threads() != 1:
            raise InputError("--clock cpu measures one thread", "add --threads 1")
        clock = time.thread_time
    load = Load(
        arguments.requests, tuple(arguments.prompt_tokens), tuple(arguments.output_tokens), arguments.joining_tokens,
        clock=clock,
    )  # fmt: skip
    return serve(model, load, arguments.rounds, lambda line: print(line, file=sys.stderr))


def _table(bench: str, rows: list[dict[str, Any]]) -> str:
    from upwell.bench.record import table

    if bench != "serve":
        first = {row["name"]: row for row in reversed(rows)}  # ours comes first
        lines = [["", "", "tokens/s", "slowest", "fastest", "ours is"]]
        for row in rows:
            ours = first[row["name"]]
            ratio = "" if row is ours else f"{ours['tokens_per_second'] / row['tokens_per_second']:.1f}x"
            numbers = [f"{row[key]:,.0f}" for key in ("tokens_per_second", "slowest", "fastest")]
            lines.append([row["name"], row["engine"], *numbers, ratio])
        return table(lines)
    speeds = [["", "tokens/s", "slowest", "fastest", "ratio"]]
    times = [["", "p50 ms", "p99 ms", "most ms"]]
    notes = []
    for row in rows:
        if "samples" in row:
            ratio = f"{row['ratio']:.1f}x" if "ratio" in row else ""
            three = (row["tokens_per_second"], min(row["samples"]), max(row["samples"]))
            speeds.append([row["name"], *(f"{n:,.0f}" for n in three), ratio])
        else:
            times.append([row["name"], *(f"{1000 * row[key]:,.2f}" for key in ("p50", "p99", "most"))])
        if "p99_over_median_before" in row:
            notes.append(f"while it joins, p99 is {row['p99_over_median_before']:.1f}x the median before and "
                         f"{row['p99_over_median']:.1f}x the median then; its first token came after "
                         f"{row['first_token_of_joining']:.2f} s")  # fmt: skip
    return "\n\n".join([table(speeds), table(times), *notes])
