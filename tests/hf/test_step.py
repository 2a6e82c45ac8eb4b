"""A step whose tensors do not fit together is refused before it reaches the model."""

from __future__ import annotations

import pytest
import torch

from quire.errors import ArgumentError, DtypeError, ShapeError
from quire.hf import Step


def fields(**changed):
    """Two sequences of 3 and 1 new tokens."""
    return {
        "input_ids": torch.tensor([5, 6, 7, 8]),
        "position_ids": torch.tensor([0, 1, 2, 9]),
        "page_table": torch.tensor([[0, -1, -1], [1, 2, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 10], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 3, 4], dtype=torch.int32),
        "slot_mapping": torch.tensor([0, 1, 2, 13]),
        "logits_indices": torch.tensor([2, 3]),
        **changed,
    }


def test_a_step_that_fits_is_accepted():
    assert Step(**fields()).num_tokens == 4


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"page_table": torch.zeros(2, 3, dtype=torch.int64)}, DtypeError,
         r"page_table must be int32 \[batch, max_pages\] on the CPU; got torch.int64"),
        ({"input_ids": [5, 6, 7, 8]}, ArgumentError, "input_ids must be int64 .* got list"),
        ({"input_ids": torch.tensor([[5, 6, 7, 8]])}, ShapeError, r"input_ids must .* got shape \[1, 4\]"),
        ({"position_ids": torch.tensor([0, 1, 2])}, ShapeError, "position_ids must .* got length 3"),
        ({"slot_mapping": torch.tensor([0])}, ShapeError, "slot_mapping must .* got length 1"),
        ({"page_table": torch.zeros(1, 3, dtype=torch.int32)}, ShapeError, "page_table must .* length 1"),
        ({"cu_seqlens_q": torch.tensor([0, 4], dtype=torch.int32)}, ShapeError, "cu_seqlens_q must .* 2"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 5], dtype=torch.int32)}, ArgumentError,
         "cu_seqlens_q must end with the number of tokens, 4; got 5"),
        ({"logits_indices": torch.tensor([4])}, ArgumentError, "logits_indices must be from 0 to 3; got 4"),
        ({"logits_indices": torch.tensor([-1])}, ArgumentError, "logits_indices must .* got -1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_what_was_expected_and_a_fix(changed, error, message):
    with pytest.raises(error, match=message) as raised:
        Step(**fields(**changed))
    assert "Fix: " in str(raised.value)


GROUPED = {
    "page_table": torch.tensor([[[0, -1], [1, 2]], [[3, -1], [0, 5]], [[4, -1], [0, 7]]], dtype=torch.int32),
    "slot_mapping": torch.arange(12).view(3, 4),
}


def test_a_step_of_several_page_tables_has_a_table_and_slots_for_each():
    step = Step(**fields(**GROUPED))
    assert step.num_groups == 3
    assert step.num_tokens == 4
    assert torch.equal(step.table_of(1), GROUPED["page_table"][1])
    assert Step(**fields()).num_groups == 1
    assert torch.equal(Step(**fields()).table_of(0), fields()["page_table"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slot_mapping": torch.arange(4)}, r"slot_mapping must be int64 \[groups, tokens\] .* got shape \[4\]"),
        ({"slot_mapping": torch.arange(8).view(2, 4)},
         r"slot_mapping must be \[groups, tokens\] with groups=3 .* \[2, 4\]"),
        ({"slot_mapping": torch.arange(9).view(3, 3)}, r"slot_mapping must be \[groups, tokens\] with .* got length 3"),
        ({"page_table": torch.zeros(3, 1, 2, dtype=torch.int32)},
         r"page_table must be \[groups, batch, max_pages\] .* 1"),
    ],
)  # fmt: skip
def test_tables_and_slots_of_other_groups_are_refused(changed, message):
    with pytest.raises(ShapeError, match=message) as raised:
        Step(**fields(**{**GROUPED, **changed}))
    assert "Fix: " in str(raised.value)


def test_a_step_without_tokens_is_refused():
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = {"input_ids": empty, "position_ids": empty, "slot_mapping": empty, "logits_indices": empty}
    with pytest.raises(ShapeError, match="at least one token"):
        Step(**fields(**nothing))


def test_a_step_that_wants_no_logits_is_accepted():
    assert len(Step(**fields(logits_indices=torch.zeros(0, dtype=torch.int64))).logits_indices) == 0


@pytest.mark.parametrize(
    ("vocab_size", "max_seq_len", "message"),
    [
        (8, None, "input_ids must be from 0 to 7; got 8"),
        (9, 9, "position_ids must be from 0 to 8; got 9"),
    ],
)
def test_tokens_and_positions_without_a_row_in_the_model_are_refused(vocab_size, max_seq_len, message):
    Step(**fields()).check_fits(9, 10, 1000)
    with pytest.raises(ArgumentError, match=message):
        Step(**fields()).check_fits(vocab_size, max_seq_len, 1000)
