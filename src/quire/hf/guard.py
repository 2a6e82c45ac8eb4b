"""Before the first step: refuse, with a sentence, a model that would be silently wrong on pages.

    check_config    what the config already says: encoders, training mode, several devices
    layer_shapes    what each layer asks of attention, by a dry run; refuses what the pages cannot express
    check_logits    the proof: the same short sequences through the pages and through the model itself

The first two name a reason. The third catches what no one has thought of: state kept outside attention, a
position counted from the start of the batch, an argument without a rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from quire.errors import QuireError, UnsupportedError
from quire.hf.cache import LayerShape, PagedCache, Visibility
from quire.hf.forward import PackedForward
from quire.hf.probe import PROBE_TOKENS, LayerCall, record_layer_calls
from quire.hf.step import Step

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# Largest |Δlogit| as a share of the largest |logit|. Reduced precision also flips near ties between experts, in
# a few rows: there the median row decides.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Two sequences as they come in practice: a prefill beside another, a decode beside a chunk, two decodes.
_CHECK_STEPS = ((9, 4), (1, 5), (1, 1))


def check_config(model: PreTrainedModel) -> None:
    """Refuse what needs no run to see.

    Raises:
        UnsupportedError: an encoder or encoder-decoder, a model in training mode or on several devices, or a
            layer type without a rule.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(model, "a decoder-only model", "an encoder-decoder", "use model.generate")
    if model.training:
        raise _refusal(model, "a model in eval mode", "training mode, which drops out at random", "model.eval()")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise _refusal(model, "all weights on one device", ", ".join(sorted(devices)), "model.to(one device)")
    layer_types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    for layer_idx, layer_type in enumerate(layer_types):
        if layer_type not in _LAYER_TYPES:
            raise _refusal(
                model,
                f"layers of type {', '.join(_LAYER_TYPES)}",
                f"layer {layer_idx} of type {layer_type!r}, whose state is no list of keys and values",
            )


def layer_shapes(model: PreTrainedModel, forward: PackedForward) -> dict[int, LayerShape]:
    """What each layer asks of attention: layer_idx → shape and visibility.

    Raises:
        UnsupportedError: a layer that attends twice or never per forward, that is not causal, that changes its
            mask, or that passes an argument no rule is known for.
    Cost: one forward of a few tokens.
    """
    try:
        calls = record_layer_calls(forward, check_tokens(model.config, PROBE_TOKENS))
    except Exception as error:
        raise _refusal(model, "a model that runs on plain token ids", f"{type(error).__name__}: {error}") from error
    _check_each_layer_once(model, calls)
    max_position = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 4096
    return {call.layer_idx: _layer_shape(model, call, max_position) for call in calls if call.layer_idx is not None}


def check_logits(
    model: PreTrainedModel, forward: PackedForward, shapes: Mapping[int, LayerShape], page_size: int, backend: str
) -> None:
    """Run two short sequences in mixed steps on pages, and whole through the ordinary model.

    Raises:
        UnsupportedError: the logits differ by more than rounding.
    Cost: five forwards of at most 13 tokens, on a pool of a few pages that is dropped again.
    """
    lengths = [sum(tokens) for tokens in zip(*_CHECK_STEPS)]
    texts = check_tokens(model.config, sum(lengths)).split(lengths)
    num_pages = [-(-length // page_size) for length in lengths]
    cache = PagedCache(shapes, page_size=page_size, num_pages=sum(num_pages), kv_dtype=None, device=model.device)
    cache.poison(range(sum(num_pages)))
    # From the far end, so that no page is where a contiguous cache would have it.
    tables = torch.arange(sum(num_pages) - 1, -1, -1, dtype=torch.int32).split(num_pages)
    page_table = torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True, padding_value=-1)
    try:
        ordinary = [forward.ordinary(text) for text in texts]
        differences = [
            _row_differences(forward.paged(step, cache, backend), ordinary, step)
            for step in _mixed_steps(texts, page_table, page_size)
        ]
    except QuireError:
        raise
    except Exception as error:
        raise _refusal(model, "a model that runs on packed steps", f"{type(error).__name__}: {error}") from error
    rows = torch.cat(differences)
    worst = rows.max() if model.dtype == torch.float32 else rows.median()
    largest_logit = max(float(logits.abs().max()) for logits in ordinary)
    if not float(worst) <= _TOLERANCE[model.dtype] * largest_logit:
        raise _refusal(
            model,
            "the logits of the ordinary model",
            f"logits off by {float(worst):.2g} where the largest is {largest_logit:.2g}: this model keeps something "
            "between tokens that is not in its attention's keys and values",
        )


def check_tokens(config: PretrainedConfig, count: int) -> torch.Tensor:
    """int64 [count] arbitrary token ids, none of which the config gives a special meaning."""
    text_config = config.get_text_config(decoder=True)
    special = set(_special_tokens(config)) | set(_special_tokens(text_config))
    plain = [token for token in range(min(text_config.vocab_size, count + len(special) + 64)) if token not in special]
    ids = torch.tensor(plain)
    return ids[torch.randint(len(ids), (count,), generator=torch.Generator().manual_seed(0))]


def _special_tokens(config: PretrainedConfig) -> list[int]:
    values = [v for name, v in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    return [v for value in values for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]


def _mixed_steps(texts: Sequence[torch.Tensor], page_table: torch.Tensor, page_size: int) -> Iterator[Step]:
    done = [0] * len(texts)
    for counts in _CHECK_STEPS:
        positions = [torch.arange(start, start + count) for start, count in zip(done, counts)]
        done = [start + count for start, count in zip(done, counts)]
        yield Step(
            input_ids=torch.cat([text[p] for text, p in zip(texts, positions)]),
            position_ids=torch.cat(positions),
            page_table=page_table,
            seq_lens=torch.tensor(done, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).to(torch.int32),
            slot_mapping=torch.cat(
                [row[p // page_size] * page_size + p % page_size for row, p in zip(page_table.long(), positions)]
            ),
            logits_indices=torch.arange(sum(counts)).flip(0),  # not in order: the rows asked for, not the last n
        )


def _row_differences(logits: torch.Tensor, ordinary: Sequence[torch.Tensor], step: Step) -> torch.Tensor:
    """max |Δlogit| of each row of a step; infinite where the number of rows is wrong."""
    owner = torch.repeat_interleave(torch.arange(len(ordinary)), step.cu_seqlens_q.diff().long())
    expected = torch.stack(
        [ordinary[int(owner[row])][int(step.position_ids[row])] for row in step.logits_indices]
    )
    if logits.shape != expected.shape:
        return torch.tensor([float("inf")])
    return (logits - expected).abs().amax(-1).cpu()


def _check_each_layer_once(model: PreTrainedModel, calls: Sequence[LayerCall]) -> None:
    if not calls:
        raise _refusal(model, "layers that call attention through AttentionInterface", "none that does")
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    times = Counter(call.layer_idx for call in calls)
    for layer_idx in range(num_layers):
        if times[layer_idx] != 1:
            often = "never" if times[layer_idx] == 0 else f"{times[layer_idx]} times"
            raise _refusal(
                model, "one attention call per layer and forward", f"layer {layer_idx} calling it {often}"
            )
    strangers = [layer_idx for layer_idx in times if layer_idx not in range(num_layers)]
    if strangers:
        raise _refusal(model, f"layers 0 to {num_layers - 1}", f"an attention call of layer {strangers[0]}")


def _layer_shape(model: PreTrainedModel, call: LayerCall, max_position: int) -> LayerShape:
    where = f"layer {call.layer_idx}"
    batch, num_qo_heads, tokens, key_dim = call.query
    if batch != 1 or call.key[:1] + call.key[2:] != call.query[:1] + call.query[2:] or call.value[2] != tokens:
        raise _refusal(
            model,
            "self-attention: one key and one value per query token, keys as wide as queries",
            f"{where} with query {list(call.query)}, key {list(call.key)} and value {list(call.value)}",
        )
    if call.key[1] != call.value[1]:
        raise _refusal(
            model, "as many key heads as value heads", f"{where} with {call.key[1]} and {call.value[1]}"
        )
    if call.unknown:
        raise _refusal(
            model,
            "attention of q, k, v, mask, scale, softcap and sinks",
            f"{where} passing {', '.join(call.unknown)}",
        )
    if call.options.get("dropout"):
        raise _refusal(model, "attention without dropout", f"{where} with dropout {call.options['dropout']}")
    return LayerShape(
        num_qo_heads, call.key[1], key_dim, call.value[3], call.dtype, _visibility(model, call, max_position)
    )


def _visibility(model: PreTrainedModel, call: LayerCall, max_position: int) -> Visibility:
    where = f"layer {call.layer_idx}"
    if call.rule is None:
        got = "a mask of its own making" if call.has_mask else "no mask, so every token sees every other"
        raise _refusal(model, "causal masks as transformers builds them", f"{where} with {got}")
    visibility = call.rule.read(max_position)
    if visibility is None:
        raise _refusal(model, "a causal mask: all earlier tokens, a window or a chunk", f"{where} with another")
    window = call.options.get("sliding_window")
    if window is not None and visibility != Visibility(window_left=window - 1):
        raise _refusal(
            model,
            f"a mask of the window its layer passes on, {window} tokens",
            f"{where} whose mask shows {visibility}",
        )
    return visibility


def _refusal(model: PreTrainedModel, expected: str, got: str, fix: str = "use model.generate") -> UnsupportedError:
    return UnsupportedError(
        f"a model on pages must be {expected}; got {model.config.model_type} with {got}. Fix: {fix}"
    )
