"""What is counted, in Prometheus' format."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_POWERS_OF_2 = tuple(2**i for i in range(17))


class Metrics:
    """Counters of one server, apart from those of anything else in the process.

    Attributes:
        answered: requests of all endpoints that take a body.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by endpoint and status.", "endpoint", "status")
        self.seconds = self._histogram("request_seconds", "From headers to answer.", _SECONDS, "endpoint")
        self.texts = self._counter("texts", "Texts, or pairs of texts, that went through the model.")
        self.tokens = self._counter("tokens", "Tokens that went through the model.")
        self.cut = self._counter("cut_texts", "Texts that were longer than the model takes, and were cut.")
        self.queue = Gauge("fastbert_queue_texts", "Texts accepted and not yet answered.", registry=self.registry)
        self.batch_texts = self._histogram("batch_texts", "Texts in a batch.", _POWERS_OF_2)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens in a batch.", _POWERS_OF_2)
        self.batch_seconds = self._histogram("batch_seconds", "The model's time for a batch.", _SECONDS)
        self.disconnects = self._counter("disconnects", "Clients that went away before they were answered.")
        self.failures = self._counter("failures", "Failures of the model, each of a batch or a part of one.")
        ProcessCollector(registry=self.registry)

    def batch(self, texts: int, tokens: int, seconds: float) -> None:
        self.texts.inc(texts)
        self.tokens.inc(tokens)
        self.batch_texts.observe(texts)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)

    def request(self, endpoint: str, status: int, start: float) -> None:
        """One that took the time since `start`, of `time.perf_counter`."""
        self.answered += 1
        self.requests.labels(endpoint, str(status)).inc()
        self.seconds.labels(endpoint).observe(time.perf_counter() - start)

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"fastbert_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"fastbert_{name}", what, labels, buckets=buckets, registry=self.registry)
