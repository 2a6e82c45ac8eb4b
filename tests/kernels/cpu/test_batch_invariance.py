"""Batch-invariant attention: a query's bits depend on its sequence and its position, and on nothing else.

Every test computes all rows of some sequences twice, each sequence at once and alone on one thread, and then
divided into chunks that run in whatever company on whatever number of threads, and compares bits.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from accuracy import assert_accurate, exact, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Shape, features, make_batch, plan_for, sharing_all_work

import quire

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Shapes that test_prefill compiles too.
SHAPES = [
    Shape(F32, 16, group=3),
    Shape(F32, 16, group=100, num_kv_heads=1),
    Shape(BF16, 128, group=4),
    Shape(BF16, 64, group=4, kv_dtype="int8"),
    Shape(F32, 40, group=3, kv_dtype="fp8_e5m2"),
]
MORE_SHAPES = [
    Shape(F32, 40, group=2),
    Shape(F16, 80, group=1, num_kv_heads=1),
    Shape(F32, 256, group=1, num_kv_heads=1),
    Shape(F16, 72, group=2, kv_dtype="fp8_e4m3"),
]


def grouped(shapes, *marks):
    """All tests of a kernel go to one xdist worker, which compiles it once."""
    return [
        pytest.param(
            s,
            id=str(s),
            marks=[pytest.mark.xdist_group(f"prefill-{s.dtype}-{s.head_dim}-{s.kv_dtype}"), *marks],
        )
        for s in shapes
    ]


every_shape = pytest.mark.parametrize(
    "shape", [*grouped(SHAPES), *grouped(MORE_SHAPES, pytest.mark.exhaustive)]
)
small = pytest.mark.parametrize("shape", grouped(SHAPES[:1]))

FEATURES = [
    {},
    {"window": True},
    {"softcap": True},
    {"alibi": True},
    {"sinks": True},
    {"window": True, "softcap": True, "alibi": True, "sinks": True},
]


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


class Rows:
    """All rows of a batch in which every token is a query, computed chunk by chunk."""

    def __init__(self, batch, **rules):
        self.batch, self.rules = batch, rules
        self.out = torch.full(batch.q.shape, 7.0, dtype=batch.q.dtype)
        self.lse = torch.full(batch.q.shape[:2], 7.0)

    def step(self, chunks, num_threads=1):
        """Run one step of (sequence, first token, end) chunks and keep its rows."""
        starts = self.batch.cu_seqlens_q
        rows = torch.cat([torch.arange(int(starts[i]) + a, int(starts[i]) + b) for i, a, b in chunks])
        table = self.batch.page_table[[i for i, _, _ in chunks]]
        lens = torch.tensor([b for _, _, b in chunks], dtype=torch.int32)
        cu = torch.tensor([0, *[b - a for _, a, b in chunks]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        with threads(num_threads), sharing_all_work():
            state = quire.paged_attention(
                self.batch.q[rows], self.batch.k_pages, self.batch.v_pages, table, lens, cu,
                batch_invariant=True, return_state=True, **self.batch.scales, **self.rules,
            )  # fmt: skip
        self.out[rows], self.lse[rows] = state

    def all_alone(self):
        """Each sequence in one step of its own."""
        for i, n in enumerate(self.batch.seq_lens.tolist()):
            self.step([(i, 0, n)])
        return self

    def assert_same_bits(self, other):
        torch.testing.assert_close(bits(self.out), bits(other.out), rtol=0, atol=0)
        torch.testing.assert_close(bits(self.lse), bits(other.lse), rtol=0, atol=0)


@st.composite
def schedules(draw, lengths):
    """Steps of chunks that together take every sequence from its first token to its last."""
    done = [0] * len(lengths)
    steps = []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        waiting = [i for i, n in enumerate(lengths) if done[i] < n]
        chosen = draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        chunks = []
        for i in chosen:
            size = draw(st.sampled_from([1, 1, 2, 7, 32, 33, 70, 200]))
            end = min(lengths[i], done[i] + size)
            chunks.append((i, done[i], end))
            done[i] = end
        steps.append((chunks, draw(st.integers(1, 3))))
    return steps


lengths_and_schedule = st.lists(
    st.integers(1, 140) | st.sampled_from([63, 64, 65, 128, 200]), min_size=1, max_size=4
).flatmap(lambda lengths: st.tuples(st.just(lengths), schedules(lengths)))


@every_shape
@settings(max_examples=25)
@given(
    story=lengths_and_schedule,
    page_size=st.sampled_from([1, 3, 16, 64]),
    asked=st.sampled_from(FEATURES),
    window_left=st.sampled_from([-1, -1, 0, 5, 70, 100]),
    kv_split=st.sampled_from([64, 128]),
    seed=st.integers(0, 99),
)
def test_chunks_batches_and_threads_change_no_bit(
    shape, story, page_size, asked, window_left, kv_split, seed
):
    lengths, schedule = story
    batch = make_batch(shape, lengths, lengths, page_size=page_size, seed=seed)
    rules = {**features(batch, seed=seed, **asked), "window_left": window_left}
    with mock.patch("quire.planning.work_list.INVARIANT_KV_SPLIT", kv_split):
        wanted = Rows(batch, **rules).all_alone()
        got = Rows(batch, **rules)
        for chunks, num_threads in schedule:
            got.step(chunks, num_threads)
    got.assert_same_bits(wanted)


@every_shape
@pytest.mark.parametrize("asked", [FEATURES[0], FEATURES[-1]], ids=["plain", "all"])
def test_single_tokens_have_the_bits_of_their_prefill_around_every_cut(shape, asked):
    batch = make_batch(shape, [4100, 30], [4100, 30], page_size=16)
    rules = features(batch, **asked)
    wanted, got = Rows(batch, **rules), Rows(batch, **rules)
    for chunk in ((0, 0, 66), (0, 2000, 2060), (0, 4050, 4100)):
        wanted.step([chunk, (1, 29, 30)])
    got.out.copy_(wanted.out)
    got.lse.copy_(wanted.lse)
    for position in (0, 1, 63, 64, 2046, 2047, 2048, 2049, 4095, 4096, 4099):
        got.out[position] = got.lse[position] = 7.0
        got.step([(1, 29, 30), (0, position, position + 1)], num_threads=2)
    got.assert_same_bits(wanted)


@small
@pytest.mark.parametrize("causal", [True, False])
def test_a_tree_masked_step_has_the_same_bits_alone_and_in_company(shape, causal):
    lengths, q_lens = [300, 90, 1, 129], [20, 9, 1, 1]
    batch = make_batch(shape, lengths, q_lens, page_size=16)
    mask = features(batch, tree=True)["tree_mask"]
    rules = {"batch_invariant": True, "causal": causal}
    with mock.patch("quire.planning.work_list.INVARIANT_KV_SPLIT", 64):
        together = plan_for(batch, 3, **rules).run(*batch.pages, tree_mask=mask, return_state=True)
        starts = batch.cu_seqlens_q.tolist()
        for i, n in enumerate(lengths):
            rows = slice(starts[i], starts[i + 1])
            alone = quire.paged_attention(
                batch.q[rows], batch.k_pages, batch.v_pages, batch.page_table[i : i + 1],
                torch.tensor([n], dtype=torch.int32), torch.tensor([0, q_lens[i]], dtype=torch.int32),
                tree_mask=mask[rows], return_state=True, **rules,
            )  # fmt: skip
            assert torch.equal(bits(alone.out), bits(together.out[rows]))
            assert torch.equal(bits(alone.lse), bits(together.lse[rows]))


@every_shape
@pytest.mark.parametrize("asked", FEATURES, ids=lambda asked: "+".join(asked) or "none")
def test_it_is_as_accurate_as_any_other_plan(shape, asked):
    batch = make_batch(shape, [5, 700, 1, 300, 0, 20], [5, 1, 1, 130, 3, 25], page_size=16, layout="gaps")
    rules = features(batch, **asked)
    with mock.patch("quire.planning.work_list.INVARIANT_KV_SPLIT", 64):
        window = {"window_left": rules.pop("window_left")} if "window_left" in rules else {}
        plan = plan_for(batch, 3, batch_invariant=True, **window)
        assert not len(plan.step.decode.items), "one kernel for all rows"
        assert len(plan.step.prefill.merges)
        state = plan.run(*batch.pages, return_state=True, **batch.scales, **rules)
    rules |= window
    assert_accurate(state, exact(batch, **rules), plain(batch, **rules), batch.largest_value)


@small
def test_sums_that_vanish_leave_no_sign_behind(shape):
    """p·v below the smallest float32 rounds to −0; whether masked keys follow must not show."""
    batch = make_batch(shape, [70], [70], page_size=16)
    batch.q.fill_(1.0)
    batch.k_pages.fill_(0.0)
    batch.v_pages.fill_(1.0)
    first = batch.page_table[0, 0].long()
    batch.k_pages[:, first, 0] = 1.0  # outweighs the others by e^16 …
    batch.v_pages[:, first, 0] = 0.0
    batch.v_pages[:, first, 1:] = -1e-44  # … so that these weigh less than the smallest number
    wanted = Rows(batch, softmax_scale=1.0).all_alone()
    got = Rows(batch, softmax_scale=1.0)
    for position in range(70):
        got.step([(0, position, position + 1)])
    got.assert_same_bits(wanted)


def test_a_backend_whose_rows_do_not_stand_alone_is_refused():
    batch = make_batch(Shape(F32, 16, group=2), [9, 3], page_size=4)
    with pytest.raises(quire.UnsupportedError, match=r'backend "reference" cannot be batch-invariant.*Fix:'):
        plan_for(batch, backend="reference", batch_invariant=True)
