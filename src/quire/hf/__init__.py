"""Hugging Face models, unmodified, on pages.

step.py        one packed forward, as plain tensors
model.py       PagedModel: load, forward, copy_pages
forward.py     one call of the model, on a packed step or as anyone would
attention.py   the attention function models call, and the step it reads
planners.py    a Planner per kind of layer
chunks.py      Llama-4's chunks as virtual sequences
cache.py       one pool per shape of layer
switches.py    every change of a model, and its lock
linear.py      a linear layer of a few tokens: the model's own weight, read once
compiled.py    a model's decoder compiled by torch around Quire's operators
limits.py      how long a sequence may become
checkpoint.py  a folder, or an id of the Hugging Face hub → where the files are
load.py        where the files are → a model
adapter.py     a peft adapter, merged into the model
admit/         which models are served, and the rehearsal that proves it
"""

from quire.hf.model import PagedModel
from quire.hf.step import Step

__all__ = ["PagedModel", "Step"]
