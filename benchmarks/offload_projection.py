"""A projection, not a measurement: V4-Flash's decode on one Ascend card with its experts on the host or on disk.

    python benchmarks/offload_projection.py [--json OUT]

By bytes and bandwidths alone: what a step reads of dense weights at the card's memory, of the chosen experts at the
host's, of the missed ones at the disk's, and two transfers a layer, one after another: nothing overlaps. Of an official
checkpoint the card holds the dense weights in BF16 (A2 and A3 have no FP8), the host the experts in FP4. No card and no
Kunpeng server was at hand; every figure below says where it comes from, and None where none was found.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upwell.checkpoint.geometry import slots
from upwell.config import ModelConfig


@dataclass(frozen=True)
class Figure:
    """A number and its source; value None: not found."""

    value: float | None
    source: str


@dataclass(frozen=True)
class Card:
    name: str
    memory_gb: Figure
    memory_gb_s: Figure


@dataclass(frozen=True)
class Host:
    name: str
    memory_gb_s: Figure


WHITE_PAPER = "Ascend white paper as quoted in gitcode cann/ops-nn issue 6033"
PLUGIN = "Project-HAMi/ascend-device-plugin, ascend-device-configmap.yaml"
CARDS = (
    Card("Ascend 910B2 (A2)", Figure(64, WHITE_PAPER), Figure(1600, WHITE_PAPER)),
    Card("Ascend 910B3 (A2)", Figure(64, PLUGIN), Figure(None, "not found")),
    Card("Ascend 910B4 (A2)", Figure(32, PLUGIN), Figure(None, "not found")),
)
CHANNELS = "8 channels x 8 bytes x DDR4-2933 a socket: arithmetic, no vendor page at hand"
HOSTS = (
    Host("Kunpeng 920, 1 socket", Figure(187.7, CHANNELS)),
    Host("Kunpeng 920, 2 sockets", Figure(375.4, CHANNELS)),
)
DISKS = {"one NVMe drive, PCIe 4.0 x4": 6.5, "four of them": 26.0}  # GB/s, assumed
HIT_RATES = (0.5, 0.8, 0.95)
BATCHES = (1, 8)
ASSUMED = {
    "host_share": (0.70, "of the host's peak bandwidth that the CPU kernels reach (flash_geometry.py's bar)"),
    "card_share": (0.60, "of the card's bandwidth that small products reach"),
    "transfer_us": (30.0, "one activation to the host or back, launch included; no figure of the link was found"),
}  # fmt: skip


def expert_bytes(config: ModelConfig) -> int:
    """One FP4 expert with its scales."""
    codes = 3 * config.hidden_size * config.moe_intermediate_size
    return codes // 2 + codes // 32


def dense_bytes(config: ModelConfig) -> int:
    """What a step reads on the card, in BF16: all but experts, the hash layers' tables and the embedding."""
    read = [slot for slot in slots(config) if slot.kind not in ("expert", "table") and slot.name != "embed.weight"]
    return sum(slot.bf16_bytes for slot in read)


def active_experts(config: ModelConfig, batch: int) -> float:
    """Experts of a layer that `batch` tokens choose, if they choose independently and evenly."""
    n = config.n_routed_experts
    return n * (1 - (1 - config.num_experts_per_tok / n) ** batch)


def step_seconds(
    config: ModelConfig, card_gb_s: float, host_gb_s: float, batch: int, disk_gb_s: float | None = None,
    hits: float = 1.0,
) -> float:  # fmt: skip
    """Of one decode step. disk_gb_s None: all experts are in host memory."""
    layers = config.num_hidden_layers
    experts = layers * active_experts(config, batch) * expert_bytes(config)
    card = dense_bytes(config) / (card_gb_s * 1e9 * ASSUMED["card_share"][0])
    host = experts / (host_gb_s * 1e9 * ASSUMED["host_share"][0])
    disk = 0.0 if disk_gb_s is None else experts * (1 - hits) / (disk_gb_s * 1e9)
    return card + host + 2 * layers * ASSUMED["transfer_us"][0] * 1e-6 + disk


def project(config: ModelConfig) -> list[dict[str, Any]]:
    rows = []
    for card in CARDS:
        for host in HOSTS:
            for batch in BATCHES:
                places: list[tuple[str, float | None, float]] = [("host memory", None, 1.0)]
                places += [(disk, speed, hits) for disk, speed in DISKS.items() for hits in HIT_RATES]
                for place, speed, hits in places:
                    rate = None
                    if card.memory_gb_s.value is not None and host.memory_gb_s.value is not None:
                        seconds = step_seconds(
                            config, card.memory_gb_s.value, host.memory_gb_s.value, batch, speed, hits
                        )
                        rate = batch / seconds
                    rows.append({"card": card.name, "host": host.name, "batch": batch, "experts": place,
                                 "hit_rate": hits, "tok_s": rate})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = ModelConfig.preset("v4-flash").with_mtp(0)
    rows = project(config)
    print("PROJECTION of V4-Flash's decode, by bytes and bandwidths; nothing here ran on such a machine.")
    each = config.num_hidden_layers * expert_bytes(config) / 1e9
    print(f"on the card {dense_bytes(config) / 1e9:.1f} GB in BF16; experts {config.n_routed_experts * each:.0f} GB in "
          f"FP4, of which a token takes {config.num_experts_per_tok * each:.2f}")  # fmt: skip
    for name, (value, what) in ASSUMED.items():
        print(f"assumed {name} {value}: {what}")
    for row in rows:
        if row["tok_s"] is not None:
            print(f"{row['card']:18} {row['host']:23} batch {row['batch']}  {row['experts']:27} "
                  f"hit rate {row['hit_rate']:.2f}  {row['tok_s']:.1f} tok/s")  # fmt: skip
    for card in CARDS:
        if card.memory_gb_s.value is None:
            print(f"{card.name}: no figure of its memory's bandwidth found, nothing projected")
    if args.json is not None:
        record = {"projection": True, "model": "DeepSeek-V4-Flash", "cards": [asdict(c) for c in CARDS],
                  "hosts": [asdict(h) for h in HOSTS], "disks_gb_s": DISKS, "assumed": ASSUMED,
                  "dense_bytes": dense_bytes(config), "expert_bytes": expert_bytes(config), "rows": rows}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
