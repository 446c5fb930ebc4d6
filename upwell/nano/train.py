"""The recipe of upwell-nano's trunk: generated questions in, plans out, from scratch, on a CPU.

    python -m upwell.nano.train --out runs/nano            # resumes by itself from the last checkpoint there

One process a core (gloo), each with its own stream of examples; Muon and AdamW; FP32, by the training kernels; the
router's bias balances load without a loss; towards the end the forward pass sees FP4 and FP8 weights.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from upwell.model import Transformer
from upwell.model.init import init_weights
from upwell.model.moe import Gate
from upwell.nano.dataset import Batch, batches
from upwell.nano.generate import Domain, examples, load_domains
from upwell.nano.geometry import UNSELECTIVE
from upwell.nano.optim import Optimizer, reduce_sum
from upwell.nano.quantized_weights import quantized, shipped_as
from upwell.nano.tokenizer import id_of, train_tokenizer

HELD_OUT = 12  # every so-manieth domain is kept for validation
BALANCE_RATE = 2e-2  # step of the router bias (auxiliary-loss-free balancing); large, as steps are few


@dataclass(frozen=True)
class Recipe:
    """What a run is determined by."""

    steps: int = 1200
    tokens: int = 3200  # a rank and step
    lr: float = 4e-3
    warmup: int = 60
    decay: float = 0.66  # the last part of the steps, over which the rate falls to zero
    quantize_after: float = 0.78  # from here on the forward pass sees the shipped formats
    seed: int = 0
    ranks: int = 2

    def rate(self, step: int) -> float:
        flat_until = self.steps * (1 - self.decay)
        fall = 1.0 if step < flat_until else (self.steps - step) / (self.steps - flat_until)
        return self.lr * min(1.0, (step + 1) / self.warmup) * fall


def keep_memory() -> None:
    """Let glibc keep freed memory: a training step frees and takes the same gigabytes again and again."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):  # MMAP_THRESHOLD, TRIM_, TOP_PAD
        libc.mallopt(option, value)


def split_domains(domains: list[Domain]) -> tuple[list[Domain], list[Domain]]:
    """(training, validation): validation's domains, with their words, are never trained on."""
    return (
        [d for i, d in enumerate(domains) if i % HELD_OUT],
        [d for i, d in enumerate(domains) if i % HELD_OUT == 0],
    )


def plan_logits(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits at the plan's positions [P, V] and their targets [P]: the head runs only there."""
    at = (batch.targets >= 0).flatten()
    streams = model.streams(batch.ids)
    return model.logits(streams[at]).float(), batch.targets.flatten()[at]


class LoadBalance:
    """Counts each learned router's choices and moves its bias towards an even load."""

    def __init__(self, model: Transformer) -> None:
        gates = [m for m in model.layers.modules() if isinstance(m, Gate)]
        self.gates = [gate for gate in gates if gate.bias is not None]
        self.counts = [torch.zeros(g.weight.shape[0]) for g in self.gates]
        for gate, count in zip(self.gates, self.counts, strict=True):
            gate.register_forward_hook(self._counter(count))

    @staticmethod
    def _counter(count: Tensor) -> Callable[..., None]:
        def hook(_module: Gate, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            count.add_(torch.bincount(output[0].flatten(), minlength=count.numel()))

        return hook

    @torch.no_grad()
    def step(self) -> float:
        """Apply and reset; returns the largest load over the mean one."""
        reduce_sum(self.counts)
        worst = 0.0
        for gate, count in zip(self.gates, self.counts, strict=True):
            assert gate.bias is not None
            gate.bias += BALANCE_RATE * torch.sign(count.mean() - count)
            worst = max(worst, float(count.max() / count.mean()))
            count.zero_()
        return worst


@torch.no_grad()
def validate(model: Transformer, held_out: list[Batch], end_id: int) -> dict[str, float]:
    """Loss a plan token, and the share of plans right in every token (teacher forced)."""
    loss = tokens = plans = right = 0.0
    for batch in held_out:
        logits, targets = plan_logits(model, batch)
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        tokens += targets.numel()
        wrong = (logits.argmax(-1) != targets).int()
        ends = (targets == end_id).nonzero().flatten()
        before = torch.cat((torch.zeros(1), wrong.cumsum(0)[ends].float()))
        right += float((before.diff() == 0).sum())
        plans += ends.numel()
    return {"loss": loss / tokens, "plans_right": right / plans}


def train(rank: int, recipe: Recipe, out: Path, init: Path | None) -> None:
    """One rank of a run. Writes out/checkpoint.pt (atomically), steps/, log.jsonl; resumes from the first."""
    keep_memory()
    torch.set_num_threads(1)
    meeting = f"file://{out.resolve()}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=recipe.ranks)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    train_domains, held_domains = split_domains(load_domains())
    model = init_weights(Transformer(UNSELECTIVE), recipe.seed, std=0.03)
    trunk = {n: p for n, p in model.named_parameters() if "indexer" not in n and not n.startswith("mtp")}
    optimizer = Optimizer(trunk)
    balance = LoadBalance(model)
    formats = {n: f for n, f in shipped_as(model).items() if n in trunk}
    first, seconds = 0, 0.0
    if (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    elif init is not None:
        model.load_state_dict(torch.load(init, weights_only=True)["model"])
    # A resumed run goes on with chunks it hasn't drawn yet.
    stream = batches(tokenizer, train_domains, recipe.seed, 1_000_000 * (first > 0) + first * recipe.ranks + rank,
                     recipe.ranks, recipe.tokens)  # fmt: skip
    held_out: list[Batch] = []
    if rank == 0:
        source = batches(tokenizer, held_domains, recipe.seed + 1, 0, 1, recipe.tokens)
        held_out = [next(source) for _ in range(12)]
    end_id = id_of(tokenizer, "<end>")
    began, average = time.monotonic() - seconds, None
    for step in range(first, recipe.steps):
        batch = next(stream)
        quantizing = step >= recipe.quantize_after * recipe.steps
        loss = _backward(model, batch, formats if quantizing else {})
        # A batch of short sequences has no HCA entry, so its compressor gets no gradient there.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trunk.values()]
        reduce_sum(grads)
        for p, g in zip(trunk.values(), grads, strict=True):
            p.grad = g
        for g in grads:
            g.div_(recipe.ranks)
        torch.nn.utils.clip_grad_norm_(trunk.values(), 1.0)
        optimizer.step(recipe.rate(step))
        for p in trunk.values():
            p.grad = None
        load = balance.step()
        average = loss if average is None else 0.98 * average + 0.02 * loss
        if rank:
            continue
        _progress(step, recipe, average, load, began)
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            model.eval()
            if quantizing:
                with quantized(model, formats):
                    held = validate(model, held_out, end_id)
            else:
                held = validate(model, held_out, end_id)
            for count in balance.counts:
                count.zero_()
            entry = {"step": step + 1, "seconds": round(time.monotonic() - began, 1), "loss": round(average, 4),
                     "held_loss": round(held["loss"], 4), "held_plans_right": round(held["plans_right"], 4),
                     "load": round(load, 2), "quantized": quantizing, "rate": recipe.rate(step)}  # fmt: skip
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            print("\n" + json.dumps(entry), file=sys.stderr, flush=True)
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            _save(out, model, optimizer, step + 1, time.monotonic() - began)
    dist.barrier()
    dist.destroy_process_group()


def _backward(model: Transformer, batch: Batch, formats: dict[str, str]) -> float:
    with quantized(model, formats):
        logits, targets = plan_logits(model, batch)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
    return float(loss.detach())


def _progress(step: int, recipe: Recipe, loss: float, load: float, began: float) -> None:
    taken = time.monotonic() - began
    left = taken / (step + 1) * (recipe.steps - step - 1)
    filled = round(24 * (step + 1) / recipe.steps)
    bar = "#" * filled + "." * (24 - filled)
    print(f"\r[{bar}] {step + 1}/{recipe.steps} loss {loss:.3f} load {load:.1f} left {left / 60:.0f} min ", end="",
          file=sys.stderr, flush=True)  # fmt: skip


def _save(out: Path, model: Transformer, optimizer: Optimizer, step: int, seconds: float) -> None:
    state: dict[str, Any] = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds,
    }  # fmt: skip
    torch.save(state, out / "checkpoint.tmp")
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")
    (out / "steps").mkdir(exist_ok=True)  # for upwell.nano.average
    torch.save({"model": state["model"]}, out / "steps" / f"{step}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run; resumes if it has a checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--quantize-after", type=float, default=Recipe.quantize_after)
    parser.add_argument("--decay", type=float, default=Recipe.decay)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=max(1, math.floor(os.cpu_count() or 1)))
    parser.add_argument("--init", type=Path, help="start from the weights of this checkpoint.pt")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rendezvous").unlink(missing_ok=True)
    recipe = Recipe(steps=args.steps, tokens=args.tokens, lr=args.lr, seed=args.seed, ranks=args.ranks,
                    quantize_after=args.quantize_after, decay=args.decay)  # fmt: skip
    tokenizer_file = args.out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_domains, _ = split_domains(load_domains())
        prompts = (example.prompt for example in islice(examples(recipe.seed, train_domains), 20_000))
        train_tokenizer(prompts).save(str(tokenizer_file))
    spawn(train, (recipe, args.out, args.init), nprocs=recipe.ranks)


if __name__ == "__main__":
    main()
