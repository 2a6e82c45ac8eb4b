"""A rehearsal: short texts through the pages and through the model as it is, and each kind of layer far out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quire.hf.admit.probe import LayerCall
from quire.hf.admit.witness import Witness
from quire.hf.attention import RunningStep
from quire.hf.cache import LayerShape, PagedCache, PageLayout
from quire.hf.forward import PackedForward
from quire.hf.invariant import suspended
from quire.hf.planners import Planners
from quire.hf.step import Step
from quire.pages import PageAllocator, PageTable
from quire.spec import KVDtype

TEXT_TOKENS = 35  # on pages of 16 tokens a text ends in its third page, on pages of 35 in its first
_ROUNDINGS = 3  # runs of the ordinary model beside the first
# Far out, so many tokens stand before an edge; then come a few that cross it, and one more.
_BEFORE_EDGE, _FAR_STEPS = 2, (5, 1)
_FARTHEST_EDGE = 8192  # of a window or chunk: more keys are not attended to in float64


class Stage(NamedTuple):
    """What is rehearsed, and on what pages."""

    forward: PackedForward
    calls: Mapping[int, LayerCall]
    shapes: Mapping[int, LayerShape]
    page_size: int
    kv_dtype: KVDtype | None
    backend: str
    batch_invariant: bool = False

    @property
    def device(self) -> torch.device:
        """Where model and pages are."""
        device: torch.device = self.forward.model.device
        return device

    def planners(self) -> Planners:
        """Planners as the model's own will be."""
        return Planners(self.backend, self.device, self.batch_invariant)

    def pages(self, num_tokens: Sequence[int], layers: Sequence[int]) -> tuple[PagedCache, PageTable]:
        """Pages full of NaN for sequences of so many tokens, and the sequences' table."""
        shapes = {layer_idx: self.shapes[layer_idx] for layer_idx in layers}
        layout = PageLayout(shapes, page_size=self.page_size, kv_dtype=self.kv_dtype)
        groups = [group.visibility for group in layout.groups]
        num_pages = len(groups) * sum(-(-tokens // self.page_size) for tokens in num_tokens)
        cache = PagedCache(shapes, layout, num_pages=num_pages, device=self.device)
        cache.poison(range(num_pages))
        table = PageTable(PageAllocator(num_pages), self.page_size, groups)
        for i in range(len(num_tokens)):
            table.add(i)
        return cache, table


class Outcome(NamedTuple):
    """What the texts showed.

    error: by how much each token's logits on pages miss the nearest run of the ordinary model, root mean square [texts,
        tokens]; infinite where a step returned other rows.
    noise: by how much one of these runs misses the nearest of the others, at most [texts, tokens].
    largest: the largest |logit|.
    fault: a sentence about a layer that attends wrongly, or None.
    """

    error: torch.Tensor
    noise: torch.Tensor
    largest: float
    fault: str | None


class WitnessedStep(RunningStep):
    """A step whose layers are judged while they attend."""

    def __init__(self, step: Step, cache: PagedCache, planners: Planners, witness: Witness) -> None:
        super().__init__(step, cache, planners)
        self._witness = witness

    def write(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> None:
        """As a RunningStep's."""
        for i, (begin, end) in enumerate(pairwise(self.step.cu_seqlens_q.tolist())):
            self._witness.write(layer_idx, i, k[begin:end], v[begin:end])
        super().write(k, v, layer_idx)

    def attend(self, q: torch.Tensor, *others: Any) -> torch.Tensor:
        """As a RunningStep's."""
        out = super().attend(q, *others)
        with suspended():
            return self._witness.attend(self, others[-1], q, out)


@torch.inference_mode()
def rehearse_texts(stage: Stage, texts: torch.Tensor) -> Outcome:
    """Serve texts in mixed steps, and compare each token's logits with the ordinary model's.

    The ordinary model runs several times, each rounded differently: where it takes a router's near tie one way or the
    other, pages may, too.

    Args:
        texts: int64 [2, tokens], at least 6.
    Cost: a forward per step, one per text, and _ROUNDINGS of both texts; a pool of a few pages.
    """
    forward, witness = stage.forward, Witness(stage.calls)
    runs = [torch.cat([forward.ordinary(text[None]) for text in texts])]
    for seed in range(_ROUNDINGS):
        with _OtherRounding(texts.shape, forward.model.dtype, seed):
            runs.append(forward.ordinary(texts))
    noise = torch.stack([_distance(run, runs[:i] + runs[i + 1 :]) for i, run in enumerate(runs)]).amax(0)
    error = torch.full_like(noise, torch.inf)
    cache, table = stage.pages([texts.shape[1]] * len(texts), list(stage.shapes))
    planners = stage.planners()
    for counts in new_tokens(texts.shape[1]):
        new = [slice(table.length(i), table.length(i) + count) for i, count in enumerate(counts)]
        step = _next_step(table, counts, torch.cat([text[s] for text, s in zip(texts, new, strict=True)]))
        logits = forward.paged(WitnessedStep(step, cache, planners, witness))
        if logits.shape == (step.num_tokens, runs[0].shape[-1]):
            # The step asked for them from the last to the first.
            rows = logits.flip(0).split(counts)  # type: ignore[no-untyped-call]
            for i, s in enumerate(new):
                error[i, s] = _distance(rows[i], [run[i, s] for run in runs])
    return Outcome(error.cpu(), noise.cpu(), float(runs[0].abs().max()), witness.fault())


def grow_texts(stage: Stage, texts: torch.Tensor, schedule: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits fp32 [tokens, vocab] of each text, of which each step of the schedule takes so many new tokens."""
    cache, table = stage.pages([texts.shape[1]] * len(texts), list(stage.shapes))
    planners, grown = stage.planners(), [[] for _ in texts]  # type: tuple[Planners, list[list[torch.Tensor]]]
    for counts in schedule:
        new = [slice(table.length(i), table.length(i) + count) for i, count in enumerate(counts)]
        step = _next_step(table, counts, torch.cat([text[s] for text, s in zip(texts, new, strict=True)]))
        rows = stage.forward.paged(RunningStep(step, cache, planners)).flip(
            0
        )  # asked for from the last to the first
        for each, part in zip(grown, rows.split(list(counts)), strict=True):  # type: ignore[no-untyped-call]
            each.append(part)
    return [torch.cat(each) for each in grown]


def first_rows(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of two texts come first of several in a step, and which come alone: bool [2, length] each.

    A model that keeps something from one token to the next outside its pages gets these rows wrong, if no others.
    """
    chunks, singles = torch.zeros(2, 2, length, dtype=torch.bool)
    for i, counts in enumerate(zip(*new_tokens(length), strict=True)):
        for count, start in zip(counts, accumulate(counts, initial=0), strict=False):
            (singles if count == 1 else chunks)[i, start] = True
    return chunks, singles


@torch.inference_mode()
def rehearse_far_out(stage: Stage) -> str | None:
    """Let each kind of layer attend to random tensors over three pages, and across the edge of its window or chunk.

    Returns:
        A sentence about a layer that attends wrongly, or None.
    Cost: no forward; each time the pages of one layer.
    """
    # The size that the model asked its mask for is looked at, too: it may have been read wrongly.
    sizes = {i: call.rule.local_size or 0 for i, call in stage.calls.items() if call.rule is not None}
    for layer_idx in {(shape, sizes[i]): i for i, shape in stage.shapes.items()}.values():
        visibility = stage.shapes[layer_idx].visibility
        edges = {visibility.window_left + 1, visibility.chunk_size, sizes[layer_idx]}
        near = {edge for edge in edges if 0 < edge <= _FARTHEST_EDGE}
        for begin in sorted({2 * stage.page_size, *near}):
            fault = _cross(stage, layer_idx, max(1, begin - _BEFORE_EDGE))
            if fault:
                return fault
    return None


def _cross(stage: Stage, layer_idx: int, begin: int) -> str | None:
    """Attend in one layer after `begin` tokens have been written."""
    shape, call = stage.shapes[layer_idx], stage.calls[layer_idx]
    witness, planners = Witness(stage.calls), stage.planners()
    cache, table = stage.pages([begin + sum(_FAR_STEPS)], [layer_idx])
    generator = torch.Generator(stage.device).manual_seed(0)

    def draw(tokens: int, heads: int, dim: int) -> torch.Tensor:
        sizes = (tokens, heads, dim)
        return torch.randn(sizes, generator=generator, device=stage.device).to(shape.dtype)

    for count in (begin, *_FAR_STEPS):
        step = WitnessedStep(
            _next_step(table, [count], torch.zeros(count, dtype=torch.int64)), cache, planners, witness
        )
        k, v = (draw(count, shape.num_kv_heads, dim) for dim in (shape.key_dim, shape.value_dim))
        if count == begin:
            # Values just outside the window are large, so that seeing them by mistake shows.
            v[: 2 * sum(_FAR_STEPS)] *= max(1.0, begin / 16)
            step.write(k, v, layer_idx)
        else:
            q = draw(count, shape.num_qo_heads, shape.key_dim) / (call.scale * shape.key_dim**0.5)
            sinks, softcap = call.options.get("s_aux"), call.options.get("softcap")
            step.attend(q, k, v, sinks, call.scale, softcap or 0.0, layer_idx)
    return witness.fault()


class _OtherRounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Changes the first numbers that a model has for each token, its embeddings, by up to a rounding of its dtype.

    All that follows is rounded differently then, and is as right as before: logits differ as far as right ones may.

    Args:
        shape: of the token ids, [batch, tokens].
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape, self._eps, self._seed, self._done = shape, torch.finfo(dtype).eps, seed, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._done or not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return out
        if out.dim() < 3 or out.shape[:2] != self._shape:
            return out
        self._done = True
        generator = torch.Generator(out.device).manual_seed(self._seed)
        drawn = torch.rand(out.shape, generator=generator, device=out.device)
        return (out.float() * (1 + (2 * drawn - 1) * self._eps)).to(out.dtype)


def new_tokens(length: int) -> list[tuple[int, int]]:
    """New tokens of two texts per step: two prefills, a decode beside a chunk, a chunk beside a decode, two decodes."""
    chunk, few = length // 3, length // 6
    return [(length - chunk - 2, few), (1, length - few - 2), (chunk, 1), (1, 1)]


def _next_step(table: PageTable, counts: Sequence[int], input_ids: torch.Tensor) -> Step:
    """The next tokens of each sequence of the table, with logits of all of them."""
    sequences = list(range(len(counts)))
    starts = [table.length(i) for i in sequences]
    slots = [torch.from_numpy(table.append(i, counts[i]).slot_mapping) for i in sequences]
    return Step(
        input_ids=input_ids,
        position_ids=torch.cat([torch.arange(s, s + count) for s, count in zip(starts, counts, strict=True)]),
        page_table=table.dense(sequences),
        seq_lens=table.seq_lens(sequences),
        cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        slot_mapping=torch.cat(slots, dim=-1),
        # Not in order: a model must return the rows asked for, not the last so many.
        logits_indices=torch.arange(sum(counts)).flip(0),
    )


def _distance(logits: torch.Tensor, runs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Root mean square of each row's Δlogits to the nearest of the runs; NaN where any of them is."""
    return torch.stack([(logits - run).square().mean(-1).sqrt() for run in runs]).amin(0)
