"""vLLM, end to end, in its own environment. Run by benchmarks/foreign.py."""

from __future__ import annotations

import time
from typing import Any

from wire import Answer, serve


def load(request: dict[str, Any]) -> tuple[Answer, Any]:
    """An engine over the model folder, and its texts for the prompts."""
    import torch
    import vllm

    engine = vllm.LLM(
        request["folder"],
        skip_tokenizer_init=True,
        dtype=request["dtype"],
        enforce_eager=request["eager"],
        max_model_len=request["max_length"],
        enable_prefix_caching=False,  # the rounds repeat the same prompts: each has to read them
        disable_log_stats=True,
        seed=0,
    )
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]

    def turn() -> Answer:
        begin = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    turn()
    return turn() | {"versions": f"vllm {vllm.__version__}, torch {torch.__version__}"}, turn


if __name__ == "__main__":
    serve(load)
