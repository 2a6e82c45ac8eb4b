"""What a model is called → the folders it is loaded from: on this machine, or a snapshot of the Hugging Face hub."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from quire.errors import ArgumentError, ModelError, UnsupportedError

# What transformers reads of a checkpoint: never a pickle (*.bin, *.pt), never code (*.py).
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
# Other formats of the same weights lie in folders (onnx/, original/) or under Mistral's own name.
_UNWANTED = ["*/*", "consolidated*"]
_LARGEST_JSON = 64 * 2**20  # bytes; an index of weights has a line per tensor

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are.

    Attributes:
        name: what the caller called it.
        folder: config.json and the weights.
        adapter: a peft adapter for them; None: there is none.
    """

    name: str
    folder: Path
    adapter: Path | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """Whose tokenizer it speaks with: the adapter's where it brings one."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            return self.adapter
        return self.folder


def find_checkpoint(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Find a folder of this name, or else a model of this id on the Hugging Face hub.

    A folder wins over an id. An id is looked up on the hub, what is missing of its snapshot is downloaded, and
    huggingface_hub shows a progress bar; its settings hold, as HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN.
    Without a network, or with HF_HUB_OFFLINE=1, a snapshot that was downloaded before is taken. Of a folder with an
    adapter the model that this names is found in the same way, but downloaded only where the adapter came by its id.

    Args:
        model: a folder, or an id such as "Qwen/Qwen3-0.6B"; a `Path` is always a folder.
        revision: a branch, tag or commit of the hub's repository; None: "main".
    Raises:
        ModelError: there is neither, or the hub cannot be reached and no snapshot is there.
        ArgumentError: a revision of a folder, or one that is no text.
        UnsupportedError: an adapter in the same folder as the weights it is for.
    """
    if revision is not None and not (isinstance(revision, str) and revision):
        raise ArgumentError(
            f"revision must be None, or a branch, tag or commit; got {revision!r:.60}. Fix: revision='main'"
        )
    folder, is_local = Path(model), True
    if os.fspath(model) and folder.is_dir():  # "" is no name, though it is the path of this folder
        if revision is not None:
            raise ArgumentError(
                f"revision must be None, as {str(model)!r} is a folder, which has none; got {revision!r}. "
                "Fix: leave it out, or give the model's id on the hub"
            )
    elif isinstance(model, str) and _is_repo_id(model):
        folder, is_local = _snapshot(model, revision), False
    else:
        raise ModelError(
            f"model must be a folder, or the id of a model on the Hugging Face hub; got {str(model)!r}, which is none. "
            'Fix: the path of the folder, or an id such as "Qwen/Qwen3-0.6B"'
        )
    if not (folder / ADAPTER_CONFIG).is_file():
        return Checkpoint(str(model), folder)
    return Checkpoint(str(model), _base_of(folder, may_download=not is_local), folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty where it cannot be read or is no object: the loaders say what is wrong."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_repo_id(model: str) -> bool:
    try:
        validate_repo_id(model)
    except errors.HFValidationError:
        return False
    return True


def _snapshot(repo_id: str, revision: str | None, *, local_files_only: bool = False) -> Path:
    """The folder of a model in huggingface_hub's cache, whole."""
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                local_files_only=local_files_only,
            )
        )
    except Exception as error:  # the hub's own kinds, those of its HTTP client, and the file system's
        raise _not_found(repo_id, revision, local_files_only, error) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"the model {_named(repo_id, revision)} must have its weights as *.safetensors, as no pickle is opened; "
            f"got none in {str(folder)!r}. Fix: a revision that has them, or HF_HUB_OFFLINE=0 if they are "
            "yet to be downloaded"
        )
    index = read_json(folder / "model.safetensors.index.json").get("weight_map")
    shards = {str(name) for name in index.values()} if isinstance(index, dict) else set()
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"the snapshot of {_named(repo_id, revision)} must be whole; got {len(missing)} of {len(shards)} files "
            f"missing in {str(folder)!r}, first {missing[0]}. Fix: load it once with a network and HF_HUB_OFFLINE=0"
        )
    return folder


def _not_found(repo_id: str, revision: str | None, local_files_only: bool, error: Exception) -> ModelError:
    name, reason = _named(repo_id, revision), str(error).strip().split("\n")[0][:200]
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"the model {name} must be one that you may download; got a gated one ({reason}). "
            "Fix: accept its terms on its page, then `hf auth login` or HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"model must be a folder, or the id of a model on the Hugging Face hub; got {repo_id!r}, which is "
            f"neither here nor on {constants.ENDPOINT}. Fix: check the spelling, or `hf auth login` for a private one"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"revision must be a branch, tag or commit of {repo_id}; got {revision!r}. Fix: revision='main'"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        fix = "HF_HUB_OFFLINE=0" if constants.HF_HUB_OFFLINE else "a network"
        if local_files_only:
            why, fix = "a folder's adapter downloads nothing", f"quire.LLM({repo_id!r}) once"
        return ModelError(
            f"the model {name} must be on this machine, as {why}; got no folder of that name and no whole snapshot in "
            f"{constants.HF_HUB_CACHE!r}. Fix: {fix}, or HF_HOME where your snapshots are"
        )
    return ModelError(
        f"the model {name} must be one that can be downloaded from {constants.ENDPOINT}; got "
        f"{type(error).__name__}: {reason}. Fix: try again, or give the folder of a copy"
    )


def _named(repo_id: str, revision: str | None) -> str:
    return f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"


def _base_of(adapter: Path, *, may_download: bool) -> Path:
    """The folder of the model that an adapter is for."""
    if any(path.name != ADAPTER_WEIGHTS for path in adapter.glob("*.safetensors")):
        raise UnsupportedError(
            f"an adapter must lie in a folder of its own; got {str(adapter)!r} with {ADAPTER_CONFIG} beside a model's "
            f"weights. Fix: move adapter_* into another folder, whose {ADAPTER_CONFIG} names the model as "
            "base_model_name_or_path"
        )
    config = read_json(adapter / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not (isinstance(base, str) and base):
        raise ModelError(
            f"{ADAPTER_CONFIG} must name the model it is for as base_model_name_or_path; got {base!r:.60} in "
            f"{str(adapter)!r}. Fix: the folder of that model, or its id on the hub"
        )
    folder = Path(base)
    if not folder.is_dir():
        if not _is_repo_id(base):
            raise ModelError(
                f"the base_model_name_or_path of {str(adapter)!r} must be a folder, or the id of a model on the "
                f"Hugging Face hub; got {base!r}, which is none. Fix: correct it in {ADAPTER_CONFIG}"
            )
        revision = revision if isinstance(revision, str) and revision else None
        folder = _snapshot(base, revision, local_files_only=not may_download)
    if (folder / ADAPTER_CONFIG).is_file():
        raise UnsupportedError(
            f"an adapter must be for a model; got {str(adapter)!r}, which is for the adapter {base!r}. "
            "Fix: merge that one into its model with peft's merge_and_unload, and save it"
        )
    return folder
