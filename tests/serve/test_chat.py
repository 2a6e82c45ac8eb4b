"""/v1/chat/completions: what the client reads is what the engine says."""

from __future__ import annotations

import pytest

from quire.engine import SamplingParams

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def expected_chat(running, **params):
    [output] = running.engine.chat(MESSAGES, SamplingParams(**params))
    return output


def test_an_answer_is_the_engines_chat(running):
    said = running.client().chat.completions.create(
        model="other", messages=MESSAGES, temperature=0, max_completion_tokens=10
    )
    expected = expected_chat(running, max_tokens=10)
    [choice] = said.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert said.object == "chat.completion"
    assert said.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert said.usage.completion_tokens == 10


def test_without_max_tokens_an_answer_may_be_as_long_as_the_model_allows(running):
    said = running.client().chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, logit_bias={"256": -100}
    )
    assert said.usage.total_tokens == running.engine.model.max_seq_len
    assert said.choices[0].finish_reason == "length"


def test_parts_of_text_are_one_text_and_what_an_answer_held_may_come_back(running):
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {**MESSAGES[1], "tool_calls": [], "refusal": None, "annotations": []},
    ]
    said = running.client().chat.completions.create(
        model="tiny", messages=parts, temperature=0, max_tokens=10
    )
    assert said.choices[0].message.content == expected_chat(running, max_tokens=10).text


@pytest.mark.parametrize("num_top", [None, 0, 4])
def test_logprobs_name_each_token_and_the_likeliest(running, num_top):
    top = {} if num_top is None else {"top_logprobs": num_top}
    said = running.client().chat.completions.create(
        model="tiny", messages=MESSAGES, seed=4, max_tokens=6, logprobs=True, **top
    )
    [text] = expected_chat(running, temperature=1.0, seed=4, max_tokens=6, logprobs=num_top or 0).outputs
    content = said.choices[0].logprobs.content
    assert len(content) == 6
    for token, token_id, each in zip(content, text.token_ids, text.logprobs, strict=True):
        assert (token.token, token.logprob) == (each[token_id].decoded_token, each[token_id].logprob)
        assert token.bytes == ([token_id] if token_id < 128 else None if token_id < 256 else list(b"<eos>"))
        likeliest = sorted((one.logprob for one in each.values()), reverse=True)[: num_top or 0]
        assert [one.logprob for one in token.top_logprobs] == likeliest


def test_samples_are_choices(running):
    said = running.client().chat.completions.create(
        model="tiny", messages=MESSAGES, n=4, seed=7, max_tokens=8, stop=["q", "Z"]
    )
    expected = expected_chat(running, temperature=1.0, n=4, seed=7, max_tokens=8, stop=["q", "Z"]).outputs
    assert [(c.index, c.message.content, c.finish_reason) for c in said.choices] == [
        (text.index, text.text, text.finish_reason) for text in expected
    ]
