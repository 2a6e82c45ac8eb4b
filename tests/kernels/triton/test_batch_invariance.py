"""Batch-invariant steps in the interpreter: a row's bits depend on its sequence and its position alone."""

import pytest
import torch
from pairs import one_in
from support import Shape, features, make_batch

import quire
from quire.kernels.triton import tune
from quire.planning import work_list as work

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [
    Shape(BF16, 64, group=4),
    Shape(BF16, 32, group=4, kv_dtype="int8"),
    Shape(F16, 40, group=1, kv_dtype="fp8_e4m3"),
    Shape(BF16, 32, group=2, kv_dtype="fp8_e5m2"),
    Shape(F32, 32, group=3, kv_dtype="int8"),
]
FEATURES = ["window", "softcap", "alibi", "sinks"]
LENGTHS = [150, 70]
# Steps of (sequence, first token, end): chunks in company, single tokens, and a first chunk that later keys follow.
SCHEDULE = [
    [(0, 0, 37)],
    [(0, 37, 149), (1, 0, 69)],
    [(1, 69, 70), (0, 149, 150)],
]


def run(batch, schedule, **rules):
    """All rows, computed step by step."""
    out = torch.full(batch.q.shape, 7.0, dtype=batch.q.dtype)
    lse = torch.full(batch.q.shape[:2], 7.0)
    for chunks in schedule:
        starts = [int(batch.cu_seqlens_q[i]) for i, _, _ in chunks]
        rows = torch.cat(
            [start + torch.arange(a, b) for start, (_, a, b) in zip(starts, chunks, strict=True)]
        )
        cu = torch.tensor([0, *[b - a for _, a, b in chunks]]).cumsum(0).int()
        state = quire.paged_attention(
            batch.q[rows], *batch.pages[1:], batch.page_table[[i for i, _, _ in chunks]],
            torch.tensor([end for *_, end in chunks], dtype=torch.int32), cu,
            return_state=True, batch_invariant=True, backend="triton", **batch.scales, **rules,
        )  # fmt: skip
        out[rows], lse[rows] = state
    return out, lse


def varied_batch(shape):
    """Values of very different sizes, the largest last, where scales make them."""
    batch = make_batch(shape, LENGTHS, LENGTHS, page_size=16)
    ordered = torch.logspace(-4, 2, LENGTHS[0])
    for row, length in enumerate(LENGTHS if batch.scales else []):
        token = torch.arange(length)
        batch.scales["v_scale"][:, batch.page_table[row][token // 16].long(), token % 16] *= ordered[:length]
    return batch


def assert_chunks_and_company_change_no_bit(batch, **rules):
    alone = run(batch, [[(i, 0, length)] for i, length in enumerate(LENGTHS)], **rules)
    together = run(batch, SCHEDULE, **rules)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert together[0].isfinite().all()


@pytest.mark.parametrize("shape", one_in(2, SHAPES), ids=str)
def test_chunks_and_company_change_no_bit(shape, monkeypatch):
    monkeypatch.setattr(work, "INVARIANT_KV_SPLIT", 64)  # parts to fold, with few keys
    assert_chunks_and_company_change_no_bit(varied_batch(shape))


@pytest.mark.parametrize(
    ("shape", "asked"),
    [
        pytest.param(SHAPES[0], ["window"], marks=pytest.mark.exhaustive),
        pytest.param(SHAPES[1], ["softcap"], marks=pytest.mark.exhaustive),
        pytest.param(SHAPES[2], ["alibi"], marks=pytest.mark.exhaustive),
        pytest.param(SHAPES[0], ["sinks"], marks=pytest.mark.exhaustive),
        (SHAPES[0], FEATURES),
        (SHAPES[3], FEATURES),
    ],
    ids=str,
)
def test_nor_do_they_with_other_scores(shape, asked, monkeypatch):
    monkeypatch.setattr(work, "INVARIANT_KV_SPLIT", 128)  # two blocks to a part
    batch = varied_batch(shape)
    rules = features(batch, **dict.fromkeys(asked, True))
    if "window" in asked:
        rules["window_left"] = 40  # whole blocks are out of some tiles' sight
    assert_chunks_and_company_change_no_bit(batch, **rules)


@pytest.mark.parametrize("shape", SHAPES[1:2], ids=str)
def test_the_number_of_multiprocessors_changes_no_bit(shape, monkeypatch):
    monkeypatch.setattr(work, "INVARIANT_KV_SPLIT", 128)
    batch = make_batch(shape, [900, 70], [3, 20], page_size=16)
    rules, chip, states = features(batch, alibi=True, sinks=True), tune.chip_of(batch.q.device), []
    for multiprocessors in (1, 3, 7):
        monkeypatch.setattr(tune, "chip_of", lambda _, n=multiprocessors: chip._replace(multiprocessors=n))
        plan = quire.plan(
            *batch.lengths[:2], shape.spec(16), batch.cu_seqlens_q, batch_invariant=True, backend="triton"
        )
        states.append(plan.run(*batch.pages, return_state=True, **batch.scales, **rules))
    for state in states[1:]:
        assert torch.equal(state.out, states[0].out)
        assert torch.equal(state.lse, states[0].lse)
