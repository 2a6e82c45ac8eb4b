"""The attention function that models call, and the step it reads.

Registered with `AttentionInterface` as "quire" and deliberately not with `AttentionMaskInterface`: models
then build no mask and pass plain q, k and v. What else a layer needs is read from a context variable, because some
models drop keyword arguments on the way to their layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

from quire.errors import UnsupportedError
from quire.hf.cache import Kind, LayerPages, PagedCache
from quire.hf.planners import Planners
from quire.hf.step import Step
from quire.hf.transfer import to_device
from quire.ops.attention_plan import AttentionPlan
from quire.ops.store import write_kv
from quire.ops.torch_op import register
from quire.spans import span

ATTENTION_NAME = "quire"


class RunningStep:
    """A step on its way through the layers.

    A plan is made when the first layer asks for it, and serves all layers of the same spec, visibility and group.

    Args:
        slots: the step's slot_mapping on the device, where it is there already.
        plans: those that are made already.
    """

    def __init__(
        self,
        step: Step,
        cache: PagedCache,
        planners: Planners,
        slots: torch.Tensor | None = None,
        plans: Mapping[Kind, AttentionPlan] | None = None,
    ) -> None:
        self.step = step
        self.cache = cache
        self.planners = planners
        slots = to_device(step.slot_mapping, planners.device) if slots is None else slots
        self._slots = slots.unbind() if slots.dim() > 1 else (slots,)  # of each group
        self._plans = dict(plans or {})

    def write(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> None:
        """Write a layer's keys and values of this step, [tokens, num_kv_heads, dim], into its pages."""
        layer = self.cache.layers[layer_idx]
        write_kv(
            _widen(k, layer.spec.head_dim),
            _widen(v, layer.spec.head_dim),
            layer.k,
            layer.v,
            self._slots[layer.group],
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            backend=self.planners.backend,
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        softmax_scale: float,
        softcap: float,
        layer_idx: int,
    ) -> torch.Tensor:
        """Write a layer's keys and values, then attend to its pages.

        Args:
            q, k, v: [tokens, heads, dim], the step's tokens.
            sinks: [num_qo_heads], or None.
        Returns:
            [tokens, num_qo_heads, value_dim].
        """
        layer = self.cache.layers[layer_idx]
        with span("attention"):
            self.write(k, v, layer_idx)
            out: torch.Tensor = self._plan_for(layer).run(
                _widen(q, layer.spec.head_dim),
                layer.k,
                layer.v,
                softmax_scale=softmax_scale,
                softcap=softcap,
                sinks=None if sinks is None else sinks.float(),
                k_scale=layer.k_scale,
                v_scale=layer.v_scale,
            )
        return out[..., : layer.value_dim]

    def _plan_for(self, layer: LayerPages) -> AttentionPlan:
        plan = self._plans.get(layer.kind)
        if plan is None:
            plan = self._plans[layer.kind] = self.planners.plan(self.step, *layer.kind)
        return plan


_running: ContextVar[RunningStep | None] = ContextVar("quire_running_step", default=None)


def attend_pages(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_vetted: Any,
) -> tuple[torch.Tensor, None]:
    """Write this step's keys and values into the layer's pages, then attend to them.

    Args:
        query: [1, num_qo_heads, tokens, key_dim], sequences packed end to end.
        key, value: [1, num_kv_heads, tokens, key_dim or value_dim].
        scaling: softmax scale; 1/√key_dim when None.
        softcap, s_aux: the layer's score cap, and its sinks [num_qo_heads].
        _vetted: the rest, which the guard has found to be without effect on the result.
    Returns:
        [1, tokens, num_qo_heads, value_dim] and no weights.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not torch.compiler.is_compiling():
        return _current_step().attend(q, k, v, s_aux, scale, softcap or 0.0, module.layer_idx)[None], None  # type: ignore[arg-type]
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    torch.ops.quire.attend_layer(q, k, v, s_aux, scale, softcap or 0.0, module.layer_idx, out)
    return out[None], None


def _current_step() -> RunningStep:
    running = _running.get()
    if running is None:
        raise UnsupportedError(
            'a model with the attention "quire" must be run by PagedModel.forward; got a direct call. '
            'Fix: model.set_attn_implementation("sdpa") for ordinary use'
        )
    return running


def _attend_layer_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    softcap: float,
    layer_idx: int,
    out: torch.Tensor,
) -> None:
    running = _current_step()
    tokens = running.step.num_tokens
    out[:tokens] = running.attend(
        q[:tokens], k[:tokens], v[:tokens], sinks, softmax_scale, softcap, layer_idx
    )
    out[tokens:] = 0  # a compiled model runs a single token as two


def _widen(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Zeros appended to q and k change no score; appended to v they give zeros, which are cut off again."""
    missing = head_dim - x.shape[-1]
    return pad(x, (0, missing)) if missing else x


AttentionInterface.register(ATTENTION_NAME, attend_pages)
# For compiled models: the graph holds a layer's number, and the running step brings pages and plan.
register(
    "attend_layer",
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, float softmax_scale, float softcap, int layer_idx, "
    "Tensor(a!) out",
    _attend_layer_op,
)


@contextmanager
def running_step(running: RunningStep) -> Iterator[None]:
    """Let the attention function see this step."""
    token = _running.set(running)
    try:
        yield
    finally:
        _running.reset(token)
