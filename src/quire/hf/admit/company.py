"""Finds out whether a model's rows have the same bits alone and in company, and makes them so.

invariant_forwards   which modules call operators that mix rows, and forwards for them that do not
rehearse_company     texts alone, and the same texts together in chunks and single tokens: the same bits
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from quire.hf.admit.rehearsal import Stage, grow_texts, new_tokens
from quire.hf.forward import PackedForward
from quire.hf.invariant import SameBits, Unproven, linear, refusal, replacement

Forward = Callable[..., Any]
_LISTENING = "quire_listening"
# Modules of these, if they call one operator, do nothing else.
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
# Numbers of tokens for which models are known to take different ways.
_TOKENS = (1, 2, 9)


def invariant_forwards(
    forward: PackedForward, input_ids: torch.Tensor
) -> list[tuple[torch.nn.Module, Forward]]:
    """The modules that call operators whose rows depend on one another, each with a forward that replaces them.

    Args:
        input_ids: int64, at least 9 plain tokens.
    Raises:
        UnsupportedError: an operator that is neither known to be invariant nor replaced.
    Cost: three forwards of a few tokens.
    """
    listener = _Listener()
    with _heard(forward.model, listener):
        for tokens in _TOKENS:
            positions = torch.arange(tokens)
            with listener:
                forward.packed(input_ids[:tokens], positions, positions, _LISTENING)
    return [
        (module, _forward_for(module, calls, listener.runs[module]))
        for module, calls in listener.calls.items()
        if any(calls)
    ]


def rehearse_company(stage: Stage, texts: torch.Tensor) -> str | None:
    """Serve two texts alone and whole, then together in chunks and single tokens.

    Args:
        texts: int64 [2, tokens], at least 6.
    Returns:
        A sentence about a token whose logits have other bits, or None.
    Cost: six forwards of at most 70 tokens.
    """
    length = texts.shape[1]
    alone = [grow_texts(stage, text[None], [(length,)])[0] for text in texts]
    for row, together in enumerate(grow_texts(stage, texts, new_tokens(length))):
        same = (together == alone[row]).all(-1)
        if not same.all():
            token = int((~same).nonzero()[0])
            off = float((together[token] - alone[row][token]).abs().max())
            return f"logits of token {token} that differ by {off:.2g} alone and in company"
    return None


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, by the innermost module that runs, what each call of an operator is replaced by.

    Attributes:
        path: the modules that run, outermost first.
        runs: how often each has run.
        calls: of each module, the replacements, with the arguments behind the first; None where there is none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path: list[torch.nn.Module] = []
        self.runs: Counter[torch.nn.Module] = Counter()
        self.calls: dict[torch.nn.Module, list[Forward | None]] = defaultdict(list)

    def enter(self, module: torch.nn.Module, _: Any) -> None:
        """A hook: a module begins to run."""
        self.path.append(module)
        self.runs[module] += 1

    def leave(self, *_: Any) -> None:
        """A hook: it ends, or fails."""
        self.path.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.path:  # before and behind the model
            return func(*args, **kwargs)
        module = self.path[-1]
        try:
            chosen = replacement(func, args, kwargs)
        except Unproven as error:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is NotImplemented:
                raise refusal(str(error), f" in {type(module).__name__}") from None
            return parts
        operator: Forward = func if chosen is None else chosen
        # Of an operator with one argument, all that is left to know is that argument.
        noted = partial(operator, **kwargs) if len(args) == 1 and chosen is not None else chosen
        self.calls[module].append(noted)
        return operator(*args, **kwargs)


@contextmanager
def _heard(model: torch.nn.Module, listener: _Listener) -> Iterator[None]:
    """Let a listener know which module runs."""
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(listener.enter, prepend=True))
        hooks.append(module.register_forward_hook(listener.leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _forward_for(module: torch.nn.Module, calls: list[Forward | None], runs: int) -> Forward:
    """A forward that replaces operators: without looking at each call where all there is to do is known."""
    replaced = "forward" in vars(module)
    if type(module) is torch.nn.Linear and not replaced:
        return _linear_forward(module)
    if (
        type(module).__module__ in _ACTIVATIONS
        and not replaced
        and len(calls) == runs
        and isinstance(calls[0], partial)
    ):
        return calls[0]
    return _replacing(module.forward)


def _linear_forward(layer: torch.nn.Linear) -> Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if type(layer.weight) is not torch.nn.Parameter:
            raise refusal(f"a weight of type {type(layer.weight).__name__}")
        return linear(x, layer.weight, layer.bias)

    return forward


def _replacing(own: Forward) -> Forward:
    same_bits = SameBits()  # type: ignore[no-untyped-call]

    def forward(*args: Any, **kwargs: Any) -> Any:
        with same_bits:
            return own(*args, **kwargs)

    return forward


def _attend_to_nothing(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(_LISTENING, _attend_to_nothing)
