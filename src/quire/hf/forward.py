"""One forward of an unmodified model over a packed step."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from quire.hf.attention import ATTENTION_NAME, AttentionSwitch, RunningStep, running_step
from quire.hf.cache import PagedCache
from quire.hf.compiled import LEAST_TOKENS, CompiledLayers
from quire.hf.linear import LinearSwitch
from quire.hf.step import Step
from quire.kernels import resolve_backend


class TokenPast:
    """A past that has one length per packed token: all of a `Cache` that Llama-4 needs, and no storage.

    Llama-4's layers without rotary embedding scale their queries by position and take the position to be
    "index in this forward + tokens seen before". In a packed row that sum is right if the tokens seen before
    are counted per token: position − index.
    """

    def __init__(self, position_ids: torch.Tensor) -> None:
        self._seen = position_ids - torch.arange(len(position_ids), device=position_ids.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """int64 [tokens]."""
        return self._seen

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values are kept in pages, not here."""
        return key, value


class PackedForward:
    """Calls a model on packed steps, or on one sequence as anyone would, and takes the logits it returns.

    compile: run the steps on pages through CompiledLayers.
    """

    def __init__(self, model: PreTrainedModel, *, compile: bool = False) -> None:
        self.model = model
        self.switch = AttentionSwitch(model)
        self.linears = LinearSwitch(model)
        self.compiled = CompiledLayers(model) if compile else None
        self._can_keep_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        text_config = model.config.get_text_config(decoder=True)
        self._scales_by_index = bool(getattr(text_config, "attn_temperature_tuning", False))

    def paged(self, step: Step, cache: PagedCache, backend: str) -> torch.Tensor:
        """Logits fp32 [rows, vocab] of the step's logits_indices, attention on pages.

        Cost: the head runs on the wanted rows only, where the model's forward has `logits_to_keep`.
        """
        device = self.model.device
        input_ids, position_ids = step.input_ids, step.position_ids
        if self.compiled and step.num_tokens < LEAST_TOKENS:
            input_ids, position_ids = input_ids.repeat(LEAST_TOKENS), position_ids.repeat(LEAST_TOKENS)
        past = TokenPast(position_ids.to(device)) if self._scales_by_index else None
        own_kernels = resolve_backend(backend, device) == "cpu"
        with (
            running_step(RunningStep(step, cache, backend, device)),
            self.linears.using() if own_kernels else nullcontext(),
            self.compiled.using() if self.compiled else nullcontext(),
        ):
            return self.packed(input_ids, position_ids, step.logits_indices, ATTENTION_NAME, past)

    @torch.inference_mode()
    def packed(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        wanted: torch.Tensor,
        attention: str,
        past: TokenPast | None = None,
    ) -> torch.Tensor:
        """Logits fp32 [rows, vocab] of the wanted rows of one packed row of tokens."""
        wanted = wanted.to(self.model.device)
        options: dict[str, Any] = {"position_ids": self._row(position_ids)}
        if self._can_keep_rows:
            options["logits_to_keep"] = wanted
        if past is not None:
            options["past_key_values"] = past
        with self.switch.using(attention):
            logits = self._logits(input_ids, **options)
        return (logits if self._can_keep_rows else logits[wanted]).float()

    @torch.inference_mode()
    def ordinary(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [tokens, vocab] of one whole sequence, without pages and from its ids alone."""
        with self.switch.using("eager"):
            return self._logits(input_ids).float()

    def _logits(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        output = self.model(input_ids=self._row(input_ids), use_cache=False, return_dict=True, **options)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _row(self, values: torch.Tensor) -> torch.Tensor:
        """[1, tokens] on the model's device; a copy, as a compiled graph is bound to the shape of what it views."""
        return values.to(self.model.device)[None].clone()
