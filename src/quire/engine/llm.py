"""The whole of it in one object: a model folder in, text out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from quire.assets import DEMO_MODEL
from quire.engine.core import DEFAULT_MAX_BATCH_TOKENS, DEFAULT_MAX_NUM_SEQS, Engine, Prompt
from quire.engine.progress import progress_bar
from quire.engine.request import Delta, Request, RequestOutput, SamplingParams
from quire.errors import ArgumentError, ModelError
from quire.hf import PagedModel
from quire.spec import KVDtype

Prompts = Prompt | Sequence[str] | Sequence[Sequence[int]]


class LLM(Engine):
    """A language model on pages, with its tokenizer: text in, text out.

        llm = quire.LLM()  # or quire.LLM("path/to/model")
        [output] = llm.generate("def fibonacci(n):", quire.SamplingParams(max_tokens=64))
        print(output.text)

    Args:
        model: a Hugging Face model folder, a transformers model, or a PagedModel, whose pages this
            LLM then owns; the embedded demo model by default.
        tokenizer: a fast transformers tokenizer; None: the folder's own, and none for a model that
            is no folder, so that prompts and results are token ids.
        page_size, num_pages, memory_bytes, kv_dtype, backend, compile: the pool and the kernels, as for
            PagedModel; for a model that is not a PagedModel yet.
        dtype, device: of the weights; for a folder only. Default: float32 on the CPU.
        max_batch_tokens, max_num_seqs: see Engine.
    Raises:
        ModelError: the folder holds no usable model or tokenizer.
        UnsupportedError: the model would not compute the same on pages, or the tokenizer is in Python only.
        ArgumentError: sizes that do not fit, or options a model that is made already cannot take.
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel | PagedModel = DEMO_MODEL,
        *,
        tokenizer: Any = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        memory_bytes: int | None = None,
        kv_dtype: KVDtype | None = None,
        backend: str | None = None,
        compile: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
    ) -> None:
        pool = _given(
            page_size=page_size,
            num_pages=num_pages,
            memory_bytes=memory_bytes,
            kv_dtype=kv_dtype,
            backend=backend,
            compile=compile,
        )
        weights = _given(dtype=dtype, device=device)
        if isinstance(model, (str, PathLike)):
            folder, model = model, PagedModel.load(model, **pool, **weights)
            tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
        elif isinstance(model, PreTrainedModel):
            _refuse(weights, "a transformers model has them already", "model.to(...) before")
            model = PagedModel(model, **pool)
        elif isinstance(model, PagedModel):
            _refuse(pool | weights, "a PagedModel has them already", "give them to PagedModel(...)")
        else:
            raise ArgumentError(
                "model must be a model folder, a transformers model or a PagedModel; got "
                f"{type(model).__name__}. "
                'Fix: LLM("path/to/folder")'
            )
        super().__init__(model, tokenizer, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them served together.

        Args:
            prompts: text, a list of texts, token ids, or a list of such lists.
            params: for all prompts, or one per prompt; default: SamplingParams(), greedy.
            progress: show a progress bar on stderr; None: when stderr is a terminal.
        Returns:
            One output per prompt, in their order; also for a single prompt a list.
        Raises:
            ArgumentError: a prompt that cannot be served (see `add_request`), named by its index
                and before any work is done.
        """
        requests = self._make_requests(prompts, params)
        with self._serving(requests), progress_bar(len(requests), shown=progress) as advance:
            for request in requests:
                while request.finish_reason is None:
                    advance(self.step())
        return [request.output() for request in requests]

    def stream(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Delta]:
        """Complete prompts, and hand out each token as it comes.

        Args:
            prompts, params: as for `generate`.
        Returns:
            An iterator of deltas, `delta.index` telling the prompts apart; a request's texts joined
            are its `output.text`. Work is done only while the iterator is advanced; closing it, or
            dropping it, aborts what has not finished and frees its pages.
        Raises:
            ArgumentError: as `generate`, at the call.
        """
        return self._stream(self._make_requests(prompts, params))

    def _stream(self, requests: list[Request]) -> Iterator[Delta]:
        # Each stream reads its own requests, since a step may be run by another stream or by generate.
        unread = deque((request, request.num_prompt_tokens, 0) for request in requests)
        with self._serving(requests):
            while unread:
                news = False
                for _ in range(len(unread)):
                    request, tokens_seen, chars_seen = unread.popleft()
                    if len(request.tokens) > tokens_seen or request.finish_reason is not None:
                        news = True
                        delta = request.delta(tokens_seen, chars_seen)
                        tokens_seen, chars_seen = len(request.tokens), len(request.text)
                        yield delta
                        if delta.output is not None:
                            continue
                    unread.append((request, tokens_seen, chars_seen))
                if not news:
                    self.step()

    @contextmanager
    def _serving(self, requests: list[Request]) -> Iterator[None]:
        try:
            for request in requests:
                self._enqueue(request)
            yield
        finally:
            for request in requests:
                self.abort(request.request_id)

    def _make_requests(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        """One request per prompt, none of them queued yet, so that a bad one is found before any work."""
        listed = _listed(prompts)
        each = _one_each(params, len(listed))
        texts = [prompt for prompt in listed if isinstance(prompt, str)]
        encoded = iter(self._encode(texts))
        requests = []
        for index, (prompt, its_params) in enumerate(zip(listed, each, strict=True)):
            token_ids = next(encoded) if isinstance(prompt, str) else prompt
            try:
                requests.append(self._make_request(prompt, its_params, token_ids, index))
            except ArgumentError as error:
                if len(listed) == 1:
                    raise
                raise type(error)(f"prompts[{index}]: {error}") from error
        return requests


def _listed(prompts: Prompts) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ArgumentError(
            f"prompts must be text, token ids or a list of these; got {type(prompts).__name__}. "
            "Fix: a tensor or array has tolist(), anything else goes through list()"
        )
    if len(prompts) and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]  # one prompt of token ids
    for item in prompts:
        if not isinstance(item, (str, Sequence)):
            raise ArgumentError(
                f"prompts must be text, token ids or a list of these; got a list with {item!r:.60}. "
                "Fix: one prompt per entry"
            )
    return list(prompts)  # type: ignore[arg-type]


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise ArgumentError(
            f"params must be one SamplingParams or one per prompt, {num_prompts}; got {len(params)}. "
            "Fix: SamplingParams(...) alone holds for all prompts"
        )
    return params


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


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], why: str, fix: str) -> None:
    if options:
        raise ArgumentError(f"{', '.join(options)} must be left out, as {why}; got {options}. Fix: {fix}")
