"""An engine from a model folder or a model's id: loading, and the options of loading."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from quire.assets import DEMO_MODEL
from quire.engine.core import DEFAULT_MAX_BATCH_TOKENS, DEFAULT_MAX_NUM_SEQS, Engine
from quire.engine.progress import say
from quire.errors import ArgumentError, ModelError
from quire.hf import PagedModel
from quire.hf.checkpoint import Checkpoint, find_checkpoint
from quire.hf.load import load_checkpoint
from quire.spec import KVDtype


class LLM(Engine):
    """A language model on pages, with its tokenizer: text in, text out.

        llm = quire.LLM()  # or quire.LLM("path/to/model"), or quire.LLM("Qwen/Qwen3-0.6B")
        [output] = llm.generate("def fibonacci(n):", quire.SamplingParams(max_tokens=64))
        print(output.text)

    An Engine that loads its model; what it does with it, and from which threads, is said there.

    Args:
        model: a Hugging Face model folder; the id of a model on the Hugging Face hub; a folder or id of a peft adapter,
            which is merged into the weights of its model; a transformers model; or a PagedModel, whose pages this LLM
            then shares with the other engines on it. The embedded demo model by default. A folder of that name wins
            over an id. Of an id the files that are needed are downloaded once, into huggingface_hub's cache, whose
            settings hold: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN. Nothing else is ever downloaded.
        revision: a branch, tag or commit of an id; None: "main".
        tokenizer: a fast transformers tokenizer; None: the folder's own, and none for a model that
            is made already, so that prompts and results are token ids.
        page_size, num_pages, memory_bytes, kv_dtype, max_model_len, backend, compile, cuda_graphs, batch_invariant,
            swap_bytes: the pool, the longest sequence and the kernels, as for PagedModel; for a model that is not a
            PagedModel yet.
        dtype: of the weights, as torch.bfloat16 or "bfloat16"; None or "auto": the checkpoint's own.
        device: of weights and pages; None: "cuda" where torch can use a GPU, else "cpu". One line says both: it is
            logged as INFO by the logger "quire", or else written to stderr where that is a terminal. Both are for
            a folder or an id only.
        max_batch_tokens, max_num_seqs, enable_prefix_caching: see Engine.
    Raises:
        ModelError: the folder holds no usable model or tokenizer, or the id is none of the hub's and of its cache's.
        UnsupportedError: the model would not compute the same on pages, the tokenizer is in Python only, or an adapter
            or quantised weights need a library that is not installed.
        ArgumentError: sizes that do not fit, or options a model that is made already cannot take.
        DeviceError: this torch or machine has no such device.
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel | PagedModel = DEMO_MODEL,
        *,
        revision: str | None = None,
        tokenizer: Any = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        memory_bytes: int | None = None,
        kv_dtype: KVDtype | None = None,
        max_model_len: int | None = None,
        backend: str | None = None,
        compile: bool | None = None,
        cuda_graphs: bool | None = None,
        batch_invariant: bool | None = None,
        swap_bytes: int = 0,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
        enable_prefix_caching: bool = True,
    ) -> None:
        if swap_bytes and not enable_prefix_caching:
            raise ArgumentError(
                f"swap_bytes must be 0 without prefix caching, which finds pages in host memory; got {swap_bytes}. "
                "Fix: enable_prefix_caching=True"
            )
        pool = _given(
            page_size=page_size,
            num_pages=num_pages,
            memory_bytes=memory_bytes,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
            backend=backend,
            compile=compile,
            cuda_graphs=cuda_graphs,
            batch_invariant=batch_invariant,
            swap_bytes=swap_bytes or None,
        )
        weights = _given(revision=revision, dtype=dtype, device=device)
        if isinstance(model, (str, PathLike)):
            checkpoint = find_checkpoint(model, revision)
            loaded = load_checkpoint(checkpoint, dtype, device)
            say(_what_was_chosen(checkpoint, loaded, dtype, device))
            tokenizer = load_tokenizer(checkpoint.tokenizer_folder) if tokenizer is None else tokenizer
            model = PagedModel(loaded, **pool)
        elif isinstance(model, PreTrainedModel):
            _refuse(weights, "a transformers model has them already", "model.to(...) before")
            model = PagedModel(model, **pool)
        elif isinstance(model, PagedModel):
            _refuse(pool | weights, "a PagedModel has them already", "give them to PagedModel(...)")
        else:
            raise ArgumentError(
                "model must be a model folder, a model's id, a transformers model or a PagedModel; got "
                f"{type(model).__name__}. "
                'Fix: LLM("path/to/folder"), LLM("Qwen/Qwen3-0.6B")'
            )
        super().__init__(
            model,
            tokenizer,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
        )


def load_tokenizer(path: str | PathLike[str]) -> Any:
    """The tokenizer of a local model folder; nothing is downloaded and no code of the folder is run.

    Raises:
        ModelError: the folder holds no usable tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and json each raise their own kinds
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the folder {str(path)!r} must hold a tokenizer that transformers can load; got "
            f"{type(error).__name__}: {reason}. Fix: save_pretrained the tokenizer there, or pass tokenizer="
        ) from error


def _what_was_chosen(checkpoint: Checkpoint, model: PreTrainedModel, dtype: object, device: object) -> str:
    """One line: what is loaded, in which dtype, where, and who decided."""
    by = "as asked" if dtype not in (None, "auto") else "the checkpoint's own"
    place = (
        "as asked" if device is not None else "a GPU is there" if model.device.type == "cuda" else "no GPU"
    )
    where = f", merged into {checkpoint.folder}" if checkpoint.adapter else ""
    kind = str(model.dtype).removeprefix("torch.")
    return f"{checkpoint.name}{where}: {kind} ({by}) on {model.device} ({place})"


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], why: str, fix: str) -> None:
    if options:
        raise ArgumentError(f"{', '.join(options)} must be left out, as {why}; got {options}. Fix: {fix}")
