"""Training sequences: one table's schema, then a few questions about it, each with its plan.

    <bos> <schema> ... <ask> question <plan> plan <end> <ask> question <plan> plan <end> ...

The schema costs most tokens, so sharing it between questions trains more of them a second. Columns are shuffled for
every sequence. Loss falls on the plan tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from upwell.analyst.plan import plan_tokens
from upwell.analyst.prompt import render_prompt
from upwell.analyst.rules import choose_columns
from upwell.nano.generate import Domain, Example, examples
from upwell.nano.tokenizer import BOS, PAD, id_of

CHUNK = 512  # sequences drawn from one seed; a resumed run starts at a chunk
BUCKET = 16  # sequence lengths are padded to a multiple of this


@dataclass(frozen=True)
class Batch:
    """ids [B, S] (padded right), targets [B, S]: the next token where it is a plan's, else -100."""

    ids: Tensor
    targets: Tensor


def sequence(tokenizer: Tokenizer, group: Sequence[Example], rng: Random) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether it belongs to a plan. `group` shares one table."""
    order = choose_columns(group[0].table, group[0].linked)
    rng.shuffle(order)
    texts: list[str] = []
    for k, example in enumerate(group):
        prompt = render_prompt(example.table, example.linked, order, example.draft)
        schema, _, ask = prompt.partition(" <ask> ")
        texts.append(schema if k == 0 else "")
        texts.append("<ask> " + ask)
        plan = example.plan
        if plan.reason == "ambiguous":  # the pair has no order of its own
            plan = replace(plan, columns=tuple(sorted(plan.columns, key=order.index)))
        texts.append(" ".join(plan_tokens(plan, order)))
    ids = [id_of(tokenizer, BOS)]
    is_plan = [False]
    for k, text in enumerate(texts):
        part = tokenizer.encode(text, add_special_tokens=False).ids if text else []
        ids += part
        is_plan += [k % 3 == 2] * len(part)
    return ids, is_plan


def sequences(
    tokenizer: Tokenizer, domains: Sequence[Domain], seed: int, chunk: int, per_table: int, max_tokens: int
) -> Iterator[tuple[list[int], list[bool]]]:
    """CHUNK sequences of at most `max_tokens`, the same for the same arguments."""
    rng = Random(f"{seed}/{chunk}")
    stream = examples(rng.randrange(1 << 60), domains)
    made = 0
    for _, same_table in groupby(stream, key=lambda example: id(example.table)):
        group = list(same_table)
        rng.shuffle(group)
        while group and made < CHUNK:
            size = rng.randint(1, per_table)
            ids, is_plan = sequence(tokenizer, group[:size], rng)
            while len(ids) > max_tokens and size > 1:
                size -= 1
                ids, is_plan = sequence(tokenizer, group[:size], rng)
            group = group[size:]
            if len(ids) <= max_tokens:
                made += 1
                yield ids, is_plan
        if made >= CHUNK:
            return


def batches(
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    seed: int,
    first_chunk: int,
    chunk_step: int,
    tokens: int,
    per_table: int = 12,
    max_tokens: int = 384,
) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens each, sequences of like length together, batches in random order."""
    chunk = first_chunk
    while True:
        drawn = sorted(sequences(tokenizer, domains, seed, chunk, per_table, max_tokens), key=lambda s: len(s[0]))
        rng = Random(f"{seed}/{chunk}/batches")
        made: list[Batch] = []
        source = iter(drawn)
        while True:
            first = next(source, None)
            if first is None:
                break
            width = -(-len(first[0]) // BUCKET) * BUCKET
            count = max(1, round(tokens / width))
            made.append(collate(tokenizer, [first, *islice(source, count - 1)]))
        # The last is a remainder of the longest; dropping it keeps the ranks' work equal.
        made = made[:-1] if len(made) > 1 else made
        rng.shuffle(made)
        yield from made
        chunk += chunk_step


def collate(tokenizer: Tokenizer, group: Sequence[tuple[list[int], list[bool]]]) -> Batch:
    """Pad to one width and shift: the target of a token is the next one, if that is a plan's."""
    width = -(-max(len(ids) for ids, _ in group) // BUCKET) * BUCKET
    ids_out = torch.full((len(group), width), id_of(tokenizer, PAD), dtype=torch.long)
    targets = torch.full((len(group), width), -100, dtype=torch.long)
    for row, (ids, is_plan) in enumerate(group):
        tokens = torch.tensor(ids)
        ids_out[row, : len(ids)] = tokens
        targets[row, : len(ids) - 1] = torch.where(torch.tensor(is_plan[1:]), tokens[1:], -100)
    return Batch(ids_out, targets)
