"""Prometheus metrics. Names are vLLM's where it has one, so its dashboards work; the rest begin with upwell."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from upwell.engine.stats import EngineStats
from upwell.server.record import RequestRecord

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))


class Metrics:
    """One server's metrics, in a registry of their own. A RecordSink."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model}
        self._registry.register(_EngineFigures(stats, self._labels))

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, help, ["model_name"], buckets=buckets, registry=self._registry)
            labelled: Histogram = made.labels(**self._labels)
            return labelled

        self._first = histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", _LONG)
        self._between = _Intervals("vllm:inter_token_latency_seconds", "Between two tokens of a choice.", self._labels)
        self._registry.register(self._between)
        self._queue = histogram("vllm:request_queue_time_seconds", "A request's time in the queue.", _LONG)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From the queue to the first token.", _LONG)
        self._decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.", _LONG)
        self._inference = histogram("vllm:request_inference_time_seconds", "From the queue to the last token.", _LONG)
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "A request's time after its first token, by token.", _SHORT
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From a request to its last token.", _LONG)
        self._prompt = histogram("vllm:request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._output = histogram("vllm:request_generation_tokens", "Tokens of a request's answer.", _TOKENS)
        self._success = Counter(
            "vllm:request_success", "Choices that ended, by reason.", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self._requests = Counter(
            "upwell:http_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self._failed = Counter(
            "upwell:request_errors", "Requests that ended in an error, by status.", ["status"], registry=self._registry
        )

    def watch(self, record: RequestRecord) -> None:
        """Have the times between a record's tokens counted as they come."""
        record.on_interval = self._between.observe

    def __call__(self, record: RequestRecord) -> None:
        known = record.status not in (404, 405)  # else anyone could make up paths, a series each
        self._requests.labels(record.path if known else "other", str(record.status)).inc()
        if record.status >= 400:
            self._failed.labels(str(record.status)).inc()
        for reason in record.finish_reasons:
            self._success.labels(finished_reason=reason, **self._labels).inc()
        if record.first_token is None:
            return
        after = record.started + record.latency - record.first_token
        self._first.observe(record.first_token - record.started)
        self._whole.observe(record.latency)
        self._prompt.observe(record.prompt_tokens)
        self._output.observe(record.completion_tokens)
        self._decode.observe(after)
        if record.scheduled is not None:
            self._queue.observe(record.scheduled - record.started)
            self._prefill.observe(record.first_token - record.scheduled)
            self._inference.observe(record.first_token + after - record.scheduled)
        if record.completion_tokens > 1:
            self._per_token.observe(after / (record.completion_tokens - 1))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class _Intervals(Collector):
    """A histogram for what happens with every token: a fraction of the time that the client's own takes. For one
    thread."""

    def __init__(self, name: str, help: str, labels: dict[str, str]) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._counts = [0] * (len(_SHORT) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SHORT, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=list(self._labels))
        ends = [*(floatToGoString(bound) for bound in _SHORT), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


class _EngineFigures(Collector):
    """Read from the engine when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats], labels: dict[str, str]) -> None:
        self._stats, self._labels = stats, labels

    def collect(self) -> Iterator[Metric]:
        told = self._stats()
        used = 1 - told.blocks_free / told.blocks_total if told.blocks_total else 0.0
        gauges: list[tuple[str, str, float]] = [
            ("vllm:num_requests_running", "Sequences that run.", told.running),
            ("vllm:num_requests_waiting", "Sequences that wait.", told.waiting),
            ("vllm:kv_cache_usage_perc", "Part of the cache's blocks in use, 0 to 1.", used),
        ]
        counters: list[tuple[str, str, float]] = [
            ("vllm:prompt_tokens", "Prompt tokens computed.", told.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", told.generated_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", told.prefix_queried_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", told.prefix_hit_tokens),
            ("vllm:num_preemptions", "Sequences that gave their blocks up.", told.preemptions),
            ("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", told.draft_proposed),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.", told.draft_accepted),
        ]
        kinds: list[tuple[type[GaugeMetricFamily | CounterMetricFamily], list[tuple[str, str, float]]]] = [
            (GaugeMetricFamily, gauges), (CounterMetricFamily, counters)
        ]  # fmt: skip
        for kind, figures in kinds:
            for name, help, value in figures:
                family = kind(name, help, labels=list(self._labels))
                family.add_metric(list(self._labels.values()), value)
                yield family
