"""How long a sequence may become before a model changes what it computes."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from quire.errors import ArgumentError
from quire.spec import check_size


def max_seq_len(config: PretrainedConfig, *, at_most: int | None = None) -> int | None:
    """Tokens a sequence may have, or None where the config sets no limit.

    The least of the model's position range and, for two kinds of rotary embedding, the length up to which
    its frequencies stay the same. "longrope" (Phi-3) and "dynamic" take the largest position *of the whole
    batch* and change all frequencies once it passes a threshold: in a packed step one long sequence would
    change every other one's results, and keys already in pages would no longer fit their queries.

    Args:
        at_most: a smaller limit that the user sets; None: none.
    Raises:
        ArgumentError: at_most is no size, or above what the config allows.
    """
    text_config = config.get_text_config(decoder=True)
    positions = getattr(text_config, "max_position_embeddings", None)
    limits = [positions] if isinstance(positions, int) else []
    for parameters in _rope_parameter_sets(text_config):
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            limits.append(int(parameters.get("original_max_position_embeddings") or positions or 1))
        elif "dynamic" in kind and isinstance(positions, int):
            limits.append(positions)
    longest = min(limits, default=None)
    if at_most is None:
        return longest
    check_size("max_model_len", at_most)
    if longest is not None and at_most > longest:
        raise ArgumentError(
            f"max_model_len must be at most the model's {longest} tokens; got {at_most}. Fix: max_model_len={longest}"
        )
    return at_most


def _rope_parameter_sets(text_config: PretrainedConfig) -> list[dict[str, Any]]:
    """The config's rope_parameters: one set, or one per type of layer."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
