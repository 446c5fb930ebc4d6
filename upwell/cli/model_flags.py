"""Flags that commands share: which model, where, and how it samples."""

from __future__ import annotations

import argparse
import gc
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upwell.engine import LLM, EngineOptions, SamplingParams


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="PATH", help="V4 checkpoint directory (default: upwell-nano)")
    add_device_flag(parser)
    parser.add_argument("--dtype", default="auto",
                        help="auto (FP32 on a CPU, else the checkpoint's), float32, bfloat16 (on a CPU: of its "
                        "products, faster where it has AVX512_BF16), float16")  # fmt: skip
    add_kv_cache_flag(parser)
    add_offload_flags(parser)


def add_kv_cache_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-cache-dtype", default="auto", metavar="auto|int8",
                        help="int8: a quarter of the cache's memory, on a CPU (default: auto)")  # fmt: skip


def add_offload_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("offload: where the model is larger than the device")
    group.add_argument("--offload", metavar="experts=host|disk",
                       help="routed experts stay in host memory, or are paged in from disk")  # fmt: skip
    group.add_argument("--expert-memory", metavar="SIZE", help="of experts on disk, keep so much in memory, e.g. 4GiB")
    group.add_argument("--expert-usage", type=Path, metavar="FILE",
                       help="keep there which experts are used most, and begin with those")  # fmt: skip


def add_device_flag(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument("--device", default=default, help=f"auto, cpu, cuda[:i], npu[:i] (default: {default})")


def add_prefix_cache_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prefix cache: prompts that begin alike are computed once")
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--prefix-cache-bytes", type=int, metavar="N", help="most it takes in memory (default: 1 GiB)")
    group.add_argument("--prefix-cache-dir", type=Path, metavar="PATH", help="keep it here too, over restarts")
    group.add_argument("--prefix-cache-disk-bytes", type=int, metavar="N", help="most it takes there (default: 16 GiB)")


def add_speculation_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--speculative-tokens", type=int, metavar="N",
                        help="draft up to N tokens a step (1 to 7) where that pays (default: none)")  # fmt: skip


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes with a part of the model each, on cards or a CPU's cores")
    group.add_argument("--tp", type=int, default=1, metavar="N", help="split heads and widths N ways (default: 1)")
    group.add_argument("--ep", type=int, default=1, metavar="N", help="keep experts whole, on N ranks (default: 1)")
    group.add_argument("--expert-load", type=Path, metavar="FILE",
                       help="place experts by the load it tells, and add what is counted now")  # fmt: skip
    group.add_argument("--redundant-experts", type=int, default=0, metavar="N",
                       help="N more places a layer, for copies of hot experts (default: 0)")  # fmt: skip


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """The engine's settings that were given."""
    from upwell.engine import EngineOptions

    given = {name: getattr(arguments, name, None) for name in EngineOptions.__annotations__}
    return EngineOptions(**{name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]


def add_sampling_flags(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens, help=f"most tokens to add (default: {max_tokens})")
    group.add_argument("--temperature", type=float, help="0 is greedy (default: 1)")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    group.add_argument("--presence-penalty", type=float)
    group.add_argument("--frequency-penalty", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None)


def load_llm(arguments: argparse.Namespace) -> LLM:
    from upwell.devices import resolve_dtype, resolve_kv_cache_dtype
    from upwell.engine import LLM

    dtype, cached = resolve_dtype(arguments.dtype), resolve_kv_cache_dtype(arguments.kv_cache_dtype)
    names = ("tp", "ep", "expert_load", "redundant_experts")
    shared = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    llm = LLM(
        arguments.model, device=arguments.device, dtype=dtype, kv_cache_dtype=cached, offload=arguments.offload,
        expert_memory=arguments.expert_memory, expert_usage=arguments.expert_usage, **shared,
        **engine_options(arguments),
    )  # fmt: skip
    gc.freeze()  # what is there now stays: a full collection would stop every stream for a tenth of a second to look
    return llm


def sampling_params(arguments: argparse.Namespace, skip_special_tokens: bool = True) -> SamplingParams:
    """The flags that were given; the rest keep SamplingParams' defaults."""
    from upwell.engine import SamplingParams

    names = [f.name for f in fields(SamplingParams) if f.default is not MISSING or f.default_factory is not MISSING]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    return SamplingParams(**given, skip_special_tokens=skip_special_tokens)
