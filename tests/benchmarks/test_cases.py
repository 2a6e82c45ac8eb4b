"""The grammar of cases, and what is counted for them."""

from __future__ import annotations

import pytest
import torch

import quire
from benchmarks.cases import make_inputs, parse_case
from benchmarks.peers import PEERS

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


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_computes_the_same(peer):
    case = parse_case("2x9:1+1x12:12+3x20:6", SPEC)
    inputs = make_inputs(case)
    expected = quire.paged_attention(
        inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens, inputs.cu_seqlens_q,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(PEERS[peer](case, inputs)(), expected, rtol=1e-5, atol=1e-5)
