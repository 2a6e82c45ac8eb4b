"""A folder in the Hugging Face format → a model, or one sentence why not."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from quire.errors import ModelError


def load_model(
    path: str | os.PathLike[str], dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """Load config.json and *.safetensors from a local folder: no download, no pickle, no code of the folder.

    Raises:
        ModelError: no such folder, no config, no safetensors, weights missing or of the wrong shape, or an
            architecture transformers does not know.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"model must be a folder; got {str(path)!r}, which is none. Fix: download the model and pass "
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
    showed_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would be printed for each file of weights
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below by name
        )
    except Exception as error:  # transformers, safetensors and json each raise their own kinds
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the folder {str(folder)!r} must hold a causal language model that transformers can load; got "
            f"{type(error).__name__}: {reason}. Fix: check the folder's config.json and weights"
        ) from error
    finally:
        if showed_progress:
            logging.enable_progress_bar()
    # transformers fills missing weights with random numbers and only warns.
    missing = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if missing:
        raise ModelError(
            f"the weights in {str(folder)!r} must be complete; got {len(missing)} missing or misshapen, "
            f"first {missing[0]}. Fix: download the model again"
        )
    model.to(device).eval()
    return model
