"""/metrics, /health and /v1/models."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from quire.engine import SamplingParams

from .conftest import make_engine, serving


def figures(running) -> dict[tuple, float]:
    page = running.get("/metrics")
    assert page.status_code == 200
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }


def test_figures_are_those_of_what_was_served():
    engine = make_engine()
    with serving(engine) as running:
        client = running.client()
        for _ in range(2):
            client.completions.create(
                model="tiny", prompt="x" * 9, n=2, max_tokens=5, seed=1, extra_body={"ignore_eos": True}
            )
        running.post("/v1/completions", {})
        running.post("/v1/nowhere", {})
        found, stats = figures(running), engine.stats
        assert found["quire_generated_tokens_total",] == 20
        assert found["quire_cached_tokens_total",] == stats.cached_tokens > 0
        assert found["quire_steps_total",] == stats.steps
        assert found["quire_texts_total", "length"] == 4
        assert found["quire_request_seconds_count",] == found["quire_time_to_first_token_seconds_count",] == 2
        assert found["quire_http_responses_total", "/v1/completions", "200"] == 2
        assert found["quire_http_responses_total", "/v1/completions", "400"] == 1
        assert found["quire_http_responses_total", "other", "404"] == 1
        assert found["quire_requests_running",] == found["quire_requests_waiting",] == 0
        allocator = engine.model.allocator
        states = [found["quire_pages", state] for state in ("owned", "cached", "free")]
        assert states == [0, allocator.num_cached, allocator.num_free]
        assert sum(states) == engine.model.num_pages


def test_requests_that_run_are_counted_apart_from_those_that_wait():
    engine = make_engine(num_pages=10)
    for prompt in ([1], [2], [3]):
        engine.add_request(prompt, SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(16):
        engine.step()
    with serving(engine) as running:
        found = figures(running)
        assert found["quire_requests_running",] == engine.num_running > 0
        assert found["quire_requests_waiting",] == 3 - engine.num_running > 0


def test_the_model_has_its_names(running):
    models = running.client().models.list().data
    assert [model.id for model in models] == ["tiny", "other"]
    assert models[0].max_model_len == 400
    assert running.client().models.retrieve("other").owned_by == "quire"
    assert running.get("/health").status_code == 200
