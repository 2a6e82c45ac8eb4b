"""Fields of SamplingParams that are left unset are what the model's generation_config says, as for model.generate."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import GenerationConfig

from quire.engine.core import Engine
from quire.engine.defaults import fill_from
from quire.engine.llm import LLM
from quire.engine.params import OWN_DEFAULTS, SamplingParams
from quire.engine.sampler import _probabilities
from quire.errors import ArgumentError

from .fakes import EOS, FakeModel, byte_tokenizer

ENDS = {"eos_token_id": EOS, "pad_token_id": EOS}


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return LLM(model, page_size=4, num_pages=100, backend="reference")


@pytest.fixture
def configured(model, monkeypatch):
    def configure(**values) -> GenerationConfig:
        config = GenerationConfig(**ENDS, **values)
        monkeypatch.setattr(model, "generation_config", config)
        return config

    return configure


def generate(model, prompt, **options) -> list[int]:
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


GREEDY = {
    "a length": {"max_new_tokens": 9},
    "a penalty": {"max_new_tokens": 12, "repetition_penalty": 1.4},
    "filters of draws that are not made": {"max_new_tokens": 9, "temperature": 0.3, "top_k": 3, "top_p": 0.1},
    "a length with the prompt": {"max_length": 50},
    "the longer of two lengths": {"max_length": 45, "max_new_tokens": 7},
}


@pytest.mark.parametrize("values", GREEDY.values(), ids=GREEDY.keys())
def test_with_nothing_set_tokens_are_those_of_generate_with_nothing_set(
    model, llm, prompts, configured, values
):
    configured(**values)
    wanted = [generate(model, prompt) for prompt in prompts]
    assert {len(tokens) for tokens in wanted} != {20}, "transformers' own length was meant to be overruled"
    assert [output.token_ids for output in llm.generate(prompts)] == wanted


def test_nothing_ends_within_the_least_number_of_tokens_of_the_config(
    model, llm, prompts, configured, expected
):
    end = expected[0][2]
    configured(max_new_tokens=12)
    model.generation_config.eos_token_id = [end, EOS]
    assert [len(output.token_ids) for output in llm.generate(prompts[:1])] == [3]
    for least in ({"min_new_tokens": 8}, {"min_length": len(prompts[0]) + 8}):
        configured(max_new_tokens=12, **least)
        model.generation_config.eos_token_id = [end, EOS]
        wanted = generate(model, prompts[0])
        assert len(wanted) >= 8
        assert llm.generate(prompts[0])[0].token_ids == wanted


@pytest.mark.parametrize(
    "values",
    [{}, {"temperature": 0.6}, {"top_k": 7, "top_p": 0.9}, {"min_p": 0.1}, {"top_k": 0, "top_p": 0.7}],
)
def test_a_model_that_samples_draws_from_what_generate_draws_from(model, llm, prompts, configured, values):
    configured(do_sample=True, max_new_tokens=1, **values)
    for prompt in prompts[:3]:
        result = model.generate(
            torch.tensor([prompt]), output_logits=True, output_scores=True, return_dict_in_generate=True
        )
        [request] = llm._intake.make_requests([prompt], None)
        ours = _probabilities(result.logits[0], [request.sequences[0].params])
        theirs = result.scores[0].softmax(-1)
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours / ours.sum(), theirs)


def test_a_model_that_samples_may_give_several_samples_and_a_greedy_one_is_refused_them_at_the_door(
    llm, prompts, configured
):
    configured(do_sample=True, max_new_tokens=4)
    [output] = llm.generate(prompts[0], SamplingParams(n=3, seed=1))
    assert len({tuple(each.token_ids) for each in output.outputs}) > 1
    configured(max_new_tokens=4)
    with pytest.raises(ArgumentError, match="n must be 1 with temperature 0"):
        llm.generate(prompts[0], SamplingParams(n=3, seed=1))
    assert not llm.has_unfinished


EVERYTHING = {
    "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.5, "repetition_penalty": 1.5,
    "max_new_tokens": 7, "min_new_tokens": 2,
}  # fmt: skip
SET = {
    "temperature": 0.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": None,
    "min_tokens": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", SET)
def test_a_given_value_always_wins_also_one_that_is_quires_default(name):
    config = GenerationConfig(**EVERYTHING)
    of_config, _ = fill_from(config, SamplingParams(), 5)
    params, is_from_config = fill_from(config, SamplingParams(**{name: SET[name]}), 5)
    assert getattr(of_config, name) != SET[name]
    for field in SET:
        expected = SET[name] if field == name else getattr(of_config, field)
        assert getattr(params, field) == expected, field
    assert is_from_config == (name != "max_tokens")


def test_a_temperature_for_a_greedy_model_draws_with_the_filters_its_config_names_and_no_others():
    params, _ = fill_from(GenerationConfig(top_p=0.6), SamplingParams(temperature=0.7), 5)
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.6, None)


@pytest.mark.parametrize("config", [None, GenerationConfig()])
def test_a_silent_config_leaves_quires_own_defaults(config):
    params, is_from_config = fill_from(config, SamplingParams(), 5)
    assert {name: getattr(params, name) for name in OWN_DEFAULTS} == OWN_DEFAULTS
    assert not is_from_config


def test_a_max_tokens_below_the_configs_min_tokens_wins():
    params, _ = fill_from(GenerationConfig(min_new_tokens=9), SamplingParams(max_tokens=4), 5)
    assert (params.min_tokens, params.max_tokens) == (4, 4)


def test_a_length_of_the_config_gives_way_to_the_pool_and_one_that_is_given_is_refused():
    model = FakeModel(num_pages=4, page_size=4)
    model.generation_config = GenerationConfig(max_length=4096, min_new_tokens=100)
    engine = Engine(model)
    [output] = engine.generate([1, 2, 3])
    assert len(output.token_ids) == 4 * 4 + 1 - 3  # the last token needs no slot
    assert output.finish_reason == "length"
    with pytest.raises(ArgumentError, match="must fit the pool"):
        engine.generate([1, 2, 3], SamplingParams(max_tokens=4096))


def test_a_prompt_past_the_configs_max_length_is_refused_with_a_fix_that_works():
    model = FakeModel()
    model.generation_config = GenerationConfig(max_length=3)
    engine = Engine(model)
    with pytest.raises(
        ArgumentError, match=r"shorter than 3 tokens, the max_length .*; got 3.*max_tokens=64"
    ):
        engine.generate([1, 2, 3])
    assert len(engine.generate([1, 2, 3], SamplingParams(max_tokens=64))[0].token_ids) == 64


def test_a_value_of_the_config_that_is_out_of_range_is_said_to_be_the_configs():
    config = GenerationConfig()
    config.repetition_penalty = 0.0
    with pytest.raises(ArgumentError, match=r"repetition_penalty must be .* the generation_config's"):
        fill_from(config, SamplingParams(), 5)
    assert fill_from(config, SamplingParams(repetition_penalty=1.0), 5)[0].repetition_penalty == 1.0


def test_what_a_config_asks_for_and_cannot_be_applied_is_named_in_one_warning(caplog):
    model = FakeModel(vocab_size=257)
    model.generation_config = GenerationConfig(
        no_repeat_ngram_size=3, num_beams=4, top_k=5, suppress_tokens=[]
    )
    with caplog.at_level(logging.WARNING, "quire"):
        Engine(model, byte_tokenizer())
    [said] = [record.getMessage() for record in caplog.records if record.name == "quire"]
    assert "num_beams=4, no_repeat_ngram_size=3, which Quire does not apply" in said
    caplog.clear()
    model.generation_config = GenerationConfig(**EVERYTHING)
    Engine(model, byte_tokenizer())
    assert [record for record in caplog.records if record.name == "quire"] == []
