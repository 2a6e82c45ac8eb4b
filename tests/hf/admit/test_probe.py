"""The probe reads from a model's own masks what each layer sees."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils as masks

from quire.hf.admit.guard import check_tokens
from quire.hf.admit.probe import PROBE_TOKENS, MaskRule, record_layer_calls
from quire.hf.forward import PackedForward
from quire.spec import Visibility

from ..families import tiny_model

CPU = torch.device("cpu")
NO_PADDING = torch.zeros(1, dtype=torch.long)


def read(visible, local_size=None):
    return MaskRule(visible, local_size, CPU).read()


def test_a_causal_mask_shows_all_earlier_tokens():
    assert read(masks.causal_mask_function) == Visibility()


@pytest.mark.parametrize("window", [1, 2, 7, 4096])
def test_a_sliding_mask_shows_a_window_that_counts_the_token_itself(window):
    rule = masks.sliding_window_causal_mask_function(window)
    assert read(rule, window) == Visibility(window_left=window - 1)


@pytest.mark.parametrize("chunk", [2, 8, 8192])
def test_a_chunked_mask_shows_the_chunk(chunk):
    assert read(masks.chunked_causal_mask_function(chunk, NO_PADDING), chunk) == Visibility(chunk_size=chunk)


@pytest.mark.parametrize(
    ("visible", "local_size"),
    [
        (masks.bidirectional_mask_function, None),
        (masks.sliding_window_bidirectional_mask_function(8), 8),
        (masks.sliding_window_causal_mask_function(7), 8),  # says 8, masks 7
        (masks.sliding_window_causal_mask_function(700_000), None),  # a window no one spoke of, far out
        (masks.or_masks(masks.causal_mask_function, lambda b, h, q, k: k == 0 * q + 1), None),
        (lambda b, h, q, k: torch.ones(8, 8, dtype=torch.bool).tril()[q, k], None),  # knows eight tokens only
    ],
)
def test_any_other_mask_has_no_reading(visible, local_size):
    assert read(visible, local_size) is None


def test_every_layer_is_recorded_once_with_its_shapes_and_arguments():
    model = tiny_model("gpt_oss")
    calls = record_layer_calls(PackedForward(model), check_tokens(model.config, PROBE_TOKENS))
    assert [call.layer_idx for call in calls] == [0, 1, 2, 3]
    assert calls[0].query == (1, 4, PROBE_TOKENS, 16)
    assert calls[0].key == calls[0].value == (1, 2, PROBE_TOKENS, 16)
    assert [call.rule.read() for call in calls] == [Visibility(window_left=4), Visibility()] * 2
    assert torch.equal(calls[0].options["s_aux"], model.model.layers[0].self_attn.sinks)
    assert not any(call.unknown for call in calls)
