"""A folder becomes a model, or one sentence that says why it does not."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import ModelError, QuireError
from quire.hf import PagedModel
from quire.hf.load import load_model

from .families import random_texts, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def refusal(path):
    with pytest.raises(ModelError) as raised:
        load_model(path, torch.float32, "cpu")
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert "Fix: " in sentence
    return sentence


def test_a_saved_model_comes_back_as_it_was_and_in_eval_mode(folder):
    text = random_texts()["a"][None]
    loaded = load_model(folder, torch.float32, "cpu")
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded(text).logits, tiny_model("llama")(text).logits)


def test_the_dtype_asked_for_is_the_dtype_loaded(folder):
    assert load_model(folder, torch.bfloat16, "cpu").dtype == torch.bfloat16


def test_paged_model_loads_a_folder(folder):
    paged = PagedModel.load(folder, page_size=4, num_pages=3, backend="reference")
    assert (paged.num_pages, paged.dtype, paged.device.type) == (3, torch.float32, "cpu")


def test_no_folder(tmp_path):
    assert "model must be a folder" in refusal(tmp_path / "nowhere")
    assert "model must be a folder" in refusal("meta-llama/Llama-3.2-1B")  # a name is not downloaded


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "must hold config.json" in refusal(folder)


def test_weights_in_a_pickle_are_never_opened(folder):
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (folder.joinpath("went_off").touch, ())

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "*.safetensors" in refusal(folder)
    assert not (folder / "went_off").exists()


@pytest.mark.parametrize(
    "config", ["", "not json", "[]", "{}", '{"model_type": "no_such_type"}', '{"model_type": "vit"}']
)
def test_a_config_of_no_language_model(folder, config):
    (folder / "config.json").write_text(config)
    assert "causal language model" in refusal(folder)


def test_code_in_the_folder_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="custom", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    refusal(folder)


def test_weights_that_are_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "causal language model" in refusal(folder)


def test_a_missing_weight_is_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing or misshapen, first model.layers.1.self_attn.q_proj.weight" in refusal(folder)


def test_a_weight_of_the_wrong_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing or misshapen, first model.norm.weight" in refusal(folder)


def test_an_encoder_decoder_folder_is_refused_too(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=32)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(QuireError):
        PagedModel.load(tmp_path)
