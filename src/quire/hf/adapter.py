"""A peft adapter, merged into the weights it is for: the model stays the plain one that pages are checked for."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from quire.errors import ModelError, UnsupportedError
from quire.hf.checkpoint import ADAPTER_WEIGHTS


def merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Add what an adapter has learned to a model's weights, in their dtype.

    Raises:
        UnsupportedError: peft is not installed, or the adapter is of a kind that cannot be merged.
        ModelError: its weights are no safetensors, or do not fit the model.
    Cost: the weights that it changes are computed once; afterwards steps cost what they do without it.
    """
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"an adapter must hold its weights as {ADAPTER_WEIGHTS}; got {str(adapter)!r} without it. "
            "Fix: save_pretrained of the PeftModel, which writes safetensors"
        )
    try:
        import peft
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("peft", "accelerate"):
            raise
        raise UnsupportedError(
            f"the adapter {str(adapter)!r} needs {error.name}, which is not installed. "
            "Fix: pip install '.[adapters]' in Quire's folder, or peft's merge_and_unload and save_pretrained"
        ) from error
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        adapted = peft.PeftModel(model, config)
        loaded = adapted.load_adapter(str(adapter), "default", is_trainable=False)
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, safetensors and json each raise their own kinds
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedError(
            f"the adapter {str(adapter)!r} must be one that peft can merge into a {type(model).__name__}; got "
            f"{type(error).__name__}: {reason:.200}. Fix: an adapter of this model that changes weights, as LoRA"
        ) from error
    # peft loads what fits and says nothing of the rest.
    wrong = sorted([*loaded.missing_keys, *loaded.unexpected_keys])
    if wrong:
        raise ModelError(
            f"the weights of the adapter {str(adapter)!r} must fit the model; got {len(wrong)} that are missing or "
            f"that nothing takes, first {wrong[0]}. Fix: the model that the adapter was trained on"
        )
    if not isinstance(merged, type(model)):
        raise UnsupportedError(
            f"the adapter {str(adapter)!r} must leave a {type(model).__name__}; got a {type(merged).__name__}. "
            "Fix: an adapter that changes weights, as LoRA"
        )
    return merged.eval()
