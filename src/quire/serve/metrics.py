"""Figures for Prometheus: the pool and the queue as they are now, and what requests took."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.engine import Engine, RequestOutput

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(engine))
        self.responses = Counter(
            "quire_http_responses", "Responses begun, by path and status.", ("path", "status"),
            registry=self._registry,
        )  # fmt: skip
        self._texts = Counter(
            "quire_texts", "Texts that ended, by the reason.", ("reason",), registry=self._registry
        )
        self._first_token = Histogram(
            "quire_time_to_first_token_seconds", "From a prompt's arrival to its first token.",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._whole = Histogram(
            "quire_request_seconds", "From a prompt's arrival to the end of its texts.",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip

    def observe(self, output: RequestOutput) -> None:
        """Count a prompt whose texts have ended."""
        for text in output.outputs:
            self._texts.labels(text.finish_reason).inc()
        if output.time_to_first_token is not None:
            self._first_token.observe(output.time_to_first_token)
        self._whole.observe(output.seconds)

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineFigures(Collector):
    """What the engine knows itself, read when someone asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """All figures, as of now; each is read without waiting for a step."""
        engine, stats, allocator = self._engine, self._engine.stats, self._engine.model.allocator
        running, live = engine.num_running, len(engine.requests)
        for name, value, text in (
            ("requests_running", running, "Prompts that hold pages."),
            ("requests_waiting", max(live - running, 0), "Prompts that wait for pages or a place."),
        ):
            yield GaugeMetricFamily(f"quire_{name}", text, value)
        pages = GaugeMetricFamily("quire_pages", "Pages of the pool, by state.", labels=("state",))
        pages.add_metric(("owned",), allocator.num_owned)
        pages.add_metric(("cached",), allocator.num_cached)
        pages.add_metric(("free",), allocator.num_free)
        yield pages
        for name, value, text in (
            ("steps", stats.steps, "Packed forwards."),
            ("computed_tokens", stats.computed_tokens, "Tokens that went through the model."),
            ("admitted_tokens", stats.admitted_tokens, "Known tokens of sequences that began to run."),
            ("cached_tokens", stats.cached_tokens, "Those of them that were found in pages."),
            ("generated_tokens", stats.generated_tokens, "Tokens handed out."),
        ):
            yield CounterMetricFamily(f"quire_{name}", text, value)


class CountResponses:
    """Counts every response by its path and status; paths that a server does not have count as one.

    Args:
        paths: those that it has.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: Iterable[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count)
