"""Grammars of replies against llguidance over a byte tokenizer: what they take is what the parser reads as calls."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from test_chat import CALLS
from tiny_v4 import EOS, VOCAB, build_tokenizer

from upwell.chat.grammar import JSON_OBJECT, reply_grammar
from upwell.chat.protocol import DSML

TOOLS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": "string", "enum": ["c", "f"]},
            },
            "required": ["city"],
        },
    },
    {"name": "now"},
]
REPLY = "\n\n" + CALLS.replace("\n\n</｜DSML｜invoke>", "\n</｜DSML｜invoke>")


@pytest.mark.parametrize("special", [False, True], ids=["as text", "as a special token"])
@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (REPLY, True),
        (REPLY.replace("city", "town"), False),
        (REPLY.replace("[1, 2]", '["x"]'), False),
        (REPLY.replace("Bern", "a</b> < ｜ 界"), True),
        (REPLY.replace('name="now"', 'name="later"'), False),
        (REPLY.replace('<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n', ""), True),
        (REPLY.replace('name="days" string="false">[1, 2]', 'name="unit" string="true">c'), True),
        (REPLY.replace('name="days" string="false">[1, 2]', 'name="unit" string="true">k'), False),
        ('{"a": 1}', True),
        ("[1]", False),
        ("Hello", False),
        ("", False),
    ],
)
def test_calls_or_json(text: str, taken: bool, special: bool) -> None:
    tokenizer = build_tokenizer()
    if special:
        tokenizer.add_special_tokens([tokenizers.AddedToken(DSML, special=True)])
    matcher = LLMatcher(
        LLTokenizer(tokenizer.to_str(), n_vocab=VOCAB, eos_token=EOS),
        reply_grammar(JSON_OBJECT, TOOLS, dsml_id=tokenizer.token_to_id(DSML)), log_level=0,
    )  # fmt: skip
    ids = tokenizer.encode(text).ids
    fits = matcher.validate_tokens(ids) == len(ids)
    assert (fits and matcher.consume_tokens(ids) and matcher.is_accepting()) == taken


def test_one_call_where_one_is_asked_for() -> None:
    matcher = LLMatcher(LLTokenizer("byte"), reply_grammar(None, TOOLS, parallel=False), log_level=0)
    data = list(REPLY.encode())
    first = REPLY.index("</｜DSML｜invoke>\n") + len("</｜DSML｜invoke>\n<")
    assert matcher.validate_tokens(data) == len(REPLY[:first].encode())
