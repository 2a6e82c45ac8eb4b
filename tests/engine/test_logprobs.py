"""How likely tokens were: ranks and logarithms in float64, in chunks, batches and after preemption."""

from __future__ import annotations

import contextlib
import math
import threading

import numpy as np
import pytest
import torch

from quire.engine.core import Engine
from quire.engine.logprobs import Logprob, token_logprobs
from quire.engine.params import SamplingParams

from .fakes import EOS, FakeModel, byte_tokenizer, fork, scripted

VOCAB = 50


def by_hand(logits: np.ndarray, token: int, num: int) -> dict[int, tuple[float, int]]:
    """{token: (logprob, rank)} of a token and the num likeliest, in float64; no two are equally likely."""
    exact = logits.astype(np.float64)
    logprobs = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    order = np.argsort(-logprobs).tolist()
    return {t: (logprobs[t], order.index(t) + 1) for t in (token, *order[:num])}


def is_by_hand(found: dict[int, Logprob], logits: np.ndarray, token: int, num: int) -> None:
    expected = by_hand(logits, token, num)
    assert list(found) == list(expected), "the token comes first, then the likeliest"
    for token_id, (logprob, rank) in expected.items():
        assert found[token_id].logprob == pytest.approx(logprob, abs=1e-5)
        assert found[token_id].rank == rank


@pytest.mark.parametrize("num", [0, 1, 5, -1, 99])
def test_a_token_and_the_likeliest_have_the_logarithms_and_ranks_of_the_formula(num):
    logits = torch.randn(130, VOCAB, generator=torch.Generator().manual_seed(0)) * 4  # more than go at once
    tokens = [row * 7 % VOCAB for row in range(130)]
    found = token_logprobs(logits, tokens, [num] * 130)
    for row, each in enumerate(found):
        shown = VOCAB if num in (-1, 99) else num
        is_by_hand(each.as_dict(lambda token: None), logits[row].numpy(), tokens[row], shown)


def test_equally_likely_tokens_share_a_rank():
    [found] = token_logprobs(torch.tensor([[1.0, 3.0, 1.0, 3.0, 0.0]]), [2], [5])
    ranks = found.as_dict(lambda token: None)
    assert {token: ranks[token].rank for token in range(5)} == {1: 1, 3: 1, 0: 3, 2: 3, 4: 5}


def test_a_row_has_the_same_bits_alone_and_in_any_batch_whatever_others_ask_for():
    """A large vocabulary, so that a single row would be worth several threads, with many ties."""
    logits = torch.randn(5, 70_000, generator=torch.Generator().manual_seed(1)).mul(4).round()
    logits[:, ::2] += 0.25 * torch.randn(5, 35_000, generator=torch.Generator().manual_seed(2))
    tokens, nums = [5, 6, 7, 8, 9], [3, 0, 20, 3, 1000]
    together = token_logprobs(logits, tokens, nums)
    for row in range(5):
        assert token_logprobs(logits[[row]], [tokens[row]], [nums[row]]) == [together[row]]


def test_a_row_is_summed_in_the_same_order_alone_and_in_a_batch(set_threads):
    """Alone, a row of this length is worth two threads to most of PyTorch's sums."""
    set_threads(2)
    logits = torch.randn(40, 50_000, generator=torch.Generator().manual_seed(3)) - 11
    logits[:, 0] = (
        0  # as likely as all others together, so that its logarithm shows the last bit of their sum
    )
    together = token_logprobs(logits, [0] * 40, [0] * 40)
    assert [token_logprobs(logits[[row]], [0], [0])[0] for row in range(40)] == together


def serve(engine: Engine, requests) -> list:
    ids = [engine.add_request(prompt, params) for prompt, params in requests]
    outputs = {}
    while engine.has_unfinished:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
    return [outputs[i] for i in ids]


def is_whole(output, model: FakeModel, num: int) -> None:
    """Every generated token is reported as the model's own logits after its history say."""
    [completion] = output.outputs
    history = list(output.prompt_token_ids)
    assert len(completion.logprobs) == len(completion.token_ids)
    for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
        is_by_hand(found, model.rule(np.array(history)), token, num)
        history.append(token)
    total = math.fsum(
        found[t].logprob for t, found in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)


def is_whole_prompt(output, model: FakeModel, num: int) -> None:
    prompt = output.prompt_token_ids
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for position in range(1, len(prompt)):
        logits = model.rule(np.array(prompt[:position]))
        is_by_hand(output.prompt_logprobs[position], logits, prompt[position], num)


ASKED = SamplingParams(
    temperature=1.5,
    top_k=9,
    repetition_penalty=1.5,
    presence_penalty=1.0,
    seed=3,
    logprobs=4,
    prompt_logprobs=2,
    max_tokens=12,
)


@pytest.mark.parametrize(("num_pages", "max_batch_tokens"), [(64, 512), (64, 5), (14, 7)])
def test_logprobs_are_the_models_own_whatever_changes_the_choice_in_chunks_and_after_preemption(
    num_pages, max_batch_tokens
):
    model = FakeModel(num_pages=num_pages)
    engine = Engine(model, max_batch_tokens=max_batch_tokens)
    prompts = [[i, *range(10 + i)] for i in range(4)]
    outputs = serve(engine, [(prompt, ASKED) for prompt in prompts])
    for output in outputs:
        is_whole(output, model, 4)
        is_whole_prompt(output, model, 2)
    assert (sum(output.preemptions for output in outputs) > 0) == (num_pages == 14)


def test_nothing_is_reported_where_nobody_asked_and_zero_reports_the_token_alone():
    model = FakeModel()
    silent, zero = serve(
        Engine(model),
        [
            ([1, 2, 3], SamplingParams(max_tokens=3)),
            ([1, 2, 3], SamplingParams(max_tokens=3, logprobs=0, prompt_logprobs=0)),
        ],
    )
    assert (silent.prompt_logprobs, silent.outputs[0].logprobs, silent.outputs[0].cumulative_logprob) == (
        None,
    ) * 3
    is_whole(zero, model, 0)
    is_whole_prompt(zero, model, 0)


def test_logits_of_prompts_are_computed_only_for_those_who_ask_and_once():
    model = FakeModel(num_pages=10, page_size=4)
    engine = Engine(model, max_batch_tokens=8)
    older = engine.add_request([40] * 9, SamplingParams(max_tokens=16))
    asks = engine.add_request(list(range(12)), SamplingParams(max_tokens=12, prompt_logprobs=0))
    rows = []
    outputs = {}
    while engine.has_unfinished:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
        rows.append(model.logits_rows[-1])
    assert outputs[asks].preemptions > 0
    # Each generated token takes one row, and the prompt of twelve tokens eleven more, also where it was computed twice.
    assert sum(rows) == 16 + 12 + 11
    assert rows[0] == 0, "nobody asked for the first chunk's"
    is_whole_prompt(outputs[asks], model, 0)
    assert outputs[older].prompt_logprobs is None


def test_a_prompt_that_others_have_computed_is_reported_whole():
    """Who finds a prompt in pages must still compute what is asked of it."""
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=6)
    prompt = list(range(17))
    assert engine.generate(prompt, SamplingParams(max_tokens=4))
    outputs = engine.generate([prompt] * 3, ASKED)
    for output in outputs:
        is_whole_prompt(output, model, 2)
        is_whole(output, model, 4)


def test_a_step_that_breaks_off_reports_nothing_twice():
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=5)
    request_id = engine.add_request(list(range(12)), ASKED)
    forward, count = model.forward, 0

    def interrupted(step):
        nonlocal count
        count += 1
        logits = forward(step)
        if count % 3 == 0:
            raise KeyboardInterrupt
        return logits

    model.forward = interrupted
    outputs = {}
    while engine.has_unfinished:
        with contextlib.suppress(KeyboardInterrupt):
            outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
        if count > 60:
            model.forward = forward
    is_whole(outputs[request_id], model, 4)
    is_whole_prompt(outputs[request_id], model, 2)


def test_a_request_aborted_inside_its_prompt_reports_what_was_computed():
    engine = Engine(FakeModel(), max_batch_tokens=5)
    params = SamplingParams(prompt_logprobs=0, logprobs=0)
    request = engine.requests[engine.add_request(list(range(12)), params)]
    engine.step()
    engine.abort(request.request_id)
    output = request.output()
    assert len(output.prompt_logprobs) == 6
    assert (output.outputs[0].logprobs, output.outputs[0].cumulative_logprob) == ([], 0)


def test_a_prompt_of_one_token_has_nothing_to_report():
    [output] = serve(Engine(FakeModel()), [([3], SamplingParams(max_tokens=1, prompt_logprobs=5))])
    assert output.prompt_logprobs == [None]


def test_each_sequence_of_a_forked_request_reports_its_own_tokens_and_the_prompt_once():
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=4)
    forked = engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=1))
    engine.step()
    [delta] = engine.step()
    fork(engine, forked, (delta.token_ids[0] + 1) % VOCAB)
    while engine.has_unfinished:
        deltas = engine.step()
    output = deltas[-1].output
    is_whole_prompt(output, model, 1)
    for completion, num_chosen in zip(output.outputs, (4, 3), strict=True):
        history = [1, 2, 3, 4, 5, *completion.token_ids]
        assert len(completion.logprobs) == num_chosen
        for end, found in zip(
            range(len(history) - num_chosen, len(history)), completion.logprobs, strict=True
        ):
            is_by_hand(found, model.rule(np.array(history[:end])), history[end], 1)


def test_tokens_are_decoded_alone_special_ones_too_and_not_without_a_tokenizer():
    model = FakeModel(vocab_size=257, rule=scripted(257, 1, [ord("a"), EOS]), eos_token_ids=(EOS,))
    params = SamplingParams(logprobs=1, prompt_logprobs=0)
    [output] = Engine(model, byte_tokenizer()).generate([ord("x")], params)
    assert [
        found[t].decoded_token for t, found in zip(output.token_ids, output.outputs[0].logprobs, strict=True)
    ] == [
        "a",
        "<eos>",
    ]
    [output] = Engine(model).generate([ord("x")], params)
    assert output.outputs[0].logprobs[0][ord("a")].decoded_token is None


def test_two_engines_on_one_model_report_their_own():
    model = FakeModel()
    outputs = {}

    def ask(name, params):
        outputs[name] = Engine(model, max_batch_tokens=6).generate([list(range(9)), [4, 5]], params)

    threads = [
        threading.Thread(
            target=ask, args=(name, SamplingParams(max_tokens=8, logprobs=name, prompt_logprobs=name))
        )
        for name in (1, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for num, results in outputs.items():
        for output in results:
            is_whole(output, model, num)
            is_whole_prompt(output, model, num)


def test_deltas_carry_the_logprobs_of_their_tokens_also_where_several_come_at_once():
    model = FakeModel(vocab_size=257, eos_token_ids=(EOS,), num_pages=200)
    engine = Engine(model, byte_tokenizer())
    asked = SamplingParams(max_tokens=9, logprobs=2, n=3, temperature=1.0, seed=4)
    stream = engine.stream(["some", "text"], [asked, SamplingParams(max_tokens=9)])
    deltas = [next(stream)]
    engine.generate("served by steps that nobody reads here", SamplingParams(max_tokens=4))
    deltas += stream
    outputs = {delta.index: delta.output for delta in deltas if delta.output is not None}
    assert all(delta.logprobs is None for delta in deltas if delta.index == 1)
    assert any(len(delta.token_ids) > 1 for delta in deltas)
    for sequence, output in enumerate(outputs[0].outputs):
        own = [delta for delta in deltas if (delta.index, delta.sequence) == (0, sequence)]
        assert all([next(iter(each)) for each in delta.logprobs] == delta.token_ids for delta in own)
        assert [each for delta in own for each in delta.logprobs] == output.logprobs
    assert len({tuple(output.token_ids) for output in outputs[0].outputs}) == 3
