"""Upwell against transformers on the same weights, in one run: prefill, decode, training, peak memory.

    python benchmarks/vs_transformers.py [--quick] [--json OUT] [--only prefill|decode|train] [--bf16 | --w8a8]
                                         [--nano]

Six layers [0, 4, 128, 4, 128, 4], hidden 256, 16.6 M parameters, FP32, 2 threads. Transformers runs in its best
configuration: malloc tuned (both sides), chunked prefill where that is faster, the faster of its expert paths, logits
of the last token only. Runs alternate, A B A B; medians and spreads are printed, and the ratio of medians. A default
run takes minutes; --quick leaves out 8,192 tokens, 16k and full batches of training. Nothing is written but OUT.

--bf16 compares inference in BF16: weights that BF16 holds exactly on both sides, Upwell's products of BF16 operands,
and transformers in the fastest of FP32, FP32 with torch's "medium" precision, and BF16.

--w8a8 does the same with weights that lie on INT8's steps wherever `upwell convert --to w8a8` has integers: Upwell
multiplies these by inputs rounded to INT8, keeps its cache in INT8 (--kv-cache-dtype int8), and multiplies the rest in
BF16; transformers has the same values, in the fastest of the three.

--nano takes upwell-nano instead: Upwell as shipped (FP4 and FP8; with --w8a8 decoded first), transformers decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A page's first touch is the dearest part of large temporaries: keep freed memory in the process.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages where the kernel has them
}
GEOMETRY: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=16, head_dim=64, qk_rope_head_dim=32,
    q_lora_rank=64, o_lora_rank=64, o_groups=4, sliding_window=128, index_n_heads=16, index_head_dim=32, index_topk=128,
    n_routed_experts=20, num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=1, routed_scaling_factor=1.5,
    swiglu_limit=10.0, compress_ratios=[0, 4, 128, 4, 128, 4],
)  # fmt: skip
BARS = {"prefill 512": 2, "prefill 2048": 4, "prefill 8192": 8, "decode x1": 8, "decode x8": 6, "train 8x512": 4}
THREADS = 2


def build() -> tuple[Any, Any]:
    """Transformers' model with random weights, and ours with the same ones."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV4Config(**GEOMETRY)
    config._attn_implementation = "eager"
    theirs = DeepseekV4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for name, buffer in theirs.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.rand(*buffer.shape[:1], 20, generator=generator).argsort(1)[:, : buffer.shape[1]])
    return theirs, in_upwell(theirs)


def in_upwell(theirs: Any) -> Any:
    """Our model with the weights of transformers'."""
    from upwell.checkpoint.names import hf_name
    from upwell.config import ModelConfig
    from upwell.model import Transformer

    ours = Transformer(ModelConfig.from_dict(theirs.config.to_dict()).with_mtp(0)).eval()
    state = theirs.state_dict()
    ours.load_state_dict({name: state[hf_name(name)] for name in ours.state_dict()})
    return ours


def nano(decoded: bool) -> tuple[Any, Any]:
    """upwell-nano in transformers, and in Upwell as shipped, or `decoded` too."""
    import torch

    from upwell.bench.forward import Transformers
    from upwell.checkpoint import load_model
    from upwell.engine.llm import nano_path

    ours = load_model(nano_path(), dtype=torch.float32)
    theirs = Transformers(ours).model
    return theirs, in_upwell(theirs) if decoded else ours


def round_to_bf16(*models: Any) -> None:
    """Round matrices to what BF16 holds."""
    import torch

    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(parameter.bfloat16())


def precisions_of(theirs: Any) -> dict[str, tuple[Any, str]]:
    """Transformers' precisions to choose from."""
    import copy

    import torch

    half = copy.deepcopy(theirs).to(torch.bfloat16)
    return {"float32": (theirs, "highest"), "float32 by medium": (theirs, "medium"), "bfloat16": (half, "medium")}


def onto_int8_steps(ours: Any, theirs: Any) -> Callable[[], None]:
    """Round what `upwell convert --to w8a8` makes integers to the values of such integers, on both sides; what is
    returned then gives ours the integers themselves."""
    import torch

    from upwell.checkpoint.names import hf_name
    from upwell.checkpoint.recipes import integer_format
    from upwell.formats.int8 import dequantize_int8, quantize_int8
    from upwell.model.layers import Linear
    from upwell.model.moe import Experts

    state, made = theirs.state_dict(), []
    for path, module in ours.named_modules():
        if isinstance(module, Experts):
            leaves = ["w13", "w2"]
        elif isinstance(module, Linear) and integer_format(f"{path}.weight", "w8a8", "upwell") == "int8":
            leaves = ["weight"]
        else:
            continue
        for leaf in leaves:
            weight = getattr(module, leaf)
            codes, scale = quantize_int8(weight)
            made.append((module, leaf, codes, scale))
            with torch.no_grad():
                weight.copy_(dequantize_int8(codes, scale))
                state[hf_name(f"{path}.{leaf}")].copy_(weight)

    def integers() -> None:
        for module, leaf, codes, scale in made:
            setattr(module, leaf, torch.nn.Parameter(codes, requires_grad=False))
            setattr(module, "scale" if leaf == "weight" else f"{leaf}_scale", scale)

    return integers


class Ours:
    """Prefill, decode and training through Upwell's model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def cache(self, batch: int, tokens: int) -> Any:
        per_sequence = -(-tokens // 256)
        self.tables = [list(range(b * per_sequence, (b + 1) * per_sequence)) for b in range(batch)]
        return self.model.new_cache(batch * per_sequence, batch)

    def extend(self, ids: Any, cache: Any, start: int) -> Any:
        """Logits [B, V] after the tokens ids [B, S], which begin at position `start`."""
        from upwell.model import Step

        batch, count = ids.shape
        step = Step(list(range(batch)), [start] * batch, [count] * batch, self.tables)
        return self.model.logits(self.model.streams(ids, cache, step, only_last=True))

    def step(self, ids: Any) -> tuple[Any, Any]:
        """A new cache, and the step that puts all of ids [B, S] into it."""
        from upwell.model import Step

        batch, count = ids.shape
        cache = self.cache(batch, count)
        return cache, Step(list(range(batch)), [0] * batch, [count] * batch, self.tables)

    def prefill(self, ids: Any) -> Any:
        cache = self.cache(ids.shape[0], ids.shape[1])
        chunk = 2048
        for begin in range(0, ids.shape[1], chunk):
            logits = self.extend(ids[:, begin : begin + chunk], cache, begin)
        return logits

    def decode(self, ids: Any, steps: int) -> Callable[[], None]:
        """Prefills ids; each call then makes `steps` greedy tokens."""
        batch, at = ids.shape[0], ids.shape[1]
        cache = self.cache(batch, at + 4096)
        state = [at, self.extend(ids, cache, 0).argmax(-1, keepdim=True)]

        def run() -> None:
            for _ in range(steps):
                state[1] = self.extend(state[1], cache, state[0]).argmax(-1, keepdim=True)
                state[0] += 1

        return run

    def loss(self, ids: Any) -> Any:
        """Mean cross-entropy of every next token of ids [B, S]."""
        targets = ids.roll(-1, 1)
        targets[:, -1] = -100  # nothing follows
        return self.model.loss(self.model.streams(ids), targets.flatten())


class Theirs:
    """The same through transformers; `chunk`, the experts' implementation and, of several, the precision are tuned
    before the runs. precisions: a model and torch's matmul precision each."""

    def __init__(self, model: Any, precisions: dict[str, tuple[Any, str]] | None = None) -> None:
        self.precisions = precisions or {"float32": (model, "highest")}
        self.model, self.chunk = model, 512

    def use(self, precision: str) -> None:
        import torch

        self.model, setting = self.precisions[precision]
        torch.set_float32_matmul_precision(setting)

    def prefill(self, ids: Any) -> Any:
        past = None
        for begin in range(0, ids.shape[1], self.chunk):
            out = self.model(
                ids[:, begin : begin + self.chunk], past_key_values=past, use_cache=True, logits_to_keep=1
            )
            past = out.past_key_values
        return out.logits[:, -1]

    def decode(self, ids: Any, steps: int) -> Callable[[], None]:
        # batched_mm copies a weight per token: fast for a step, gigabytes for a prompt.
        chosen, self.model.config._experts_implementation = self.model.config._experts_implementation, "grouped_mm"
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        self.model.config._experts_implementation = chosen
        state = [out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)]

        def run() -> None:
            for _ in range(steps):
                out = self.model(state[1], past_key_values=state[0], use_cache=True)
                state[0], state[1] = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

        return run

    def loss(self, ids: Any) -> Any:
        return self.model(ids, labels=ids, use_cache=False).loss

    def tune(
        self, name: str, begin: Callable[[], Callable[[], Any]], experts: tuple[str, ...], chunks: tuple[int, ...]
    ) -> None:
        """Keep the fastest of the settings for what comes next, and say so. `begin` gives what is to be timed."""
        best = None
        for precision in self.precisions:
            self.use(precision)
            run = begin()
            run()
            for implementation in experts:
                for chunk in chunks:
                    self.model.config._experts_implementation, self.chunk = implementation, chunk
                    started = time.perf_counter()
                    run()
                    cost = time.perf_counter() - started
                    if best is None or cost < best[0]:
                        best = (cost, precision, implementation, chunk)
        assert best is not None
        self.use(best[1])
        self.model.config._experts_implementation, self.chunk = best[2], best[3]
        setting = f"{best[1]}, " if len(self.precisions) > 1 else ""
        print(f"  transformers at its best for {name}: {setting}experts {best[2]}, chunk {best[3]}", flush=True)


def interleave(
    a: Callable[[], Any], b: Callable[[], Any], rounds: int, budget: float
) -> tuple[list[float], list[float]]:
    """Seconds of a and b, alternating, after a warm-up of each: `rounds`, or fewer when `budget` seconds are spent."""
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    a(), b()
    while len(times[0]) < rounds and (not times[0] or time.perf_counter() - started < budget):
        for run, kept in ((a, times[0]), (b, times[1])):
            begin = time.perf_counter()
            run()
            kept.append(time.perf_counter() - begin)
    return times


class Report:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, tokens: int, ours: list[float], theirs: list[float]) -> None:
        mine, other = statistics.median(ours), statistics.median(theirs)
        row = {
            "name": name, "tokens": tokens, "ours_tok_s": tokens / mine, "theirs_tok_s": tokens / other,
            "ours_s": ours, "theirs_s": theirs, "ratio": other / mine, "bar": BARS.get(name),
        }  # fmt: skip
        self.rows.append(row)

        def spread(times: list[float]) -> str:
            rate = f"{tokens / statistics.median(times):10,.0f}"
            return f"{rate} ({tokens / max(times):,.0f}..{tokens / min(times):,.0f})"

        bar = "" if row["bar"] is None else f"   bar {row['bar']}x: {'met' if row['ratio'] >= row['bar'] else 'MISSED'}"
        print(f"{name:14s} ours {spread(ours)}  transformers {spread(theirs)}  {row['ratio']:.2f}x{bar}", flush=True)


def check(ours: Ours, theirs: Theirs, ids: Any, taken: int) -> str:
    """Compare logits [S, V] over their scale, by full forward and by prefill through the cache.

    Every position agrees while all entries are taken, of the first `taken` tokens. Beyond index_topk entries, the
    indexer's scores at the cut can lie within rounding of each other, and then two right answers differ: there 99 of
    100 positions must agree.
    """
    import torch

    full = theirs.model(ids, use_cache=False).logits[0]
    scale = full.abs().max()

    step = ours.step(ids)
    mine = ours.model(ids)[0], ours.model(ids, *step)[0]
    off = torch.stack([(logits - full).abs().amax(-1) / scale for logits in mine])
    before, after = float(off[:, :taken].max()) if taken else 0.0, off[:, taken:]
    share = float((after <= 1e-4).float().mean())
    if not (before <= 1e-4 and share >= 0.99):
        raise SystemExit(
            f"logits differ by {before:.1e} of their scale, {share:.1%} agree under selection: "
            "not the same model, no comparison"
        )
    return f"{before:.1e} of their scale; under selection {share:.1%} of positions, median {float(after.median()):.1e}"


def training(side: Ours | Theirs, ids: Any) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        with torch.enable_grad():
            side.loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def long_prefill() -> None:
    """In a process of its own: our 16k prefill's cost per token against 1k's."""
    import torch

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    ours = Ours(own_model())
    ids = torch.randint(0, GEOMETRY["vocab_size"], (1, 16384))
    ours.prefill(ids[:, :8])
    seconds: dict[int, list[float]] = {1024: [], 16384: []}
    for _ in range(3):
        for n, kept in seconds.items():
            begin = time.perf_counter()
            ours.prefill(ids[:, :n])
            kept.append((time.perf_counter() - begin) / n)
    print(json.dumps({f"per_token_{n // 1024}k_s": statistics.median(kept) for n, kept in seconds.items()}))


def prefill_memory() -> None:
    """In a process of its own, which has run nothing before: what a 16k prefill takes besides the model."""
    import torch

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    model = own_model()
    ids = torch.randint(0, GEOMETRY["vocab_size"], (1, 16384))
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    Ours(model).prefill(ids)
    print(json.dumps({
        "peak_above_start_bytes": memory("VmHWM") - held, "weight_bytes": sum(p.nbytes for p in model.parameters()),
    }))  # fmt: skip


def own_model() -> Any:
    """Our model alone, with random weights."""
    from transformers import DeepseekV4Config

    from upwell.config import ModelConfig
    from upwell.model import Transformer
    from upwell.model.init import init_weights

    config = ModelConfig.from_dict(DeepseekV4Config(**GEOMETRY).to_dict()).with_mtp(0)
    return init_weights(Transformer(config), 0).eval()


def memory(name: str) -> int:
    """Bytes of this process by a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}")


def alone(what: str) -> dict[str, Any]:
    """The JSON that this script prints in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True, env=os.environ)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def save(directory: Path, wider: int) -> None:
    """Our model, its widths times `wider`, as a checkpoint with nano's tokenizer: for `upwell bench serve` and
    server_load.py."""
    from upwell.checkpoint import save_checkpoint
    from upwell.engine.llm import nano_path

    for name in ("hidden_size", "num_attention_heads", "q_lora_rank", "o_lora_rank", "moe_intermediate_size"):
        GEOMETRY[name] *= wider
    save_checkpoint(build()[1], directory, quantize=False)
    (directory / "tokenizer.json").write_bytes((nano_path() / "tokenizer.json").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter decodes")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", choices=("prefill", "decode", "train"))
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--bf16", action="store_true", help="inference in BF16, each side in its fastest way")
    formats.add_argument("--w8a8", action="store_true", help="the same with INT8 where `upwell convert` has it")
    parser.add_argument("--nano", action="store_true", help="upwell-nano's weights, not random ones")
    parser.add_argument("--save", type=Path, metavar="DIR", help="only write our model there, with nano's tokenizer")
    parser.add_argument("--wider", type=int, default=1, metavar="N", help="with --save: N times as wide")
    parser.add_argument("--long-prefill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prefill-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    if args.long_prefill or args.prefill_memory:
        long_prefill() if args.long_prefill else prefill_memory()
        return
    if args.save is not None:
        save(args.save, args.wider)
        return

    import torch
    import transformers

    from upwell.bench.record import cpu_name
    from upwell.ops import native

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    theirs_model, ours_model = nano(decoded=args.w8a8) if args.nano else build()
    vocabulary = ours_model.config.vocab_size
    taken = 0 if args.nano else GEOMETRY["index_topk"] * 4  # of nano's learned router, too, choices can lie that near
    narrow = args.bf16 or args.w8a8
    if narrow and not args.nano:
        round_to_bf16(ours_model, theirs_model)
    integers = onto_int8_steps(ours_model, theirs_model) if args.w8a8 else None
    precisions = precisions_of(theirs_model) if narrow else None
    ours, theirs = Ours(ours_model), Theirs(theirs_model, precisions)
    parameters = sum(p.numel() for p in ours_model.parameters())
    machine = {"cpu": cpu_name(), "threads": THREADS, "torch": torch.__version__,
               "transformers": transformers.__version__, "python": platform.python_version(),
               "kernels": native.describe()}  # fmt: skip
    print(f"$ {' '.join(sys.argv)}\n{machine}\n{'nano' if args.nano else f'{parameters / 1e6:.2f} M parameters'}, "
          f"{'W8A8' if args.w8a8 else 'BF16' if narrow else 'FP32'}", flush=True)  # fmt: skip
    ids = torch.randint(0, vocabulary, (8, 16384), generator=torch.Generator().manual_seed(1))
    print(f"logits agree to {check(ours, theirs, ids[:1, :1024], taken)}", flush=True)
    if integers is not None:
        integers()
    if narrow:
        ours_model.multiply_in(torch.bfloat16)
    if integers is not None:
        ours_model.cache_in(torch.int8)
    report, rounds, budget = Report(), 3 if args.quick else 7, 5.0 if args.quick else 25.0
    extra: dict[str, Any] = {}
    if args.only in (None, "prefill"):
        for n in (512, 2048) if args.quick else (512, 2048, 8192):
            part = ids[:1, :n]
            chunks = (512,) if args.quick else tuple(c for c in (256, 512, 1024, 2048) if c <= n)
            probe = ids[:1, : min(n, 2048)]
            theirs.tune(
                f"prefill {n}", lambda probe=probe: lambda: theirs.prefill(probe), ("eager", "grouped_mm"), chunks
            )
            times = interleave(
                lambda part=part: ours.prefill(part), lambda part=part: theirs.prefill(part), rounds, budget
            )
            report.add(f"prefill {n}", n, *times)
    if args.only in (None, "prefill") and not (args.quick or narrow or args.nano):
        extra = alone("--long-prefill") | alone("--prefill-memory")
        growth = extra["per_token_16k_s"] / extra["per_token_1k_s"]
        above = extra["peak_above_start_bytes"] / 2**20
        print(f"prefill 16k: cost per token {growth:.2f}x that at 1k (bar 1.5x), peak {above:.0f} MiB above weights "
              "(bar 1,024 MiB)")  # fmt: skip
    if args.only in (None, "decode"):
        for batch in (1, 8):
            steps = 8 if args.quick else 32
            context = ids[:batch, :512]
            theirs.tune(
                f"decode x{batch}", lambda context=context: theirs.decode(context, 4),
                ("eager", "grouped_mm", "batched_mm"), (512,),
            )
            times = interleave(ours.decode(context, steps), theirs.decode(context, steps), rounds, budget)
            report.add(f"decode x{batch}", batch * steps, *times)
    if args.only in (None, "train") and not (narrow or args.nano):
        batch = 1 if args.quick else 8
        batch_ids = ids[:batch, :512]
        run_theirs = training(theirs, batch_ids)
        theirs.tune("training", lambda: run_theirs, ("eager", "grouped_mm"), (512,))
        run_ours = training(ours, batch_ids)
        times = interleave(run_ours, run_theirs, min(rounds, 5), 2 * budget)
        report.add(f"train {batch}x512", batch * 512, *times)
    if args.json is not None:
        result = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": machine, "parameters": parameters,
                  "products": str(ours_model.products)[6:],
                  "kv_cache_dtype": str(ours_model.cached or ours_model.dtype)[6:], "geometry": GEOMETRY,
                  "rows": report.rows, "long_prefill": extra}  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
