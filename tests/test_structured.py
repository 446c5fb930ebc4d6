"""Structured output: a model of random weights writes only what the grammar allows, judged by other libraries."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import lark
import pytest
import torch
from tiny_v4 import EOS, build_llm, build_model

from upwell import LLM, SamplingParams
from upwell.chat.protocol import END_THINK, THINK
from upwell.engine import Engine, RequestOutput, StructuredOutputs
from upwell.errors import EngineError, InputError

# Every value is bounded, so that a model that draws at random comes to an end.
ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["a\"b", "größer", None, 7]},
        "count": {"type": "integer", "minimum": -20, "maximum": 20},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "kind", "count", "items"],
    "additionalProperties": False,
    "$defs": {
        "item": {
            "anyOf": [
                {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False},
            ]
        }
    },
}  # fmt: skip
SUM = """
start: expr
expr: term ("+" term)~0..3
term: NUMBER | "(" NUMBER "*" NUMBER ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


@pytest.fixture(scope="module")
def llm() -> LLM:
    return build_llm(max_num_seqs=8, cache_tokens=8192)


def generate(llm: LLM, wanted: StructuredOutputs, prompt: str = "Order:", **params: Any) -> RequestOutput:
    defaults = {"max_tokens": 500, "seed": 3, "n": 6}
    return llm.generate(prompt, SamplingParams(structured_outputs=wanted, **{**defaults, **params}))[0]


def texts(output: RequestOutput) -> list[str]:
    assert [o.finish_reason for o in output.outputs] == ["stop"] * len(output.outputs)
    assert all(o.token_ids[-1] == EOS for o in output.outputs)
    return [o.text for o in output.outputs]


@pytest.mark.parametrize("schema", [ORDER, json.dumps(ORDER)], ids=["mapping", "text"])
def test_json_schema(llm: LLM, schema: Any) -> None:
    judge = jsonschema.Draft202012Validator(ORDER)
    written = texts(generate(llm, StructuredOutputs(json=schema)))
    for text in written:
        judge.validate(json.loads(text))
    assert len(set(written)) > 1
    greedy = texts(generate(llm, StructuredOutputs(json=schema), temperature=0.0, n=1))
    judge.validate(json.loads(greedy[0]))


def test_json_object(llm: LLM) -> None:
    # Nothing bounds it: what comes to its end within the limit is an object.
    bias = {ord_id(llm, c): 6.0 for c in '}]"'}
    output = generate(llm, StructuredOutputs(json_object=True), logit_bias=bias, n=8)
    ended = [o.text for o in output.outputs if o.finish_reason == "stop"]
    assert len(ended) >= 4 and all(isinstance(json.loads(text), dict) for text in ended)


def ord_id(llm: LLM, char: str) -> int:
    return llm.tokenizer.encode(char)[0]


@pytest.mark.parametrize("pattern", [r"[a-f]{3}-(19|20)\d\d( ok)?", r"(é|日本|😀){1,4}!", r"x?"])
def test_regex(llm: LLM, pattern: str) -> None:
    assert all(re.fullmatch(pattern, text) for text in texts(generate(llm, StructuredOutputs(regex=pattern))))


def test_lark_grammar(llm: LLM) -> None:
    judge = lark.Lark(SUM)
    written = texts(generate(llm, StructuredOutputs(grammar=SUM)))
    for text in written:
        judge.parse(text)
    assert len(set(written)) > 1


def test_gbnf_grammar(llm: LLM) -> None:
    gbnf = 'root ::= "[" item ("," item)* "]" "."\nitem ::= [0-9] | "\\"" [a-z] "\\""'
    for text in texts(generate(llm, StructuredOutputs(grammar=gbnf), logit_bias={ord_id(llm, "]"): 5.0})):
        assert text.endswith("].") and isinstance(json.loads(text[:-1]), list)


def test_choice(llm: LLM) -> None:
    choices = ["yes", "yes, but", 'a "no"\\\n', "日本", "/x/"]
    bias = {ord_id(llm, c): 3.0 for c in 'a/'}
    written = texts(generate(llm, StructuredOutputs(choice=choices), n=24, logit_bias=bias))
    assert set(written) <= set(choices) and len(set(written)) > 1


def test_streaming_seeds_and_a_mixed_batch(llm: LLM) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs(json=ORDER), seed=9, max_tokens=500, n=2)
    alone = llm.generate("x", params)[0]
    streamed = ["", ""]
    for delta in llm.stream("x", params):
        streamed[delta.index] += delta.text
    assert streamed == texts(alone)
    # Beside it: a free request, and one with a mask of ids.
    requests = [
        llm.engine.request(llm.tokenizer.encode(text), sampling, sink=lambda delta: None, token_mask=mask)
        for text, sampling, mask in [
            ("free", SamplingParams(seed=1, max_tokens=30, ignore_eos=True), None),
            ("ids", SamplingParams(seed=1, max_tokens=30, ignore_eos=True), lambda out: [40, 41]),
        ]
    ]
    for request in requests:
        llm.engine.add(request)
    assert texts(llm.generate("x", params)[0]) == streamed
    while llm.engine.has_work:
        llm.engine.step()


def test_logprobs_are_of_what_is_allowed(llm: LLM) -> None:
    output = generate(llm, StructuredOutputs(choice=["ab", "cd"]), logprobs=5, n=1).outputs[0]
    assert output.logprobs is not None
    assert {token for token, _ in output.logprobs[0].top} == {ord_id(llm, "a"), ord_id(llm, "c")}
    assert [entry.logprob for entry in output.logprobs[1:]] == pytest.approx([0.0, 0.0])


def test_preemption_loses_no_place_in_the_grammar() -> None:
    # Two completions outgrow a pool of two blocks: one is computed again, in the middle of its number.
    wanted = StructuredOutputs(regex="[0-9]{40}")
    params = SamplingParams(structured_outputs=wanted, seed=2, max_tokens=60, n=2)
    roomy = build_llm(max_num_seqs=2, cache_tokens=2048).generate("y" * 230, params)[0]
    tight = build_llm(max_num_seqs=2, cache_tokens=3 * 256).generate("y" * 230, params)[0]
    assert texts(tight) == texts(roomy) and all(re.fullmatch("[0-9]{40}", text) for text in texts(tight))


def test_the_grammar_begins_after_reasoning(llm: LLM) -> None:
    end = llm.tokenizer.id_of(END_THINK)
    wanted = StructuredOutputs(choice=["yes", "no"])
    # It thinks for a few tokens of its own, then is made to end that.
    output = generate(llm, wanted, f"?{THINK}", logit_bias={end: 4.0, EOS: -100.0}, n=8)
    for o in output.outputs:
        assert llm.tokenizer.decode(o.token_ids[o.token_ids.index(end) + 1 :]) in ("yes", "no")
    assert any(o.token_ids[0] != end for o in output.outputs)
    assert set(texts(generate(llm, wanted, f"?{THINK}hm{END_THINK}"))) <= {"yes", "no"}


def test_min_tokens_gives_way_to_the_grammars_end(llm: LLM) -> None:
    assert set(texts(generate(llm, StructuredOutputs(choice=["ab", "cd"]), min_tokens=9))) <= {"ab", "cd"}
    longer = generate(llm, StructuredOutputs(regex="a{1,9}"), min_tokens=6)
    assert all(len(text) >= 5 for text in texts(longer))  # five and the end


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"json": {"type": "strng"}}, "json can't be compiled at #: Invalid type: strng"),
        (
            {"json": {"properties": {"a": {"type": "array", "items": {"not": {"type": "string"}}}}}},
            r'json can\'t be compiled at #/properties/a/items: Unimplemented keys: \["not"\]',
        ),
        (
            {"json": {"properties": {"a/b": {"pattern": "(", "type": "string"}, "c": {"$ref": "#/$defs/ok"}},
                      "$defs": {"ok": {}}}},
            "at #/properties/a~1b: unclosed group",
        ),
        ({"json": {"properties": {"c": {"$ref": "#/$defs/gone"}}}}, "at #/properties/c: Pointer '/\\$defs/gone'"),
        ({"json": {"type": "object", "required": ["n"],
                   "properties": {"n": {"type": "integer", "minimum": 2, "maximum": 1}}}},
         r"at #/properties/n: .*minimum \(2\) is greater than maximum \(1\)"),
        ({"regex": "ab(c"}, r"regex 'ab\(c' can't be compiled at character 3: unclosed group"),
        ({"regex": "(?=a)b"}, "at character 1: look-around"),
        ({"grammar": "start: word\nword: nothing"}, 'grammar can\'t be compiled at line 2, column 7: unknown name: "n'),
        ({"grammar": "start: ("}, "at line 1, column"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_with_its_place(llm: LLM, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        generate(llm, StructuredOutputs(**wanted))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "has nothing, must have exactly one of json, regex"),
        ({"regex": "a", "choice": ["b"]}, r"has \['regex', 'choice'\]"),
        ({"json": '{"type": \n "object",}'}, "isn't JSON at line 2, column"),
        ({"json": "[1]"}, r"json is \[1\], must be a JSON schema"),
        ({"regex": 3}, "regex is 3, must be text"),
        ({"choice": []}, r"choice is \[\]"),
        ({"choice": "yes"}, "choice is 'yes', must be a list"),
        ({"json_object": "x"}, "json_object is 'x'"),
    ],
)
def test_refused_at_construction(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StructuredOutputs(**wanted)


def test_what_does_not_go_together(llm: LLM) -> None:
    wanted = StructuredOutputs(choice=["a"])
    with pytest.raises(InputError, match="ignore_eos can't go with structured_outputs"):
        SamplingParams(structured_outputs=wanted, ignore_eos=True)
    with pytest.raises(InputError, match="must be a StructuredOutputs"):
        SamplingParams(structured_outputs={"choice": ["a"]})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="both given"):
        llm.generate("a", SamplingParams(structured_outputs=wanted), token_mask=lambda out: None)
    with pytest.raises(InputError, match="no tokenizer"):
        Engine(build_model()).request([1], SamplingParams(structured_outputs=wanted), lambda delta: None)


def test_a_mask_goes_back_to_an_earlier_place(llm: LLM) -> None:
    grammars = llm.engine._grammars
    assert grammars is not None
    matcher = grammars.compile(StructuredOutputs(choice=["abcd", "abxy"]))
    a, b, c, d, x, y = (ord_id(llm, char) for char in "abcdxy")
    mask, fresh = grammars.mask(matcher, []), grammars.mask(matcher, [])
    for output in ([a, b, c, d], [a, b], [a, b, x], [], [a, b, x, y, EOS], [a]):
        there, afresh = mask(output), grammars.mask(matcher, [])(output)
        assert there == afresh == [EOS] if len(output) > 3 else torch.equal(there, afresh)  # type: ignore[arg-type]
    assert fresh.forced([]) == [a, b] and fresh.forced([a, b]) == [] and fresh.forced([a, b, c]) == [d]
    assert fresh.accepts([a], [b, x, d]) == 2
    with pytest.raises(EngineError, match="the grammar failed"):
        fresh([y])
