"""Cases and contestants in words: what a table's first column and a plot's titles say."""

from __future__ import annotations

import pytest

from benchmarks.words import case_in_words, name_of


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("8x2k:1", "decode, 8 × 2k keys"),
        ("8x8k:1@int8", "decode, 8 × 8k keys, int8 pages"),
        ("8x2k:1@float32", "decode, 8 × 2k keys, float32"),
        ("8x2k:1@page64", "decode, 8 × 2k keys, pages of 64"),
        ("8x2k:1@32/1x128@page1", "decode, 8 × 2k keys, 32/1 heads of 128, pages of 1"),
        ("1x2k:2k", "a prompt of 2k"),
        ("4x2k:2k", "4 prompts of 2k"),
        ("1x16k:2k", "a chunk of 2k up to token 16k"),
        ("2x4k:512+16x1k:1", "2 chunks of 512 up to token 4k beside decode, 16 × 1k keys"),
        ("8x4k:4", "8 × 4k keys, 4 queries each"),
        ("64 skewed", "64 skewed"),
    ],
)
def test_a_case_in_words(case, words):
    assert case_in_words(case) == words


def test_every_peer_of_the_attention_table_has_a_name_in_words():
    for who in (
        "quire",
        "sdpa, contiguous",
        "gather + sdpa",
        "flex, paged",
        "vllm",
        "sdpa cudnn",
        "sdpa flash",
    ):
        assert name_of(who) != who
    assert name_of("someone else") == "someone else"
