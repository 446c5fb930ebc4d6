"""upwell inspect: what a checkpoint or preset is, without loading it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from upwell.checkpoint.inspect import inspect_target


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="layers, parameters, bytes of weights and cache of a checkpoint or preset",
        description="Describe a checkpoint directory or a preset (v4-flash, v4-pro) without loading it.",
    )
    parser.add_argument("target", metavar="PATH|PRESET", help="a checkpoint directory, v4-flash or v4-pro")
    parser.add_argument("--json", action="store_true", help="print JSON; all sizes in bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = inspect_target(args.target)
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def render(facts: dict[str, Any]) -> str:
    """The facts of `inspect_target` as text for people."""
    layers, parameters, weights, cache = (facts[k] for k in ("layers", "parameters", "weight_bytes", "cache"))
    kinds = ", ".join(f"{layers[k]} {label}" for k, label in (("sliding", "sliding"), ("csa", "CSA"), ("hca", "HCA")))
    geometry = facts["geometry"]
    lines = [
        facts["target"],
        f"  layers       {layers['total']}: {kinds}; {layers['hash_routed']} hash-routed; MTP blocks: {layers['mtp']}",
        f"  shape        hidden {geometry['hidden_size']}, {geometry['num_attention_heads']} heads of "
        f"{geometry['head_dim']}, {geometry['n_routed_experts']} experts (top {geometry['num_experts_per_tok']}), "
        f"vocabulary {geometry['vocab_size']}",
        "",
        "  parameters              total      in experts          active   active w/o embedding",
        _row("    without MTP", parameters["total"], parameters["experts"], parameters["active"],
             parameters["active_without_embedding"]),
    ]  # fmt: skip
    if layers["mtp"]:
        lines.append(
            _row("    with MTP", parameters["total_with_mtp"], None, parameters["active_with_mtp"],
                 parameters["active_with_mtp_without_embedding"])
        )  # fmt: skip
    lines += ["", "  weights"]
    names = {"stored": "in this directory", "official": "official FP4/FP8", "bf16": "BF16"}
    lines += [f"    {label:<18} {_size(weights[key]):>12}" for key, label in names.items() if key in weights]
    lines += [
        "",
        f"  cache (BF16)   {cache['elements_per_token']:,} elements, {cache['bytes_per_token']:,} bytes a token",
        "    sequence        total   bytes/token   + compressor states",
    ]
    for name, row in cache["sequences"].items():
        lines.append(
            f"    {name:>8} {_size(row['total']):>12} {row['bytes_per_token']:>13,.0f} "
            f"{_size(row['compressor_states']):>21}"
        )
    return "\n".join(lines)


def _row(label: str, *counts: int | None) -> str:
    widths = (14, 16, 16, 23)
    return f"{label:<16}" + "".join(f"{_count(n):>{w}}" for n, w in zip(counts, widths, strict=True)).rstrip()


def _count(n: int | None) -> str:
    if n is None:
        return ""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:,.3f} {name}"
    return f"{n:,}"


def _size(n: float) -> str:
    for shift, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n >= 1 << shift:
            return f"{n / (1 << shift):,.2f} {name}"
    return f"{n:,.0f} B"
