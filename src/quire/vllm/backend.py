"""The backend itself: vLLM V1's three classes on CPUs, over ``plan``, ``AttentionPlan.run`` and ``write_kv``.

vLLM makes one implementation per layer and one builder per group of layers that share a block table. Each step the
builder plans once for every kind of layer in its group; the layers find their plan in what it returns.

vLLM's CPU platform takes this backend for every model. Attention that is no decoder's (encoders, and decoders that look
at an encoder) goes on to vLLM's own classes. Whatever else Quire cannot serve is refused while the model is built.

Importing this module imports vLLM, and is refused where its version is not among the tested ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from quire.vllm.versions import check_version

check_version()

# ruff: noqa: E402  # what follows may not exist in other versions
import vllm.envs as envs
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import CrossAttentionSpec, EncoderOnlyAttentionSpec, KVCacheLayout

from quire.errors import UnsupportedError
from quire.ops.attention_plan import AttentionPlan
from quire.ops.planner import plan
from quire.ops.store import write_kv
from quire.ops.warm_up import warm_up
from quire.spec import COMPUTE_DTYPES
from quire.vllm.cache import FORMATS, SERVED_BY_NAME, LayerPages, pages_of, row_bytes
from quire.vllm.kinds import LayerKind, window_left_of

logger = init_logger("vllm.quire")

FIX = "Fix: QUIRE_VLLM=0 for vLLM's own attention"


class QuireCPUBackend(AttentionBackend):
    """What vLLM asks before it makes layers: which attention Quire can serve."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(COMPUTE_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(FORMATS)
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The name of the backend whose place it takes; a layer looks it up."""
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[QuireCPUImpl]:
        return QuireCPUImpl

    @staticmethod
    def get_builder_cls() -> type[QuireCPUBuilder]:
        return QuireCPUBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Rows of a page and head side by side are read fastest; any strides are served."""
        return KVCacheLayout.LBHNC, KVCacheLayout.LBNHC

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Where vLLM quantises per token and head, a row of the cache has room for its scales."""
        quantized = spec.kv_quant_mode.is_per_token_head and spec.state_content_bytes is None
        return replace(spec, state_content_bytes=row_bytes(spec.head_size)) if quantized else spec

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Others than decoders go on to vLLM's own classes."""
        return attn_type in tuple(AttentionType)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Plans are made of the lengths on the host."""
        return False

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any, **more: Any
    ) -> str | None:
        """What single questions do not say: pages that are not quantised are of the model's dtype."""
        named = SERVED_BY_NAME.get(kv_cache_dtype or "auto", dtype)
        if named != dtype:
            return f"kv_cache_dtype {kv_cache_dtype} not supported with a model of {dtype}"
        if FORMATS[kv_cache_dtype or "auto"].stores_scales and head_size % 2:
            return f"kv_cache_dtype {kv_cache_dtype} not supported with an odd head_size"
        return None


@dataclass
class QuireMetadata:
    """One step of one KV cache group: a plan for each kind of its layers, and what they were made of."""

    plans: dict[LayerKind, AttentionPlan]


class QuireCPUBuilder(AttentionMetadataBuilder[Any]):
    """Plans each step of one KV cache group, once for every kind of layer in it."""

    supports_update_block_table = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._vllms_own: CPUAttentionMetadataBuilder | None = None
        self._specs = {}
        self._batch_invariant = bool(envs.VLLM_BATCH_INVARIANT)
        if isinstance(kv_cache_spec, (EncoderOnlyAttentionSpec, CrossAttentionSpec)):
            self._vllms_own = CPUAttentionMetadataBuilder(kv_cache_spec, layer_names, vllm_config, device)
            self.supports_update_block_table = False
            return
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).items():
            _check_built_layer(name, layer)
            self._specs[layer.impl.kind] = layer.impl.kind.spec(kv_cache_spec.block_size)
        warm_up(*self._specs.values())
        logger.info("Quire serves attention of %d layers: %s", len(layer_names), *self._specs)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The plans of a step."""
        if self._vllms_own is not None:
            return self._vllms_own.build(common_prefix_len, common_attn_metadata, fast_build)
        step = common_attn_metadata
        if not isinstance(step.causal, bool):
            raise UnsupportedError(
                f"a step must be causal, or not, as a whole; got {len(step.causal)} requests that differ. {FIX}"
            )
        batch = step.num_reqs
        table, lens = step.block_table_tensor[:batch], step.seq_lens[:batch]
        starts = step.query_start_loc_cpu[: batch + 1]
        return QuireMetadata(
            {
                kind: plan(
                    table, lens, spec, starts,
                    causal=step.causal, window_left=kind.window_left, batch_invariant=self._batch_invariant,
                )
                for kind, spec in self._specs.items()
            }
        )  # fmt: skip

    def update_block_table(
        self, metadata: QuireMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> QuireMetadata:
        """The same step for another KV cache group, whose pages are others."""
        return QuireMetadata(
            {
                kind: made.with_page_table(blk_table[: made.step.batch])
                for kind, made in metadata.plans.items()
            }
        )


class QuireCPUImpl(AttentionImpl[Any]):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._vllms_own: CPUAttentionBackendImpl | None = None
        if attn_type != AttentionType.DECODER:
            self._vllms_own = CPUAttentionBackendImpl(
                num_heads, head_size, scale, self.num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
                logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks, **others,
            )  # fmt: skip
            return
        dtype = torch.get_default_dtype()  # the model's, while it is built
        _refuse_unsupported(self, dtype, sliding_window is not None, sinks is not None, others)
        window_left = window_left_of(sliding_window)
        self.kind = LayerKind(num_heads, self.num_kv_heads, head_size, dtype, kv_cache_dtype, window_left)
        self.softcap = float(logits_soft_cap or 0.0)
        self.sinks = sinks
        self.alibi_slopes = None
        if alibi_slopes is not None:
            self.alibi_slopes = torch.tensor(alibi_slopes, dtype=torch.float32)
        self._seen: tuple[torch.Tensor, LayerPages] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks are parameters of the model, in its dtype; kernels read float32."""
        if self._vllms_own is not None:
            self._vllms_own.process_weights_after_loading(act_dtype)
        elif self.sinks is not None:
            self.sinks = self.sinks.detach().float().contiguous()

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend the step's queries [tokens, num_heads, head_size] to the cache; ``output`` is written in place.

        Rows of padding behind the step's tokens are neither read nor written.
        """
        if self._vllms_own is not None:
            result: torch.Tensor = self._vllms_own.forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return result
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError(
                f"outputs must be of the model's dtype; got a scale to quantise them by. {FIX}"
            )
        if attn_metadata is None:  # vLLM measures how much memory the model takes, and there is no cache yet
            return output.zero_()
        pages = self._pages(layer, kv_cache)
        attn_metadata.plans[self.kind].run(
            query,
            pages.k_pages,
            pages.v_pages,
            softmax_scale=self.scale,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            out=output,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the step's keys and values [tokens, num_kv_heads, head_size] to their slots."""
        if self._vllms_own is not None:
            self._vllms_own.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        pages = self._pages(layer, kv_cache)
        write_kv(
            key,
            value,
            pages.k_pages,
            pages.v_pages,
            slot_mapping,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
        )

    def _pages(self, layer: Any, kv_cache: torch.Tensor) -> LayerPages:
        """The layer's cache as pages, made once for each cache."""
        if self._seen is None or self._seen[0] is not kv_cache:
            form = FORMATS[self.kv_cache_dtype]
            pages = pages_of(kv_cache, self.head_size, form)
            if form.kv_dtype is not None and not form.stores_scales:
                pages = pages._replace(k_scale=layer._k_scale, v_scale=layer._v_scale)
            self._seen = kv_cache, pages
        return self._seen[1]


def _refuse_unsupported(
    impl: QuireCPUImpl, dtype: torch.dtype, has_window: bool, has_sinks: bool, others: dict[str, Any]
) -> None:
    """Ask the backend what vLLM asks a GPU's, because its CPU platform asks nothing."""
    config = get_current_vllm_config()
    model, parallel, speculative = config.model_config, config.parallel_config, config.speculative_config
    transfer = config.kv_transfer_config
    reasons = QuireCPUBackend.validate_configuration(
        head_size=impl.head_size,
        dtype=dtype,
        kv_cache_dtype=impl.kv_cache_dtype,
        block_size=None,
        use_mla=False,
        has_sink=has_sinks,
        use_sparse=False,
        use_mm_prefix=model is not None and bool(model.is_mm_prefix_lm),
        use_per_head_quant_scales=False,
        device_capability=None,
        attn_type=impl.attn_type,
        has_sliding_window=has_window,
        use_non_causal=config.attention_config.use_non_causal,
        use_batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        use_kv_connector=transfer is not None and transfer.is_kv_transfer_instance,
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_adaptive_verification=speculative is not None and speculative.enable_adaptive_verification,
        use_dcp=parallel.decode_context_parallel_size > 1,
        use_rswa=model is not None and model.rswa_window is not None,
    )
    reasons += [f"{name}={value!r} not supported" for name, value in others.items() if value is not None]
    if reasons:
        raise UnsupportedError(
            f"a model's attention must be of a kind that Quire serves; got {'; '.join(reasons)}. {FIX}"
        )


def _check_built_layer(name: str, layer: Any) -> None:
    """What a layer knows and its implementation does not."""
    if not isinstance(layer.impl, QuireCPUImpl):
        raise UnsupportedError(
            f"layer {name} must have Quire's attention; got {type(layer.impl).__name__}. {FIX}"
        )
    if layer.head_size_v != layer.head_size:
        raise UnsupportedError(
            f"values of layer {name} must be as wide as its keys, {layer.head_size}; got {layer.head_size_v}. {FIX}"
        )
