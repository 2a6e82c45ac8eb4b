"""As much of vLLM's interfaces as the backend touches, for tests on machines without vLLM."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Generic, TypeVar

import torch

T = TypeVar("T")


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


@dataclass(frozen=True)
class MultipleOf:
    base: int


class KVCacheLayout(enum.Enum):
    LBHNC = 0
    LBNHC = 1


class QuantMode(enum.IntEnum):
    NONE = 0
    INT8_PER_TOKEN_HEAD = 2

    @property
    def is_per_token_head(self) -> bool:
        return self is QuantMode.INT8_PER_TOKEN_HEAD


@dataclass(frozen=True)
class CacheSpec:
    block_size: int = 16
    head_size: int = 16
    kv_quant_mode: QuantMode = QuantMode.NONE
    state_content_bytes: int | None = None


class EncoderOnlyAttentionSpec(CacheSpec):
    pass


class CrossAttentionSpec(CacheSpec):
    pass


class AttentionBackend:
    """The questions of ``validate_configuration`` that have a method of the same name."""

    QUESTIONS: ClassVar = {
        "use_mm_prefix": "supports_mm_prefix", "has_sink": "supports_sink", "has_sliding_window":
        "supports_sliding_window", "use_non_causal": "supports_non_causal", "use_batch_invariant":
        "supports_batch_invariance", "use_pcp": "supports_pcp", "use_dcp": "supports_dcp", "use_rswa": "supports_rswa",
        "use_adaptive_verification": "supports_device_cpu_query_lens_mismatch",
    }  # fmt: skip

    @classmethod
    def validate_configuration(
        cls, head_size: int, dtype: Any, kv_cache_dtype: str, attn_type: str, **asked: Any
    ) -> list[str]:
        wrong = [] if dtype in cls.supported_dtypes else ["dtype not supported"]
        if kv_cache_dtype not in cls.supported_kv_cache_dtypes:
            return [*wrong, "kv_cache_dtype not supported"]
        for question, name in cls.QUESTIONS.items():
            answer = getattr(cls, name, lambda: False)
            if asked[question] and not answer():
                wrong.append(f"{question} not supported")
        combination = cls.supports_combination(
            head_size, dtype, kv_cache_dtype, None, False, False, False, False, None
        )
        return wrong + ([combination] if combination else [])


class AttentionMetadataBuilder(Generic[T]):
    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names


class AttentionImpl(Generic[T]):
    pass


class OwnImpl:
    """vLLM's own attention: it remembers what it was asked."""

    def __init__(self, *args: Any) -> None:
        self.args, self.asked = args, []

    def __getattr__(self, name: str) -> Any:
        def answer(*args: Any) -> Any:
            self.asked.append(name)
            return f"vLLM's own {name}"

        return answer


class OwnBuilder(OwnImpl):
    pass


class Attention:
    def __init__(self, impl: Any, head_size_v: int | None = None) -> None:
        self.impl, self.head_size = impl, impl.head_size
        self.head_size_v = head_size_v or impl.head_size
        self._k_scale, self._v_scale = torch.tensor(0.02), torch.tensor(0.03)


def config(**changed: Any) -> SimpleNamespace:
    """vLLM's configuration as far as it is read; ``layers`` are those of the model."""
    parts = {
        "model_config": SimpleNamespace(is_mm_prefix_lm=False, rswa_window=None),
        "parallel_config": SimpleNamespace(prefill_context_parallel_size=1, decode_context_parallel_size=1),
        "attention_config": SimpleNamespace(use_non_causal=False),
        "speculative_config": None, "kv_transfer_config": None, "layers": {},
    }  # fmt: skip
    return SimpleNamespace(**{**parts, **changed})


class Current:
    """The configuration while a model is built, and the plugins' table."""

    config = config()
    registered: ClassVar[dict[str, str]] = {}


def modules() -> dict[str, ModuleType]:
    """By name, what is put into ``sys.modules``."""
    contents = {
        "vllm": {},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.config": {
            "get_current_vllm_config": lambda: Current.config,
            "get_layers_from_vllm_config": lambda config, kind, names: {n: config.layers[n] for n in names},
        },
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(info=lambda *args: None)},
        "vllm.model_executor.layers.attention": {"Attention": Attention},
        "vllm.v1.attention.backend": {
            kind.__name__: kind
            for kind in (AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType, MultipleOf)
        },
        "vllm.v1.attention.backends.cpu_attn": {
            "CPUAttentionBackendImpl": OwnImpl, "CPUAttentionMetadataBuilder": OwnBuilder,
        },
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": SimpleNamespace(CPU_ATTN="CPU_ATTN"),
            "register_backend": Current.registered.__setitem__,
        },
        "vllm.v1.kv_cache_interface": {
            kind.__name__: kind for kind in (CrossAttentionSpec, EncoderOnlyAttentionSpec, KVCacheLayout)
        },
    }  # fmt: skip
    made: dict[str, ModuleType] = {}
    for name, content in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(made[name]).update(content)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made


def install(monkeypatch: Any) -> Any:
    """``quire.vllm.backend`` over the stand-in, for one test."""
    import quire.vllm.versions as versions

    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "quire.vllm.backend", raising=False)
    monkeypatch.setattr(versions, "installed_version", lambda: versions.TESTED[0])
    monkeypatch.setattr(Current, "config", config())
    Current.registered.clear()
    import quire.vllm.backend as backend

    monkeypatch.delitem(sys.modules, "quire.vllm.backend")  # the next test has its own
    return backend
