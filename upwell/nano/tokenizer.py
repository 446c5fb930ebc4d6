"""nano's tokenizer: byte-level BPE over lower-case text, trained on the generated questions and schemas.

V4's own special tokens keep their first ids (bos 0, eos 1, pad 2); the pointers, slots, kinds and plan words of
upwell/analyst/prompt.py follow, one token each.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from upwell.analyst.prompt import SPECIAL_TOKENS

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
CHAT_TOKENS = (BOS, EOS, PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
VOCAB_SIZE = 4096


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token, which every nano tokenizer has."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train on `texts` (prompts as render_prompt writes them). Deterministic for the same texts in the same order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # The spaces around pointers and plan words carry nothing: the tokens swallow them.
    special = [AddedToken(t, special=True, normalized=False) for t in CHAT_TOKENS]
    special += [AddedToken(t, special=True, normalized=False, lstrip=True, rstrip=True) for t in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
