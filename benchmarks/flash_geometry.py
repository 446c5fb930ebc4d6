"""Decode at the true layer geometry of V4-Flash, on a CPU, straight from packed weights, against memory's own speed.

    python benchmarks/flash_geometry.py [--weights official|w8a8|w4a8] [--gib 8] [--layers 3] [--steps 24]
                                        [--threads N] [--json OUT]

Preset v4-flash with fewer layers (sliding, CSA, HCA in turn) and as many experts a layer as fit in --gib of weights in
the official formats: FP4 experts, FP8 matrices, BF16 the rest; or in those of `upwell convert --to w8a8` (or w4a8),
which Ascend A2 and A3 compute. Weights are random, but of sane spread. Requests go
through the engine; a step is timed from outside. In the same run, all weights are read once by a plain loop on the same
threads: its speed is the bar that decoding's bytes a second are measured by. The last table is a projection to all of
Flash, by bytes alone. Nothing is written but OUT. Without a quiet machine the figures mean little.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upwell.bench.record import cpu_name
from upwell.checkpoint.recipes import integer_format
from upwell.config import ModelConfig
from upwell.engine import LLM, SamplingParams
from upwell.formats.fp8 import scale_shape
from upwell.model import Transformer
from upwell.model.layers import Linear
from upwell.ops import native
from upwell.ops.rope import inverse_frequencies

BARS = {"share of a plain read, batch 1": 0.70, "batch 8 over batch 1": 2.5}
KINDS = {0: "sliding", 4: "CSA", 128: "HCA"}
BATCHES = (1, 8)
PROMPT = 16
# Peak bandwidth, GB/s: channels x 8 bytes x rate. A plain read reaches less than the peak.
HOSTS = {
    "Kunpeng 920, 1 socket, 8 x DDR4-2933": 187.7,
    "Kunpeng 920, 2 sockets": 375.4,
    "EPYC 9004, 1 socket, 12 x DDR5-4800": 460.8,
    "desktop, 2 x DDR5-5600": 89.6,
}


class Pool:
    """Random codes made once, from which every weight is a copy: gigabytes take seconds."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.offset = 0
        count = 1 << 23
        noise = torch.randn(count, generator=generator)
        self.codes = {
            torch.uint8: torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator),
            # A block's largest value lies near e4m3's 448, as its scale is chosen so.
            torch.float8_e4m3fn: (noise * 90).clamp(-448, 448).to(torch.float8_e4m3fn),
            torch.bfloat16: (noise * 0.015).bfloat16(),
            torch.float32: noise * 0.005,
            torch.int8: (noise * 30).round().clamp(-127, 127).to(torch.int8),
        }

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        flat, source = out.view(-1), self.codes[dtype]
        at = 0
        while at < flat.numel():
            begin = self.offset % (source.numel() // 2)
            n = min(flat.numel() - at, source.numel() - begin)
            flat[at : at + n] = source[begin : begin + n]
            at, self.offset = at + n, self.offset + 7919 * 64
        return out

    def scales(self, shape: tuple[int, ...], exponent: int) -> Tensor:
        """UE8M0 around 2^exponent."""
        return self.codes[torch.uint8][: torch.Size(shape).numel()].view(shape) % 2 + (127 + exponent)


def rows_of_integers(pool: Pool, shape: tuple[int, ...], integer: str) -> tuple[Tensor, Tensor]:
    """INT8, or INT4 two a byte, of shape [..., out, in], and a scale a row."""
    if integer == "int8":
        return pool.take(shape, torch.int8), torch.full(shape[:-1], 0.0005)
    return pool.take((*shape[:-1], shape[-1] // 2), torch.uint8), torch.full(shape[:-1], 0.003)


def expert(pool: Pool, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return pool.take((rows, cols // 2), torch.uint8), pool.scales((rows, cols // 32), -8)


def fill(model: Transformer, pool: Pool, weights: str) -> None:
    """Give a model on the meta device its weights."""
    c = model.config
    fp8 = {"wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3"}
    for path, module in model.named_modules():
        leaf = path.rsplit(".", 1)[-1]
        if isinstance(module, Linear):
            shape = (module.out_features, module.in_features)
            integer = None if weights == "official" else integer_format(f"{path}.weight", weights, "upwell")
            if integer is not None:
                weight, module.scale = rows_of_integers(pool, shape, integer)
            elif weights == "official" and leaf in fp8 and "compressor" not in path:
                weight = pool.take(shape, torch.float8_e4m3fn)
                module.scale = pool.scales(scale_shape(*shape), -13)
            else:
                weight = pool.take(shape, torch.bfloat16)
            module.weight = nn.Parameter(weight, False)
            continue
        if leaf == "experts":
            i, d = c.moe_intermediate_size, c.hidden_size
            if weights != "official":
                integer = integer_format(f"{path}.0.w1.weight", weights, "upwell") or ""
                w13, module.w13_scale = rows_of_integers(pool, (c.n_routed_experts, 2 * i, d), integer)
                w2, module.w2_scale = rows_of_integers(pool, (c.n_routed_experts, d, i), integer)
                module.w13, module.w2 = nn.Parameter(w13, False), nn.Parameter(w2, False)
                continue
            shapes = {"w1": (i, d), "w2": (d, i), "w3": (i, d)}
            module.pack([{name: expert(pool, *s) for name, s in shapes.items()} for _ in range(c.n_routed_experts)])
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if leaf == "embed":  # a window over random numbers: a step reads one row of it
                value = torch.randn(c.vocab_size + c.hidden_size).as_strided(tuple(parameter.shape), (1, 1))
            elif leaf == "gate":
                value = pool.take(tuple(parameter.shape), torch.bfloat16)
            elif name == "fn":
                value = pool.take(tuple(parameter.shape), torch.float32)
            else:
                value = torch.ones(parameter.shape) if name == "weight" else torch.zeros(parameter.shape)
            module._parameters[name] = nn.Parameter(value, False)
        for name, buffer in list(module._buffers.items()):
            if name == "tid2eid" and buffer is not None:
                table = torch.rand(4096, c.n_routed_experts).topk(c.num_experts_per_tok).indices
                module._buffers[name] = table.repeat(-(-c.vocab_size // 4096), 1)[: c.vocab_size].contiguous()
            elif name == "bias" and buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape)
    r = c.qk_rope_head_dim
    model.freqs = inverse_frequencies(r, c.rope_theta, None)
    model.compress_freqs = inverse_frequencies(r, c.compress_rope_theta, c.yarn)


def dense_bytes(module: nn.Module) -> int:
    """What a step reads of a module whatever the routing: weights and scales, without routed experts and tables."""
    tensors = [*module.parameters(), *(b for n, b in module.named_buffers() if n.endswith("scale"))]
    return sum(t.nbytes for t in tensors)


class Geometry:
    """The model, and its bytes by part."""

    def __init__(self, gib: float, layers: int, experts: int | None, weights: str) -> None:
        self.flash = ModelConfig.preset("v4-flash").with_mtp(0)
        ratios = tuple((0, 4, 128)[i % 3] for i in range(layers))
        config = dataclasses.replace(
            self.flash, num_hidden_layers=layers, compress_ratios=ratios, num_hash_layers=min(1, layers)
        )
        d, i = config.hidden_size, config.moe_intermediate_size
        by_row = 4 * (2 * i + d)
        self.expert_bytes = {
            "official": 3 * (d * i // 2 + d * i // 32), "w8a8": 3 * d * i + by_row, "w4a8": 3 * d * i // 2 + by_row,
        }[weights]  # fmt: skip
        if experts is None:
            dense = 2 * config.vocab_size * d + layers * 200e6  # the head, and what a layer's rest takes at most
            experts = min(self.flash.n_routed_experts, int((gib * 2**30 - dense) / layers / self.expert_bytes))
        if experts < config.num_experts_per_tok:
            raise SystemExit(f"{gib} GiB hold {experts} experts a layer, a token takes more: raise --gib")
        self.config = dataclasses.replace(config, n_routed_experts=experts)
        with torch.device("meta"):
            self.model = Transformer(self.config)
        fill(self.model, Pool(), weights)
        self.model.eval()
        blocks: list[Any] = list(self.model.layers)
        dense_parts = [dense_bytes(b) - dense_bytes(b.ffn.experts) for b in blocks]
        self.layer_bytes = dict(zip(ratios, dense_parts, strict=True))
        self.head_bytes = dense_bytes(self.model.head) + dense_bytes(self.model.hc_head)

    def step_bytes(self, batch: int) -> float:
        """Weights that a decode step reads once: for more than one sequence the expected number, routing being even."""
        return self._bytes(self.config, batch)

    def flash_bytes(self, batch: int) -> float:
        return self._bytes(self.flash, batch)

    def _bytes(self, config: ModelConfig, batch: int) -> float:
        share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
        routed = config.num_hidden_layers * share * config.n_routed_experts * self.expert_bytes
        return self.head_bytes + routed + sum(self.layer_bytes[r] for r in config.compress_ratios)

    def tensors(self) -> list[Tensor]:
        """All weights that a step may read."""
        held = [p.detach() for n, p in self.model.named_parameters() if not n.startswith("embed")]
        for block in self.model.layers:
            for weights in block.ffn.experts.packed or []:
                held += [tensor for pair in weights.values() for tensor in pair]
        return [t for t in held if t.nbytes >= 64]


def decode_times(llm: LLM, batch: int, steps: int, vocab: int) -> list[float]:
    """Seconds of each decode step with `batch` sequences."""
    generator = torch.Generator().manual_seed(batch)
    params = SamplingParams(temperature=0.0, max_tokens=steps + 4, ignore_eos=True)
    for _ in range(batch):
        ids = torch.randint(0, vocab, (PROMPT,), generator=generator).tolist()
        llm.engine.add(llm.engine.request(ids, params, lambda delta: None))
    for _ in range(3):  # the prompts, and a first decode step or two
        llm.engine.step()
    times = []
    while llm.engine.has_work:
        begin = time.perf_counter()
        llm.engine.step()
        times.append(time.perf_counter() - begin)
    return times[:-1]  # the last step may have fewer sequences


def read_speed(tensors: list[Tensor]) -> float:
    """Bytes a second of one plain read."""
    begin = time.perf_counter()
    return native.read_memory(tensors) / (time.perf_counter() - begin)


def measure(geometry: Geometry, steps: int, rounds: int) -> dict[str, Any]:
    config = geometry.config
    llm = LLM.from_model(geometry.model, None, max_num_seqs=max(BATCHES), cache_tokens=2048)
    held = geometry.tensors()
    reads: list[float] = []
    times: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    decode_times(llm, 1, 2, config.vocab_size)  # first use: plan, threads, page tables
    for _ in range(rounds):  # in turn, so that a slow spell of the machine meets all
        reads.append(read_speed(held))
        for batch, kept in times.items():
            kept += decode_times(llm, batch, steps, config.vocab_size)
    reads.append(read_speed(held))
    bandwidth = statistics.median(reads)
    rows = []
    for batch, kept in times.items():
        step, touched = statistics.median(kept), geometry.step_bytes(batch)
        rows.append({
            "batch": batch, "bytes_a_step": round(touched), "step_s": step, "step_s_all": kept, "tok_s": batch / step,
            "bytes_s": touched / step, "share": touched / step / bandwidth,
        })  # fmt: skip
    return {"plain_read_bytes_s": bandwidth, "plain_read_all": reads, "plain_read_bytes": sum(t.nbytes for t in held),
            "decode": rows, "batch_8_over_1": rows[1]["tok_s"] / rows[0]["tok_s"]}  # fmt: skip


def project(geometry: Geometry, result: dict[str, Any], hosts: dict[str, float]) -> list[dict[str, Any]]:
    """Tokens a second of all of Flash where a plain read has that bandwidth and decoding gets the share seen here."""
    return [
        {"host": host, "gb_s": speed, "batch": row["batch"],
         "tok_s": row["batch"] * row["share"] * speed * 1e9 / geometry.flash_bytes(row["batch"])}
        for host, speed in hosts.items() for row in result["decode"]
    ]  # fmt: skip


def spread(times: list[float], batch: int) -> str:
    rates = sorted(batch / t for t in times)
    return f"{statistics.median(rates):.2f} ({rates[len(rates) // 10]:.2f} .. {rates[-1 - len(rates) // 10]:.2f})"


def show(geometry: Geometry, result: dict[str, Any]) -> None:
    c = geometry.config
    kinds = ", ".join(KINDS[r] for r in c.compress_ratios)
    print(f"{c.num_hidden_layers} layers ({kinds}), {c.n_routed_experts} experts each, "
          f"{result['plain_read_bytes'] / 2**30:.2f} GiB of weights")  # fmt: skip
    speeds = [s / 1e9 for s in result["plain_read_all"]]
    print(f"plain read: {result['plain_read_bytes_s'] / 1e9:.1f} GB/s ({min(speeds):.1f} .. {max(speeds):.1f})")
    for row in result["decode"]:
        print(f"decode, batch {row['batch']}: {spread(row['step_s_all'], row['batch'])} tok/s, "
              f"{row['bytes_a_step'] / 1e6:,.0f} MB a step, {row['bytes_s'] / 1e9:.1f} GB/s, "
              f"{row['share']:.0%} of the plain read")  # fmt: skip
    found = dict(zip(BARS, (result["decode"][0]["share"], result["batch_8_over_1"]), strict=True))
    for name, bar in BARS.items():
        print(f"{name}: {found[name]:.2f}, bar {bar}: {'met' if found[name] >= bar else 'MISSED'}")
    print(f"PROJECTION (by bytes alone) of all {geometry.flash.num_hidden_layers} layers of V4-Flash: "
          + ", ".join(f"{geometry.flash_bytes(b) / 1e9:.1f} GB a step at batch {b}" for b in BATCHES))  # fmt: skip
    for row in result["projection"]:
        print(f"  {row['host']:40s} {row['gb_s']:6.1f} GB/s  batch {row['batch']}: {row['tok_s']:6.1f} tok/s")


def _host(text: str) -> tuple[str, float]:
    name, _, speed = text.rpartition("=")
    try:
        return name or text, float(speed)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} isn't NAME=GB/s") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=("official", "w8a8", "w4a8"), default="official")
    parser.add_argument("--gib", type=float, default=8.0, help="weights to make, GiB (default %(default)s)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, help="experts a layer (default: what fits)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                        help="in what products are computed (default %(default)s, as V4 is)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=24, help="decode steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--host", type=_host, action="append", default=[], metavar="NAME=GB/s",
                        help="project for this host too")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if native.library() is None:
        raise SystemExit(f"nothing to measure here: {native.describe()}")
    machine = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__,
               "python": platform.python_version(), "kernels": native.describe()}  # fmt: skip
    print(f"$ {' '.join(sys.argv)}\n{machine}", flush=True)
    begin = time.perf_counter()
    geometry = Geometry(args.gib, args.layers, args.experts, args.weights)
    geometry.model.multiply_in(getattr(torch, args.dtype))
    print(f"weights made in {time.perf_counter() - begin:.0f} s", flush=True)
    result = measure(geometry, args.steps, args.rounds)
    result["projection"] = project(geometry, result, {**HOSTS, **dict(args.host)})
    show(geometry, result)
    if args.json is not None:
        c = geometry.config
        record = {"command": sys.argv, "machine": machine, "weights": args.weights, "dtype": args.dtype,
                  "layers": list(c.compress_ratios), "experts": c.n_routed_experts, "bars": BARS, **result}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
