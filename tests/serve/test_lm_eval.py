"""lm-eval-harness' completions client answers a small task over the server, as over the engine itself."""

from __future__ import annotations

import json
import os

import pytest
from tokenizers import AddedToken

from quire.engine import SamplingParams

from .conftest import make_engine, serving

QUESTIONS = [
    {"question": f"Q{i}: which letter?\nA:", "choices": [" alpha", " beta", " gamma"], "answer": i % 3}
    for i in range(4)
]


def scores(engine, question) -> list[float]:
    """The logprob of each choice behind its question, by the engine alone."""
    prompt = question["question"].encode()
    texts = [list(prompt + choice.encode()) for choice in question["choices"]]
    outputs = engine.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    return [
        sum(next(iter(each.values())).logprob for each in output.prompt_logprobs[len(prompt) :])
        for output in outputs
    ]


def test_a_task_of_choices_and_one_of_texts_come_out_as_by_the_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    engine = make_engine()
    engine.tokenizer.add_special_tokens({"eos_token": AddedToken("<eos>", special=True)})
    engine.tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "questions.json"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "doc_to_text": "{{question}}", "target_delimiter": "",
    }  # fmt: skip
    tasks = [
        {
            **common, "task": "choices", "output_type": "multiple_choice", "doc_to_choice": "choices",
            "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
        },
        {
            **common, "task": "texts", "output_type": "generate_until", "doc_to_target": "{{question}}",
            "generation_kwargs": {"until": ["q"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]  # fmt: skip
    with serving(engine) as running:
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "tiny", "base_url": f"{running.url}/v1/completions", "num_concurrent": 2, "batch_size": 2,
                "tokenizer": str(tmp_path / "tokenizer"), "max_length": 300, "max_retries": 1,
            },
            tasks=tasks, bootstrap_iters=0, log_samples=True, verbosity="ERROR",
        )  # fmt: skip
        running.check_idle()
    for sample in found["samples"]["choices"]:
        expected = scores(engine, sample["doc"])
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-4)
    best = [max(range(3), key=scores(engine, each).__getitem__) == each["answer"] for each in QUESTIONS]
    assert found["results"]["choices"]["acc,none"] == sum(best) / 4
    for sample in found["samples"]["texts"]:
        [output] = engine.generate(sample["doc"]["question"], SamplingParams(max_tokens=12, stop="q"))
        assert sample["filtered_resps"] == [output.text]
