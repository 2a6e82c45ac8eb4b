"""One forward of an unmodified model over a packed step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from quire.hf.attention import ATTENTION_NAME, RunningStep, running_step
from quire.hf.compiled import LEAST_TOKENS
from quire.hf.switches import Switches
from quire.hf.transfer import to_device
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
    """Calls a model on packed steps, or on whole sequences as its users would, and returns logits.

    Args:
        compile: run the steps on pages with the decoder compiled.
        batch_invariant: run them with the forwards that `switches` has been given for it.
    """

    def __init__(
        self, model: PreTrainedModel, *, compile: bool = False, batch_invariant: bool = False
    ) -> None:
        self.model = model
        self.switches = Switches(model, compile=compile, batch_invariant=batch_invariant)
        self._compile, self._batch_invariant = compile, batch_invariant
        self._can_keep_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        text_config = model.config.get_text_config(decoder=True)
        self._scales_by_index = bool(getattr(text_config, "attn_temperature_tuning", False))

    def paged(
        self,
        running: RunningStep,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits fp32 [rows, vocab] of the step's logits_indices, attention on pages.

        Args:
            input_ids, position_ids, wanted: what the model reads of the step, where it is on the device already; None:
                the step's own.
        Cost: the head runs on the wanted rows only, where the model's forward has `logits_to_keep`.
        """
        step, device = running.step, self.model.device
        input_ids = step.input_ids if input_ids is None else input_ids
        position_ids = step.position_ids if position_ids is None else position_ids
        wanted = step.logits_indices if wanted is None else wanted
        if self._compile and step.num_tokens < LEAST_TOKENS:
            input_ids, position_ids = input_ids.repeat(LEAST_TOKENS), position_ids.repeat(LEAST_TOKENS)
        past = TokenPast(to_device(position_ids, device)) if self._scales_by_index else None
        kernels = self._batch_invariant or resolve_backend(running.planners.backend, device) == "cpu"
        with self.switches.lock, running_step(running):  # the planners, too, serve one step at a time
            return self.packed(input_ids, position_ids, wanted, ATTENTION_NAME, past, kernels, self._compile)

    @torch.inference_mode()
    def packed(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        wanted: torch.Tensor,
        attention: str,
        past: TokenPast | None = None,
        kernels: bool = False,
        compiled: bool = False,
    ) -> torch.Tensor:
        """Logits fp32 [rows, vocab] of the wanted rows of one packed row of tokens.

        attention, kernels, compiled: as for `Switches.run`.
        """
        wanted = to_device(wanted, self.model.device)
        inputs = self._inputs(self._row(input_ids)) | {"position_ids": self._row(position_ids)}
        if self._can_keep_rows:
            inputs["logits_to_keep"] = wanted
        if past is not None:
            inputs["past_key_values"] = past
        logits = self.switches.run(attention, inputs, kernels=kernels, compiled=compiled).logits[0]
        rows: torch.Tensor = logits if self._can_keep_rows else logits[wanted]
        return rows.float()

    @torch.inference_mode()
    def ordinary(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [batch, tokens, vocab] of whole sequences [batch, tokens], from their ids alone."""
        inputs = self._inputs(input_ids.to(self.model.device))
        logits: torch.Tensor = self.switches.run("eager", inputs).logits
        return logits.float()

    def _inputs(self, input_ids: torch.Tensor) -> dict[str, Any]:
        return {"input_ids": input_ids, "use_cache": False, "return_dict": True}

    def _row(self, values: torch.Tensor) -> torch.Tensor:
        """[1, tokens] on the model's device; copied, as torch compiles anew for a view of another shape of base."""
        return to_device(values, self.model.device)[None].clone()
