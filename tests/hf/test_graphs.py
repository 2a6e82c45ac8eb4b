"""Decode steps through graphs: padded, planned into the same memory, equal to steps launched one by one.

On a CPU nothing is recorded: a recorded step stands for its launches, so that all but the recording is tested.
tests/engine/test_gpu.py records.
"""

from __future__ import annotations

import logging

import pytest
import torch

from quire.errors import ArgumentError, UnsupportedError
from quire.hf import PagedModel
from quire.hf.chunks import split_at_chunks
from quire.hf.graphs import MAX_BATCH, DecodeGraphs, batch_size_of
from quire.hf.step import Step, pad_decode

from .families import PAGE_SIZE, TOLERANCE, on_pages, tiny_model, worst_difference


def launched_one_by_one(launch):
    return launch


def with_graphs(paged: PagedModel, capture=launched_one_by_one) -> PagedModel:
    paged.graphs = DecodeGraphs(
        paged._forward, paged._cache, paged._planners, paged._longest_sequence(), capture
    )
    return paged


def decode_step(lengths, *, width=None, first_page=0, tokens=None) -> Step:
    """Sequences of so many tokens, the last of each new; pages end to end."""
    pages = [-(-n // PAGE_SIZE) for n in lengths]
    table = torch.full((len(lengths), width or max(pages)), -1, dtype=torch.int32)
    slots, page = [], first_page
    for row, (n, count) in enumerate(zip(lengths, pages, strict=True)):
        table[row, :count] = torch.arange(page, page + count)
        slots.append((page + count - 1) * PAGE_SIZE + (n - 1) % PAGE_SIZE)
        page += count
    batch = len(lengths)
    return Step(
        input_ids=torch.tensor(tokens or [5 + 3 * i for i in range(batch)]),
        position_ids=torch.tensor(lengths) - 1,
        page_table=table,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        logits_indices=torch.arange(batch),
    )


def fill_pages(paged: PagedModel) -> None:
    generator = torch.Generator().manual_seed(2)
    for pool in paged._cache.pools:
        for pages in (pool.k, pool.v):
            pages.copy_(torch.randn(pages.shape, generator=generator))


def test_few_sizes_serve_all_batches_and_none_wastes_much():
    sizes = [batch_size_of(batch) for batch in range(1, MAX_BATCH + 1)]
    assert sizes[:9] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    for batch, size in enumerate(sizes, 1):
        assert batch <= size < batch + max(8, batch / 7)
    assert len(set(sizes)) < 60
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4", "deepseek_v3", "gpt2"]
)
def test_texts_that_grow_have_the_logits_of_the_ordinary_model(family, backend):
    model = tiny_model(family)
    paged = with_graphs(on_pages(model, backend=backend))
    assert worst_difference(model, paged) < TOLERANCE
    assert paged.graphs._graphs, "no step went through a graph"


@pytest.mark.parametrize("lengths", [[1], [9], [4, 17, 1], [3, 3, 3, 3, 3], list(range(1, 12))])
def test_a_padded_step_has_the_logits_of_the_step(lengths):
    paged = on_pages(tiny_model("llama"))
    fill_pages(paged)
    step = decode_step(lengths)
    wanted = paged.forward(step)
    keys = [pool.k.clone() for pool in paged._cache.pools]
    fill_pages(paged)
    with_graphs(paged)
    for _ in range(2):  # recorded, then replayed
        torch.testing.assert_close(paged.forward(step), wanted, rtol=0, atol=1e-5)
    for pool, before in zip(paged._cache.pools, keys, strict=True):
        torch.testing.assert_close(pool.k, before, rtol=0, atol=1e-5)


def test_the_rows_asked_for_come_in_their_order():
    paged = on_pages(tiny_model("llama"))
    fill_pages(paged)
    step = decode_step([4, 17, 6])
    wanted = paged.forward(step)
    with_graphs(paged)
    for rows in ([2, 0], [1], [0, 0, 2], [], [2, 1, 0]):
        asked = Step(**{**vars(step), "logits_indices": torch.tensor(rows, dtype=torch.int64)})
        torch.testing.assert_close(paged.forward(asked), wanted[rows], rtol=0, atol=1e-5)


def test_what_was_returned_stays_when_the_next_step_runs():
    paged = with_graphs(on_pages(tiny_model("llama")))
    fill_pages(paged)
    first = paged.forward(decode_step([4, 17]))
    before = first.clone()
    paged.forward(decode_step([5, 18], tokens=[60, 61]))
    assert torch.equal(first, before)


def test_only_steps_of_one_token_per_sequence_go_through_graphs(monkeypatch):
    paged = with_graphs(on_pages(tiny_model("llama")))
    decode = decode_step([4, 17])
    assert paged.graphs.serves(decode)
    prompt = Step(
        input_ids=torch.arange(3),
        position_ids=torch.arange(3),
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32),
        slot_mapping=torch.arange(3),
        logits_indices=torch.tensor([2]),
    )
    assert not paged.graphs.serves(prompt)
    monkeypatch.setattr("quire.hf.graphs.MAX_BATCH", 1)
    assert not paged.graphs.serves(decode)


def test_longer_sequences_take_a_larger_graph_and_short_ones_go_on_using_it(monkeypatch):
    monkeypatch.setattr("quire.hf.graphs.SMALLEST_CAPACITY", 8)
    paged = with_graphs(on_pages(tiny_model("llama")))
    fill_pages(paged)
    seen = []
    for length in (3, 8, 9, 60, 3, 61):
        paged.forward(decode_step([length]))
        seen.append(paged.graphs._graphs[1].capacity)
    assert seen == [8, 8, 16, 64, 64, 64]
    assert len(paged.graphs._graphs) == 1


def test_a_step_that_cannot_be_planned_is_not_replayed_and_leaves_the_next_one_right():
    """The graph's memory may hold half of it: what is replayed is always the step that was asked for."""
    replays = []

    def counting(launch):
        def replay():
            replays.append(1)
            return launch()

        return replay

    paged = with_graphs(on_pages(tiny_model("llama")), counting)
    fill_pages(paged)
    good = decode_step([4, 17])
    wanted = paged.forward(good)
    replays.clear()
    for name, wrong, message in (
        (
            "page_table",
            torch.full((2, 5), 80, dtype=torch.int32),
            "page_table must hold page ids from 0 to 79",
        ),
        ("page_table", torch.full((2, 5), -1, dtype=torch.int32), "page id"),
        ("slot_mapping", torch.tensor([0, 80 * PAGE_SIZE]), "slot_mapping must be from -1 to 319; got 320"),
        ("input_ids", torch.tensor([1, 10_000]), "input_ids must be from 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            paged.forward(Step(**{**vars(good), name: wrong}))
    assert not replays
    assert torch.equal(paged.forward(good), wanted)


def test_a_model_that_keeps_what_it_saw_when_it_was_recorded_is_noticed(caplog):
    def stale(launch):
        recorded = launch()
        return lambda: recorded

    paged = with_graphs(on_pages(tiny_model("llama")), stale)
    fill_pages(paged)
    step = decode_step([4, 17])
    paged._must_record = True
    with pytest.raises(
        UnsupportedError, match=r"must compute on the device what differs between steps; got logits off"
    ):
        paged.forward(step)
    paged._must_record = False
    with caplog.at_level(logging.WARNING, "quire"):
        logits = paged.forward(step)
    assert paged.graphs is None
    assert "decode steps run without CUDA graphs: to be replayed" in caplog.text
    assert torch.equal(logits, paged.forward(step))


def test_a_model_that_cannot_be_recorded_runs_without_unless_it_was_asked_for(caplog):
    def fails(launch):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    paged = with_graphs(on_pages(tiny_model("llama")), fails)
    fill_pages(paged)
    step = decode_step([4, 17])
    paged._must_record = True
    with pytest.raises(
        UnsupportedError,
        match=r"got: operation not permitted when stream is capturing\. Fix: cuda_graphs=False",
    ):
        paged.forward(step)
    paged._must_record = False
    with caplog.at_level(logging.WARNING, "quire"):
        paged.forward(step)
    assert (paged.graphs, len(caplog.records)) == (None, 1)


def test_graphs_asked_for_where_there_are_none_are_refused():
    for options, reason in (({}, "pages on cpu"), ({"backend": "reference"}, "pages on cpu")):
        with pytest.raises(
            UnsupportedError, match=f"cuda_graphs=True needs a GPU and its kernels; got {reason}"
        ):
            on_pages(tiny_model("llama"), cuda_graphs=True, **options)
    assert on_pages(tiny_model("llama"), cuda_graphs=False).graphs is None
    assert on_pages(tiny_model("llama")).graphs is None
    with pytest.raises(ArgumentError, match="cuda_graphs must be True, False or None; got 'yes'"):
        on_pages(tiny_model("llama"), cuda_graphs="yes")


def test_padding_writes_nowhere_and_sees_nothing():
    step = decode_step([4, 17])
    padded = pad_decode(step, 4)
    assert padded.seq_lens.tolist() == [4, 17, 0, 0]
    assert padded.slot_mapping.tolist() == [*step.slot_mapping.tolist(), -1, -1]
    assert padded.input_ids.tolist() == [5, 8, 0, 0]
    assert padded.page_table[:2].equal(step.page_table)
    nothing = pad_decode(None, 2, 3)
    assert nothing.slot_mapping.tolist() == [[-1, -1]] * 3
    assert nothing.page_table.shape == (3, 2, 1)


def test_padding_has_a_chunk_of_length_0():
    table = torch.tensor([[7, 3, 5], [0, 0, 0]], dtype=torch.int32)
    lens, starts = torch.tensor([11, 0], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    pages, seq_lens, cu_seqlens_q = split_at_chunks(table, lens, starts, chunk_size=8, page_size=4)
    assert seq_lens.tolist() == [3, 0]
    assert cu_seqlens_q.tolist() == [0, 1, 2]
    assert pages[0, 0] == 5
