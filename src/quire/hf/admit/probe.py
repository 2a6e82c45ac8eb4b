"""What a model's layers ask of attention, learned by running it once on a few tokens.

Two functions are registered as "quire_probe". One builds the masks: a small causal mask that carries the *rule* it
was built from, a function (batch, head, query, key) → visible. The other is called by the layers to attend: it records
the call and the rule of its mask. So the window or chunk of each layer is what the ordinary model masks by, whatever
its config calls it and however large it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from quire.hf.forward import PackedForward
from quire.spec import Visibility

PROBE_NAME = "quire_probe"
PROBE_TOKENS = 8
_LARGEST_POSITION = 1 << 20

# Keyword arguments that do not change what a layer computes once its mask, scale, cap and sinks are known.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
_UNDERSTOOD = frozenset({"dropout", "scaling", "sliding_window", "softcap", "s_aux"})


@dataclass(frozen=True)
class MaskRule:
    """Which keys a query sees, as the model's own mask would have it.

    visible: (batch, head, query, key) → bool, over index tensors on `device`.
    local_size: the window or chunk the mask was asked for, if any.
    """

    visible: Callable[..., torch.Tensor]
    local_size: int | None
    device: torch.device

    def read(self, max_position: int | None = None) -> Visibility | None:
        """The visibility that agrees with the rule at its corners and far out, or None.

        A rule made for these tokens only, which has no answer about later ones, cannot be read: None.
        """
        for candidate in self._candidates():
            try:
                if all(self._agrees(candidate, q) for q in self._telling_positions(max_position)):
                    return candidate
            except IndexError:
                return None
        return None

    def _candidates(self) -> list[Visibility]:
        if self.local_size is None:
            return [Visibility()]
        return [Visibility(window_left=self.local_size - 1), Visibility(chunk_size=self.local_size)]

    def _telling_positions(self, max_position: int | None) -> list[int]:
        size = self.local_size or 1
        near = [0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1]
        return [*near, min(max_position or _LARGEST_POSITION, _LARGEST_POSITION) - 1]

    def _agrees(self, candidate: Visibility, q: int) -> bool:
        key = torch.arange(q + 2, device=self.device)
        expected = key <= q
        if candidate.window_left >= 0:
            expected &= key >= q - candidate.window_left
        if candidate.chunk_size:
            expected &= key // candidate.chunk_size == q // candidate.chunk_size
        query = torch.tensor(q, device=self.device)
        return torch.equal(self.visible(0, 0, query, key).expand(len(key)), expected)


@dataclass(frozen=True)
class LayerCall:
    """One call of the attention function during the probe.

    query, key, value: shapes [batch, heads, tokens, dim].
    rule: the rule the layer's mask carried; None where the layer brought no mask, or one it had changed.
    unknown: keyword arguments with a value, of which no one has said that they may be ignored.
    """

    layer_idx: int | None
    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtype: torch.dtype
    has_mask: bool
    rule: MaskRule | None
    options: dict[str, Any]
    unknown: list[str]

    @property
    def scale(self) -> float:
        """What the layer multiplies q·k with."""
        scaling = self.options.get("scaling")
        return float(self.query[-1] ** -0.5 if scaling is None else scaling)


_recording: ContextVar[list[LayerCall] | None] = ContextVar("quire_probe_calls", default=None)


def record_layer_calls(forward: PackedForward, input_ids: torch.Tensor) -> list[LayerCall]:
    """Run the model once on PROBE_TOKENS tokens, and list what its layers asked for, in order."""
    rows = torch.arange(PROBE_TOKENS)
    calls: list[LayerCall] = []
    token = _recording.set(calls)
    try:
        forward.packed(input_ids, rows, rows, PROBE_NAME)
    finally:
        _recording.reset(token)
    return calls


def _mask_with_rule(*_: Any, mask_function: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    device = torch.device(options.get("device") or "cpu")
    mask = torch.ones(1, 1, PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool, device=device).tril()
    mask.quire_rule = MaskRule(mask_function, options.get("local_size"), device)  # type: ignore[attr-defined]
    return mask


def _note_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    calls = _recording.get()
    if calls is not None:
        unknown = [
            name
            for name, option in options.items()
            if option is not None and name not in _UNDERSTOOD | _WITHOUT_EFFECT
        ]
        calls.append(
            LayerCall(
                getattr(module, "layer_idx", None),
                query.shape,
                key.shape,
                value.shape,
                query.dtype,
                attention_mask is not None,
                getattr(attention_mask, "quire_rule", None),
                options,
                unknown,
            )
        )
    # Any sane values will do: only the calls are looked at.
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register(PROBE_NAME, _note_call)
AttentionMaskInterface.register(PROBE_NAME, _mask_with_rule)
