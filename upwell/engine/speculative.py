"""Speculative decoding, exact: tokens are drafted cheaply, then one forward of the model says which of them it would
have drawn itself.

Drafts come from the mask where it leaves no choice, from the text so far (lookup.py), and from the checkpoint's MTP
block. A draft is accepted if the model, with its own random number, draws the same token; MTP's is drawn with that very
number, so that the two agree as often as can be. So every token is the model's own draw, and the output is what it
would have been without drafts, seed by seed.

MTP reads the model's final streams at t and the token after it. Each sequence keeps the streams that MTP hasn't read
yet: they go through it together when the next draft is made, and a prompt's end goes through as it is computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from upwell.config import BLOCK_TOKENS
from upwell.engine.lookup import Lookup
from upwell.engine.pace import AGAIN, Acceptance, Pace
from upwell.engine.params import Allowed, allowed_after, only_choice
from upwell.engine.runner import Runner
from upwell.engine.sampler import sample
from upwell.engine.sequence import Sequence, Status, Unread
from upwell.errors import EngineError
from upwell.model import Step
from upwell.model.cache import SavedRings

MOST_DRAFTS = 7  # what the compressor's shortest ring gives back; with the token before them, 8 rows a product
_MTP_DEPTH = 3
_LOOKUPS = (0, 1, 2, 4, MOST_DRAFTS)
_BARREN = 16  # looks in a row of which no draft came true, after which they become rare
_SELDOM = 8, 128  # steps between looks then: at first, and at most; each one in vain doubles it
_LAG = 8  # tokens that MTP may fall behind while drafting doesn't pay, before this sequence goes without it


@dataclass(slots=True)
class Draft:
    """Proposed tokens of one sequence, and what its mask allows at each of them and after the last."""

    sequence: Sequence
    room: int  # most tokens that may be proposed
    tokens: list[int] = field(default_factory=list)
    allowed: list[Allowed] = field(default_factory=list)
    saved_at: int = 0  # its first place among the saved
    by_mtp: int = 0  # so many of the tokens, the first ones, took a pass of MTP
    by_lookup: int = 0
    error: Exception | None = None  # of the mask after the last token
    is_certain: bool = True  # the mask left no other choice at any of the tokens

    def add(self, token: int) -> None:
        """One more token. One that would end the sequence only closes the draft: nothing comes after it, and the model
        draws it after the token before without."""
        if token in self.sequence.end_ids:
            self.room = len(self.tokens)
            return
        allowed = self.allowed[-1] if len(self.allowed) > len(self.tokens) else None
        self.is_certain &= only_choice(allowed) is not None
        self.tokens.append(token)

    def allows(self, token: int) -> bool:
        allowed = self.look()
        if allowed is None or self.error is not None:
            return self.error is None
        if isinstance(allowed, Tensor):
            return bool(int(allowed[token // 32]) >> token % 32 & 1)
        return token in allowed

    def look(self) -> Allowed:
        """What may come after the tokens so far; a mask that fails closes the draft."""
        if len(self.allowed) == len(self.tokens) and self.error is None:
            self.allowed.append(None)
            own, tokens = self.sequence, self.tokens
            try:
                self.allowed[-1] = allowed_after(own.mask, own.output + tokens) if tokens else own.allowed()
            except Exception as error:
                self.error, self.room = error, len(self.tokens)
        return self.allowed[-1]

    def forced(self) -> int | None:
        """The one token that may come next, or how a forced text is best begun; None where there is a choice."""
        allowed = self.look()
        if allowed is None or self.error is not None:
            return None
        if not isinstance(allowed, Tensor):
            return only_choice(allowed)
        forced = getattr(self.sequence.mask, "forced", None)
        text = [] if forced is None else forced(self.sequence.output + self.tokens)
        return int(text[0]) if text else None


class Speculator:
    """Proposes up to `most` tokens a sequence and step, and text that masks force. Owned by the engine's thread."""

    def __init__(self, runner: Runner, most: int) -> None:
        self._runner, self._model = runner, runner.model
        self._depths = range(min(most, _MTP_DEPTH) + 1) if self._model.mtp else range(1)
        self._lengths = [n for n in _LOOKUPS if n <= most]
        self._mtp, self._lookup = Acceptance(_MTP_DEPTH), Acceptance(MOST_DRAFTS)
        self._paces: dict[int, tuple[Pace, Pace]] = {}  # by batch size: of MTP and of lookups
        self._idle = 0  # steps since MTP last drafted
        self._barren = 0  # looks since a draft came true
        self._until = 0  # steps until the next look
        self._began = 0.0
        self._saved: SavedRings | None = None
        self.proposed = self.accepted = 0
        for block in self._model.mtp[:1]:
            for name in ("e_proj", "h_proj"):
                getattr(block, name).keep_decoded(self._model.dtype)

    def looks(self, sequences: Items[Sequence]) -> bool:
        """Whether this step is to look for drafts: where none came true for a while, looking mostly costs. What a mask
        forces is always worth it."""
        self._until -= 1
        return self._until < 0 or any(s.mask is not None for s in sequences)

    @property
    def rests(self) -> bool:
        """MTP hasn't paid of late: decoding may as well share a forward with prompts."""
        return len(self._depths) == 1 or self._idle >= _LAG

    def propose(self, sequences: Items[Sequence]) -> list[Draft]:
        """A draft for each decoding sequence; without tokens where nothing is worth proposing."""
        self._began, self._saved = time.perf_counter(), None
        drafts = [Draft(s, self._room(s)) for s in sequences]
        if self._until < 0:
            self._look(drafts)
        for draft in drafts:
            while len(draft.tokens) < draft.room and (token := draft.forced()) is not None:
                draft.add(token)
            draft.look()
        if self._saved is None and any(not d.is_certain for d in drafts):
            self._save(drafts, [len(d.tokens) for d in drafts])
        return drafts

    def _look(self, drafts: list[Draft]) -> None:
        if not self._look_up(drafts):
            self._ask_mtp(drafts)
        self._barren += 1
        first, most = _SELDOM
        self._until = min(most, first << min(8, self._barren - _BARREN)) if self._barren >= _BARREN else 0

    def settle(self, drafts: Items[Draft], accepted: Items[int]) -> None:
        """After a forward over the drafts: so many tokens of each were accepted, and the cache forgets the rest."""
        lost: list[int] = []
        for draft, count in zip(drafts, accepted, strict=True):
            lost += range(draft.saved_at + count, draft.saved_at + len(draft.tokens))
            self.proposed += len(draft.tokens)
            self.accepted += count
            if min(count, draft.by_mtp + draft.by_lookup):
                self._barren = self._until = 0
            if draft.by_mtp:
                self._mtp.saw(draft.by_mtp, min(count, draft.by_mtp))
            if draft.by_lookup:
                self._lookup.saw(draft.by_lookup, min(count, draft.by_lookup))
        if lost:
            if self._saved is None:
                raise EngineError("a token that the mask left no choice about wasn't drawn")
            self._runner.cache.restore(self._saved, lost)

    def clock(self, drafts: Items[Draft]) -> None:
        """At a step's end: what it took, for the choice of the next ones."""
        seconds = time.perf_counter() - self._began
        mtp, lookup = self._pace(len(drafts))
        depth, length = max([d.by_mtp for d in drafts]), max([d.by_lookup for d in drafts])
        if not length:
            mtp.took(depth, seconds)
        if not depth and length in lookup.choices:
            lookup.took(length, seconds)

    def read(self, sequence: Sequence, start: int, streams: Tensor) -> None:
        """The model's final streams [n, h, D] of a sequence's tokens from `start` on, which are certain."""
        if len(self._depths) == 1:
            return
        unread, is_prompt = sequence.unread, sequence.status is Status.PREFILL
        if is_prompt and _LAG <= self._idle < AGAIN:
            sequence.unread = None  # drafting doesn't pay these days
            return
        if unread is not None and unread.end == start:
            unread = Unread(unread.start, torch.cat((unread.streams, streams)))
        else:
            # A prompt's beginning, or what follows a restored prefix, which brought MTP's window along.
            unread = Unread(start, streams) if is_prompt else None
        if unread is not None and len(unread.streams) > _LAG:
            unread = self._read_prompt(sequence, unread) if is_prompt else None
        sequence.unread = unread

    def _read_prompt(self, sequence: Sequence, unread: Unread) -> Unread:
        """Let MTP read all but the last token of a prompt, as far as later windows will see it."""
        known = min(len(unread.streams), len(sequence) - 1 - unread.start)  # whose next token is known
        first = max(0, known - self._model.config.sliding_window)
        if known > first:
            self._feed([sequence], [Unread(unread.start + first, unread.streams[first:known])])
        return Unread(unread.start + known, unread.streams[known:].clone())

    def _room(self, sequence: Sequence) -> int:
        """Tokens that may be proposed: those that the cache has blocks for, and that the completion may still have."""
        blocks = len(sequence.table) * BLOCK_TOKENS - sequence.computed - 1
        return max(0, min(MOST_DRAFTS, blocks, sequence.request.limit - len(sequence.output) - 1))

    def _in_step(self, sequence: Sequence) -> bool:
        """MTP has read, or can read now, all that it needs to draft for this sequence."""
        unread = sequence.unread
        return unread is not None and unread.end == sequence.computed and len(unread.streams) > 0

    def _save(self, drafts: Items[Draft], counts: Items[int]) -> None:
        """Keep what so many drafted tokens of each will write over."""
        slots: list[int] = []
        positions: list[int] = []
        for draft, count in zip(drafts, counts, strict=True):
            draft.saved_at = len(slots)
            slots += [draft.sequence.slot] * count
            positions += range(draft.sequence.computed + 1, draft.sequence.computed + 1 + count)
        self._saved = self._runner.cache.save(slots, positions)

    def _pace(self, batch: int) -> tuple[Pace, Pace]:
        size = batch.bit_length()
        if size not in self._paces:
            self._paces[size] = Pace(self._depths, self._mtp), Pace(self._lengths, self._lookup)
        return self._paces[size]

    def _look_up(self, drafts: list[Draft]) -> bool:
        """Propose what the text itself suggests, where that has paid; False where nothing is."""
        found = []
        for draft in drafts:
            sequence = draft.sequence
            if sequence.lookup is None:
                sequence.lookup = Lookup(sequence.request.prompt_token_ids)
            lookup = sequence.lookup
            lookup.extend(sequence.output[lookup.grown :])
            found.append(lookup.propose(draft.room))
        length = self._pace(len(drafts))[1].choose() if any(found) else 0
        for draft, tokens in zip(drafts, found, strict=True):
            for token in tokens[:length]:
                if len(draft.tokens) == draft.room or not draft.allows(token):
                    break
                draft.add(token)
            draft.by_lookup = len(draft.tokens)
        return any(d.tokens for d in drafts)

    def _ask_mtp(self, drafts: list[Draft]) -> None:
        able = [d for d in drafts if d.room and self._in_step(d.sequence)] if len(self._depths) > 1 else []
        pace, depth = self._pace(len(drafts))[0], 0
        if able:
            depth = pace.choose()
        else:
            pace.idle()
        self._idle = 0 if depth else self._idle + 1
        if depth:
            # MTP's own window too is written where drafts go; what a mask forces may come after MTP's.
            self._save(drafts, [d.room for d in drafts])
            self._draft_by_mtp(able, depth)

    def _draft_by_mtp(self, drafts: list[Draft], depth: int) -> None:
        unread = [u for d in drafts if (u := d.sequence.unread) is not None]
        out = self._feed([d.sequence for d in drafts], unread)
        for draft, u in zip(drafts, unread, strict=True):
            draft.sequence.unread = Unread(u.end, u.streams[:0])
        for k in range(depth):
            if k:
                reads = [Unread(d.sequence.computed + k - 1, row) for d, row in zip(drafts, out.split(1), strict=True)]
                out = self._feed([d.sequence for d in drafts], reads, [[d.tokens[-1]] for d in drafts])
            self._choose(drafts, out)
            going = [i for i, d in enumerate(drafts) if len(d.tokens) == k + 1 < d.room]
            if not going:
                break
            drafts, out = [drafts[i] for i in going], out[going]

    def _choose(self, drafts: list[Draft], out: Tensor) -> None:
        """One more token for each draft, from MTP's streams [B, h, D]; where the mask leaves one, that."""
        tokens = [d.forced() for d in drafts]
        free = [i for i, token in enumerate(tokens) if token is None and drafts[i].error is None]
        if free:
            rows = [drafts[i] for i in free]
            logits = self._model.draft_logits(out[free])
            draws = sample(
                logits, [d.sequence for d in rows], [d.look() for d in rows], [d.tokens for d in rows], logprobs=False
            )
            for i, draw in zip(free, draws, strict=True):
                tokens[i] = draw.token
        for draft, token in zip(drafts, tokens, strict=True):
            if token is not None:
                draft.add(token)
                draft.by_mtp = len(draft.tokens)

    def _feed(self, sequences: list[Sequence], reads: list[Unread], next_ids: list[list[int]] | None = None) -> Tensor:
        """Streams through MTP, each with the token after it -> MTP's streams [B, h, D] at each sequence's last."""
        lengths = [len(u.streams) for u in reads]
        longest, device = max(lengths), self._model.device
        if next_ids is None:
            next_ids = [s.tokens(u.start + 1, u.end + 1) for s, u in zip(sequences, reads, strict=True)]
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in next_ids], device=device)
        streams = torch.cat([pad(u.streams, (0, 0, 0, 0, 0, longest - len(u.streams))) for u in reads])
        tables = [s.table for s in sequences]
        step = Step([s.slot for s in sequences], [u.start for u in reads], lengths, tables, device)
        out = self._model.draft_streams(ids, streams, self._runner.cache, step)
        return out[torch.tensor([b * longest + n - 1 for b, n in enumerate(lengths)], device=device)]
