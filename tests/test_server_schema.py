"""schemathesis on the served OpenAPI document: whatever fits or misses it, no answer is a 5xx. Bounded and seeded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from served import Served
from tiny_v4 import build_llm

from upwell.server.app import create_app
from upwell.server.responders import ModelResponder

_responder = ModelResponder(build_llm(max_num_seqs=4, cache_tokens=2048), max_model_len=100)
schema = schemathesis.openapi.from_dict(create_app(_responder, "tiny").openapi())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(_responder)
    yield server
    server.stop()


@schema.parametrize()
@settings(
    max_examples=6, phases=[Phase.explicit, Phase.generate], derandomize=True, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_no_server_errors(case: schemathesis.Case, served: Served) -> None:
    response = case.call(base_url=served.url, timeout=60)
    case.validate_response(response, checks=[not_a_server_error])


def test_the_document_names_every_path() -> None:
    paths = set(schema.raw_schema["paths"])
    assert paths >= {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/messages",
        "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/health", "/ready", "/metrics",
    }  # fmt: skip
