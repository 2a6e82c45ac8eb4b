"""What a tile's queries see, whole and in parts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.planning import split


@given(
    seq_len=st.integers(0, 50),
    q_position=st.integers(-20, 50),
    q_len=st.integers(1, 20),
    causal=st.booleans(),
    window_left=st.integers(-1, 30),
)
def test_the_visible_range_is_the_union_over_the_tiles_queries(
    seq_len, q_position, q_len, causal, window_left
):
    q_position = min(q_position, seq_len - q_len)  # a tile lies before the end of its sequence
    seen = [
        key
        for position in range(q_position, q_position + q_len)
        for key in range(seq_len)
        if (key <= position or not causal) and (window_left < 0 or key >= position - window_left)
    ]
    for function in (split.visible_range, split.visible_range.py_func):
        begin, end = function(seq_len, q_position, q_len, causal, window_left)
        assert 0 <= begin <= end <= seq_len
        assert list(range(begin, end)) == sorted(set(seen))


@given(begin=st.integers(0, 60), length=st.integers(1, 60), kv_split=st.sampled_from([0, 1, 8, 64]))
def test_parts_end_at_multiples_of_the_split_and_at_the_end(begin, length, kv_split):
    end = begin + length
    for function in (split.part_end, split.part_end.py_func):
        ends, at = [], begin
        while at < end:
            at = function(at, end, kv_split)
            ends.append(at)
        assert ends == [x for x in range(begin + 1, end) if kv_split and x % kv_split == 0] + [end]
