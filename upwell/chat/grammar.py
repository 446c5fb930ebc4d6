"""Grammars (Lark, as llguidance reads it) for replies that must have a form: V4's call markup, JSON, or either."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from upwell.chat.protocol import DSML, END_TOOL_CALLS, TOOL_CALLS

_END_PARAMETER = "</｜DSML｜parameter>"
_ANY_JSON: Mapping[str, Any] = {}
JSON_OBJECT: Mapping[str, Any] = {"type": "object"}


def reply_grammar(
    schema: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    parallel: bool = True,
    dsml_id: int | None = None,
) -> str:
    """A reply that is JSON in `schema`, or calls of `tools` (OpenAI's functions: name, parameters), or either.

    `dsml_id`: the token of the markup's ｜DSML｜, where the tokenizer has it as a special token: text can't spell one.
    """
    forms = []
    rules = []
    if schema is not None:
        forms.append("answer")
        rules.append(f"answer: %json {_json(schema)}")
    if tools:
        forms.append("calls")
        rules += _Calls(dsml_id).rules(tools, parallel)
    return "\n".join(["start: " + " | ".join(forms), *rules])


class _Calls:
    """The rules of a block of calls."""

    def __init__(self, dsml_id: int | None) -> None:
        self._dsml = None if dsml_id is None else f"<[{dsml_id}]>"

    def rules(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> list[str]:
        many = "+" if parallel else ""
        rules = [
            f"calls: {self._markup(chr(10) * 2 + TOOL_CALLS + chr(10))} call{many} {self._markup(END_TOOL_CALLS)}",
            "call: " + " | ".join(f"call_{k}" for k in range(len(tools))),
        ]
        for k, tool in enumerate(tools):
            given = tool.get("parameters")
            parameters: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
            parts = [self._markup(f'<｜DSML｜invoke name="{tool["name"]}">\n')]
            properties, required = parameters.get("properties"), parameters.get("required")
            if isinstance(properties, Mapping):
                shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
                for i, (name, schema) in enumerate(properties.items()):
                    rule = f"value_{k}_{i}"
                    parts.append(rule + ("" if isinstance(required, list) and name in required else "?"))
                    rules += self._value(rule, name, schema, shared)
            parts.append(self._markup("</｜DSML｜invoke>\n"))
            rules.append(f"call_{k}: " + " ".join(parts))
        return rules

    def _value(self, rule: str, name: str, schema: Any, shared: Mapping[str, Any]) -> list[str]:
        """One parameter: text as it is, everything else as JSON."""
        head, tail = f'<｜DSML｜parameter name="{name}" string=', self._markup(_END_PARAMETER + "\n")
        if not isinstance(schema, Mapping) or schema.get("type") != "string":
            whole = {**schema, **shared} if isinstance(schema, Mapping) else _ANY_JSON
            return [f"{rule}: {self._markup(head + _quoted('false') + '>')} {rule}_json {tail}",
                    f"{rule}_json: %json {_json(whole)}"]  # fmt: skip
        opening = self._markup(head + _quoted("true") + ">")
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return [f"{rule}: {opening} ({' | '.join(map(_literal, choices))}) {tail}"]
        if self._dsml is None:
            return [f"{rule}: {opening} {rule}_text {_literal(chr(10))}",
                    f"{rule}_text[suffix={_literal(_END_PARAMETER)}]: /(?s:.*)/"]  # fmt: skip
        after = _END_PARAMETER.partition(DSML)[2] + "\n"
        return [f"{rule}: {opening} {rule}_text {self._dsml} {_literal(after)}", f"{rule}_text: /(?s:.*)<\\//"]

    def _markup(self, text: str) -> str:
        """Literal text, with the special token where it is one."""
        if self._dsml is None:
            return _literal(text)
        return f" {self._dsml} ".join(_literal(part) for part in text.split(DSML) if part)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False)
