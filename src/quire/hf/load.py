"""A checkpoint → a model, or one sentence why not."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging

from quire.errors import DtypeError, ModelError, UnsupportedError
from quire.hf.adapter import merge_adapter
from quire.hf.checkpoint import Checkpoint, read_json
from quire.spec import COMPUTE_DTYPES, existing_device

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}
# Tensors beside a quantised weight, or of an adapter: without them the model is another one.
_ESSENTIAL = re.compile(
    r"(qweight|qzeros|scales|g_idx|weight_packed|weight_scale(_inv)?|absmax|lora_[AB](\..*)?\.weight)$"
)


def load_checkpoint(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a model, with its adapter merged into its weights where it has one.

    Args:
        dtype: of the weights, also by name; None or "auto": what the checkpoint's config.json says, or its weights.
        device: None: "cuda" where torch can use a GPU, else "cpu".
    Raises:
        ModelError, UnsupportedError: as `load_model` and `merge_adapter`.
        DtypeError: a dtype that pages are not computed in.
        DeviceError: this torch or machine has no such device.
    """
    where = existing_device(default_device() if device is None else device)
    model = load_model(checkpoint.folder, dtype, where)
    return model if checkpoint.adapter is None else merge_adapter(model, checkpoint.adapter)


def default_device() -> str:
    """The device of a model for which none is named."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    path: str | os.PathLike[str], dtype: torch.dtype | str | None, device: torch.device | str
) -> PreTrainedModel:
    """Load config.json and *.safetensors from a local folder: no download, no pickle, no code of the folder.

    Raises:
        ModelError: no such folder, no config, no safetensors, weights missing or of the wrong shape, or an
            architecture transformers does not know.
        UnsupportedError: quantised weights that transformers cannot load here.
        DtypeError: a dtype that pages are not computed in, also the checkpoint's own where it is left to that.
    """
    folder = Path(path)
    _check_files(folder)
    asked = _dtype(dtype)
    quantised = _quantisation(folder)
    # Some of these weights cannot be moved once they are loaded.
    placed = {"device_map": {"": device}} if quantised and find_spec("accelerate") else {}
    showed_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would be printed for each file of weights
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=asked,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below by name
            **placed,
        )
        model = model if model.device == device else model.to(device)
    except Exception as error:  # transformers, safetensors and json each raise their own kinds
        raise _refusal(folder, quantised, error) from error
    finally:
        if showed_progress:
            logging.enable_progress_bar()
    _check_weights(folder, report)
    if model.dtype not in COMPUTE_DTYPES:
        raise DtypeError(
            f"the weights in {str(folder)!r} must be of {', '.join(_DTYPES)}; got {model.dtype}. "
            "Fix: dtype=torch.bfloat16"
        )
    return model.eval()


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"model must be a folder; got {str(folder)!r}, which is none. Fix: download the model and pass "
            "its folder"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"a model folder must hold config.json; got {str(folder)!r} without one. Fix: pass the folder "
            "that save_pretrained wrote"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"a model folder must hold its weights as *.safetensors; got {str(folder)!r} without any. "
            "Fix: convert them with save_pretrained, which writes safetensors"
        )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in COMPUTE_DTYPES:
        raise DtypeError(
            f"dtype must be 'auto' or one of {', '.join(_DTYPES)}; got {dtype!r:.60}. Fix: dtype='auto' takes the "
            "checkpoint's own"
        )
    return found


def _quantisation(folder: Path) -> str | None:
    """The method by which a checkpoint's weights are quantised; None: they are not.

    Raises:
        UnsupportedError: a method that transformers does not know, and would pass over with a warning.
    """
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    found: Any = config.get("quantization_config")
    if found is None and isinstance(text_config, dict):
        found = text_config.get("quantization_config")
    if found is None and config.get("quantization") is not None:  # as MLX writes it
        found = {"quant_method": "mlx"}
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if isinstance(found, dict) and (found.get("load_in_8bit") or found.get("load_in_4bit")):
        method = "bitsandbytes_4bit" if found.get("load_in_4bit") else "bitsandbytes_8bit"
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UnsupportedError(
            f"quantised weights must be of a method that transformers can load; got {method!r:.60} in {str(folder)!r}. "
            "Fix: the checkpoint of this model that is not quantised"
        )
    return str(method)


def _refusal(folder: Path, quantised: str | None, error: Exception) -> ModelError | UnsupportedError:
    reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
    if quantised is not None:
        return UnsupportedError(
            f"the weights in {str(folder)!r}, quantised by {quantised!r}, must be loadable by transformers here; got "
            f"{reason}. Fix: install what it names, or take the checkpoint of this model that is not quantised"
        )
    return ModelError(
        f"the folder {str(folder)!r} must hold a causal language model that transformers can load; got "
        f"{reason}. Fix: check the folder's config.json and weights"
    )


def _check_weights(folder: Path, report: dict[str, Any]) -> None:
    """Refuse weights that are missing, of another shape, or that belong to others and that nothing takes."""
    # transformers fills missing weights with random numbers and only warns.
    missing = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if missing:
        raise ModelError(
            f"the weights in {str(folder)!r} must be complete; got {len(missing)} missing or misshapen, "
            f"first {missing[0]}. Fix: download the model again"
        )
    passed_over = sorted(key for key in report["unexpected_keys"] if _ESSENTIAL.search(key))
    if passed_over:
        raise UnsupportedError(
            f"the weights in {str(folder)!r} must be all that the model computes with; got {len(passed_over)} of "
            f"quantised layers or adapters that nothing takes, first {passed_over[0]}. Fix: a checkpoint whose "
            "config.json has its quantization_config, or one that is not quantised; an adapter in a folder of its own"
        )
