"""The same prompts on pages and in a contiguous padded cache, by the clock and by the byte."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from quire.engine import Engine, EngineStats, RequestOutput, SamplingParams
from quire.engine.request import Request

Watch = Callable[[int, list[Request]], None]


@dataclass(frozen=True)
class Run:
    """One way of serving the prompts, once.

    Attributes:
        token_ids: the generated tokens of each prompt, the end-of-text token included.
        seconds: from the first prompt's arrival to the last token.
        first_token: seconds until each prompt's first token.
        allocated_slots: slots of the KV cache at its largest; a slot holds one token, in all layers.
        filled_slots: those that held a token of a prompt or of a text.
        kv_bytes: bytes of these slots.
        pages: pages at peak; None where there are none.
        preemptions: how often a request gave its pages back.
    """

    token_ids: list[list[int]]
    seconds: float
    first_token: list[float]
    allocated_slots: int
    filled_slots: int
    kv_bytes: int
    pages: int | None = None
    preemptions: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all prompts by the whole time, reading the prompts included."""
        return sum(map(len, self.token_ids)) / self.seconds

    @property
    def wasted(self) -> float:
        """The part of the allocated slots that held nothing."""
        return 1 - self.filled_slots / self.allocated_slots


def serve_on_pages(
    engine: Engine, prompts: Sequence[str], params: SamplingParams, watch: Watch | None = None
) -> tuple[Run, list[RequestOutput]]:
    """Serve all prompts at once, step by step. Nothing of an earlier run is found in pages.

    Args:
        watch: called after every step with its number and all requests, finished ones included.
    Returns:
        The measured run, and each prompt's output.
    """
    engine.reset_prefix_cache()
    engine.stats = EngineStats()
    started = time.perf_counter()
    requests = [engine.requests[engine.add_request(prompt, params)] for prompt in prompts]
    while engine.has_unfinished:
        engine.step()
        if watch is not None:
            watch(engine.stats.steps, requests)
    seconds = time.perf_counter() - started
    outputs = [request.output() for request in requests]
    pages = engine.stats.peak_pages
    # A token takes a slot of each group of layers; of a cache without groups it takes one.
    allocated = pages * engine.table.page_size // len(engine.table.groups)
    unused = engine.stats.peak_unused_slots // len(engine.table.groups)
    run = Run(
        token_ids=[output.token_ids for output in outputs],
        seconds=seconds,
        first_token=[output.time_to_first_token or seconds for output in outputs],
        allocated_slots=allocated,
        filled_slots=allocated - unused,
        kv_bytes=pages * engine.model.bytes_per_page,
        pages=pages,
        preemptions=sum(output.preemptions for output in outputs),
    )
    return run, outputs


def serve_padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int, eos_token_ids: Sequence[int]
) -> Run:
    """Serve all prompts with `model.generate`: one batch, padded on the left, its cache contiguous.

    Greedy, with the model's own attention (SDPA where it has it).
    """
    widest = max(map(len, prompts))
    pad = eos_token_ids[0] if eos_token_ids else 0
    input_ids = torch.tensor([[pad] * (widest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    clock = _FirstStepClock()
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=list(eos_token_ids) or None,
        return_dict_in_generate=True,
    )
    started = time.perf_counter()
    result = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    seconds = time.perf_counter() - started
    texts = [_until_eos(row, eos_token_ids) for row in result.sequences[:, widest:].tolist()]
    layers = result.past_key_values.layers
    cache_length = max(layer.keys.shape[-2] for layer in layers)
    # The last token of a text is handed out, never computed: it takes no slot.
    lengths = [len(prompt) + len(text) - 1 for prompt, text in zip(prompts, texts, strict=True)]
    return Run(
        token_ids=texts,
        seconds=seconds,
        first_token=[clock.first - started] * len(prompts),
        allocated_slots=len(prompts) * cache_length,
        filled_slots=sum(min(length, cache_length) for length in lengths),
        kv_bytes=sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values)),
    )


@dataclass(frozen=True)
class Divergence:
    """Where two greedy texts of a prompt part, and how near a tie the model was there.

    Attributes:
        prompt: index of the prompt.
        position: the first generated token that differs.
        on_pages, padded: the two tokens; None where a text had ended.
        gap: logit of `on_pages` minus logit of `padded`, from the plain model on this prompt alone,
            without pages and without padding; None where a text had ended.
    """

    prompt: int
    position: int
    on_pages: int | None
    padded: int | None
    gap: float | None


def divergences(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], on_pages: Run, padded: Run
) -> list[Divergence]:
    """Compare the texts of two runs; empty when all agree."""
    return [
        _divergence(model, prompt, i, a, b)
        for i, (prompt, a, b) in enumerate(zip(prompts, on_pages.token_ids, padded.token_ids, strict=True))
        if a != b
    ]


def _divergence(
    model: PreTrainedModel, prompt: Sequence[int], index: int, a: list[int], b: list[int]
) -> Divergence:
    common = next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if common in (len(a), len(b)):
        return Divergence(index, common, *_at(common, a, b), gap=None)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *a[:common]]], device=model.device)).logits[0, -1]
    return Divergence(index, common, a[common], b[common], float(logits[a[common]] - logits[b[common]]))


def _at(position: int, a: list[int], b: list[int]) -> tuple[int | None, int | None]:
    return a[position] if position < len(a) else None, b[position] if position < len(b) else None


def _until_eos(tokens: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    end = next((t for t, token in enumerate(tokens) if token in eos_token_ids), len(tokens) - 1)
    return tokens[: end + 1]


class _FirstStepClock:
    """A stopping criterion that never stops: asked after every token, it remembers when the first came."""

    first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
