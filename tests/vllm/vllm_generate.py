"""A program: one model inside vLLM, greedily, and what it generated as a line of JSON.

Run by vLLM's Python with one argument, a JSON object of ``Job``'s fields. It is a process of its own for each job,
because vLLM chooses its backend once in a process.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass, field
from typing import Any

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class Job:
    """What to run: ``broken`` is a defect to put into Quire's layers, for the negative controls."""

    model: str
    quire: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    shared: int = 0  # tokens that all prompts begin with
    rounds: int = 1
    tokens: int = 48
    broken: str = ""


def break_layers(how: str) -> None:
    """Give every layer a defect that a right test must see."""
    from quire.vllm import backend

    made = backend.QuireCPUImpl.__init__

    def init(self: Any, *args: Any, **named: Any) -> None:
        made(self, *args, **named)
        if how == "window" and self.kind.window_left >= 0:
            self.kind = self.kind._replace(window_left=self.kind.window_left + 1)
        elif how == "softcap":
            self.softcap = 0.0
        elif how == "alibi":
            self.alibi_slopes = None

    backend.QuireCPUImpl.__init__ = init


def count_calls() -> dict[str, int]:
    """How often Quire's layers are run from now on."""
    from quire.vllm import backend

    calls = {"runs": 0}
    forward = backend.QuireCPUImpl.forward

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        calls["runs"] += 1
        return forward(self, *args, **named)

    backend.QuireCPUImpl.forward = counted
    return calls


def main(job: Job) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    calls = count_calls() if job.quire else {}
    if job.broken:
        break_layers(job.broken)
    rng = random.Random(0)
    head = [rng.randrange(3, 1000) for _ in range(job.shared)]
    prompts = [{"prompt_token_ids": head + [rng.randrange(3, 1000) for _ in range(n)]} for n in LENGTHS]
    options: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "enable_prefix_caching": False,
        "max_num_batched_tokens": 1024, "max_num_seqs": 8, **job.options,
    }  # fmt: skip
    llm = LLM(job.model, skip_tokenizer_init=True, disable_log_stats=False, **options)
    params = SamplingParams(
        temperature=0, max_tokens=job.tokens, ignore_eos=True, detokenize=False, logprobs=1
    )
    for _ in range(job.rounds):
        results = llm.generate(prompts, params, use_tqdm=False)
    first = [result.outputs[0] for result in results]
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "tokens": [list(output.token_ids) for output in first],
        "logprobs": [[next(iter(step.values())).logprob for step in output.logprobs] for output in first],
        "cached": [result.num_cached_tokens for result in results],
        "preemptions": metrics.get("vllm:num_preemptions"),
        **calls,
    }


if __name__ == "__main__":
    chosen = Job(**json.loads(sys.argv[1]))
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1",
        QUIRE_VLLM=str(int(chosen.quire)),
    )  # fmt: skip
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    print(json.dumps(main(chosen)), file=answers, flush=True)
