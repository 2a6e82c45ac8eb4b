"""Requests in, tokens out: the engine over a model on pages.

request.py     SamplingParams, Request, Delta, RequestOutput
admission.py   which prompts can be served at all
scheduler.py   who runs in the next step, and on whose pages
runner.py      what runs, packed into one forward
sampler.py     logits to tokens
text.py        tokens to text, while they come
core.py        Engine: the loop over these
llm.py         LLM: the loop, with loading, generate and stream
"""

from quire.engine.core import Engine, EngineStats
from quire.engine.llm import LLM
from quire.engine.request import Delta, RequestOutput, SamplingParams

__all__ = ["LLM", "Delta", "Engine", "EngineStats", "RequestOutput", "SamplingParams"]
