"""vLLM's cache and the pages that are views of it: every element at the place that the format says."""

import pytest
import torch

import quire
from quire.kernels import reference
from quire.vllm.cache import FORMATS, pages_of, row_bytes
from quire.vllm.kinds import LayerKind, window_left_of

PAGES, HEADS, SIZE, DIM = 3, 2, 4, 8


def cache_of(name, dtype=torch.float32, by_token=False):
    """A layer's cache in the middle of other memory, ordered by head or by token inside its pages."""
    form = FORMATS[name]
    content = 2 * DIM if form.kv_dtype is None or not form.stores_scales else row_bytes(DIM)
    if form.kv_dtype is not None:
        dtype = torch.uint8
    sizes = (PAGES, SIZE, HEADS, content) if by_token else (PAGES, HEADS, SIZE, content)
    cache = torch.zeros(2, *sizes, dtype=dtype)[1]
    return cache.transpose(1, 2) if by_token else cache


@pytest.mark.parametrize("by_token", [False, True])
def test_a_row_is_its_key_and_then_its_value(by_token):
    cache = cache_of("auto", by_token=by_token)
    cache.copy_(torch.arange(cache.numel()).view(cache.shape))
    pages = pages_of(cache, DIM, FORMATS["auto"])
    for page, head, slot in [(0, 0, 0), (2, 1, 3), (1, 0, 2)]:
        assert torch.equal(pages.k_pages[head, page, slot], cache[page, head, slot, :DIM])
        assert torch.equal(pages.v_pages[head, page, slot], cache[page, head, slot, DIM:])
    assert pages.k_scale is None
    assert pages.v_scale is None


@pytest.mark.parametrize("name", ["auto", "int8_per_token_head", "fp8_per_token_head", "fp8_e5m2"])
@pytest.mark.parametrize("by_token", [False, True])
def test_what_is_written_through_the_views_lies_in_the_cache_and_is_read_back(name, by_token):
    cache, form = cache_of(name, by_token=by_token), FORMATS[name]
    pages = pages_of(cache, DIM, form)
    k, v = torch.randn(2, 5, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([0, 7, 11, 2, -1])
    k_scale, v_scale = pages.k_scale, pages.v_scale
    if form.kv_dtype and not form.stores_scales:
        k_scale, v_scale = torch.tensor(0.02), torch.tensor(0.03)
    quire.write_kv(k, v, *pages[:2], slots, k_scale=k_scale, v_scale=v_scale, backend="reference")
    written = cache.view(torch.uint8).flatten(3).any(-1)  # [pages, heads, size]
    assert {(p, s) for p, h, s in written.nonzero().tolist()} == {(0, 0), (1, 3), (2, 3), (0, 2)}
    row = cache[1, 1, 3].contiguous()
    if form.kv_dtype is None:
        assert torch.equal(row, torch.cat([k[1, 1], v[1, 1]]))
    elif form.stores_scales:
        values, scale = reference.quantize(k[1, 1], pages.k_pages.dtype)
        assert torch.equal(row[:DIM].view(pages.k_pages.dtype).float(), values.float())
        assert torch.equal(row[2 * DIM : 2 * DIM + 4].view(torch.float32)[0], scale)
        assert torch.equal(
            row[2 * DIM + 4 :].view(torch.float32)[0], reference.quantize(v[1, 1], values.dtype)[1]
        )
    else:
        stored = row[DIM:].view(torch.float8_e5m2).float() * 0.03
        torch.testing.assert_close(stored, v[1, 1], rtol=0.13, atol=0.01)


def test_layers_of_one_kind_have_one_spec():
    kind = LayerKind(8, 2, 40, torch.bfloat16, "int8_per_token_head", window_left_of(48))
    assert kind.spec(24) == quire.AttentionSpec(8, 2, 40, 24, torch.bfloat16, "int8")
    assert kind.window_left == 47
    assert window_left_of(None) == -1
    assert kind._replace(kv_cache_dtype="auto").spec(16).kv_dtype is None
