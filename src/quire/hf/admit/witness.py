"""Each layer's attention, judged on the very tensors it was given.

Logits of two 16-bit runs differ by more than a 2 % error in the softmax scale would cause, so attention is checked
layer by layer. The formula in float64, on the same queries and on the keys and values that the pages hold, is what a
layer should give. The same formula in the model's dtype shows how far plain PyTorch is off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from quire.hf.admit.probe import LayerCall, MaskRule
from quire.hf.attention import RunningStep
from quire.hf.cache import LayerPages
from quire.kernels.reference import quantize

# How far attention on pages may be off: this many times plain PyTorch in the model's dtype, and this much of the
# largest value, as kernels compute in float32. Measured on the families of the tests in 16 bits: 0.6 to 0.8 times
# plain PyTorch where all is right, 1.6 to 6 times with a softmax scale that is 2 % off.
TIMES_PLAIN, FLOAT32_ROUNDINGS = 1.5, 8 * torch.finfo(torch.float32).eps
# How far quantised pages may be from what was written, compared with the rule by which they round.
TIMES_QUANTISED = 1.1


class Witness:
    """Compares what layers find in their pages with what they should find, and keeps the sums of squares.

    Args:
        calls: what each layer asked of attention in the probe: scale, cap, sinks, and the rule of its mask.
    """

    def __init__(self, calls: Mapping[int, LayerCall]) -> None:
        self.calls = calls
        self._written: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._squares: dict[int, list[torch.Tensor]] = defaultdict(list)

    def write(self, layer_idx: int, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Note a sequence's next keys and values [tokens, num_kv_heads, dim]."""
        before = self._written.get((layer_idx, sequence), (k[:0], v[:0]))
        self._written[layer_idx, sequence] = torch.cat([before[0], k]), torch.cat([before[1], v])

    def attend(
        self, running: RunningStep, layer_idx: int, q: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Judge what the queries of a step [tokens, num_qo_heads, key_dim] found in the pages of a layer.

        Returns:
            What the model goes on with: `out`, but from quantised pages what unquantised ones would give, so that
            its logits can be compared with the ordinary model's.
        """
        step, layer, call = running.step, running.cache.layers[layer_idx], self.calls[layer_idx]
        starts, goes_on = step.cu_seqlens_q.tolist(), out
        for i, seq_len in enumerate(step.seq_lens.tolist()):
            rows = slice(starts[i], starts[i + 1])
            written = self._written[layer_idx, i]
            kept = _kept(layer, step.table_of(layer.group)[i].to(q.device), written, seq_len)
            exact = attention(q[rows].double(), kept[0], kept[1], call)
            plain = attention(q[rows], kept[0], kept[1].to(q.dtype), call)
            differences = [
                [out[rows] - exact],
                [plain - exact],
                [written[1].abs().amax().expand(exact.shape)],
                [x - y for x, y in zip(kept, written, strict=True)],
                [_quantised(x, layer) - x for x in written],
            ]
            squares = [torch.stack([d.double().square().sum() for d in each]).sum() for each in differences]
            self._squares[layer_idx].append(torch.stack(squares))
            if layer.k_scale is not None:
                goes_on = out.clone() if goes_on is out else goes_on
                k, v = (x.double() for x in written)
                goes_on[rows] = attention(q[rows].double(), k, v, call).to(out.dtype)
        return goes_on

    def fault(self) -> str | None:
        """What the worst layer got wrong, or None where all are right.

        Cost: the one device sync of a rehearsal's layers.
        """
        layers = list(self._squares)
        sums = torch.stack([torch.stack(squares).sum(0) for squares in self._squares.values()])
        error, plain, values, lost, rounded = sums.sqrt().cpu().T
        allowed = TIMES_PLAIN * plain + FLOAT32_ROUNDINGS * values
        for what, off, bound in (
            ("keys and values", lost, TIMES_QUANTISED * rounded),
            ("attention", error, allowed),
        ):
            wrong = ~(off <= bound)  # also where it is NaN
            if wrong.any():
                worst = int((off / bound).nan_to_num(torch.inf).where(wrong, -1.0).argmax())
                return (
                    f"{what} of layer {layers[worst]} off by {off[worst]:.2g}, root of the sum of squares, where "
                    f"rounding explains {bound[worst]:.2g}"
                )
        return None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """What a layer's last len(q) tokens of a sequence should get.

    In 16 bits the result, and the weights before the values are summed, are rounded to the dtype of q; scores are
    float32, as in PyTorch's own fused attention.

    Args:
        q: [queries, num_qo_heads, key_dim].
        k, v: [tokens, num_kv_heads, key_dim or value_dim], the whole sequence.
        call: scale, cap and sinks, and the rule of the model's own mask.
    Returns:
        [queries, num_qo_heads, value_dim].
    """
    softcap, sinks = call.options.get("softcap"), call.options.get("s_aux")
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # the heads of a group side by side
    scores = torch.einsum("qhgd,thd->hgqt", queries.to(wide), k.to(wide)) * call.scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(call, len(q), len(k)).to(q.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.to(scores).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)], -1
        )
    weights = torch.softmax(scores, -1)[..., : len(k)].to(q.dtype)
    return torch.einsum("hgqt,thd->qhgd", weights, v).flatten(1, 2)


def _visible(call: LayerCall, queries: int, tokens: int) -> torch.Tensor:
    """bool [queries, tokens]."""
    rule: MaskRule = call.rule  # type: ignore[assignment]  # a layer without one has been refused
    key = torch.arange(tokens, device=rule.device)
    return rule.visible(0, 0, key[tokens - queries :, None], key[None]).expand(queries, tokens)


def _kept(
    layer: LayerPages, pages: torch.Tensor, written: tuple[torch.Tensor, torch.Tensor], seq_len: int
) -> list[torch.Tensor]:
    """A sequence's keys and values as its pages hold them, in float64 and in the shape in which they were written."""
    position = torch.arange(seq_len, device=pages.device)
    page, offset = pages.long()[position // layer.spec.page_size], position % layer.spec.page_size
    kept = []
    for values, scale, like in ((layer.k, layer.k_scale, written[0]), (layer.v, layer.v_scale, written[1])):
        numbers = values[:, page, offset, : like.shape[-1]].double()
        if scale is not None:
            numbers = numbers * scale[:, page, offset, None].double()
        kept.append(numbers.transpose(0, 1))
    return kept


def _quantised(x: torch.Tensor, layer: LayerPages) -> torch.Tensor:
    """x as the rule of the layer's pages rounds it."""
    if layer.k_scale is None:
        return x
    values, scale = quantize(x, layer.k.dtype)
    return values.double() * scale[..., None].double()
