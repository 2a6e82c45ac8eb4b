"""Requests in, tokens out: the engine over a model on pages.

params.py      SamplingParams, BeamSearchParams: what a caller asks for
admission.py   which prompts and parameters can be served at all
encodings.py   what tokenizers, NumPy and torch hand over, as lists of token ids
defaults.py    what a model's generation_config says of parameters left unset
intake.py      from prompts and parameters to requests
chat.py        conversations to prompts, by the tokenizer's chat template
request.py     a request, and what comes back from it
reader.py      what a caller's requests have gained, and who is woken for it
beams.py       beam search: a request whose sequences fork and are given up
sequence.py    one text of a request: its tokens, and how many are in pages
scheduler.py   who runs in the next step, and on whose pages
hits.py        what of a request is in pages already
audit.py       whether the pages of a step are those that its sequences computed
runner.py      what runs, packed into one forward
logits.py      what changes logits: penalties, bias, a caller's functions, masks
sampler.py     how a token is drawn
logprobs.py    how likely tokens were
text.py        tokens to text, while they come
launch.py      a step on its way, and whether the next may be launched before it has ended
stats.py       what an engine has done, in numbers
snapshot.py    the pool and the queue at a moment: who owns which pages
picture.py     ... in SVG
rates.py       how fast it was of late
trace.py       steps by their parts, in a file for Perfetto
turns.py       engines on one model: one at a time, and pages for the oldest
core.py        Engine: add_request and step, generate and stream, over all of these
llm.py         LLM: an Engine that loads its model
async_llm.py   AsyncLLM: an Engine for coroutines
"""

from quire.engine.async_llm import Answer, AsyncLLM
from quire.engine.core import Engine
from quire.engine.llm import LLM
from quire.engine.logprobs import Logprob
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.engine.request import CompletionOutput, Delta, RequestOutput
from quire.engine.snapshot import Snapshot
from quire.engine.stats import EngineStats

__all__ = [
    "LLM",
    "Answer",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "Delta",
    "Engine",
    "EngineStats",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "Snapshot",
]
