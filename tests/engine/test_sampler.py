"""Logits to tokens."""

from __future__ import annotations

import pytest
import torch

from quire.engine.params import SamplingParams
from quire.engine.sampler import _keep_top_p, sample
from quire.engine.sequence import Sequence


def sequence(**params) -> Sequence:
    return Sequence(0, [0], SamplingParams(**params), max_length=99, stop_token_ids=frozenset())


def draws(logits: torch.Tensor, count: int = 400, **params) -> list[int]:
    """Tokens of `count` sequences with seeds 0, 1, ... that all see the same logits."""
    sequences = [sequence(seed=seed, **params) for seed in range(count)]
    return sample(logits.expand(count, -1), sequences)


PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])
LOGITS = PROBABILITIES.log()[None]


def test_temperature_zero_takes_what_argmax_takes_also_in_a_tie():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 1e-6]])
    assert sample(logits, [sequence()] * 3) == logits.argmax(-1).tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("k", "support"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (99, {0, 1, 2, 3})]
)
def test_top_k_draws_exactly_the_k_likeliest(k, support):
    assert set(draws(LOGITS, temperature=1.0, top_k=k)) == support


@pytest.mark.parametrize(
    ("p", "support"),
    [(1e-9, {1}), (0.49, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {1, 2, 3}), (0.96, {0, 1, 2, 3})],
)
def test_top_p_draws_exactly_the_smallest_set_that_reaches_p(p, support):
    assert set(draws(LOGITS, temperature=1.0, top_p=p)) == support


def test_top_p_looks_at_what_top_k_left():
    # Of the top two, 0.5 and 0.3, the first alone holds 0.5 / 0.8 = 0.625.
    assert set(draws(LOGITS, temperature=1.0, top_k=2, top_p=0.6)) == {1}
    assert set(draws(LOGITS, temperature=1.0, top_k=2, top_p=0.65)) == {1, 3}


def test_each_token_is_drawn_as_often_as_it_is_likely():
    counts = torch.bincount(torch.tensor(draws(LOGITS, 4000, temperature=1.0)), minlength=4)
    assert torch.allclose(counts / 4000, PROBABILITIES, atol=0.025)
    sharpened = (PROBABILITIES**2) / (PROBABILITIES**2).sum()
    counts = torch.bincount(torch.tensor(draws(LOGITS, 4000, temperature=0.5)), minlength=4)
    assert torch.allclose(counts / 4000, sharpened, atol=0.025)


@pytest.mark.parametrize(
    ("p", "support"),
    [(0.05, {0, 1, 2, 3}), (0.11, {1, 2, 3}), (0.31, {1, 3}), (0.61, {1}), (1.0, {1}), (0.0, {0, 1, 2, 3})],
)
def test_min_p_draws_exactly_what_is_at_least_so_likely_beside_the_likeliest(p, support):
    assert set(draws(LOGITS, temperature=1.0, min_p=p)) == support


def test_min_p_looks_at_what_temperature_made_and_top_p_at_what_min_p_left():
    # At temperature 2 the probabilities go as their square roots: 0.15 is sqrt(0.3) = 0.55 of the likeliest.
    assert set(draws(LOGITS, temperature=2.0, min_p=0.5)) == {1, 2, 3}
    # Of 0.5 and 0.3 the first alone holds 0.625.
    assert set(draws(LOGITS, temperature=1.0, min_p=0.5, top_p=0.62)) == {1}
    assert set(draws(LOGITS, temperature=1.0, min_p=0.5, top_p=0.63)) == {1, 3}


@pytest.mark.parametrize("k", [None, 0, -1])
def test_top_k_of_vllm_and_of_generate_for_all_tokens_is_all_tokens(k):
    assert set(draws(LOGITS, temperature=1.0, top_k=k)) == {0, 1, 2, 3}


def test_greedy_choice_wins_over_every_filter():
    asked = sequence(temperature=0.0, top_k=2, top_p=0.1, min_p=0.9)
    assert sample(LOGITS, [asked]) == [1]
    assert asked.generator is None


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}, {"min_p": 0.2}]
)
def test_a_draw_is_where_one_uniform_number_falls_in_the_cumulative_mass(filters):
    mass = PROBABILITIES.double()
    if filters:
        mass[0] = 0  # the least likely token is ruled out
    for seed, token in enumerate(draws(LOGITS, 50, temperature=1.0, **filters)):
        u = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert token == int((mass.cumsum(0) <= u * mass.sum()).sum())


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_top_p_over_a_large_vocabulary_is_what_a_full_sort_says(spread):
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * spread
    params = [SamplingParams(temperature=1.0, top_p=p) for p in (0.3, 1.0, 0.95)]
    probabilities = logits.softmax(-1)
    kept = _keep_top_p(probabilities, params) > 0
    for row, p in ((0, 0.3), (2, 0.95)):
        ranked, order = probabilities[row].double().sort(descending=True)
        needed = int((ranked.cumsum(0) < p).sum()) + 1
        assert set(order[:needed].tolist()) == set(kept[row].nonzero().flatten().tolist())
    assert kept[1].all()


def test_ties_at_the_edge_of_a_filter_all_stay():
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert set(draws(logits, temperature=1.0, top_k=2)) == {0, 1, 2, 3}
    assert set(draws(logits, temperature=1.0, top_p=0.6)) == {0, 1, 2, 3}
    assert set(draws(logits, temperature=1.0, top_k=1)) == {1}


def test_a_row_gets_the_same_token_alone_and_in_any_batch():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)) * 3
    params = [
        {"temperature": 1.0},
        {},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.5},
        {"temperature": 1.5, "min_p": 0.05},
    ]
    for seed in range(30):
        together = sample(logits, [sequence(seed=seed, **p) for p in params])
        alone = [sample(logits[[i]], [sequence(seed=seed, **p)])[0] for i, p in enumerate(params)]
        pair = sample(logits[2:4], [sequence(seed=seed, **p) for p in params[2:4]])
        assert together == alone
        assert pair == together[2:4]


def test_a_draw_takes_one_number_whatever_the_filters():
    plain, filtered = sequence(seed=5, temperature=1.0), sequence(seed=5, temperature=1.0, top_k=2, top_p=0.9)
    sample(LOGITS.expand(2, -1), [plain, filtered])
    assert torch.equal(plain.generator.get_state(), filtered.generator.get_state())


def test_a_tiny_temperature_is_greedy_and_not_nan():
    assert set(draws(LOGITS * 1e6, 20, temperature=1e-30)) == {1}
    assert set(draws(LOGITS, 20, temperature=1e-30, top_p=0.9)) == {1}
    assert set(draws(LOGITS, 20, temperature=1e-300, min_p=0.1)) == {1}


def test_tokens_ruled_out_by_the_model_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]])
    assert set(draws(logits, temperature=1.0)) == {1, 3}
    assert set(draws(logits, temperature=1.0, top_k=3)) == {1, 3}


def test_a_row_of_nan_leaves_the_others_alone():
    logits = torch.cat([LOGITS, torch.full((1, 4), torch.nan), LOGITS])
    tokens = sample(logits, [sequence(seed=s, temperature=1.0, top_p=0.9) for s in range(3)])
    assert tokens[0] == draws(LOGITS, 1, temperature=1.0, top_p=0.9)[0]
    assert 0 <= tokens[1] < 4


def test_logits_are_not_changed():
    logits = LOGITS.clone()
    sample(logits, [sequence(temperature=0.5, top_k=2, top_p=0.5)])
    assert torch.equal(logits, LOGITS)


def test_without_a_seed_the_global_seed_repeats_the_draws():
    torch.manual_seed(7)
    first = [sample(LOGITS, [sequence(temperature=1.0)])[0] for _ in range(20)]
    torch.manual_seed(7)
    assert [sample(LOGITS, [sequence(temperature=1.0)])[0] for _ in range(20)] == first
    assert len(set(first)) > 1
