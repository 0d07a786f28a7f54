"""What Prometheus reads at /metrics."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from plato2.talk.bot import Reply


class Metrics:
    """Requests, batches, seconds, tokens and refusals, and the process itself."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "plato2_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "plato2_request_seconds",
            "From a request to the end of its answer.",
            ["endpoint"],
            registry=registry,
        )
        self.queue_length = Gauge("plato2_queue_length", "Requests that have not begun.", registry=registry)
        self.batch_contexts = Histogram(
            "plato2_batch_contexts",
            "Contexts answered in one batch.",
            registry=registry,
            buckets=(1, 2, 4, 6, 8, 10, 12, 14, 16, math.inf),
        )
        self.decode_seconds = Histogram(
            "plato2_decode_seconds", "Decoding the candidates of a batch.", registry=registry
        )
        self.rank_seconds = Histogram(
            "plato2_rank_seconds", "Ranking the candidates of a batch.", registry=registry
        )
        self.tokens = Counter(
            "plato2_tokens", "Tokens of contexts (in) and of replies (out).", ["direction"], registry=registry
        )
        self.refusals = Counter("plato2_refusals", "Replies the safety filter refused.", registry=registry)
        ProcessCollector(registry=registry)

    def count_batch(self, replies: list[Reply]) -> None:
        """For `Batcher.on_batch`."""
        self.batch_contexts.observe(len(replies))
        timing = max((reply.timing for reply in replies), key=lambda timing: timing.contexts)
        if timing.contexts:  # none where the safety filter stopped all messages
            self.decode_seconds.observe(timing.decode_s)
            self.rank_seconds.observe(timing.rank_s)

    def count_answer(self, n_in: int, n_out: int, is_refusal: bool) -> None:
        """A reply that goes back, in tokens."""
        self.tokens.labels("in").inc(n_in)
        self.tokens.labels("out").inc(n_out)
        self.refusals.inc(is_refusal)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """A request that was answered; paths that are not ours count as one."""
        known = ("/v1/models", "/v1/chat/completions", "/healthz", "/metrics", "/openapi.json", "/")
        endpoint = path if path in known else "other"
        if path.startswith("/v1/models/"):
            endpoint = "/v1/models/{id}"
        self.requests.labels(endpoint, str(status)).inc()
        self.request_seconds.labels(endpoint).observe(seconds)
