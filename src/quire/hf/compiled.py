"""A model's layers compiled by torch around Quire's operators.

Between two matrix products a layer computes norms, rotations, gates and sums: two dozen small operators, each of
which reads and writes memory and costs Python time. Compiled, they are a few loops. Attention and the linear layers
stay operators that the compiler does not look into, so one graph serves every step. It is compiled once, for two or
more tokens; torch would compile again for a dimension of size one, so a single token is run twice.

The head stays outside: it runs on the wanted rows only, whose number would be a second dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from quire.errors import UnsupportedError

LEAST_TOKENS = 2


class CompiledDecoder:
    """A compiled `forward` for a model's decoder, all between the token ids and the head.

    Compiled on first use, which takes from seconds to a minute; torch caches the result on disk, and later
    processes need about half the time.

    Args:
        model: its decoder becomes one graph, with the `forward` that the decoder has now.
    Raises:
        UnsupportedError: the model has no decoder apart from its head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        if decoder is None or decoder is model:
            raise UnsupportedError(
                f"to be compiled, a model must have a decoder apart from its head; got "
                f"{model.config.model_type} without. Fix: compile=False"
            )
        self.decoder: torch.nn.Module = decoder
        self._own_forward = vars(decoder).get("forward")
        # A graph of one model must not count against another's, where torch can tell them apart.
        options: dict[str, Any] = (
            {"isolate_recompiles": True} if "isolate_recompiles" in _COMPILE_OPTIONS else {}
        )
        self._compiled: Callable[..., Any] = torch.compile(
            decoder.forward, fullgraph=True, dynamic=True, **options
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own.

        Raises:
            UnsupportedError: the decoder is no single graph, or there is no compiler.
        """
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _refusal(error) from error

    def check_current(self) -> None:
        """Refuse to run a graph of a `forward` that the decoder no longer has.

        Raises:
            UnsupportedError: someone has replaced it.
        """
        forward = vars(self.decoder).get("forward")
        is_compiled = isinstance(getattr(forward, "__self__", None), CompiledDecoder)
        if forward is not self._own_forward and not is_compiled:
            raise UnsupportedError(
                f"a compiled decoder must keep its forward; got {forward!r} in its place. "
                "Fix: make a new PagedModel after changing the model"
            )


_COMPILE_OPTIONS = inspect.signature(torch.compile).parameters


def _refusal(error: Exception) -> UnsupportedError:
    cause = getattr(error, "inner_exception", error)  # what a compiler raised, or torch's own objection
    reason = str(cause).strip().split("\n")[0]
    if "C++ compiler" in reason:
        return UnsupportedError(
            f"compile=True needs a C++ compiler; got {type(cause).__name__}: {reason}. "
            "Fix: install g++, or compile=False"
        )
    return UnsupportedError(
        f"to be compiled, a model must be one graph for torch.compile; got {type(cause).__name__}: {reason}. "
        "Fix: compile=False"
    )
