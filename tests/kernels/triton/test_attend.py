"""The attention kernel in the interpreter against the float64 reference, poison wherever no key lies."""

import math
import random

import interpreter
import pytest
import torch
from accuracy import assert_accurate, exact, plain
from pairs import every_pair, one_in
from support import LAYOUTS, Shape, attend, features, give_back_unseen, make_batch, plan_for

import quire
from quire.kernels.triton import tune
from quire.planning import work_list as work

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ALL = {"window": True, "softcap": True, "alibi": True, "sinks": True, "tree": True}
FEATURES = [{}, *({name: True} for name in ALL), ALL]
SMALL, NARROW = Shape(F32, 32, group=2), Shape(BF16, 64, group=3, kv_dtype="fp8_e4m3", num_kv_heads=1)
few_shapes = pytest.mark.parametrize("shape", [SMALL, NARROW], ids=str)

# Lengths and query tokens: one query each, beside a long one that is split and an empty one; several queries each,
# over prefixes and without, one beside more queries than keys; decode rows beside prefill rows.
STEPS = {
    "decode": ([0, 1, 63, 64, 65, 420], None),
    "prefill": ([40, 65, 130, 20], [40, 17, 33, 25]),
    "mixed": ([1, 40, 65, 0, 300, 140], [1, 20, 2, 3, 1, 1]),
}


def judge(batch, **rules):
    """Run the kernels and judge them."""
    state = attend(batch, backend="triton", **rules)
    assert_accurate(state, exact(batch, **rules), plain(batch, **rules), batch.largest_value)
    return state


# The tile tables of these chips, each with three multiprocessors, so that work is shared and split.
CHIPS = {
    "here": None,
    "sm_80": tune.known_chip("cuda", 80, 3),
    "sm_90": tune.known_chip("cuda", 90, 3),
    "gfx942": tune.known_chip("hip", 0, 3),
}
CASES = every_pair(
    {
        "head_dim": [16, 20, 64, 80, 96, 128, 256],
        "asked": FEATURES,
        "layout": LAYOUTS,
        "group": [1, 3, 4, 8, 24],
        "page_size": [1, 13, 16, 128],
        "kv_dtype": [None, "int8", "fp8_e4m3", "fp8_e5m2"],
        "dtype": [F32, F16, BF16],
        "step": list(STEPS),
        "causal": [True, False],
        "strided_q": [False, True],
        "share": [0.0, 0.4],
        "chip": list(CHIPS),
    }
)


def name(case):
    shape = Shape(case["dtype"], case["head_dim"], case["group"], case["kv_dtype"])
    words = [
        case["chip"],
        shape,
        f"p{case['page_size']}",
        case["layout"],
        "+".join(case["asked"]) or "none",
        case["step"],
    ]
    return "-".join(map(str, words)) + ("" if case["causal"] else "-full")


@pytest.mark.parametrize("case", one_in(3, CASES), ids=name)
def test_it_equals_the_reference(case, monkeypatch):
    if CHIPS[case["chip"]]:
        monkeypatch.setattr(tune, "chip_of", lambda _: CHIPS[case["chip"]])
    heads = 1 if case["group"] > 4 else 2
    shape = Shape(case["dtype"], case["head_dim"], case["group"], case["kv_dtype"], num_kv_heads=heads)
    how = {key: case[key] for key in ("page_size", "layout", "share", "strided_q")}
    batch = make_batch(shape, *STEPS[case["step"]], **how)
    judge(batch, causal=case["causal"], **features(batch, **case["asked"]))


# Few rows of a 16-bit dtype lie transposed; what meets above by pairs seldom comes to that without quantised pages.
TRANSPOSED = every_pair(
    {
        "asked": FEATURES,
        "head_dim": [20, 80, 128],
        "group": [1, 3, 8],
        "page_size": [13, 16, 256],
        "dtype": [F16, BF16],
        "layout": ["nhd", "gaps"],
        "causal": [True, False],
        "chip": ["here", "sm_80"],
    }
)


FEW_ROWS = [case | {"step": "few", "kv_dtype": None} for case in TRANSPOSED]


@pytest.mark.parametrize("case", one_in(3, FEW_ROWS), ids=name)
def test_few_rows_over_pages_of_their_own_dtype_equal_the_reference(case, monkeypatch):
    if CHIPS[case["chip"]]:
        monkeypatch.setattr(tune, "chip_of", lambda _: CHIPS[case["chip"]])
    shape = Shape(case["dtype"], case["head_dim"], case["group"])
    most = tune.MIN_COLUMNS // case["group"]  # query tokens; more than keys once
    how = {key: case[key] for key in ("page_size", "layout")}
    batch = make_batch(shape, [0, 1, 64, 65, 900], [1, most, most, 1, most], **how)
    plan = quire.plan(*batch.lengths[:2], shape.spec(case["page_size"]), batch.cu_seqlens_q, backend="triton")
    assert f"decode tile: {tune.MIN_COLUMNS} rows" in plan.explain()
    judge(batch, causal=case["causal"], **features(batch, **case["asked"]))


@few_shapes
def test_a_windows_first_key_is_the_one_window_left_positions_back(shape):
    batch = make_batch(shape, [17, 65, 140], [5, 1, 3], page_size=16)
    for window_left in (0, 15, 16, 64, 127, 128):
        judge(batch, window_left=window_left)


@few_shapes
def test_pages_before_a_window_are_never_read(shape):
    for window_left in (15, 64):
        batch = make_batch(shape, [17, 65, 140], [5, 1, 3], page_size=16)
        whole = attend(batch, backend="triton", window_left=window_left)
        assert give_back_unseen(batch, window_left)
        for part, wanted in zip(attend(batch, backend="triton", window_left=window_left), whole, strict=True):
            assert torch.equal(part, wanted)


@few_shapes
def test_rows_before_the_first_key_are_zero_and_the_others_unharmed(shape):
    batch = make_batch(shape, [5, 0, 1], [40, 4, 2], page_size=4)
    state = judge(batch)
    seeing = [*range(35, 40), 45]
    blind = [row for row in range(46) if row not in seeing]
    assert (state.out[blind] == 0).all()
    assert state.lse[blind].isneginf().all()
    assert state.lse[seeing].isfinite().all()


@few_shapes
def test_a_batch_of_empty_sequences_is_all_zero(shape):
    batch = make_batch(shape, [0, 0], [1, 30], page_size=16)
    state = judge(batch)
    assert (state.out == 0).all()


@few_shapes
def test_scores_far_apart_neither_overflow_nor_vanish(shape):
    batch = make_batch(shape, [3, 70, 200], [1, 2, 40], page_size=16)
    for softmax_scale in (0.0, 1e-4, 5.0, -2.0):
        state = judge(batch, softmax_scale=softmax_scale)
        assert state.lse.isfinite().all()


DTYPES = [(dtype, kv_dtype) for dtype in (F32, F16, BF16) for kv_dtype in ("int8", "fp8_e4m3", "fp8_e5m2")]


@pytest.mark.parametrize("dtypes", one_in(4, DTYPES), ids=str)
def test_stored_bytes_of_any_scale_keep_their_weight(dtypes):
    dtype, kv_dtype = dtypes
    batch = make_batch(Shape(dtype, 64, 4, kv_dtype), [3, 70, 300], [1, 2, 40], page_size=16)
    generator = torch.Generator().manual_seed(0)
    for name, low, high in (("k_scale", -3, 1), ("v_scale", -30, 8)):  # as powers of two; some are 0
        exponent = torch.empty_like(batch.scales[name]).uniform_(low, high, generator=generator)
        batch.scales[name] *= exponent.exp2() * (torch.rand(exponent.shape, generator=generator) > 0.1)
    judge(batch)


@pytest.mark.parametrize("dims", [(), (2, 1, 1)], ids=["per tensor", "per head"])
@pytest.mark.parametrize("shape", [Shape(F32, 32, 2, "int8"), Shape(BF16, 64, 3, "fp8_e4m3")], ids=str)
def test_given_scales_are_read_through_strides_of_zero(shape, dims):
    batch = make_batch(shape, *STEPS["mixed"], page_size=16)
    for name, scale in batch.scales.items():
        given = torch.linspace(0.01, 0.05, math.prod(dims)).view(dims) * (1 if name == "k_scale" else 3)
        batch.scales[name] = given.expand(scale.shape)
    judge(batch)


@pytest.mark.parametrize("exponent", one_in(4, [-100, -12, 0, 12, 100]))
def test_queries_of_any_size_meet_stored_bytes(exponent):
    batch = make_batch(Shape(BF16, 64, 4, "int8"), [3, 70, 300], [1, 2, 40], page_size=16)
    batch.q.mul_(2.0**exponent)
    batch.scales["k_scale"] *= 2.0**-exponent  # scores stay as they are
    judge(batch)


@few_shapes
def test_a_sink_far_above_the_scores_leaves_nothing_and_one_far_below_changes_nothing(shape):
    batch = make_batch(shape, [3, 0, 420], page_size=16)
    heads = batch.q.shape[1]
    high = attend(batch, backend="triton", sinks=torch.full((heads,), 300.0))
    assert (high.out == 0).all()
    assert high.lse[:, 0].tolist() == pytest.approx([300.0] * 3)
    without, low, none = (
        attend(batch, backend="triton", **sinks)
        for sinks in ({}, {"sinks": torch.full((heads,), -300.0)}, {"sinks": torch.full((heads,), -math.inf)})
    )
    assert torch.equal(without.out, low.out)
    assert torch.equal(without.lse[[0, 2]], low.lse[[0, 2]])
    assert low.lse[1].tolist() == pytest.approx([-300.0] * heads)
    assert torch.equal(without.out, none.out)
    assert torch.equal(without.lse, none.lse)


@few_shapes
@pytest.mark.parametrize("batch_invariant", one_in(2, [True, False]))
def test_a_row_without_keys_keeps_its_sink_in_the_same_bits_whole_or_split(
    shape, batch_invariant, monkeypatch
):
    """Rows ahead of the first key, those of an empty sequence, and one whose mask hides every key."""
    monkeypatch.setattr(work, "INVARIANT_KV_SPLIT", 64)
    batch = make_batch(shape, [140, 0, 1, 300], [150, 2, 1, 1], page_size=16)
    blind = [*range(10), 150, 151, 152]
    sinks = torch.linspace(-9.0, 30.0, batch.q.shape[1])
    tree_mask = torch.ones(154, 150, dtype=torch.bool)
    tree_mask[152] = False
    chip = tune.chip_of(batch.q.device)
    for multiprocessors in (1, 7):
        monkeypatch.setattr(tune, "chip_of", lambda _, n=multiprocessors: chip._replace(multiprocessors=n))
        plan = plan_for(batch, batch_invariant=batch_invariant, backend="triton")
        state = plan.run(*batch.pages, sinks=sinks, tree_mask=tree_mask, return_state=True, **batch.scales)
        assert (state.out[blind] == 0).all()
        torch.testing.assert_close(state.lse[blind], sinks.expand(len(blind), -1), rtol=3e-7, atol=0)
        assert (state.lse[blind] == state.lse[0]).all()
        assert state.lse.isfinite().all()


@few_shapes
def test_a_mask_that_hides_the_queries_own_key_leaves_the_earlier_ones(shape):
    batch = make_batch(shape, [1, 0, 64, 65, 130], page_size=16)
    state = judge(batch, tree_mask=torch.zeros(5, 1, dtype=torch.bool))
    assert (state.out[:2] == 0).all()
    assert state.lse[:2].isneginf().all()


@few_shapes
@pytest.mark.parametrize("step", one_in(2, list(STEPS)))
def test_any_number_of_workers_gives_the_same_within_rounding(shape, step, monkeypatch):
    batch = make_batch(shape, *STEPS[step], page_size=16)
    chip = tune.chip_of(batch.q.device)
    for multiprocessors in (1, 7):
        monkeypatch.setattr(tune, "chip_of", lambda _, n=multiprocessors: chip._replace(multiprocessors=n))
        judge(batch)


@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_it_does_not_matter_which_worker_comes_last(step, monkeypatch):
    lengths, q_lens = STEPS[step]
    batch = make_batch(NARROW, [500, *lengths[-2:]], q_lens and [20, *q_lens[-2:]], page_size=16)
    rules = features(batch, sinks=True)
    wanted = judge(batch, **rules)
    for seed in range(2):
        shuffled = lambda programs, seed=seed: random.Random(seed).sample(programs, len(programs))  # noqa: E731
        monkeypatch.setattr(interpreter.CheckedGrid, "order", staticmethod(shuffled))
        state = attend(batch, backend="triton", **rules)
        assert torch.equal(state.out, wanted.out)
        assert torch.equal(state.lse, wanted.lse)


def test_one_plan_serves_many_layers():
    batch = make_batch(SMALL, *STEPS["mixed"], page_size=16)
    plan = quire.plan(*batch.lengths[:2], batch.shape.spec(16), batch.cu_seqlens_q, backend="triton")
    wanted = exact(batch)
    for _ in range(3):  # counters of the split tiles are ready again after each
        state = plan.run(*batch.pages, return_state=True)
        assert_accurate(state, wanted, plain(batch), batch.largest_value)


@pytest.mark.parametrize(
    ("shape", "step"), [(SMALL, "mixed"), (NARROW, "mixed"), (Shape(BF16, 20, group=8), "decode")], ids=str
)
def test_without_lse_the_output_is_the_same(shape, step):
    batch = make_batch(shape, *STEPS[step], page_size=16)
    out = quire.paged_attention(*batch.pages, *batch.lengths, **batch.scales, backend="triton")
    assert torch.equal(out, attend(batch, backend="triton").out)
