"""Operating the server: keys and limits, audit, metrics, traces, drain, TLS, faults, rude clients."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import Served, scripted_llm, spawn
from test_server_openai import script
from tiny_v4 import build_llm, save

from upwell.analyst.schema_text import QueryWriter
from upwell.engine import LLM
from upwell.errors import InputError
from upwell.server import protocol, wire
from upwell.server.blocking import ThreadedLLM
from upwell.server.keys import Bucket, Key, KeyRing, hash_key, new_key, read_keys
from upwell.server.responders import ModelResponder, NanoResponder
from upwell.server.run import Listener, open_listener
from upwell.server.settings import ServerSettings

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def scripted(settings: ServerSettings | None = None, **options: Any) -> Served:
    return Served(ModelResponder(scripted_llm(script, **options)), "scripted", settings)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = scripted()
    yield server
    server.stop()


# Keys and limits


def test_buckets_refill() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    assert bucket.wait(60) == 0
    bucket.spend(90)  # known only afterwards: it goes below nothing
    assert bucket.wait(1) == 31
    now[0] = 31
    assert bucket.wait(1) == 0
    now[0] = 1000
    assert bucket.wait(61) == 1  # never more than a minute's worth


def test_keys_file(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "upwell.cli", "key", "ana", "--requests-per-minute", "2"], capture_output=True, text=True
    )
    key = made.stderr.split()[-1]
    assert key not in made.stdout, "the file must hold no key"
    path = tmp_path / "keys.jsonl"
    path.write_text(made.stdout + "\n")
    (read,) = read_keys(path)
    assert (read.name, read.requests_per_minute, read.sha256) == ("ana", 2, hash_key(key))
    assert KeyRing([read]).find(key) is read
    for line, message in (
        ("{", "line 1 isn't JSON"),
        ('{"name": "a"}', "must be an object with name, sha256"),
        ('{"name": "a", "sha256": "xx"}', "sha256 isn't 64"),
        (json.dumps({"name": "a", "sha256": "0" * 64, "tokens_per_minute": 0}), "tokens_per_minute is 0"),
    ):
        path.write_text(line)
        with pytest.raises(InputError, match=message):
            read_keys(path)


def test_keys_and_rate_limits(tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("few", "small")}
    lines = [
        {"name": "few", "sha256": hash_key(keys["few"]), "requests_per_minute": 2},
        {"name": "small", "sha256": hash_key(keys["small"]), "tokens_per_minute": 25},
    ]
    path = tmp_path / "keys.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    audit = tmp_path / "audit.jsonl"
    settings = ServerSettings(api_keys=("master",), api_keys_file=path, audit_log=audit, audit_prompts=True)
    server = scripted(settings)
    try:
        body = {"model": "scripted", "messages": HELLO}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic bWFzdGVy"}):
            refused = server.post(CHAT, body, headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/metrics").status_code == 200
        anthropics = {"model": "scripted", "max_tokens": 50, "messages": HELLO}
        refused = server.post("/v1/messages", anthropics)
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        assert server.post("/v1/messages", anthropics, headers={"x-api-key": "master"}).status_code == 200

        def statuses(key: str, n: int) -> list[httpx.Response]:
            return [server.post(CHAT, body, headers={"authorization": f"Bearer {keys[key]}"}) for _ in range(n)]

        *fine, limited = statuses("few", 3)
        assert [answer.status_code for answer in fine] == [200, 200]
        assert limited.status_code == 429 and 1 <= int(limited.headers["retry-after"]) <= 30
        assert limited.json()["error"]["code"] == "rate_limit_exceeded" and "2 requests" in limited.text
        first, second = statuses("small", 2)
        assert first.status_code == 200 and second.status_code == 429 and "25 tokens" in second.text
    finally:
        server.stop()
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    known = [entry for entry in entries if entry["key"] == "few"]
    assert [entry["status"] for entry in known] == [200, 200, 429]
    assert known[0]["completion_tokens"] == len("Hello, 世界! 👋".encode()) + 1 and known[0]["prompt_tokens"] > 0
    assert known[0]["prompt"] == HELLO and known[0]["model"] == "scripted" and known[0]["latency_s"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", known[0]["time"])
    text = audit.read_text()
    assert not any(key in text for key in (*keys.values(), "master")), "keys never reach a log"


def test_a_stranger_needs_a_key_or_insecure() -> None:
    with pytest.raises(InputError, match="there is no API key"):
        open_listener(Listener("0.0.0.0", 0), ServerSettings())
    for listener, settings in (
        (Listener("0.0.0.0", 0, insecure=True), ServerSettings()),
        (Listener("0.0.0.0", 0), ServerSettings(api_keys=("k",))),
        (Listener("localhost", 0), ServerSettings()),
    ):
        open_listener(listener, settings).close()
    with pytest.raises(InputError, match="go together"):
        open_listener(Listener(tls_cert=Path("x")), ServerSettings())


def test_other_sites_are_kept_out(served: Served) -> None:
    """No CORS headers by default; a page whose own name points at localhost is refused by it."""
    cross = httpx.get(f"{served.url}/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in cross.headers
    server = scripted(
        ServerSettings(allowed_hosts=("localhost", "127.0.0.1"), allowed_origins=("https://app.example",))
    )
    try:
        rebound = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"})
        assert rebound.status_code == 400 and "host is 'evil.example'" in rebound.text
        welcome = httpx.get(f"{server.url}/v1/models", headers={"origin": "https://app.example"})
        assert welcome.headers["access-control-allow-origin"] == "https://app.example"
    finally:
        server.stop()


# Limits on requests


def raw(served: Served, data: bytes, wait: float = 5.0) -> bytes:
    """What comes back for raw bytes, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=wait) as connection:
        connection.sendall(data)
        parts = []
        while True:
            try:
                part = connection.recv(65536)
            except (TimeoutError, ConnectionResetError):
                break
            if not part:
                break
            parts.append(part)
    return b"".join(parts)


def test_sizes_and_times_are_limited(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    small = scripted(ServerSettings(max_body=1000, body_timeout=0.2))
    try:
        too_much = small.post(CHAT, {"messages": HELLO, "user": "x" * 2000})
        assert too_much.status_code == 413 and "1000" in too_much.text
        chunked = httpx.post(f"{small.url}{CHAT}", content=(b"x" * 600 for _ in range(3)))
        assert chunked.status_code == 413
        slow = raw(small, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{", 2)
        assert slow.startswith(b"HTTP/1.1 408")
    finally:
        small.stop()
    assert raw(served, b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
    assert raw(served, b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000).startswith(b"HTTP/1.1 431")  # never ends
    assert raw(served, b"\x00\xff garbage\r\n\r\n").startswith(b"HTTP/1.1 400")
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.2)
    assert raw(served, b"GET / HTTP/1.1\r\n", 2).startswith(b"HTTP/1.1 408")


def test_bodies_that_break_parsers(served: Served) -> None:
    kind = {"content-type": "application/json"}
    for content in (b"", b"null", b"[]", b"[" * 100_000, b"\xff\xfe", b'{"messages": [{"role": "user"'):
        answer = httpx.post(f"{served.url}{CHAT}", content=content, headers=kind)
        assert answer.status_code == 400 and "message" in answer.json()["error"], content[:20]
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    for messages in ([{"role": "assistant", "tool_calls": [call]}], [{"role": "user", "content": {"a": deep}}]):
        assert served.post(CHAT, {"messages": messages}).status_code == 400


def test_a_reader_that_stops_is_dropped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SEND_TIMEOUT", 0.3)
    server = Served(ModelResponder(build_llm(max_num_seqs=4, cache_tokens=16384)))
    try:
        wide = {"logprobs": True, "top_logprobs": 20}  # more bytes than the sockets' buffers take
        body = json.dumps({"messages": HELLO, "stream": True, "max_tokens": 6000, "n": 4, "ignore_eos": True, **wide})
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            server.wait_until_free()  # long before 4 x 6,000 tokens are made
            assert server.engine.stats().generated_tokens < 24_000
    finally:
        server.stop()


# Faults


def test_a_failing_model_fails_its_request_only(served: Served) -> None:
    runner = served.engine.runner
    logits = runner.logits

    def failing(streams: Any) -> Any:
        runner.logits = logits  # type: ignore[method-assign]
        raise RuntimeError("a bad kernel")

    runner.logits = failing  # type: ignore[method-assign]
    failed = served.post(CHAT, {"messages": HELLO})
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert "a bad kernel" in failed.json()["error"]["message"]
    assert served.post(CHAT, {"messages": HELLO}).status_code == 200
    runner.logits = failing  # type: ignore[method-assign]
    with pytest.raises(openai.APIError, match="a bad kernel"):
        list(served.openai.chat.completions.create(model="scripted", messages=HELLO, stream=True))
    assert httpx.get(f"{served.url}/health").status_code == 200
    served.wait_until_free()


def test_context_and_queue_and_shutdown() -> None:
    server = Served(ModelResponder(build_llm(max_num_seqs=1, cache_tokens=4096, max_queue=0), max_model_len=1000))
    try:
        long = server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 990}], "max_tokens": 30})
        error = long.json()["error"]
        assert long.status_code == 400 and error["code"] == "context_length_exceeded"
        numbers = [int(n) for n in re.findall(r"\d+", error["message"])]
        assert numbers[1:] == [30, 1000] and numbers[0] > 990  # the prompt's tokens, those asked for, the limit
        busy = server.openai.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
        )
        next(iter(busy))
        full = server.post(CHAT, {"messages": HELLO, "max_tokens": 5})
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            server.openai.completions.create(model="tiny", prompt=["a", "b"])
        server.app.state.gate.draining = True
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        late = server.post(CHAT, {"messages": HELLO})
        assert late.status_code == 503 and late.json()["error"]["type"] == "service_unavailable_error"
        assert int(late.headers["retry-after"]) >= 1
        assert server.post("/v1/messages", {}).json()["error"]["type"] == "overloaded_error"
        busy.close()
    finally:
        server.stop()


def test_sigterm_drains_and_tls(tmp_path: Path) -> None:
    """A stream that runs at SIGTERM is finished over HTTPS; then the process ends by itself."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    process, url = spawn("--model", str(save(tmp_path / "tiny")), "--device", "cpu", "--tls-cert", str(cert),
                         "--tls-key", str(key), "--log-level", "info", "--log-format", "json")  # fmt: skip
    try:
        assert url.startswith("https://")
        http = httpx.Client(verify=str(cert))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http)
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        last = list(chunks)[-1]
        assert last.choices[0].finish_reason == "length"
        http.close()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGTERM)
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    (logged,) = [line for line in lines if line["logger"] == "upwell.requests"]
    assert logged["status"] == 200 and logged["completion_tokens"] == 300 and logged["path"] == "/v1/completions"


# What is told about requests


def test_metrics(served: Served) -> None:
    def figures() -> dict[str, float]:
        text = httpx.get(f"{served.url}/metrics").text
        return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples
                if "le" not in s.labels}  # fmt: skip

    before = figures()
    served.post(CHAT, {"messages": HELLO})
    list(served.openai.chat.completions.create(model="scripted", messages=HELLO, stream=True))
    served.post(CHAT, {"messages": [], "model": "x"})
    after = figures()

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    tokens = len("Hello, 世界! 👋".encode()) + 1
    assert grew("vllm:generation_tokens_total") == 2 * tokens
    assert grew("vllm:time_to_first_token_seconds_count") == grew("vllm:e2e_request_latency_seconds_count") == 2
    assert grew("vllm:request_generation_tokens_sum") == 2 * tokens
    assert grew("vllm:prompt_tokens_total") == grew("vllm:request_prompt_tokens_sum") > 0
    for part in ("queue", "prefill", "decode", "inference"):
        assert grew(f"vllm:request_{part}_time_seconds_count") == 2
    parts = sum(grew(f"vllm:request_{part}_time_seconds_sum") for part in ("queue", "inference"))
    assert parts == pytest.approx(grew("vllm:e2e_request_latency_seconds_sum"), rel=1e-6)
    assert 0 < grew("vllm:inter_token_latency_seconds_count") <= 2 * (tokens - 1)
    assert 0 < grew("vllm:inter_token_latency_seconds_sum") <= grew("vllm:request_decode_time_seconds_sum") + 0.1
    assert after["vllm:num_requests_running"] == after["vllm:kv_cache_usage_perc"] == 0
    for name in (
        "vllm:num_requests_waiting", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total",
        "vllm:spec_decode_num_accepted_tokens_total", "vllm:num_preemptions_total",
        "vllm:inter_token_latency_seconds_count", "vllm:request_time_per_output_token_seconds_count",
    ):  # fmt: skip
        assert name in after
    text = httpx.get(f"{served.url}/metrics").text
    assert 'upwell:request_errors_total{status="400"}' in text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="scripted"}' in text
    httpx.get(f"{served.url}/made-up-{os.getpid()}")
    assert f"made-up-{os.getpid()}" not in httpx.get(f"{served.url}/metrics").text


def test_traces() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from upwell.server.tracing import Tracing

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = Served(ModelResponder(scripted_llm(script)), "scripted", tracing=Tracing(provider))
    try:
        parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        request_id = server.post(CHAT, {"messages": HELLO}, headers=parent).headers["x-request-id"]
    finally:
        server.stop()
    (span,) = exporter.get_finished_spans()
    assert span.name == f"POST {CHAT}" and span.attributes is not None
    assert span.attributes["upwell.request_id"] == request_id
    assert span.attributes["gen_ai.usage.output_tokens"] == len("Hello, 世界! 👋".encode()) + 1
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert span.parent is not None and f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert [event.name for event in span.events] == ["first_token"]


def test_traces_reach_a_collector() -> None:
    """What `--otlp-traces-endpoint` sends, read by OpenTelemetry's own protobuf classes."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Not on the tests' output."""

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    try:
        settings = ServerSettings(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/v1/traces")
        server = scripted(settings)
        try:
            request_id = server.post(CHAT, {"messages": HELLO}).headers["x-request-id"]
            assert server.post(CHAT, {"messages": HELLO, "model": "x"}).status_code == 404
        finally:
            server.stop()  # which sends what waits
    finally:
        collector.shutdown()
        collector.server_close()
    told = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    resources = [resource for request in told for resource in request.resource_spans]
    names = {a.value.string_value for resource in resources for a in resource.resource.attributes
             if a.key == "service.name"}  # fmt: skip
    assert names == {"upwell"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    good, bad = ({a.key: a.value for a in span.attributes} for span in spans)
    assert spans[0].name == f"POST {CHAT}" and spans[0].end_time_unix_nano > spans[0].start_time_unix_nano
    assert good["upwell.request_id"].string_value == request_id and good["http.response.status_code"].int_value == 200
    assert good["gen_ai.usage.output_tokens"].int_value == len("Hello, 世界! 👋".encode()) + 1
    assert bad["http.response.status_code"].int_value == 404


def test_the_prefix_cache_survives_sigkill(tmp_path: Path) -> None:
    """`upwell serve` with its embedded model, killed and started again: the second finds what the first computed."""
    flags = ("--device", "cpu", "--prefix-cache-dir", str(tmp_path), "--max-num-seqs", "2")
    body = {"prompt": [2 + k % 900 for k in range(700)], "max_tokens": 8, "temperature": 0, "ignore_eos": True}

    def hits(url: str) -> float:
        text = httpx.get(f"{url}/metrics").text
        return float(re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", text, re.MULTILINE)[0])

    texts = []
    for expected in (0, 699):
        process, url = spawn(*flags)
        try:
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            texts.append(answer.json()["choices"][0]["text"])
            assert hits(url) >= expected and (expected or not hits(url))
            deadline = time.monotonic() + 30
            while not expected and not list(tmp_path.rglob("*whole*")) and time.monotonic() < deadline:
                time.sleep(0.05)  # a thread of its own writes
            process.kill()
        finally:
            process.kill()
            process.communicate()
    assert texts[0] == texts[1]


# The embedded model


def test_nano_writes_queries_over_a_schema() -> None:
    llm = LLM(device="cpu")
    responder = NanoResponder(llm)
    responder.write_query = QueryWriter(ThreadedLLM(responder.thread, llm.tokenizer)).write
    server = Served(responder, "upwell-nano")
    try:
        table = "CREATE TABLE sales (id INTEGER PRIMARY KEY, region TEXT, amount DOUBLE, sold_on DATE);"
        messages: Any = [
            {"role": "system", "content": f"Write SQL.\n{table}"},
            {"role": "user", "content": "total amount by region"},
        ]
        answers: list[str | None] = []

        def ask() -> None:
            answer = server.openai.chat.completions.create(model="upwell-nano", messages=messages)
            answers.append(answer.choices[0].message.content)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        message = server.anthropic.messages.create(
            model="upwell-nano", max_tokens=100, system=messages[0]["content"], messages=messages[1:]
        )
        assert [getattr(block, "text", None) for block in message.content] == [answers[0]]
        assert answers[0] is not None and len(set(answers)) == 1
        import duckdb

        database = duckdb.connect()
        database.execute(table)
        database.execute("INSERT INTO sales VALUES (1, 'N', 2, NULL), (2, 'S', 5, NULL), (3, 'N', 1, NULL)")
        rows = database.execute(answers[0]).fetchall()
        assert sorted(rows) == [("N", 3.0), ("S", 5.0)]
        tools = [{"type": "function", "function": {"name": "f"}}]
        forced = {"messages": HELLO, "tools": tools, "tool_choice": "required"}
        assert "calls no tools" in server.post(CHAT, forced).json()["error"]["message"]
        assert server.post("/v1/completions", {"prompt": "<ask>", "max_tokens": 3}).status_code == 200
    finally:
        server.stop()


def test_health_tells_of_a_dead_engine() -> None:
    server = scripted()
    try:
        server.engine.scheduler.schedule = None  # type: ignore[method-assign, assignment]
        assert server.post(CHAT, {"messages": HELLO}).status_code == 500
        deadline = time.monotonic() + 10
        while httpx.get(f"{server.url}/health").status_code != 503:
            assert time.monotonic() < deadline
        assert server.post(CHAT, {"messages": HELLO}).status_code == 503
    finally:
        server.stop()


def test_key_limits_are_the_keys_own() -> None:
    now = [0.0]
    key = Key("a", "0" * 64, requests_per_minute=1, clock=lambda: now[0])
    key.admit()
    with pytest.raises(Exception, match="1 requests a minute"):
        key.admit()
    Key("b", "1" * 64, requests_per_minute=1, clock=lambda: now[0]).admit()
