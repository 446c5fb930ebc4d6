"""How well a model predicts a text, and how near it stays to another: perplexity, KL divergence, first choices.

One model is in memory at a time: of the reference are kept its output head and what goes into it, hidden_size values a
scored token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upwell.bench.documents import Document
from upwell.config import BLOCK_TOKENS
from upwell.model import Step, Transformer
from upwell.model.layers import Linear

CHUNK = 512  # tokens a forward
_LOGITS = 1 << 25  # values held at once

Z95 = 1.959964


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of documents: what its head reads for each document, [scored, D], and the head."""

    inputs: list[Tensor]
    head: Linear

    def log_probabilities(self, document: int) -> Iterator[Tensor]:
        """Of all tokens, FP32 [n, V], for the next few of the document's scored places."""
        for part in self.inputs[document].split(max(1, _LOGITS // self.head.out_features)):
            yield F.log_softmax(self.head(part.to(self.head.weight.device)).float().cpu(), dim=-1)


@torch.inference_mode()
def predict(model: Transformer, documents: Sequence[Document]) -> Predictions:
    """Run the documents through the model, each from an empty cache, in chunks: memory is that of one sequence."""
    blocks = -(-max(len(document.ids) for document in documents) // BLOCK_TOKENS)
    cache = model.new_cache(blocks, 1)
    inputs = []
    for document in documents:
        parts = []
        for begin in range(0, len(document.ids) - 1, CHUNK):
            ids = document.ids[begin : min(begin + CHUNK, len(document.ids) - 1)]
            step = Step([0], [begin], [len(ids)], [list(range(blocks))], model.device)
            streams = model.streams(torch.tensor([ids], device=model.device), cache, step)
            scored = streams[max(0, document.begin - 1 - begin) :]
            if len(scored):
                parts.append(model.norm(model.hc_head(scored)).cpu())
        inputs.append(torch.cat(parts))
    return Predictions(inputs, model.head)


@dataclass(frozen=True)
class Scores:
    """Of each document, sums over its scored tokens, FP64 [documents]: loss in nats, KL divergence, and so on.

    `kl` is KL(reference || model); `same`: how often the first choices of the two agree; both None without a reference.
    `first`: how often the first choice is the text's token. `whole` [completions]: whether all of a completion's are.
    """

    tokens: Tensor
    loss: Tensor
    first: Tensor
    whole: Tensor
    kl: Tensor | None = None
    same: Tensor | None = None

    def summary(self) -> dict[str, Any]:
        n = int(self.tokens.sum())
        loss = float(self.loss.sum()) / n
        row: dict[str, Any] = {"tokens": n, "loss": loss, "perplexity": math.exp(loss),
                               "first_choice_right": float(self.first.sum()) / n}  # fmt: skip
        if len(self.whole):
            row |= {"completions": len(self.whole), "completions_right": float(self.whole.double().mean())}
        if self.kl is not None and self.same is not None:
            row |= {"kl": float(self.kl.sum()) / n, "same_first_choice": float(self.same.sum()) / n}
        return row


@torch.inference_mode()
def score(of: Predictions, documents: Sequence[Document], reference: Predictions | None = None) -> Scores:
    """Hold predictions against the documents, and against a reference's predictions of the same documents."""
    columns: list[list[float]] = []
    whole = []
    for i, document in enumerate(documents):
        targets = torch.tensor(document.ids[document.begin :])
        sums, at = [0.0] * 4, 0
        others = None if reference is None else reference.log_probabilities(i)
        for ours in of.log_probabilities(i):
            target, first = targets[at : at + len(ours)], ours.argmax(-1)
            at += len(ours)
            sums[0] -= float(ours.gather(1, target.unsqueeze(1)).double().sum())
            sums[1] += int((first == target).sum())
            if others is not None:
                theirs = next(others)
                sums[2] += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
                sums[3] += int((first == theirs.argmax(-1)).sum())
        columns.append([len(targets), *sums])
        if document.completion:
            whole.append(int(sums[1]) == len(targets))
    tokens, loss, first_right, kl, same = torch.tensor(columns, dtype=torch.float64).unbind(1)
    compared = (None, None) if reference is None else (kl, same)
    return Scores(tokens, loss, first_right, torch.tensor(whole, dtype=torch.bool), *compared)


def loss_difference(model: Scores, reference: Scores) -> dict[str, float | None]:
    """Mean loss a token over the reference's, with its 95 % interval; documents are the independent units, so that of
    one document is unknown, None."""
    extra, tokens, k = model.loss - reference.loss, model.tokens, len(model.tokens)
    n = float(tokens.sum())
    mean = float(extra.sum()) / n
    if k == 1:
        return {"difference": mean, "low": None, "high": None}
    spread = float((extra - mean * tokens).square().sum().sqrt()) / n  # of a ratio of sums
    half = Z95 * spread * math.sqrt(k / (k - 1))
    return {"difference": mean, "low": mean - half, "high": mean + half}


def paired_difference(model: Sequence[bool], reference: Sequence[bool]) -> dict[str, float | int]:
    """The share right over the reference's on the same items, with Bonett and Price's 95 % interval (2012).

    It adjusts Wald's by one item in each of the two discordant cells, so that it holds for few of them too.
    """
    n = len(model)
    gained = sum(a and not b for a, b in zip(model, reference, strict=True))
    lost = sum(b and not a for a, b in zip(model, reference, strict=True))
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    middle, half = up - down, Z95 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return {"gained": gained, "lost": lost, "difference": (gained - lost) / n, "low": max(-1.0, middle - half),
            "high": min(1.0, middle + half)}  # fmt: skip
