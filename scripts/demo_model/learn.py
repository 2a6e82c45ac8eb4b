"""The training: windows of the text, two optimisers, a schedule that fits the time given, and a state to go on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from demo_model.corpus import Documents, training_windows
from demo_model.model import CONTEXT, loss_of

MUON_RATE = 8e-3
ADAMW_RATE = 4e-3
WARM_UP_STEPS = 100
TIMED_STEPS = (30, 90)  # how fast a step is, once everything is compiled

Loss = Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor]


class Plan(NamedTuple):
    """What the caller decides about a training run."""

    steps: int | None  # None: as many as fit before `deadline`
    deadline: float  # of time.monotonic
    tokens_per_step: int
    tokens_per_pass: int  # one forward and backward; a step adds several up
    seed: int
    report_every: float  # seconds


class MasterWeights:
    """fp32 copies of a bf16 model's weights: the model computes, these learn.

    An update smaller than bf16's spacing would be lost in the model itself. Muon moves the matrices inside
    the layers, AdamW the tied embedding and the norms.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.named = {name: p.detach().clone().float() for name, p in model.named_parameters()}
        self.weights = list(self.named.values())
        model.to(torch.bfloat16)
        hidden = [w for name, w in self.named.items() if w.ndim == 2 and "embed" not in name]
        rest = [w for name, w in self.named.items() if w.ndim != 2 or "embed" in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def add_gradients(self) -> None:
        """Move the model's bf16 gradients into the fp32 sums."""
        for weight, p in zip(self.weights, self.model.parameters(), strict=True):
            gradient = p.grad.float()
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
            p.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all weights at this share (0 to 1) of the peak rates."""
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, peak in zip(self.optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the model the weights as they are now."""
        for weight, p in zip(self.weights, self.model.parameters(), strict=True):
            p.copy_(weight)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Everything that training goes on from, as safetensors; `about` must be JSON."""
        tensors = {f"weight.{name}": weight for name, weight in self.named.items()}
        for kind, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{kind}.{index}.{name}"] = torch.as_tensor(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in tensors.items()}, whole, {"about": json.dumps(about)})
        whole.replace(path)  # a run that is killed here leaves the state before

    @torch.no_grad()
    def load(self, path: Path) -> dict[str, Any]:
        """Undo `save`; gives `about` back."""
        with safe_open(path, "pt", device=str(self.weights[0].device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 # it is no mapping
            about: dict[str, Any] = json.loads(file.metadata()["about"])
        for name, weight in self.named.items():
            weight.copy_(tensors[f"weight.{name}"])
        for kind, optimizer in enumerate(self.optimizers):
            values = optimizer.state_dict()
            for key, tensor in tensors.items():
                if key.startswith(f"optimizer.{kind}."):
                    _, _, index, name = key.split(".")
                    values["state"].setdefault(int(index), {})[name] = tensor
            optimizer.load_state_dict(values)
        self.refresh()
        return about


def batches(documents: Documents, plan: Plan, device: str, first_step: int) -> Iterator[torch.Tensor]:
    """The windows of each step from `first_step` (from 0) on, int64 [batch, CONTEXT + 1], on the device."""
    offsets = torch.arange(CONTEXT + 1, device=device)
    windows = training_windows(documents, CONTEXT, max(1, plan.tokens_per_step // CONTEXT), plan.seed)
    latest: np.ndarray | None = None
    stream: torch.Tensor | None = None
    for step, (laid, starts) in enumerate(windows):
        if laid is not None:
            latest, stream = laid, None
        if step < first_step:
            continue
        if stream is None:
            stream = torch.from_numpy(latest).to(device)
        yield stream[torch.from_numpy(starts).to(device)[:, None] + offsets].long()


def compiled(model: LlamaForCausalLM, windows: torch.Tensor, wanted: bool) -> Loss:
    """The loss, compiled; plain, said aloud, where this machine cannot compile it."""
    if not wanted:
        return loss_of
    fast: Loss = torch.compile(loss_of, dynamic=False)
    started = time.monotonic()
    try:
        fast(model, windows).backward()
    except Exception as error:  # a missing compiler, an operation without a rule: dynamo's and Triton's own
        print(f"training: NOT compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        fast = loss_of
    else:
        print(f"training: compiled in {time.monotonic() - started:.0f} s", flush=True)
    model.zero_grad(set_to_none=True)
    return fast


def train(
    master: MasterWeights,
    documents: Documents,
    plan: Plan,
    *,
    device: str,
    compile_it: bool,
    state: Path | None,
    resume: bool,
) -> Loss:
    """Train to the end of the plan. Returns the loss, as it was compiled."""
    step, total = 0, plan.steps
    if resume and state is not None and state.exists():
        about = master.load(state)
        step, total = about["step"], about["total"]
        print(f"training: goes on after step {step} of {total}", flush=True)
    feed = batches(documents, plan, device, step)
    rows = max(1, plan.tokens_per_pass // CONTEXT)
    probe = torch.zeros(min(rows, max(1, plan.tokens_per_step // CONTEXT)), CONTEXT + 1, dtype=torch.long)
    loss_fn = compiled(master.model, probe.to(device), compile_it)
    first, started = step, time.monotonic()
    reported, timed, losses = started, started, []
    while total is None or step < total:
        windows = next(feed)
        for part in windows.split(rows):
            loss = loss_fn(master.model, part)
            (loss * len(part) / len(windows)).backward()
            master.add_gradients()
        losses.append(loss.detach())
        master.step(rate_at(step, total))
        step += 1
        if step - first == TIMED_STEPS[0]:
            losses[-1].item()  # waits for the device
            timed = time.monotonic()
        if total is None and step - first == TIMED_STEPS[1]:
            losses[-1].item()
            each = (time.monotonic() - timed) / (TIMED_STEPS[1] - TIMED_STEPS[0])
            total = max(step + 1, step + int((plan.deadline - time.monotonic()) / (1.02 * each)))
            print(f"training: {each * 1e3:.1f} ms a step: --steps {total}", flush=True)
        if time.monotonic() - reported > plan.report_every or step == total:
            reported = time.monotonic()
            recent = torch.stack(losses[-50:]).mean().item()
            seen = step * plan.tokens_per_step
            rate = (step - first) * plan.tokens_per_step / (time.monotonic() - started)
            print(
                f"step {step}: {seen:,} tokens, {rate:,.0f}/s, training {recent:.4f} nats/token", flush=True
            )
            if not math.isfinite(recent):
                raise SystemExit("training: the loss is no number. Fix: a lower rate, another --seed")
            losses = losses[-50:]
            if state is not None and total is not None:
                master.save(state, {"step": step, "total": total})
    return loss_fn


def rate_at(step: int, total: int | None) -> float:
    """The share of the peak rate: up over the first steps, then in a straight line to zero at the end."""
    warm_up = min(WARM_UP_STEPS, max(1, (total or 10**9) // 10))
    left = 1.0 if total is None else (total - step) / total
    return min((step + 1) / warm_up, left)
