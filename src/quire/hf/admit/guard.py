"""Refuses, before the first step, a model that would be silently wrong on pages, and says why.

    check_config    what the config already says: encoders, training mode, several devices
    layer_calls     what each layer asks of attention, by a dry run
    layer_shapes    the same, as pages can express it; refuses what they cannot
    keep_bits       where the model is to be batch-invariant: which operators it needs for that, and whether they do
    rehearse        a test on the pages' own dtype, device and kernels: every layer against its formula in float64,
                    and the logits of short texts against those of the model itself

The first three name a reason. The last catches what they do not know of: state kept outside attention, a position
counted from the start of the batch, an argument without a rule.

The rehearsal has limits. Texts are 35 tokens long, or as long as the model allows. Where a page holds as many, only the
layers are tested across pages, one of each kind on random tensors, and not the whole model. Where rounding alone makes
a router choose other experts, a few wrong rows look like such choices; NaN is refused, and errors in most of the rows,
in most of those that begin a step, or in most of those that are a step of one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from quire.errors import QuireError, UnsupportedError
from quire.hf import limits
from quire.hf.admit.company import invariant_forwards, rehearse_company
from quire.hf.admit.probe import PROBE_TOKENS, LayerCall, record_layer_calls
from quire.hf.admit.rehearsal import TEXT_TOKENS, Outcome, Stage, first_rows, rehearse_far_out, rehearse_texts
from quire.hf.cache import LayerShape
from quire.hf.forward import PackedForward
from quire.spec import Visibility

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# Bounds on the median row and on the largest row, as multiples of the noise.
_TIMES_MEDIAN, _TIMES_LARGEST = 2.0, 4.0

_CAUSE = "counts positions along the packed row or keeps something between tokens outside its keys and values"
_NO_NOISE = "cannot be rehearsed: no tensor with a row per token was found that could be rounded differently"


def check_config(model: PreTrainedModel) -> None:
    """Refuse what needs no run to see.

    Raises:
        UnsupportedError: an encoder or encoder-decoder, a model in training mode or on several devices, or a
            layer type without a rule.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(model, "be a decoder alone", "an encoder-decoder")
    if model.training:
        raise _refusal(model, "be in eval mode", "training mode, which drops out at random", "model.eval()")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise _refusal(model, "be on one device", ", ".join(sorted(devices)), "model.to(device)")
    layer_types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    for layer_idx, layer_type in enumerate(layer_types):
        if layer_type not in _LAYER_TYPES:
            raise _refusal(
                model,
                f"have no layers but {', '.join(_LAYER_TYPES)}",
                f"layer {layer_idx} of type {layer_type!r}, for which there is no rule",
            )


def layer_calls(model: PreTrainedModel, forward: PackedForward) -> dict[int, LayerCall]:
    """What each layer asks of attention, by layer_idx.

    Raises:
        UnsupportedError: a layer that attends twice or never per forward.
    Cost: one forward of a few tokens.
    """
    try:
        calls = record_layer_calls(forward, check_tokens(model.config, PROBE_TOKENS))
    except Exception as error:
        raise _refusal(model, "run on plain token ids", f"{type(error).__name__}: {error}") from error
    _check_each_layer_once(model, calls)
    return {call.layer_idx: call for call in calls if call.layer_idx is not None}


def layer_shapes(model: PreTrainedModel, calls: Mapping[int, LayerCall]) -> dict[int, LayerShape]:
    """The shape and visibility of each layer, by layer_idx.

    Raises:
        UnsupportedError: a layer that is not causal, that changes its mask, or that passes an argument no rule is
            known for.
    """
    max_position = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return {layer_idx: _layer_shape(model, call, max_position) for layer_idx, call in calls.items()}


def keep_bits(model: PreTrainedModel, stage: Stage) -> None:
    """Give the model forwards with which a row keeps its bits in any company, and see whether rows do.

    Raises:
        UnsupportedError: the model needs an operator that is not known to be invariant, or its rows do not keep their
            bits all the same.
    Cost: three forwards of a few tokens, six of at most 70.
    """
    tokens = min(TEXT_TOKENS, limits.max_seq_len(model.config) or TEXT_TOKENS)
    ids = check_tokens(model.config, 2 * tokens)
    try:
        stage.forward.switches.keep_bits(invariant_forwards(stage.forward, ids))
        fault = rehearse_company(stage, ids.view(2, tokens))
    except QuireError:
        raise
    except Exception as error:
        raise _refusal(model, "run on packed steps", f"{type(error).__name__}: {error}") from error
    if fault:
        raise _refusal(model, "give each token the same bits in any step", fault, "batch_invariant=False")


def rehearse(model: PreTrainedModel, stage: Stage) -> None:
    """Serve short texts, and attend far out in each kind of layer, as PagedModel will.

    Raises:
        UnsupportedError: a layer's attention, or the logits, are off by more than rounding.
    Cost: nine forwards of at most 70 tokens; in 16 bits as many again before logits are refused.
    """
    tokens = min(TEXT_TOKENS, limits.max_seq_len(model.config) or TEXT_TOKENS)
    texts = check_tokens(model.config, 4 * tokens).view(2, 2, tokens)
    try:
        outcome = rehearse_texts(stage, texts[0])
        fault = outcome.fault or _logits_fault(outcome, model.dtype)
        if fault and not outcome.fault and _may_be_a_tie(outcome, model.dtype):
            outcome = rehearse_texts(stage, texts[1])
            fault = outcome.fault or _logits_fault(outcome, model.dtype)
        fault = fault or rehearse_far_out(stage)
    except QuireError:
        raise
    except Exception as error:
        raise _refusal(model, "run on packed steps", f"{type(error).__name__}: {error}") from error
    if fault:
        raise _refusal(model, "give the same logits on pages as without", fault)


def _may_be_a_tie(outcome: Outcome, dtype: torch.dtype) -> bool:
    # In 16 bits a router may choose another expert at a near tie; other texts then have theirs in other rows.
    return dtype != torch.float32 and bool(outcome.error.isfinite().all())


def _logits_fault(outcome: Outcome, dtype: torch.dtype) -> str | None:
    error, noise, rounding = outcome.error, outcome.noise, torch.finfo(dtype).eps * outcome.largest
    checks = [(error.max(), _TIMES_LARGEST * noise.max() + rounding)]  # NaN, if any, wins the max
    for rows in (torch.ones_like(error, dtype=torch.bool), *first_rows(error.shape[1])):
        checks.append((error[rows].median(), _TIMES_MEDIAN * noise[rows].median() + rounding))
    for off, bound in checks:
        if not off <= bound:
            return (
                f"logits off by {off:.2g}, root mean square of a token, where another rounding explains {bound:.2g}, "
                f"so it {_CAUSE if noise.any() else _NO_NOISE}"
            )
    return None


def check_tokens(config: PretrainedConfig, count: int) -> torch.Tensor:
    """int64 [count] arbitrary token ids, none of which the config gives a special meaning."""
    text_config = config.get_text_config(decoder=True)
    special = _special_tokens(config) | _special_tokens(text_config)
    plain = [token for token in range(min(text_config.vocab_size, 512)) if token not in special]
    ids = torch.tensor(plain)
    return ids[torch.randint(len(ids), (count,), generator=torch.Generator().manual_seed(0))]


def _special_tokens(config: PretrainedConfig) -> set[int]:
    named = [v for name, v in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    flat = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return {token for token in flat if isinstance(token, int)}


def _check_each_layer_once(model: PreTrainedModel, calls: Sequence[LayerCall]) -> None:
    if not calls:
        raise _refusal(model, "attend through AttentionInterface", "no layer that does")
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    times = Counter(call.layer_idx for call in calls)
    for layer_idx in range(num_layers):
        if times[layer_idx] != 1:
            often = "never" if times[layer_idx] == 0 else f"{times[layer_idx]} times"
            raise _refusal(model, "attend once per layer and forward", f"layer {layer_idx} attending {often}")
    strangers = [layer_idx for layer_idx in times if layer_idx not in range(num_layers)]
    if strangers:
        raise _refusal(model, f"attend in layers 0 to {num_layers - 1}", f"a call of layer {strangers[0]}")


def _layer_shape(model: PreTrainedModel, call: LayerCall, max_position: int | None) -> LayerShape:
    where = f"layer {call.layer_idx}"
    batch, num_qo_heads, tokens, key_dim = call.query
    if (
        batch != 1
        or call.key[:1] + call.key[2:] != call.query[:1] + call.query[2:]
        or call.value[2] != tokens
    ):
        raise _refusal(
            model,
            "have one key and one value per query token, keys as wide as queries",
            f"{where} with query {list(call.query)}, key {list(call.key)} and value {list(call.value)}",
        )
    if call.key[1] != call.value[1]:
        raise _refusal(
            model, "have as many key heads as value heads", f"{where} with {call.key[1]} and {call.value[1]}"
        )
    if call.unknown:
        raise _refusal(
            model,
            "attend by q, k, v, mask, scale, softcap and sinks alone",
            f"{where} passing {', '.join(call.unknown)}",
        )
    if call.options.get("dropout"):
        raise _refusal(model, "attend without dropout", f"{where} with dropout {call.options['dropout']}")
    return LayerShape(
        num_qo_heads, call.key[1], key_dim, call.value[3], call.dtype, _visibility(model, call, max_position)
    )


def _visibility(model: PreTrainedModel, call: LayerCall, max_position: int | None) -> Visibility:
    where = f"layer {call.layer_idx}"
    if call.rule is None:
        got = "a mask of its own making" if call.has_mask else "no mask, so every token sees every other"
        raise _refusal(model, "keep the causal masks that transformers builds", f"{where} with {got}")
    visibility = call.rule.read(max_position)
    if visibility is None:
        raise _refusal(model, "see all earlier tokens, a window or a chunk", f"{where} with another mask")
    window = call.options.get("sliding_window")
    if window is not None and visibility != Visibility(window_left=window - 1):
        raise _refusal(
            model,
            f"mask by the window its layers pass on, {window} tokens",
            f"{where} whose mask shows {visibility}",
        )
    return visibility


def _refusal(
    model: PreTrainedModel, must: str, got: str, fix: str = "use model.generate"
) -> UnsupportedError:
    return UnsupportedError(
        f"to run on pages, a model must {must}; got {model.config.model_type}: {got}. Fix: {fix}"
    )
