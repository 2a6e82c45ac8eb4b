"""openvino-genai, end to end, in its own environment. Run by benchmarks/foreign.py.

The model is exported once by optimum-intel into a folder beside it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from wire import Answer, serve


def load(request: dict[str, Any]) -> tuple[Answer, Any]:
    """A continuous batching pipeline in the request's precision, and its texts for the prompts."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    folder = export(Path(request["folder"]), request["dtype"])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.enable_prefix_caching = False  # the rounds repeat the same prompts: each has to read them
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[request["dtype"]]
    properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = request["max_tokens"], True, False
    config.set_eos_token_id(0)  # it insists on one, to be ignored
    prompts = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in request["prompts"]]

    def turn() -> Answer:
        begin = time.perf_counter()
        results = pipeline.generate(prompts, [config] * len(prompts))
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "tokens": [list(map(int, result.m_generation_ids[0])) for result in results],
        }

    turn()
    return turn() | {"versions": f"openvino-genai {genai.__version__.split('-')[0]}"}, turn


def export(folder: Path, dtype: str) -> Path:
    """The model as OpenVINO reads it; exported only where that was not done before."""
    exported = folder.with_name(folder.name + f"-openvino-{dtype}")
    if not (exported / "openvino_model.xml").exists():
        from optimum.exporters.openvino import main_export

        precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
        from optimum.intel import OVConfig

        main_export(
            str(folder), exported, task="text-generation-with-past", ov_config=OVConfig(dtype=precision)
        )
    return exported


if __name__ == "__main__":
    serve(load)
