"""Everything that Quire changes in a model, and only while it runs.

    the attention its configs name       always
    the `forward` of its linear layers   where Quire's kernel serves a step
    the `forward` of its decoder         where that is compiled
    the `forward` of any module          where it is to be batch-invariant, in place of the other two

`Switches.run` is the one place that changes a model and the one that changes it back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any
from weakref import WeakSet

import torch
from transformers import PretrainedConfig, PreTrainedModel

from quire.errors import UnsupportedError
from quire.hf.compiled import CompiledDecoder
from quire.hf.linear import own_forward

# Every module reads this from its config at each call. `set_attn_implementation` would walk all modules at every
# step; what it checks, the guard finds out.
_ATTENTION = "_attn_implementation_internal"
_Change = tuple[dict[str, Any], str, Any]  # whose attributes, which, and what it becomes


class Switches:
    """Calls a model with another attention, and with forwards of Quire's; between calls it is the ordinary model.

    Threads take turns: all Switches of a model have the same lock, also those of two models that share a config, a
    linear layer or a decoder when their Switches are made. Linear layers of a subclass, and those with a forward of
    their own at the time of a call, are left alone.

    Args:
        model: its configs, linear layers and decoder are looked up once, here.
        compile: make a compiled forward of its decoder.
        batch_invariant: calls with kernels take the forwards of `keep_bits`, and no others.
    Attributes:
        lock: held while the model is changed; the thread that holds it may call `run`.
        parts: what a call may change, by id.
    Raises:
        UnsupportedError: the model cannot be compiled as asked, or shares parts with two models in use whose
            steps may run at the same time.
    """

    def __init__(
        self, model: PreTrainedModel, *, compile: bool = False, batch_invariant: bool = False
    ) -> None:
        self._model, self._batch_invariant = model, batch_invariant
        modules = list(model.modules())
        holders = (getattr(module, "config", None) for module in modules)
        configs = list({id(c): c for c in holders if isinstance(c, PretrainedConfig)}.values())
        linears = [m for m in modules if type(m) is torch.nn.Linear and m.weight.device.type == "cpu"]
        patched = (*configs, *(modules if batch_invariant else linears), model.get_decoder() or model)
        self.parts: dict[int, Any] = {
            id(part): part for part in patched
        }  # kept, so that each id stays its own
        self.lock = _share_lock(self)
        self._configs = [vars(config) for config in configs]
        self._linears = [(vars(layer), own_forward(layer)) for layer in linears]
        self._invariant: list[tuple[torch.nn.Module, Callable[..., Any], Any]] = []
        with self.lock:  # the forward to be compiled is the model's own
            self._compiled = CompiledDecoder(model) if compile else None

    def keep_bits(self, forwards: Iterable[tuple[torch.nn.Module, Callable[..., Any]]]) -> None:
        """Let calls with kernels take these forwards, by which a row keeps its bits in any company."""
        self._invariant = [(module, forward, vars(module).get("forward")) for module, forward in forwards]

    def run(
        self, attention: str, inputs: dict[str, Any], *, kernels: bool = False, compiled: bool = False
    ) -> Any:
        """Call the model; whatever happens, it is left as it was found.

        Args:
            attention: the registered name of the attention its layers call.
            inputs: keyword arguments of the model.
            kernels: linear layers take Quire's kernel for as many tokens as it is faster for; of a model that is to be
                batch-invariant, modules take the forwards of `keep_bits`.
            compiled: the decoder runs compiled.
        Raises:
            UnsupportedError: the compiled decoder is not the model's any more, or a module that keeps its bits has
                been given another forward.
        """
        with self.lock:
            changes: list[_Change] = [(attributes, _ATTENTION, attention) for attributes in self._configs]
            if kernels and self._batch_invariant:
                changes += [_change_of(*each) for each in self._invariant]
            elif kernels:
                changes += [(layer, "forward", f) for layer, f in self._linears if "forward" not in layer]
            if compiled and self._compiled is not None:
                self._compiled.check_current()
                changes.append((vars(self._compiled.decoder), "forward", self._compiled.forward))
            undo = _restoring(changes)
            try:
                for attributes, name, value in changes:
                    attributes[name] = value
                return self._model(**inputs)
            finally:
                # One call that runs no Python: a signal, such as Ctrl-C, is dealt with before or after it.
                deque(undo, maxlen=0)


def _change_of(module: torch.nn.Module, forward: Callable[..., Any], present: Any) -> _Change:
    attributes = vars(module)
    if attributes.get("forward") is not present:
        raise UnsupportedError(
            f"a batch-invariant model must keep its forwards; got another one of a {type(module).__name__}. "
            "Fix: make a new PagedModel after changing the model"
        )
    return attributes, "forward", forward


def _restoring(changes: list[_Change]) -> chain[Any]:
    """An iterator that gives every attribute its present value again, or takes it away, as it is advanced."""
    present = [
        (attributes, {name: attributes[name]}) for attributes, name, _ in changes if name in attributes
    ]
    absent = [(attributes, name) for attributes, name, _ in changes if name not in attributes]
    return chain(
        map(dict.update, [a for a, _ in present], [before for _, before in present]),
        map(dict.pop, [a for a, _ in absent], [name for _, name in absent], repeat(None)),
    )


_registry_lock = threading.Lock()
_in_use: WeakSet[Switches] = WeakSet()


def _share_lock(new: Switches) -> threading.RLock:
    """The lock of those Switches in use that may change the same parts, or a new one."""
    with _registry_lock:
        locks = {id(s.lock): s.lock for s in _in_use if s.parts.keys() & new.parts.keys()}
        if len(locks) > 1:
            raise UnsupportedError(
                "a model may share configs and layers with one other model on pages, or with several that share "
                f"them among each other; got {len(locks)} that do not. Fix: make the PagedModel of this model first"
            )
        lock = next(iter(locks.values()), None) or threading.RLock()
        new.lock = lock
        _in_use.add(new)
        return lock
