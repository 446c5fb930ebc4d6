"""From logits to the next token of each sequence.

Rows are edited one by one (penalties, bias, masks touch few ids); truncation and drawing run over all rows at once.
Nothing is ever sorted whole: top_k and top_p look at the best tokens, and top_p halves ranges where these are too few.
Each sequence draws from its own generator, one number a token, by inverting the cumulative distribution: the same seed
gives the same token whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upwell.engine.outputs import Draw, TokenLogprob
from upwell.engine.params import Allowed, SamplingParams
from upwell.engine.sequence import Sequence

_CANDIDATES = 1024  # best tokens that top_p looks at first
_FEW = 32  # ids
_NEVER = float("-inf")
_CHUNK = 512  # terms that a running sum in FP32 adds up


def sample(
    logits: Tensor, sequences: Items[Sequence], allowed: Items[Allowed], ahead: Items[Items[int]] | None = None,
    logprobs: bool = True,
) -> list[Draw]:  # fmt: skip
    """One token a row: logits [B, V] FP32 (edited in place), and what may come; row b of sequences[b].

    Row b is the token after ahead[b], tokens that the sequence doesn't have yet; None: the next of each.

    Greedy ties go to the lowest id.
    """
    ahead = [()] * len(sequences) if ahead is None else ahead
    # What most greedy requests ask for, and nano's plans: nothing but the best of the allowed ids.
    if logits.device.type == "cpu" and all(
        [s.params.is_plain and len(s.output) + 1 >= s.params.min_tokens for s in sequences]
    ):
        if all([ids is None for ids in allowed]):
            return [Draw(token, None) for token in _best_of_all(logits)]
        if not any([isinstance(ids, Tensor) for ids in allowed]):
            return [Draw(_best(row, ids), None) for row, ids in zip(logits.numpy(), allowed, strict=True)]
    for row, sequence, ids, before in zip(logits, sequences, allowed, ahead, strict=True):
        _edit(row, sequence, ids, before)
    drawn = [b for b, s in enumerate(sequences) if not s.params.is_greedy]
    chosen = _best_of_all(logits) if len(drawn) < len(sequences) else [0] * len(sequences)
    if drawn:
        of_drawn = logits if len(drawn) == len(sequences) else logits[drawn]
        uniforms = [sequences[b].uniform(len(ahead[b])) for b in drawn]
        tokens = _draw(of_drawn, [sequences[b].params for b in drawn], uniforms).tolist()
        for b, token in zip(drawn, tokens, strict=True):
            chosen[b] = token
    entries = _logprobs(logits, chosen, sequences) if logprobs else {}
    return [Draw(token, entries.get(b)) for b, token in enumerate(chosen)]


def _best_of_all(logits: Tensor) -> list[int]:
    """The id of the largest of each row of logits [B, V]; of equals the lowest."""
    # On a CPU torch takes 5 to 15 times as long as numpy.
    best: list[int] = (logits.numpy().argmax(1) if logits.device.type == "cpu" else logits.argmax(-1)).tolist()
    return best


def _best(row: NDArray[np.float32], allowed: Allowed) -> int:
    """The id of the largest of row [V], of the ids allowed; of equals the lowest."""
    if allowed is None:
        return int(row.argmax())
    assert not isinstance(allowed, Tensor)
    if len(allowed) <= _FEW:  # numpy would take longer
        return int(max(sorted(allowed), key=row.__getitem__))
    ids = np.sort(np.fromiter(allowed, np.int64, len(allowed)))
    return int(ids[row[ids].argmax()])


def _edit(row: Tensor, sequence: Sequence, allowed: Allowed, ahead: Items[int]) -> None:
    """Penalties, bias, minimum length and mask, in place: row [V]."""
    params = sequence.params
    seen_counts = sequence.counts + Counter(ahead) if ahead else sequence.counts
    if params.repetition_penalty != 1.0:
        seen = _ids(set(sequence.request.prompt_token_ids) | seen_counts.keys(), row)
        old = row[seen]
        row[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if seen_counts and (params.presence_penalty or params.frequency_penalty):
        counts = torch.tensor(list(seen_counts.values()), dtype=row.dtype, device=row.device)
        row[_ids(seen_counts, row)] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        bias = torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
        row[_ids(params.logit_bias, row)] += bias
    if isinstance(allowed, Tensor):
        row.masked_fill_(~_unpacked(allowed.to(row.device), len(row)), _NEVER)
    elif allowed is not None:
        ids = _ids(allowed, row)
        kept = row[ids]
        row.fill_(_NEVER)
        row[ids] = kept
    if sequence.end_ids and len(sequence.output) + len(ahead) + 1 < params.min_tokens:
        ends = _ids(sequence.end_ids, row)
        kept = row[ends]
        row[ends] = _NEVER
        if allowed is not None and row.max() == _NEVER:  # a grammar at its end knows no minimum
            row[ends] = kept


def _unpacked(bits: Tensor, vocab: int) -> Tensor:
    """INT32 [ceil(vocab / 32)], lowest bit first -> bool [vocab]."""
    return (bits[:, None] >> torch.arange(32, dtype=torch.int32, device=bits.device) & 1).flatten()[:vocab].bool()


def _ids(ids: Iterable[int], row: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=row.device)


def _draw(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Tensor:
    """Tokens [R] at each row's temperature, truncated by its min_p, top_k and top_p (in this order)."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(1)

    scaled = logits / column([p.temperature for p in params])
    scaled -= scaled.amax(dim=-1, keepdim=True)  # the best token at 0
    if any(p.min_p > 0 for p in params):
        scaled.masked_fill_(scaled < column([p.min_p for p in params]).log(), _NEVER)
    if any(p.top_k > 0 for p in params):
        scaled.masked_fill_(scaled < _kth_best(scaled, [p.top_k for p in params]), _NEVER)
    if any(p.top_p < 1 for p in params):
        scaled.masked_fill_(scaled < _nucleus(scaled, column([p.top_p for p in params])), _NEVER)
    return _invert(scaled.softmax(dim=-1), uniforms)


def _invert(probs: Tensor, uniform: list[float]) -> Tensor:
    """The token of each row at which the cumulated probs [R, V] pass its uniform number: tokens [R].

    In FP32, which is all an NPU has, a running sum of 129,280 terms would lose the rare tokens. So first the chunk is
    found among the sums of chunks, then the token in its chunk, by the number's 23 high bits and its low bits.
    """
    rows, vocab = probs.shape
    chunks = torch.nn.functional.pad(probs, (0, -vocab % _CHUNK)).view(rows, -1, _CHUNK)
    edges = chunks.sum(dim=-1).cumsum(dim=-1)
    high = [math.floor(u * 2**23) / 2**23 for u in uniform]
    low = [u - h for u, h in zip(uniform, high, strict=True)]
    total = edges[:, -1:]
    # At most 1 - 2^-23 of the total, so below it in FP32 too: what is found is never of probability 0.
    target = total * torch.tensor(high, device=probs.device).unsqueeze(1)
    chunk = torch.searchsorted(edges, target, right=True)
    start = edges.gather(1, (chunk - 1).clamp(min=0)).masked_fill(chunk == 0, 0.0)
    rest = (target - start) + total * torch.tensor(low, device=probs.device).unsqueeze(1)
    share = (rest / (edges.gather(1, chunk) - start)).clamp(max=1 - 2**-23)
    inner = chunks.gather(1, chunk.unsqueeze(-1).expand(-1, -1, _CHUNK)).squeeze(1).cumsum(dim=-1)
    place = torch.searchsorted(inner, share * inner[:, -1:], right=True)
    return (chunk * _CHUNK + place).squeeze(1)


def _kth_best(scaled: Tensor, ks: list[int]) -> Tensor:
    """The value of each row's k-th best token [R, 1]; -inf for k off. Ties with it stay."""
    vocab = scaled.shape[-1]
    k = torch.tensor([min(k, vocab) if k > 0 else vocab for k in ks], device=scaled.device)
    largest = int(max(x for x in (min(k, vocab) for k in ks) if x > 0))
    best = scaled.topk(largest, dim=-1).values
    kth = best.gather(1, (k.clamp(max=largest) - 1).unsqueeze(1))
    return kth.masked_fill((k > largest).unsqueeze(1), _NEVER)


def _nucleus(scaled: Tensor, top_p: Tensor) -> Tensor:
    """The value of the last token of the smallest set of best tokens that holds top_p [R, 1]; -inf for top_p off."""
    total = scaled.logsumexp(dim=-1, keepdim=True)
    best = scaled.topk(min(_CANDIDATES, scaled.shape[-1]), dim=-1).values
    mass = (best - total).exp()
    before = _before(mass)
    last = best.gather(1, (before < top_p).sum(dim=-1, keepdim=True) - 1)
    short = ((before[:, -1:] + mass[:, -1:] < top_p) & (top_p < 1)).squeeze(1)  # the candidates hold less than top_p
    if best.shape[-1] < scaled.shape[-1] and bool(short.any()):
        wanted = (top_p * total.exp()).squeeze(1).tolist()
        for row in short.nonzero().squeeze(1).tolist():
            last[row] = _bisected(scaled[row], wanted[row])
    return last.masked_fill(top_p >= 1, _NEVER)


def _bisected(scaled: Tensor, wanted: float) -> float:
    """The largest value such that the tokens at or above it have `wanted` mass (exp of scaled [V], the best at 0).

    The range is halved until few tokens lie in it; only those are sorted.
    """
    mass, known = scaled.exp(), 0.0  # of the tokens above the range
    low, high = float(scaled.masked_fill(scaled == _NEVER, 0.0).min()), 0.0
    while len(scaled) > _CANDIDATES and low < (middle := (low + high) / 2) < high:
        kept = scaled >= middle
        more = float(mass[kept].sum())
        if known + more >= wanted:
            low = middle
        else:
            high, known, kept = middle, known + more, ~kept
        scaled, mass = scaled[kept], mass[kept]
    values, order = scaled.sort(descending=True)
    at = int((mass[order].cumsum(0) < wanted - known).sum())
    return float(values[min(at, len(values) - 1)])


def _before(mass: Tensor) -> Tensor:
    """What lies before each item of mass [R, N]: a running sum in chunks: FP32 drifts over many terms."""
    n = mass.shape[-1]
    chunks = torch.nn.functional.pad(mass, (0, -n % _CHUNK)).unflatten(-1, (-1, _CHUNK))
    sums = chunks.sum(dim=-1)
    starts = sums.cumsum(dim=-1) - sums
    inner = chunks.cumsum(dim=-1) - chunks
    return (starts.unsqueeze(-1) + inner).flatten(-2)[:, :n]


def _logprobs(logits: Tensor, tokens: list[int], sequences: Items[Sequence]) -> dict[int, TokenLogprob]:
    wanted = [b for b, s in enumerate(sequences) if s.params.logprobs is not None]
    if not wanted:
        return {}
    logprobs = logits[wanted].log_softmax(dim=-1)
    most = min(max(sequences[b].params.logprobs or 0 for b in wanted), logits.shape[-1])
    values, ids = logprobs.topk(most, dim=-1)
    out = {}
    for row, b in enumerate(wanted):
        k = sequences[b].params.logprobs or 0
        # A masked token has no place among the likely ones.
        pairs = zip(ids[row, :k].tolist(), values[row, :k].tolist(), strict=True)
        top = tuple((i, v) for i, v in pairs if v > _NEVER)
        out[b] = TokenLogprob(tokens[b], float(logprobs[row, tokens[b]]), top)
    return out
