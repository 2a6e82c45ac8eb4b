"""What changes logits before a token is chosen, against formulas in float64 and model.generate."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from quire.engine.logits import BadWords, TokenCounts, change_logits, logit_rules
from quire.engine.params import SamplingParams
from quire.engine.sampler import sample
from quire.engine.sequence import Sequence
from quire.errors import ArgumentError

VOCAB = 40
ENDING_IDS = (7, 9)


def sequence(prompt=(1, 2, 3), generated=(), bad_word_ids=(), **params) -> Sequence:
    params = SamplingParams(**params)
    rules = logit_rules(params, ending_ids=ENDING_IDS, bad_words=bad_word_ids, vocab_size=VOCAB)
    made = Sequence(0, list(prompt), params, max_length=99, stop_token_ids=frozenset(ENDING_IDS), rules=rules)
    made.tokens.extend(generated)
    return made


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def by_hand(logits: torch.Tensor, of: Sequence, bad_word_ids=()) -> np.ndarray:
    """What SamplingParams' docstring says, token by token in float64."""
    p, out = of.params, logits.double().numpy().copy()
    prompt = of.tokens[: of.num_prompt_tokens].tolist()
    generated = of.tokens[of.num_prompt_tokens :].tolist()
    counts = Counter(generated)
    for token in range(VOCAB):
        if token in prompt or token in counts:
            out[token] = (
                out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
            )
        out[token] -= p.frequency_penalty * counts[token] + p.presence_penalty * (counts[token] > 0)
        out[token] += (p.logit_bias or {}).get(token, 0.0)
        if p.allowed_token_ids is not None and token not in p.allowed_token_ids:
            out[token] = -math.inf
        if len(generated) < p.min_tokens and token in ENDING_IDS:
            out[token] = -math.inf
        for *prefix, last in bad_word_ids:
            if token == last and (not prefix or generated[-len(prefix) :] == prefix):
                out[token] = -math.inf
    return out


GENERATED = (5, 2, 5, 30, 5)
BAD_WORDS = (
    [11],
    [30, 5, 12],
    [5, 13],
    [2, 14],
    [3, 5, 2, 5, 30, 5, 15],
)  # the last one begins in the prompt
ASKED = {
    "repetition above 1": {"repetition_penalty": 1.3},
    "repetition below 1": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 0.75},
    "presence below 0": {"presence_penalty": -2},
    "frequency": {"frequency_penalty": 0.4},
    "all penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.3},
    "bias": {"logit_bias": {5: -4.0, 31: 2.5, 2: 100.0}},
    "bias of an allowed and a forbidden token": {
        "logit_bias": {5: 50.0, 6: 50.0},
        "allowed_token_ids": {5, 8},
    },
    "allowed": {"allowed_token_ids": [8, 9, 5]},
    "too early to end": {"min_tokens": 6},
    "late enough to end": {"min_tokens": 5},
    "bad words": {"bad_word_ids": BAD_WORDS},
    "everything": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {5: 4.0},
        "allowed_token_ids": range(3, 20),
        "min_tokens": 6,
        "bad_word_ids": BAD_WORDS,
    },
}


@pytest.mark.parametrize("name", ASKED)
def test_each_option_does_what_its_formula_says(name):
    of = sequence(generated=GENERATED, **ASKED[name])
    [logits] = rows(1)
    changed = logits[None].clone()
    assert change_logits(changed, [of]) == {}
    expected = by_hand(logits, of, ASKED[name].get("bad_word_ids", ()))
    np.testing.assert_allclose(changed[0].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert (torch.from_numpy(expected) != logits).any() or name == "late enough to end"


def test_rows_that_ask_for_different_things_do_not_see_each_other():
    sequences = [sequence(generated=GENERATED, **asked) for asked in ASKED.values()]
    logits = rows(len(sequences))
    together = logits.clone()
    change_logits(together, sequences)
    for row, asked in enumerate(ASKED.values()):
        alone = logits[[row]].clone()
        change_logits(alone, [sequence(generated=GENERATED, **asked)])
        assert torch.equal(together[row], alone[0])


def test_a_row_that_asks_for_nothing_is_chosen_from_as_it_came():
    logits = rows(3)
    asks = sequence(logit_bias={4: 1000.0})
    assert sample(logits, [sequence(), asks, sequence()]) == [
        int(logits[0].argmax()),
        4,
        int(logits[2].argmax()),
    ]
    assert asks.rules is not None
    assert sequence(min_tokens=0, logit_bias={}, bad_words=[], logits_processors=[]).rules is None
    assert sequence(temperature=1.0, top_k=3, min_p=0.1).rules is None


def test_a_batch_without_rules_is_one_argmax(monkeypatch):
    calls = []
    monkeypatch.setattr("quire.engine.sampler.change_logits", lambda *_: calls.append("changed"))

    class Counting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    assert sample(rows(4).as_subclass(Counting), [sequence()] * 4) == rows(4).argmax(-1).tolist()
    assert [call for call in calls if call != "__get__"] == ["argmax", "tolist"]


def test_counts_follow_the_tokens_and_cost_only_the_new_ones():
    counts = TokenCounts([3, 1, 3])
    seen = sequence().tokens[:0]
    for token in (5, 3, 5):
        seen.append(token)
        counts.update(seen)
    assert dict(zip(counts.ids, counts.counts, strict=True)) == {3: 1, 1: 0, 5: 2}


def test_counts_are_right_after_an_update_that_was_interrupted():
    class Interrupting(dict):
        def setdefault(self, token, place):
            if token == 6:
                raise KeyboardInterrupt
            return super().setdefault(token, place)

    tokens = sequence(generated=(5, 6)).tokens[3:]
    counts = TokenCounts([1])
    counts.update(tokens[:1])
    counts._places = Interrupting(counts._places)
    with pytest.raises(KeyboardInterrupt):
        counts.update(sequence(generated=(5, 5, 6)).tokens[3:])
    counts.update(sequence(generated=(5, 5, 6)).tokens[3:])
    assert dict(zip(counts.ids, counts.counts, strict=True)) == {1: 0, 5: 2, 6: 1}


def test_a_bad_word_is_ruled_out_where_it_would_be_complete_and_only_there():
    words = BadWords([[4], [5, 6], [5, 5, 7], [8, 5, 9]])
    assert words.single.tolist() == [4]

    def completed(*generated):
        of = sequence(prompt=(8, 5), generated=generated)
        return sorted(words.completions(of.tokens, of.num_prompt_tokens))

    assert completed() == []  # the prompt ends with 5, which was not generated
    assert completed(5) == [6]
    assert completed(5, 5) == [6, 7]
    assert completed(8, 5) == [6, 9]
    assert completed(5, 1) == []


def test_tokens_that_the_model_does_not_have_are_no_bad_words_and_end_nothing():
    of = sequence(bad_word_ids=[[VOCAB], [3, VOCAB], [VOCAB, 3], [4]])
    logits = rows(1)
    change_logits(logits, [of])
    assert logits.isneginf().nonzero().tolist() == [[0, 4]]


def test_a_bias_beyond_float32_is_the_largest():
    logits = torch.zeros(1, VOCAB)
    change_logits(logits, [sequence(logit_bias={3: 1e300, 4: -1e300})])
    assert torch.isfinite(logits).all()
    assert (int(logits.argmax()), int(logits.argmin())) == (3, 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_rules_leave_no_token_fails_alone(temperature):
    logits = rows(3)
    impossible = sequence(allowed_token_ids=[7, 9], min_tokens=1, temperature=temperature, seed=1)
    good = sequence(allowed_token_ids=[7, 8], temperature=temperature, seed=1)
    first, failure, last = sample(logits, [good, impossible, sequence()])
    assert first in (7, 8)
    assert last == int(logits[2].argmax())
    assert isinstance(failure, ArgumentError)
    assert "must leave a token to choose; got none after 0 generated tokens" in str(failure)


# A caller's functions


def only(*allowed: int):
    def processor(token_ids, logits):
        mask = torch.full_like(logits, -torch.inf)
        mask[list(allowed)] = 0
        return logits + mask

    return processor


def test_processors_run_in_their_order_on_what_penalties_and_bias_left_and_before_masks():
    seen = []

    def first(token_ids, logits):
        seen.append(("first", list(token_ids), float(logits[6])))
        logits[6] += 1  # in place
        return logits

    def second(prompt, token_ids, logits):
        seen.append(("second", list(prompt), list(token_ids), float(logits[6])))
        return logits.new_zeros(VOCAB).index_fill(0, torch.tensor([6, 8]), 5.0)

    logits = torch.zeros(1, VOCAB)
    of = sequence(
        generated=(6,),
        bad_word_ids=[[6]],
        logit_bias={6: 3.0},
        presence_penalty=1.0,
        logits_processors=[first, second],
    )
    assert sample(logits, [of]) == [8]
    assert seen == [("first", [6], 2.0), ("second", [1, 2, 3], [6], 3.0)]
    assert not logits.any(), "the model's logits were changed"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("huge", [math.inf, 3e38])
def test_a_processor_may_force_a_token_by_any_large_logit(temperature, huge):
    def force(token_ids, logits):
        logits[11] = huge
        return logits

    of = [sequence(logits_processors=[force], temperature=temperature, seed=seed) for seed in range(5)]
    assert sample(rows(5), of) == [11] * 5


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (None, "NoneType"),
        (torch.zeros(VOCAB + 1), r"torch.float32 \[41\]"),
        (torch.zeros(1, VOCAB), r"torch.float32 \[1, 40\]"),
        (torch.zeros(VOCAB, dtype=torch.bool), r"torch.bool \[40\]"),
        ([0.0] * VOCAB, "list"),
    ],
)
def test_what_is_no_row_of_logits_fails_its_own_row_with_a_sentence(returned, got):
    wrong = sequence(logits_processors=[lambda token_ids, logits: returned])
    fine = sequence(logits_processors=[only(3)])
    [failure, token] = sample(rows(2), [wrong, fine])
    with pytest.raises(ArgumentError, match=rf"must return logits, a float tensor \[40\]; got {got} from"):
        raise failure
    assert token == 3


def test_what_a_processor_raises_is_the_choice_of_its_row_alone():
    def failing(token_ids, logits):
        logits.fill_(torch.nan)
        raise RuntimeError("my own")

    drawing = {"temperature": 1.0, "seed": 4}
    logits = rows(4)
    others = [sequence(), sequence(logits_processors=[only(3)]), sequence(logit_bias={5: 1.0}, **drawing)]
    expected = [sample(logits[[row]], [of])[0] for row, of in zip((0, 2, 3), others, strict=True)]
    fails = sequence(logits_processors=[failing], **drawing)
    [first, failure, *rest] = sample(logits, [others[0], fails, *others[1:]])
    assert [first, *rest] == expected
    assert str(failure) == "my own"


def test_a_row_gets_the_same_token_alone_and_in_any_batch_whatever_it_asks_for():
    options = [*ASKED.values(), {}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "min_p": 0.2}]
    options = [option | {"temperature": 0.8} if i % 2 else option for i, option in enumerate(options)]
    logits = rows(len(options), seed=2)

    def made(option, seed):
        return sequence(generated=GENERATED, seed=seed, **option)

    for seed in range(10):
        together = sample(logits, [made(option, seed) for option in options])
        assert together == [sample(logits[[i]], [made(option, seed)])[0] for i, option in enumerate(options)]
        assert together[3:9] == sample(logits[3:9], [made(option, seed) for option in options[3:9]])
