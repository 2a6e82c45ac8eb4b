"""/v1/completions: what the client reads is what the engine says."""

from __future__ import annotations

from functools import partial

import pytest
from transformers import GenerationConfig

from quire.engine import SamplingParams

from .conftest import make_engine, serving

PROMPT = "some text"


def greedy(running, prompt=PROMPT, **params):
    [output] = running.engine.generate(prompt, SamplingParams(**params))
    return output


def test_a_text_is_the_engines_with_its_usage(running):
    said = running.client().completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=12)
    expected = greedy(running, max_tokens=12)
    [choice] = said.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (expected.text, "length", None)
    assert (said.object, said.model) == ("text_completion", "tiny")
    usage = said.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(PROMPT),
        12,
        12 + len(PROMPT),
    )


def test_sixteen_tokens_at_temperature_1_are_the_default(running):
    said = running.client().completions.create(model="tiny", prompt=PROMPT, seed=5)
    expected = greedy(running, temperature=1.0, seed=5, max_tokens=16)
    assert said.choices[0].text == expected.text
    assert said.choices[0].text != greedy(running, max_tokens=16).text


def test_what_is_left_out_is_the_models_where_it_samples():
    engine = make_engine()
    engine.model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=4, min_new_tokens=3
    )
    with serving(engine) as running:
        ask = partial(running.client().completions.create, model="tiny", prompt=PROMPT, seed=5, max_tokens=12)
        [whole] = engine.generate(PROMPT, SamplingParams(seed=5, max_tokens=12))
        [warm] = engine.generate(PROMPT, SamplingParams(seed=5, max_tokens=12, temperature=1.5))
        assert ask().choices[0].text == whole.text
        assert ask(temperature=1.5).choices[0].text == warm.text != whole.text


def test_every_sample_of_every_prompt_has_its_place(running):
    prompts = ["one", [116, 119, 111], "three"]
    said = running.client().completions.create(
        model="tiny", prompt=prompts, n=3, seed=-(2**63) + 9, temperature=0.7, top_p=0.9, max_tokens=9
    )
    params = SamplingParams(n=3, seed=9 - 2**63 + 2**63, temperature=0.7, top_p=0.9, max_tokens=9)
    expected = [text.text for output in running.engine.generate(prompts, params) for text in output.outputs]
    assert [choice.text for choice in said.choices] == expected
    assert [choice.index for choice in said.choices] == list(range(9))
    assert len(set(expected)) == 9


def test_a_prompt_may_be_token_ids_alone(running):
    said = running.client().completions.create(
        model="tiny", prompt=list(PROMPT.encode()), temperature=0, max_tokens=4
    )
    assert said.choices[0].text == greedy(running, max_tokens=4).text


@pytest.mark.parametrize("as_list", [True, False])
def test_a_stop_string_ends_a_text(running, as_list):
    whole = greedy(running, max_tokens=12).text
    stop = whole[5:7]
    said = running.client().completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=12, stop=[stop] if as_list else stop
    )
    assert said.choices[0].text == whole[: whole.index(stop)]
    assert said.choices[0].finish_reason == "stop"


def test_logprobs_are_lists_side_by_side(running):
    said = running.client().completions.create(
        model="tiny", prompt=PROMPT, temperature=1, seed=1, max_tokens=5, logprobs=3
    )
    [text] = greedy(running, temperature=1.0, seed=1, max_tokens=5, logprobs=3).outputs
    found = said.choices[0].logprobs
    firsts = [next(iter(each.values())) for each in text.logprobs]
    assert found.tokens == [each.decoded_token for each in firsts]
    assert found.token_logprobs == [each.logprob for each in firsts]
    for top, each in zip(found.top_logprobs, text.logprobs, strict=True):
        assert set(top.values()) <= {one.logprob for one in each.values()}
        assert max(top.values()) == max(one.logprob for one in each.values())
    lengths = [len(token) for token in found.tokens]
    assert found.text_offset == [sum(lengths[:i]) for i in range(5)]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("prompt", [PROMPT, list(PROMPT.encode())])
def test_an_echo_with_logprobs_scores_the_prompt_as_evaluations_ask(running, prompt, max_tokens):
    said = running.post(
        "/v1/completions",
        {
            "model": "tiny", "prompt": [prompt], "temperature": 0, "max_tokens": max_tokens, "logprobs": 1,
            "seed": 1234, "echo": True,
        },
    ).json()  # fmt: skip
    expected = greedy(running, max_tokens=max(max_tokens, 1), logprobs=1, prompt_logprobs=1)
    [choice] = said["choices"]
    text = expected.text if max_tokens else ""
    assert choice["text"] == PROMPT + text
    known = [*expected.prompt_logprobs[1:], *expected.outputs[0].logprobs[:max_tokens]]
    own = [next(iter(each.values())).logprob for each in known]
    assert choice["logprobs"]["token_logprobs"] == [None, *own]
    assert choice["logprobs"]["top_logprobs"][0] is None
    likeliest = [max(each.values(), key=lambda one: one.logprob).logprob for each in known]
    assert [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]] == likeliest
    assert choice["logprobs"]["tokens"][: len(PROMPT)] == list(PROMPT)
    assert choice["logprobs"]["text_offset"][: len(PROMPT)] == list(range(len(PROMPT)))
    assert said["usage"]["completion_tokens"] == max_tokens
    assert choice["finish_reason"] == "length"


def test_usage_tells_how_many_tokens_were_found_in_pages(running):
    prompt = "a prompt that nobody has asked for before, of several pages"
    ask = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    cached = [
        running.client().completions.create(**ask).usage.prompt_tokens_details.cached_tokens for _ in range(2)
    ]
    page_size = running.engine.model.page_size
    assert cached == [0, (len(prompt) - 1) // page_size * page_size]


def test_what_vllm_adds_reaches_the_engine(running):
    extra = {
        "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "min_tokens": 3, "stop_token_ids": [10],
        "ignore_eos": True, "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    said = running.client().completions.create(
        model="tiny", prompt=PROMPT, seed=3, max_tokens=30, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias={"65": 4.5, "66": -100}, extra_body=extra | {"cache_salt": "mine"},
    )  # fmt: skip
    expected = greedy(
        running, temperature=1.0, seed=3, max_tokens=30, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias={65: 4.5, 66: -100.0}, **extra,
    )  # fmt: skip
    assert said.choices[0].text == expected.text


def test_null_is_the_default(running):
    body = {
        "model": None,
        "prompt": PROMPT,
        "seed": 2,
        "max_tokens": None,
        "stop": None,
        "logprobs": None,
        "user": "x",
    }
    said = running.post("/v1/completions", body).json()
    assert said["choices"][0]["text"] == greedy(running, temperature=1.0, seed=2, max_tokens=16).text
