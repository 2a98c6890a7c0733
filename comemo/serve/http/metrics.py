"""What a server counts, for Prometheus. A registry for each app: nothing is global."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from comemo.serve.work import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOTALS = {
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that were in the KV cache",
    "answer_tokens": "Tokens of answers",
    "pictures_computed": "Pictures that went through the vision tower",
    "pictures_found": "Pictures that did not have to be computed",
    "steps": "Decode steps",
    "cancelled": "Requests whose client was gone",
    "timeouts": "Requests that took too long",
}


class Metrics:
    """Counters and histograms of one app.

    Args:
        engine: whose state is shown, too.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "comemo_requests", "Requests by status", ["status"], registry=self.registry
        )
        self.first = self._seconds(
            "comemo_first_token_seconds", "From the request to its first token"
        )
        self.waited = self._seconds("comemo_queue_seconds", "In the queue")
        self.whole = self._seconds("comemo_request_seconds", "From the request to its end")
        self.per_token = self._seconds("comemo_token_seconds", "Mean of an answer, per token")
        self.registry.register(_EngineCollector(engine))

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        state = self._engine.state()
        for name, text in TOTALS.items():
            yield CounterMetricFamily(
                f"comemo_{name}", text, value=float(state.totals.get(name, 0))
            )
        requests = GaugeMetricFamily("comemo_requests_now", "Requests by state", labels=["state"])
        for name in ("waiting", "reading", "answering"):
            requests.add_metric([name], getattr(state, name))
        yield requests
        for name, text in (("key", "KV cache"), ("picture", "image memory")):
            for part, what in (("tokens", "taken"), ("capacity", "in all")):
                value = getattr(state, f"{name}_{part}")
                full = f"comemo_{name}_{part}"
                yield GaugeMetricFamily(full, f"Tokens of the {text}, {what}", value=value)
