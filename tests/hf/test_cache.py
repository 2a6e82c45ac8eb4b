"""Which layers share a page table, and what a page is."""

from __future__ import annotations

import pytest
import torch

from quire.errors import UnsupportedError
from quire.hf.cache import LayerShape, PagedCache, PageLayout
from quire.spec import Visibility

ALL, WINDOW, CHUNKS = Visibility(), Visibility(5), Visibility(chunk_size=8)


def shapes_of(*kinds, head_dims=None):
    """A layer for each, of two heads of 8 floats."""
    head_dims = head_dims or [8] * len(kinds)
    return {
        i: LayerShape(4, 2, dim, dim, torch.float32, kind)
        for i, (kind, dim) in enumerate(zip(kinds, head_dims, strict=True))
    }


def layout_of(shapes, page_size=4):
    return PageLayout(shapes, page_size=page_size, kv_dtype=None)


def groups(layout):
    return [(group.visibility, group.layers) for group in layout.groups]


@pytest.mark.parametrize("sight", [ALL, WINDOW, CHUNKS], ids=str)
def test_layers_that_see_the_same_share_one_page_table(sight):
    layout = layout_of(shapes_of(*[sight] * 5))
    assert groups(layout) == [(sight, (0, 1, 2, 3, 4))]
    assert layout.bytes_per_page == 5 * 2 * 2 * 4 * 8 * 4


def test_layers_that_see_less_have_page_tables_of_their_own_those_that_see_all_first():
    layout = layout_of(shapes_of(WINDOW, WINDOW, ALL, WINDOW, WINDOW, ALL))
    assert groups(layout) == [(ALL, (2, 5)), (WINDOW, (0, 1)), (WINDOW, (3, 4))]
    assert layout.bytes_per_page == 2 * 2 * 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    ("counts", "size", "sizes"),
    [
        ((12, 12), 12, [12, 12]),  # GPT-OSS
        ((4, 22), 4, [4, 4, 4, 4, 4, 4, 2]),  # Gemma 3 with 26 layers
        ((12, 36), 12, [12, 12, 12, 12]),  # Llama 4
        ((12, 13), 13, [12, 13]),
        ((1, 1, 1), 1, [1, 1, 1]),
    ],
)
def test_groups_are_of_a_size_that_wastes_little_memory_and_few_page_tables(counts, size, sizes):
    kinds = [ALL] * counts[0] + [WINDOW] * counts[1] + [CHUNKS] * sum(counts[2:])
    layout = layout_of(shapes_of(*kinds))
    assert [len(group.layers) for group in layout.groups] == sizes
    assert list(layout.layers_of_spec.values()) == [size]
    assert sorted(i for group in layout.groups for i in group.layers) == list(range(len(kinds)))


def test_layers_of_different_pages_share_one_page_table_that_keeps_all():
    layout = layout_of(shapes_of(WINDOW, ALL, WINDOW, head_dims=[8, 16, 8]))
    assert groups(layout) == [(ALL, (0, 1, 2))]
    assert layout.bytes_per_page == (8 + 16 + 8) * 2 * 2 * 4 * 4
    windows = layout_of(shapes_of(WINDOW, WINDOW, head_dims=[8, 16]))
    assert groups(windows) == [(WINDOW, (0, 1))], "none of them ever sees what is out of the window"


def test_layers_of_one_group_have_memory_of_their_own_and_those_of_two_share_it():
    shapes = shapes_of(WINDOW, ALL, WINDOW, ALL, WINDOW, WINDOW)
    layout = layout_of(shapes)
    cache = PagedCache(shapes, layout, num_pages=3, device=torch.device("cpu"))
    assert {i: layer.group for i, layer in cache.layers.items()} == {1: 0, 3: 0, 0: 1, 2: 1, 4: 2, 5: 2}
    memory = {i: layer.k.data_ptr() for i, layer in cache.layers.items()}
    assert memory[0] == memory[1] == memory[4] != memory[2] == memory[3] == memory[5]
    assert 3 * layout.bytes_per_page == sum(pool.nbytes for pool in cache.pools)


def test_chunks_are_whole_pages():
    with pytest.raises(UnsupportedError, match=r"page_size must divide .* 8, .* got 5\. Fix: page_size=4"):
        layout_of(shapes_of(ALL, CHUNKS), page_size=5)
