"""Prometheus metrics by vLLM's names, with the prefix `pagedjax:`."""

import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pagedjax.engine import Engine

from .async_engine import Delta, Stream, Watcher

PREFIX = "pagedjax:"
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
TOKENS = tuple(1 << i for i in range(15))


class EngineState(Collector):
    """What the engine knows of itself, read when it is asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        scheduler, pool, cache = engine.scheduler, engine.pool, engine.prefix_cache
        yield gauge("num_requests_running", "sequences that have pages", len(scheduler.running))
        yield gauge("num_requests_waiting", "sequences that wait for pages and rows", len(scheduler.waiting))
        yield gauge("kv_cache_usage_perc", "share of pages in use, 1 for all", pool.num_used / pool.num_usable)
        yield counter("num_preemptions", "sequences that lost their pages", scheduler.stats.num_preemptions)
        if cache:
            yield counter("prefix_cache_queries", "tokens looked up", cache.stats.num_queries)
            yield counter("prefix_cache_hits", "tokens found", cache.stats.num_hits)


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


class Arrivals(Collector):
    """What is counted for every event, without the library's locks and labels: in the event loop alone."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._counts = [0] * (len(SHORT) + 1)
        self._seconds = 0.0

    def between(self, seconds: float) -> None:
        self._counts[bisect_left(SHORT, seconds)] += 1
        self._seconds += seconds

    def collect(self) -> Iterator[Metric]:
        yield counter("generation_tokens", "sent to clients", self.num_tokens)
        name, text = PREFIX + "inter_token_latency_seconds", "between tokens of a sequence"
        buckets = zip((*map(str, SHORT), "+Inf"), accumulate(self._counts), strict=True)
        yield HistogramMetricFamily(name, text, list(buckets), self._seconds)


class Metrics(Watcher):
    """Counts what requests meet."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self._arrivals = Arrivals()
        self.registry.register(EngineState(engine))
        self.registry.register(self._arrivals)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

        self._prompt = Counter(PREFIX + "prompt_tokens", "of requests that ended", registry=self.registry)
        self._success = Counter(
            PREFIX + "request_success", "sequences that ended", ["finished_reason"], registry=self.registry
        )
        self._first = histogram("time_to_first_token_seconds", "from arrival", LONG)
        self._whole = histogram("e2e_request_latency_seconds", "from arrival to the last token", LONG)
        self._queued = histogram("request_queue_time_seconds", "from arrival to the first step", LONG)
        self._iteration = histogram("iteration_tokens_total", "tokens of a step", TOKENS)
        self._latest: dict[tuple[Stream, int], float] = {}

    def step(self, num_tokens: int) -> None:
        self._iteration.observe(num_tokens)

    def arrived(self, stream: Stream, deltas: list[Delta]) -> None:
        """Tokens that come together count as one interval apart from the last, and none from each other."""
        now = time.perf_counter()
        for delta in deltas:
            num_tokens, key = len(delta.token_ids), (stream, delta.index)
            self._arrivals.num_tokens += num_tokens
            latest = self._latest.get(key)
            if latest is not None and num_tokens:
                self._arrivals.between((now - latest) / num_tokens)
            self._latest[key] = now
            if delta.finish_reason:
                self._success.labels(delta.finish_reason).inc()

    def ended(self, stream: Stream) -> None:
        for i, request in enumerate(stream.requests):
            self._latest.pop((stream, i), None)
            m = request.metrics
            if m.first_scheduled is not None:
                self._queued.observe(m.first_scheduled - m.arrival)
            if m.first_token is not None:
                self._first.observe(m.first_token - m.arrival)
            if m.finished is not None:
                self._whole.observe(m.finished - m.arrival)
        if stream.requests:
            self._prompt.inc(len(stream.first.prompt_token_ids))

    def text(self) -> bytes:
        return generate_latest(self.registry)
