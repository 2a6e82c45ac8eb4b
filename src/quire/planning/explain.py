"""A plan in words: what will run, on how many workers, reading how many bytes, and how evenly."""

from __future__ import annotations

from collections.abc import Sequence

from quire.planning.work_list import StepPlan, WorkList
from quire.spec import AttentionSpec


def explain(spec: AttentionSpec, backend: str, step: StepPlan, notes: Sequence[str] = ()) -> str:
    """Several lines about a plan: its step, and per kernel the items, splits, bytes and balance.

    Bytes are those of keys and values, counted each time an item reads them.
    ``notes`` are the backend's: which kernel, and why not another.
    """
    pages = str(spec.storage_dtype).removeprefix("torch.")
    lines = [
        f'backend "{backend}": {step.batch} sequences, {step.num_tokens} query tokens, '
        f"{int(step.seq_lens.sum())} KV tokens in {int(step.pages_per_sequence.sum())} pages of {spec.page_size}",
        f"  {spec.num_qo_heads} query heads over {spec.num_kv_heads} KV heads of {spec.head_dim}, pages in {pages}, "
        f"{'causal' if step.causal else 'full'} attention"
        + (f" within {step.window_left} tokens back" if step.window_left >= 0 else ""),
    ]
    if step.kv_split:
        lines.append(
            f"  batch-invariant: one kernel for all rows, tiles cut at every {step.kv_split} keys and nowhere else"
        )
    for name, work in (("decode", step.decode), ("prefill", step.prefill)):
        lines.append(f"  {name}: {_describe(spec, work)}")
    lines += [f"  {note}" for note in notes]
    return "\n".join(lines)


def _describe(spec: AttentionSpec, work: WorkList) -> str:
    if not len(work.items):
        return "nothing to do"
    per_worker = work.kv_tokens_per_worker()
    megabytes, mean = per_worker.sum() * spec.bytes_per_token / 1e6, per_worker.mean()
    balance = f"{per_worker.max() / mean:.2f} × the mean" if mean else "no keys"
    return (
        f"{len(work.items)} items on {len(per_worker)} worker{'s' * (len(per_worker) > 1)}, {len(work.merges)} tiles "
        f"split into {work.num_partials} parts; reads {megabytes:.1f} MB; busiest worker {balance}"
    )
