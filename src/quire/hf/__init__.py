"""Hugging Face models, unmodified, on pages.

step.py        one packed forward, as plain tensors
model.py       PagedModel: load, forward, copy_pages
attention.py   the attention function models call, and the step it reads
linear.py      linear layers of a few tokens: the model's own weights, read once
compiled.py    the model's layers compiled by torch around Quire's operators
huge_pages.py  weights in huge pages
chunks.py      Llama-4's chunks as virtual sequences
cache.py       one pool per shape of layer
probe.py       what layers ask of attention, learned by a dry run
guard.py       what is refused, and why
limits.py      how long a sequence may become
load.py        a folder → a model
"""

from quire.hf.model import PagedModel
from quire.hf.step import Step

__all__ = ["PagedModel", "Step"]
