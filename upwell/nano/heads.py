"""The recipe's second stage, on a frozen trunk: the MTP block learns to draft, the indexers learn what attention reads.

    python -m upwell.nano.heads --out runs/nano          # after upwell.nano.train; writes runs/nano/heads.pt

The language loss gives an indexer no gradient (its top-k has none), so it gets an objective of its own: its scores'
softmax is drawn to the attention that its layer really pays to the compressed entries, summed over heads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from upwell.model import Transformer
from upwell.model.attention import Attention, Rope
from upwell.nano.dataset import Batch, batches
from upwell.nano.generate import load_domains
from upwell.nano.geometry import UNSELECTIVE
from upwell.nano.optim import Optimizer, reduce_sum
from upwell.nano.quantized_weights import quantized, shipped_as
from upwell.nano.train import keep_memory, split_domains
from upwell.ops.norm import rms_norm
from upwell.ops.rope import apply_rope

JOINED = 4  # sequences laid end to end, so that the indexer sees contexts longer than a question's


def mtp_loss(model: Transformer, ids: Tensor, targets: Tensor, streams: Tensor) -> tuple[Tensor, float]:
    """Cross entropy of the token after next at plan positions, and how often the draft's best is right.

    ids, targets [B, S] (targets: next token where it is a plan's, else -100); streams [B*S, h, D] of the trunk.
    """
    logits, _ = model.draft(ids.roll(-1, dims=1), streams)
    after_next = targets.roll(-1, dims=1)
    after_next[:, -1] = -100
    wanted = torch.where(targets >= 0, after_next, -100).flatten()
    at = wanted >= 0
    hits = float((logits[at].argmax(-1) == wanted[at]).float().mean())
    return F.cross_entropy(logits[at].float(), wanted[at]), hits


def indexer_loss(attn: Attention, x: Tensor, rope: Rope) -> Tensor:
    """KL from the layer's attention over compressed entries (heads summed) to the indexer's softmax.

    x [B, S, D] is the layer's normed input, detached; gradients reach the indexer only.
    """
    assert attn.indexer is not None and attn.compressor is not None
    steps = x.shape[1]
    with torch.no_grad():
        q_latent = attn.q_norm(attn.wq_a(x))
        q = rms_norm(attn.wq_b(q_latent).unflatten(-1, (attn.heads, attn.dim)), None, attn.eps)
        q = apply_rope(q, rope.cos.unsqueeze(-2), rope.sin.unsqueeze(-2))
        entries = attn.compressor(x, rope.freqs)
        dots = torch.einsum("bshd,bnd->bshn", q.float(), entries.float()) * attn.dim**-0.5
        at = torch.arange(steps, device=x.device)
        hidden = torch.arange(entries.shape[1], device=x.device)[None, :] >= ((at + 1) // attn.ratio)[:, None]
        target = dots.masked_fill(hidden[None, :, None, :], float("-inf")).softmax(-1).nan_to_num(0.0).mean(2)
    keys = attn.indexer.compressor(x, rope.freqs)
    queries, weights = attn.indexer.queries(x, q_latent, rope.cos, rope.sin)
    relu = torch.einsum("bshc,bnc->bshn", queries.float(), keys.float()).relu()
    scores = torch.einsum("bshn,bsh->bsn", relu, weights.float()).masked_fill(hidden[None], -1e9)
    logs = scores.log_softmax(-1)
    some = ~hidden.all(-1)
    kl = (target * (target.clamp(min=1e-9).log() - logs)).masked_fill(hidden[None], 0.0).sum(-1)
    return kl[:, some].mean()


def attention_inputs(model: Transformer, ids: Tensor) -> tuple[Tensor, list[tuple[Attention, Tensor, Rope]]]:
    """The trunk's streams, and each CSA layer with its input and rotary, all detached."""
    seen: list[tuple[Attention, Tensor, Rope]] = []

    def keep(module: Attention, inputs: tuple[Tensor, Rope]) -> None:
        if module.indexer is not None:
            seen.append((module, inputs[0].detach(), inputs[1]))

    hooks = [m.register_forward_pre_hook(keep) for m in model.layers.modules() if isinstance(m, Attention)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        streams = model.streams(ids)
    for hook in hooks:
        hook.remove()
    return streams, seen


def joined(batch: Batch) -> Tensor:
    """Rows laid end to end, JOINED at a time: [B, S] -> [B // JOINED, JOINED * S] (at least one row)."""
    rows = max(1, batch.ids.shape[0] // JOINED) * min(JOINED, batch.ids.shape[0])
    return batch.ids[:rows].reshape(max(1, batch.ids.shape[0] // JOINED), -1)


def train_heads(rank: int, out: Path, steps: int, tokens: int, lr: float, ranks: int, seed: int) -> None:
    keep_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out.resolve()}/rendezvous", rank=rank, world_size=ranks)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = Transformer(UNSELECTIVE)
    trunk = out / "average.pt" if (out / "average.pt").exists() else out / "checkpoint.pt"
    model.load_state_dict(torch.load(trunk, weights_only=True)["model"])
    trained = {n: p for n, p in model.named_parameters() if "indexer" in n or n.startswith("mtp")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = Optimizer(trained)
    formats = shipped_as(model)
    source = batches(tokenizer, split_domains(load_domains())[0], seed + 2, rank, ranks, tokens)
    began = time.monotonic()
    hit_rate = kl = 0.0
    for step in range(steps):
        batch = next(source)
        with quantized(model, formats):
            streams, _ = attention_inputs(model, batch.ids)
            with torch.autocast("cpu", torch.bfloat16):
                draft_loss, hits = mtp_loss(model, batch.ids, batch.targets, streams.detach())
            _, layers = attention_inputs(model, joined(batch))
            index_loss = torch.stack([indexer_loss(attn, x, rope) for attn, x, rope in layers]).mean()
            (draft_loss + index_loss).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()]
        reduce_sum(grads)
        for p, g in zip(trained.values(), grads, strict=True):
            p.grad = g.div_(ranks)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step(lr * min(1.0, (step + 1) / 20) * min(1.0, 2 * (steps - step) / steps))
        for p in trained.values():
            p.grad = None
        hit_rate += 0.05 * (hits - hit_rate)
        kl += 0.05 * (float(index_loss.detach()) - kl)
        if rank == 0 and ((step + 1) % 20 == 0 or step + 1 == steps):
            entry = {"step": step + 1, "seconds": round(time.monotonic() - began, 1),
                     "draft_hits": round(hit_rate, 4), "index_kl": round(kl, 4)}  # fmt: skip
            with (out / "heads_log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), file=sys.stderr, flush=True)
    if rank == 0:
        torch.save({"model": model.state_dict()}, out / "heads.tmp")
        os.replace(out / "heads.tmp", out / "heads.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the trunk's run")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=3200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ranks", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.out / "rendezvous").unlink(missing_ok=True)
    spawn(train_heads, (args.out, args.steps, args.tokens, args.lr, args.ranks, args.seed), nprocs=args.ranks)


if __name__ == "__main__":
    main()
