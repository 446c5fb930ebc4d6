"""Lowers every Triton kernel, at every tile size that the table can pick, for one chip of each family.

    python -m contract.triton_lower [KERNEL [SOC]]     in triton-ascend's venv; a line a kernel, exit status 1 on failure
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

from contract.lowering import lower
from upwell.devices.npu import chip
from upwell.ops.triton import attention, compress, hyper_connections, int4
from upwell.ops.triton.tiles import MEMORY, VECTOR_CORES, Tiles, tiles_of

SOCS = ("Ascend910B1", "Ascend910_9382", "Ascend950PR_9599")
STREAMS, HEADS_DIM, H = "*bf16", 512, 4
Instance = tuple[Any, dict[str, str], dict[str, Any]]


def instances(tiles: Tiles) -> Iterator[Instance]:
    """Kernel, types of its arguments, constants: what the launchers beside the kernels give for V4 in BF16."""
    numbers = dict.fromkeys
    yield (
        hyper_connections.project_kernel,
        {"streams": STREAMS, "fn": "*fp32", "partial": "*fp32", **numbers(("tokens", "width", "chunks"), "i32")},
        {"ROWS": (2 + H) * H, "PAD": 8 * H, "BK": tiles.project},
    )
    yield (
        hyper_connections.mix_kernel,
        {
            **numbers(("partial", "base", "scale", "mixed"), "*fp32"),
            **numbers(("tokens", "width", "chunks", "iterations"), "i32"), "eps": "fp32", "norm_eps": "fp32",
        },
        {"H": H, "G": 8, "BT": tiles.mix_tokens},
    )  # fmt: skip
    for dims in tiles.stream_dims:
        yield (
            hyper_connections.collapse_kernel,
            {"streams": STREAMS, "mixed": "*fp32", "out": STREAMS, **numbers(("tokens", "dim", "blocks"), "i32")},
            {"H": H, "PAD": 8 * H, "BD": dims},
        )
        yield (
            hyper_connections.expand_kernel,
            {
                **numbers(("streams", "output", "out"), STREAMS), "post": "*fp32", "comb": "*fp32",
                **numbers(("tokens", "dim", "blocks", "post_row", "comb_row"), "i32"),
            },
            {"H": H, "BD": dims},
        )  # fmt: skip
    for ratio, overlap in ((4, True), (128, False)):
        window = {"RATIO": ratio, "OVERLAP": overlap, "CHUNK": min(ratio, tiles.pool_slots)}
        for dims in tiles.pool_dims:
            yield (
                compress.pool_ring_kernel,
                {
                    **numbers(("kv", "gate", "out"), "*fp32"), "slots": "*i64", "positions": "*i64",
                    **numbers(("sequences", "dim", "blocks"), "i32"),
                },
                {**window, "RING": ratio * (1 + overlap), "BD": dims},
            )  # fmt: skip
            for prior in (True, False) if overlap else (False,):
                yield (
                    compress.pool_kernel,
                    {
                        **numbers(("kv", "gate", "prior_kv", "prior_gate", "out"), "*fp32"),
                        **numbers(("windows", "per_batch", "dim", "blocks"), "i32"),
                    },
                    {**window, "PRIOR": prior, "BD": dims},
                )  # fmt: skip
    for group in (0, 32):
        constants = {"BN": tiles.int4_rows, "BK": tiles.int4_bytes, "GROUP": group}
        yield (
            int4.product_kernel,
            {
                "rows": STREAMS, "packed": "*i8", "scales": "*fp32", "picks": "*i64", "row_scales": "*fp32",
                "out": STREAMS, **numbers(("pairs", "outputs", "half", "groups", "blocks"), "i32"),
            },
            {**constants, "ROW_SCALES": group == 0},
        )  # fmt: skip
        yield (
            int4.decode_kernel,
            {
                "packed": "*i8", "scales": "*fp32", "out": STREAMS if group else "*i8",
                **numbers(("outputs", "half", "row_blocks", "byte_blocks"), "i32"),
            },
            constants,
        )  # fmt: skip
    partial = numbers(("tops", "sums", "parts"), "*fp32")
    for ring in (True, False):
        yield (
            attention.attend_kernel,
            {
                "q": STREAMS, "keys": STREAMS, **numbers(("rows", "slots", "positions"), "*i64"), **partial,
                **numbers(("batch", "heads", "count", "splits", "per_split", "first_split", "all_splits"), "i32"),
                "scale": "fp32",
            },
            {"RING": ring, "D": HEADS_DIM, "BH": tiles.attend_heads, "BN": tiles.attend_keys},
        )  # fmt: skip
    yield (
        attention.combine_kernel,
        {**partial, "sink": "*fp32", "out": STREAMS, **numbers(("batch", "heads", "splits", "blocks"), "i32")},
        {"D": HEADS_DIM, "BH": tiles.combine_heads},
    )


def check(soc: str, instance: Instance) -> str | None:
    """What is wrong with a kernel on a chip, or None; prints a line."""
    kernel, arguments, constants = instance
    begun = time.perf_counter()
    try:
        lowered = lower(kernel, arguments, constants, soc)
        problem = lowered.problem
        memory = MEMORY[chip(soc).family]
        expected = {
            "UB_SIZE": 8 * memory.ub, "L1_SIZE": 8 * memory.l1, "L0C_SIZE": 8 * memory.l0c,
            "VECTOR_CORE_COUNT": VECTOR_CORES[soc],
        }  # fmt: skip
        if problem is None and not expected.items() <= lowered.spec.items():
            problem = f"the compiler's chip is another: {lowered.spec}"
    except Exception as error:
        problem = f"{type(error).__name__}: {getattr(error, 'stderr', None) or error}"
    sizes = " ".join(f"{name}={value}" for name, value in constants.items())
    seconds = time.perf_counter() - begun
    print(f"{soc:17} {kernel.__name__:16} {sizes:60} {seconds:5.1f} s  {problem or 'lowered'}", flush=True)
    return problem


def refuses_what_does_not_fit(soc: str) -> bool:
    """The check is worth something only if a tile beyond the chip's memory fails it."""
    kernel, arguments, constants = next(i for i in instances(Tiles(1)) if "BD" in i[2])
    problem = lower(kernel, arguments, {**constants, "BD": 1 << 16}, soc).problem
    return problem is not None and "ub overflow" in problem


def main(wanted: str = "", *socs: str) -> int:
    work = []
    for soc in socs or SOCS:
        tiles = tiles_of(chip(soc))
        assert tiles is not None
        work += [(soc, i) for i in instances(tiles) if wanted in i[0].__name__]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [problem for problem in pool.map(lambda w: check(*w), work) if problem is not None]
        blind = [soc for soc, refuses in zip(SOCS, pool.map(refuses_what_does_not_fit, SOCS), strict=True) if not refuses]
    print(f"{len(work) - len(failed)} of {len(work)} kernels lowered; a tile that doesn't fit is refused on "
          f"{len(SOCS) - len(blind)} of {len(SOCS)} chips")  # fmt: skip
    return 1 if failed or blind else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
