"""Prometheus metrics at /metrics. A test compares their names and meanings with the table in docs/server.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from batchinfer.server.engine_loop import EngineSnapshot

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_NEWEST_WEIGHT = 0.1  # of the newest request in the exponential mean of durations


class Metrics:
    """Metrics of one server, in a registry of its own: two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.mean_request_s = 1.0
        self._first = Histogram(
            "batchinfer_time_to_first_token_seconds",
            "From the arrival of a request until its first token",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "batchinfer_time_per_output_token_seconds",
            "Mean time of a sample's tokens after its first",
            buckets=_PER_TOKEN_S,
            registry=self.registry,
        )
        self._request = Histogram(
            "batchinfer_request_seconds",
            "From the arrival of a request until its last token",
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self._responses = Counter(
            "batchinfer_responses", "HTTP responses by status", labelnames=("status",), registry=self.registry
        )
        self._errors = Counter(
            "batchinfer_errors", "Requests that failed, by status", labelnames=("status",), registry=self.registry
        )
        self._disconnects = Counter(
            "batchinfer_disconnects", "Requests whose client went away before the end", registry=self.registry
        )

    def watch_engine(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        """Read the engine's figures from `snapshot` at every scrape."""
        self.registry.register(_EngineFigures(snapshot))

    def observe_sample(self, arrived_s: float, first_s: float, now_s: float, tokens: int) -> None:
        """Record a finished sample; times are on the clock of time.monotonic."""
        self._first.observe(max(0.0, first_s - arrived_s))
        if tokens > 1:
            self._per_token.observe((now_s - first_s) / (tokens - 1))

    def observe_request(self, seconds: float) -> None:
        self._request.observe(seconds)
        self.mean_request_s += _NEWEST_WEIGHT * (seconds - self.mean_request_s)

    def count_response(self, status: int) -> None:
        self._responses.labels(str(status)).inc()
        if status >= 400:
            self.count_error(status)

    def count_error(self, status: int) -> None:
        """Count a failed request, also one whose stream began with 200."""
        self._errors.labels(str(status)).inc()

    def count_disconnect(self) -> None:
        self._disconnects.inc()

    def render_text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineFigures(Collector):
    def __init__(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        stats = now.stats
        yield GaugeMetricFamily("batchinfer_sequences_running", "Sequences that have a seat", now.running)
        yield GaugeMetricFamily("batchinfer_sequences_waiting", "Sequences in the engine's queue", now.waiting)
        usage = now.used_blocks / max(1, now.num_blocks)
        yield GaugeMetricFamily("batchinfer_kv_cache_usage_ratio", "KV blocks that sequences hold, of all", usage)
        prompt = CounterMetricFamily(
            "batchinfer_prompt_tokens", "Prompt tokens, computed or found in the prefix cache", labels=("source",)
        )
        prompt.add_metric(["computed"], stats.prompt_tokens_computed)
        prompt.add_metric(["cached"], stats.prompt_tokens_reused)
        yield prompt
        yield CounterMetricFamily("batchinfer_generated_tokens", "Tokens generated", stats.generated_tokens)
        drafts = CounterMetricFamily(
            "batchinfer_draft_tokens", "Tokens proposed from a sequence's own text", labels=("result",)
        )
        drafts.add_metric(["accepted"], stats.accepted_tokens)
        drafts.add_metric(["rejected"], stats.draft_tokens - stats.accepted_tokens)
        yield drafts
        yield CounterMetricFamily(
            "batchinfer_preemptions", "Sequences computed again for want of memory", stats.preemptions
        )
        yield CounterMetricFamily("batchinfer_steps", "Forward passes", stats.steps)
