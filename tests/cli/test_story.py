"""The demo's story: beginnings are shared, samples fork, pages run out, and no text changes by it."""

import pytest

from quire import LLM
from quire.cli.story import ARRIVALS, MOST_TOKENS, SHARED, stage, tell

pytestmark = pytest.mark.xdist_group("cli-demo-model")


@pytest.fixture(scope="module")
def told():
    seen = []
    engine = stage(LLM(num_pages=64), MOST_TOKENS)
    story = tell(engine, MOST_TOKENS, lambda step, requests: seen.append((step, len(requests))))
    return engine, story, seen


def test_requests_come_one_after_another(told):
    _, _, seen = told
    assert seen[0] == (1, 1)
    assert [count for _, count in seen] == sorted(count for _, count in seen)
    assert seen[-1][1] == len(ARRIVALS)


def test_a_shared_beginning_is_found_and_a_prompt_of_two_samples_has_two_owners(told):
    engine, story, _ = told
    beginning = len(engine.tokenizer(SHARED)["input_ids"])
    assert story.outputs[2].num_cached_tokens >= beginning - 2 * engine.model.page_size
    assert story.shared_pages >= beginning // engine.model.page_size - 1
    assert [len(output.outputs) for output in story.outputs] == [arrival.n for arrival in ARRIVALS]


def test_pages_run_out_and_every_text_is_the_one_it_is_alone(told):
    engine, story, _ = told
    assert story.preemptions > 0
    assert story.same == len(ARRIVALS)
    assert engine.model.allocator.num_available == engine.model.num_pages
