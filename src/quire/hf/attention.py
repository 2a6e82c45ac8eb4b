"""The attention function that models call, and the step it reads.

Registered with `AttentionInterface` as "quire" and deliberately not with `AttentionMaskInterface`: models
then build no mask and hand over plain q, k and v. What else a layer needs travels in a context variable,
because some models drop keyword arguments on the way down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from quire.errors import UnsupportedError
from quire.hf.cache import LayerPages, PagedCache, Visibility
from quire.hf.chunks import split_at_chunks
from quire.hf.step import Step
from quire.ops.attention_plan import AttentionPlan
from quire.ops.planner import plan
from quire.ops.store import write_kv
from quire.ops.torch_op import register
from quire.spec import AttentionSpec

ATTENTION_NAME = "quire"


class RunningStep:
    """A step on its way through the layers, with the plans those layers share.

    A plan is made when the first layer asks for it and reused by all layers of the same spec and visibility.
    """

    def __init__(self, step: Step, cache: PagedCache, backend: str, device: torch.device) -> None:
        self.step = step
        self.cache = cache
        self.backend = backend
        self.device = device
        self.slot_mapping = step.slot_mapping.to(device)
        self._plans: dict[tuple[AttentionSpec, Visibility], AttentionPlan] = {}

    def plan_for(self, layer: LayerPages) -> AttentionPlan:
        """The plan of this layer's spec and visibility, made at most once per step."""
        key = (layer.spec, layer.visibility)
        if key not in self._plans:
            page_table, seq_lens, cu_seqlens_q = self._sequences_seen_by(layer.visibility)
            self._plans[key] = plan(
                page_table,
                seq_lens,
                layer.spec,
                cu_seqlens_q,
                window_left=layer.visibility.window_left,
                backend=self.backend,
                device=self.device,
            )
        return self._plans[key]

    def _sequences_seen_by(self, visibility: Visibility) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        step = self.step
        if not visibility.chunk_size:
            return step.page_table, step.seq_lens, step.cu_seqlens_q
        return split_at_chunks(
            step.page_table,
            step.seq_lens,
            step.cu_seqlens_q,
            chunk_size=visibility.chunk_size,
            page_size=self.cache.page_size,
        )


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
        return _attend(q, k, v, s_aux, scale, softcap or 0.0, module.layer_idx)[None], None  # type: ignore[arg-type]
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    torch.ops.quire.attend_layer(q, k, v, s_aux, scale, softcap or 0.0, module.layer_idx, out)
    return out[None], None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    softcap: float,
    layer_idx: int,
) -> torch.Tensor:
    """attend_pages with [tokens, heads, dim] tensors, for the step that is running."""
    running = _running.get()
    if running is None:
        raise UnsupportedError(
            'a model with the attention "quire" must be run by PagedModel.forward; got a direct call. '
            'Fix: model.set_attn_implementation("sdpa") for ordinary use'
        )
    layer = running.cache.layers[layer_idx]
    q, k, v = (_widen(x, layer.spec.head_dim) for x in (q, k, v))
    write_kv(
        k,
        v,
        layer.k,
        layer.v,
        running.slot_mapping,
        k_scale=layer.k_scale,
        v_scale=layer.v_scale,
        backend=running.backend,
    )
    out: torch.Tensor = running.plan_for(layer).run(
        q,
        layer.k,
        layer.v,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=None if sinks is None else sinks.float(),
        k_scale=layer.k_scale,
        v_scale=layer.v_scale,
    )
    return out[..., : layer.value_dim]


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
    running = _running.get()
    tokens = len(q) if running is None else running.step.num_tokens
    out[:tokens] = _attend(q[:tokens], k[:tokens], v[:tokens], sinks, softmax_scale, softcap, layer_idx)
    out[tokens:] = 0  # the compiled layers' companion of a single token


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


class AttentionSwitch:
    """Lets a model use another attention for a while; outside, it stays the ordinary model it was.

    Every module reads the name from its config at each call, so switching is a matter of a few attributes.
    `set_attn_implementation` would walk all modules at every step; what it checks, the guard finds out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        holders = (getattr(module, "config", None) for module in model.modules())
        configs = {id(c): c for c in holders if isinstance(c, PretrainedConfig)}
        self._configs = list(configs.values())

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Within the block the model's layers call the attention registered under this name."""
        before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = name
        try:
            yield
        finally:
            for config, previous in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = previous
