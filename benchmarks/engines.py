"""Who generates: Quire's engine, transformers' two ways, and engines of other environments.

An engine is a function from a job to something ready to take turns. Loading, compiling and a first generation
happen before; a turn is all prompts in, all tokens out. Prefix caches are off: the rounds repeat the same prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.foreign import Worker
from benchmarks.turns import Absent, Ready

Tokens = list[list[int]]


@dataclass
class Job:
    """One case on one model, and the texts seen so far.

    Attributes:
        model: its name in tables.
        pythons: interpreter of each foreign engine's environment; None where the user gave none.
        texts: by engine, every different result its turns gave: the gate judges them all.
    """

    model: str
    folder: Path
    prompts: list[list[int]]
    max_tokens: int
    dtype: str
    pythons: dict[str, Path | None] = field(default_factory=dict)
    texts: dict[str, list[Tokens]] = field(default_factory=dict)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.prompts)) + self.max_tokens

    def remember(self, engine: str, tokens: Tokens) -> None:
        """Keep a result for the gate."""
        seen = self.texts.setdefault(engine, [])
        if tokens not in seen:
            seen.append(tokens)


def quire_engine(name: str, job: Job) -> Ready:
    """quire.LLM, as it comes."""
    return _quire(name, job)


def quire_compiled(name: str, job: Job) -> Ready:
    """quire.LLM with the model's layers compiled by torch."""
    from quire import UnsupportedError

    try:
        return _quire(name, job, compile=True)
    except UnsupportedError as error:
        raise Absent(str(error)) from error


def quire_batch_invariant(name: str, job: Job) -> Ready:
    """quire.LLM whose logits have the same bits in any company."""
    return _quire(name, job, batch_invariant=True)


def padded_generate(name: str, job: Job) -> Ready:
    """model.generate on one batch, padded on the left, its cache contiguous."""
    model = _model(job)
    widest = max(map(len, job.prompts))
    input_ids = torch.tensor([[0] * (widest - len(prompt)) + prompt for prompt in job.prompts])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in job.prompts])

    def generate() -> Tokens:
        tokens = model.generate(
            input_ids, attention_mask=mask, max_new_tokens=job.max_tokens, do_sample=False
        )
        return tokens[:, widest:].tolist()

    return _local(name, job, generate)


def generate_batch(name: str, job: Job) -> Ready:
    """transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _model(job)
    config = GenerationConfig(max_new_tokens=job.max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=256, max_batch_tokens=512, allow_block_sharing=False
    )

    def generate() -> Tokens:
        outputs = model.generate_batch(job.prompts, config, continuous_batching_config=batching)
        if len(outputs) != len(job.prompts):
            raise RuntimeError("generate_batch lost requests")
        by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return [by_prompt[tuple(prompt)] for prompt in job.prompts]

    return _local(name, job, generate)


def vllm_eager(name: str, job: Job) -> Ready:
    """vLLM's CPU build without torch.compile."""
    return _vllm(name, job, eager=True)


def vllm_compiled(name: str, job: Job) -> Ready:
    """vLLM's CPU build as it comes, the model compiled."""
    return _vllm(name, job, eager=False)


def openvino(name: str, job: Job) -> Ready:
    """openvino-genai's continuous batching, computing and caching in the case's dtype."""
    return _foreign(name, job, Worker(job.pythons.get("openvino"), "openvino_engine.py"), _request(job))


ENGINES: dict[str, Callable[[str, Job], Ready]] = {
    "quire": quire_engine,
    "quire, compiled": quire_compiled,
    "quire, batch-invariant": quire_batch_invariant,
    "model.generate": padded_generate,
    "generate_batch": generate_batch,
    "vllm, eager": vllm_eager,
    "vllm, compiled": vllm_compiled,
    "openvino-genai": openvino,
}
ONLY_BY_NAME = ("quire, batch-invariant",)  # take part where --engines names them


def _quire(name: str, job: Job, **options: Any) -> Ready:
    import quire

    # The rounds repeat their prompts: found in pages, they would measure nothing.
    llm = quire.LLM(job.folder, dtype=getattr(torch, job.dtype), enable_prefix_caching=False, **options)
    params = quire.SamplingParams(max_tokens=job.max_tokens, ignore_eos=True)
    return _local(name, job, lambda: [o.token_ids for o in llm.generate(job.prompts, params, progress=False)])


def _local(name: str, job: Job, generate: Callable[[], Tokens]) -> Ready:
    def turn() -> float:
        begin = time.perf_counter()
        tokens = generate()
        seconds = time.perf_counter() - begin
        job.remember(name, tokens)
        return seconds

    turn()
    return Ready(job.texts[name], turn)


def _foreign(name: str, job: Job, worker: Worker, request: dict[str, Any]) -> Ready:
    answer = worker.load(name, request)
    job.remember(name, answer["tokens"])

    def turn() -> float:
        answer = worker.turn(name)
        job.remember(name, answer["tokens"])
        return float(answer["seconds"])

    return Ready(job.texts[name], turn, answer["versions"], worker.close)


def _vllm(name: str, job: Job, *, eager: bool) -> Ready:
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        # Left to itself it keeps a core for its scheduler's process, and computes on the rest: half of two cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    worker = Worker(job.pythons.get("vllm"), "vllm_engine.py", environment)
    return _foreign(name, job, worker, _request(job) | {"eager": eager})


def _request(job: Job) -> dict[str, Any]:
    fields = asdict(job)
    wanted = ("prompts", "max_tokens", "dtype")
    return {name: fields[name] for name in wanted} | {"folder": str(job.folder), "max_length": job.max_length}


def _model(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.dtype)).eval()
