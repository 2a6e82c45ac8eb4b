"""The grammar of cases, and what is counted for them."""

from __future__ import annotations

import pytest
import torch

import quire
from benchmarks.cases import make_inputs, parse_case

SPEC = quire.AttentionSpec(4, 2, 16, page_size=4, dtype=torch.float32)


def test_a_case_names_lengths_in_groups():
    case = parse_case("2x1k:8+1x30:1", SPEC)
    assert case.seq_lens == (1024, 1024, 30)
    assert case.q_lens == (8, 8, 1)


@pytest.mark.parametrize("text", ["", "8x2048", "2x8:9", "0x", "1x0:1", "1x8:0", "x8:1"])
def test_what_is_no_case_is_refused(text):
    with pytest.raises(ValueError, match="case"):
        parse_case(text, SPEC)


def test_flops_count_each_visible_pair_once():
    case = parse_case("1x5:3+2x4:1", SPEC)
    visible_pairs = (3 + 4 + 5) + 2 * 4
    assert case.flops == 2 * 2 * visible_pairs * SPEC.num_qo_heads * SPEC.head_dim


def test_bytes_count_keys_and_values_of_every_sequence():
    assert parse_case("1x5:3+2x4:1", SPEC).kv_bytes == 13 * 2 * 2 * 16 * 4


def test_scales_of_quantised_pages_are_bytes_to_read_too():
    case = parse_case("1x5:1@int8", SPEC)
    assert (case.spec.kv_dtype, case.spec.dtype) == ("int8", torch.float32)
    assert case.kv_bytes == 5 * 2 * 2 * (16 + 4)


def test_a_case_may_name_its_dtype():
    assert parse_case("1x5:1@bfloat16", SPEC).spec.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="int8"):
        parse_case("1x5:1@int3", SPEC)


def test_a_case_may_name_its_heads_and_its_page_size():
    spec = parse_case("1x5:1@32/1x96@page64@int8", SPEC).spec
    assert (spec.num_qo_heads, spec.num_kv_heads, spec.head_dim) == (32, 1, 96)
    assert (spec.page_size, spec.kv_dtype, spec.dtype) == (64, "int8", torch.float32)
    assert parse_case("1x5:1@page1", SPEC).spec.num_qo_heads == SPEC.num_qo_heads


@pytest.mark.parametrize("change", ["page", "page0", "32/8", "32x128", "6/4x16", "", "float32@"])
def test_heads_and_pages_that_no_layer_has_are_refused(change):
    with pytest.raises(ValueError, match="got"):
        parse_case(f"1x5:1@{change}", SPEC)


@pytest.mark.parametrize(("text", "decodes"), [("3x9:1", True), ("1x9:9", False), ("1x9:1+1x9:2", False)])
def test_steps_of_single_queries_are_decodes(text, decodes):
    assert parse_case(text, SPEC).decodes is decodes


@pytest.mark.parametrize("dtype", ["float32", "int8", "fp8_e4m3"])
def test_tokens_are_what_the_pages_hold(dtype):
    """Gathered and dequantised, the tokens give the reference's attention."""
    case = parse_case(f"2x9:1+1x12:12@{dtype}", SPEC)
    inputs = make_inputs(case)
    for row, begin in enumerate(inputs.cu_seqlens_q[:-1].tolist()):
        k, v = inputs.tokens(row)
        out = quire.paged_attention(
            inputs.q[begin : begin + case.q_lens[row]], inputs.k_pages, inputs.v_pages,
            inputs.page_table[row : row + 1], inputs.seq_lens[row : row + 1],
            torch.tensor([0, case.q_lens[row]], dtype=torch.int32), backend="reference", **inputs.scales,
        )  # fmt: skip
        k, v = (x.repeat_interleave(2, 0).double() for x in (k, v))
        q = inputs.q[begin : begin + case.q_lens[row]].transpose(0, 1).double()
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=case.q_lens[row] > 1)
        torch.testing.assert_close(out, wanted.transpose(0, 1).float(), rtol=1e-5, atol=1e-5)
