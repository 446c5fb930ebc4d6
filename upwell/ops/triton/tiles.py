"""How much of an operation a Triton kernel takes at a time, by chip: what fits its on-chip memory, twice where the
compiler overlaps loads with arithmetic. `make npu-triton` holds this table to the compiler's own."""

from __future__ import annotations

from dataclasses import dataclass

from upwell.devices.npu import Chip, Family

KIB = 1024


@dataclass(frozen=True)
class Memory:
    """On-chip memory of one core in bytes: the vector core's unified buffer (UB), the cube core's L1 and accumulator.

    Source: the device specification that bishengir-compile 1.2.0 (PyPI ascendnpu-ir) attaches to a module, in bits.
    """

    ub: int
    l1: int
    l0c: int


MEMORY: dict[Family, Memory] = {
    "a2": Memory(ub=192 * KIB, l1=512 * KIB, l0c=128 * KIB),
    "a3": Memory(ub=192 * KIB, l1=512 * KIB, l0c=128 * KIB),
    "950": Memory(ub=248 * KIB, l1=512 * KIB, l0c=256 * KIB),
}
# Vector cores by SoC, from the same specification; a cube core goes with two of them.
VECTOR_CORES = {
    "Ascend910B1": 48, "Ascend910B2": 48, "Ascend910B2C": 48, "Ascend910B3": 40, "Ascend910B4": 40,
    "Ascend910B4-1": 40, "Ascend910_9362": 40, "Ascend910_9372": 40, "Ascend910_9381": 48, "Ascend910_9382": 48,
    "Ascend910_9391": 48, "Ascend910_9392": 48, "Ascend950PR_950z": 8, "Ascend950PR_9579": 56,
    "Ascend950PR_957c": 56, "Ascend950PR_9589": 64, "Ascend950PR_9599": 72, "Ascend950DT_950x": 16,
    "Ascend950DT_9571": 56, "Ascend950DT_9581": 64, "Ascend950DT_9591": 72, "Ascend950DT_95A1": 72,
}  # fmt: skip
FEWEST_CORES = 40  # for a SoC that the list lacks; fewer programs than cores is slower, never wrong


@dataclass(frozen=True)
class Tiles:
    """Elements a program holds at once. `cores` is the number of vector cores: programs beyond it would queue.

    Where two sizes stand, (few, many): the smaller while the larger would leave cores idle.
    """

    cores: int
    project: int = 256  # mHC's projection: columns of fn, beside its 32 rows, FP32
    mix_tokens: int = 16
    stream_dims: tuple[int, int] = (256, 2048)  # of each of the h streams
    int4_rows: int = 16  # of a packed weight
    int4_bytes: int = 256  # of each such row
    pool_slots: int = 32  # of a window
    pool_dims: tuple[int, int] = (64, 256)
    attend_heads: int = 16
    attend_keys: int = 64
    combine_heads: int = 8


def tiles_of(chip: Chip) -> Tiles | None:
    """The tiles for a chip; None for one that the kernels aren't lowered for."""
    if chip.family not in MEMORY:
        return None
    return Tiles(cores=VECTOR_CORES.get(chip.soc, FEWEST_CORES))


def sized(sizes: tuple[int, int], width: int, rows: int, cores: int) -> int:
    """Of two tile sizes, the larger if `rows` of `width` elements cut by it still keep the cores busy."""
    few, many = sizes
    return many if rows * -(-width // many) >= cores else few
