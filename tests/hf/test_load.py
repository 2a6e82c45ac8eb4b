"""A folder becomes a model, or one sentence that says why it does not."""

from __future__ import annotations

import json
import pickle
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import DeviceError, DtypeError, ModelError, QuireError, UnsupportedError
from quire.hf import PagedModel
from quire.hf.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, find_checkpoint
from quire.hf.load import load_checkpoint, load_model

from .families import random_texts, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def refusal(path, kind=ModelError):
    with pytest.raises(kind) as raised:
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


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("asked", [None, "auto"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_checkpoints_own_where_none_is_asked_for(tmp_path, kind, asked):
    tiny_model("llama").to(getattr(torch, kind)).save_pretrained(tmp_path)
    assert load_model(tmp_path, asked, "cpu").dtype == getattr(torch, kind)
    edit_config(tmp_path, dtype="bfloat16")  # what the config says counts, then the weights
    assert load_model(tmp_path, asked, "cpu").dtype == torch.bfloat16
    edit_config(tmp_path, dtype=None)
    assert load_model(tmp_path, asked, "cpu").dtype == getattr(torch, kind)


@pytest.mark.parametrize("asked", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_named(folder, asked):
    assert load_model(folder, asked, "cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("asked", ["float8", torch.float64, "int8", 16])
def test_a_dtype_that_pages_are_not_computed_in_is_refused(folder, asked):
    with pytest.raises(DtypeError, match=r"dtype must be 'auto' or one of .* Fix: dtype='auto'"):
        load_model(folder, asked, "cpu")


def test_a_checkpoint_of_another_dtype_is_refused_unless_one_is_asked_for(folder):
    edit_config(folder, dtype="float64")
    with pytest.raises(DtypeError, match=r"must be of .*; got torch.float64"):
        load_model(folder, None, "cpu")
    assert load_model(folder, torch.float32, "cpu").dtype == torch.float32


def test_the_device_is_a_gpu_where_there_is_one_unless_another_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_checkpoint(find_checkpoint(folder)).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def existing_device(device):
        asked.append(device)
        return torch.device("cpu")

    monkeypatch.setattr("quire.hf.load.existing_device", existing_device)
    load_checkpoint(find_checkpoint(folder))
    load_checkpoint(find_checkpoint(folder), device="cpu")
    assert asked == ["cuda", "cpu"]


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(DeviceError):
        load_checkpoint(Checkpoint("x", tmp_path), device="vulkan:3")


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


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "mystery", "bits": 4}}, "of a method .*; got 'mystery'"),
        ({"quantization_config": {"bits": 4}}, "of a method .*; got None"),
        ({"quantization_config": "int4"}, "of a method .*; got None"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "of a method .*; got 'mlx'"),
        (
            {"text_config": {"quantization_config": {"quant_method": "mystery"}}},
            "of a method .*; got 'mystery'",
        ),
        (
            {"quantization_config": {"quant_method": "quanto"}},
            "quantised by 'quanto', must be loadable",
        ),
        (
            {"quantization_config": {"load_in_4bit": True}},
            "quantised by 'bitsandbytes_4bit', must be loadable",
        ),
    ],
)
def test_quantised_weights_that_cannot_be_loaded_are_refused(folder, config, said):
    edit_config(folder, **config)
    assert re.search(said, refusal(folder, UnsupportedError))


def quantise_in_fp8(folder, **config):
    """Weights of linear layers as float8 with one scale each, as the checkpoints of the "fp8" method have them."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "_proj" in name]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, **config)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_quantised_weights_are_those_of_the_model_where_transformers_can_load_them(folder):
    pytest.importorskip("accelerate")  # which brings peft, too
    exact = load_model(folder, torch.float32, "cpu").model.layers[0].mlp.up_proj.weight
    quantise_in_fp8(folder, quantization_config=FP8)
    loaded = load_model(folder, torch.float32, "cpu")
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert 0 < (weight - exact).abs().max() <= exact.abs().max() / 16
    assert PagedModel(loaded, num_pages=4, backend="reference").num_pages == 4


def test_scales_that_no_config_names_are_not_passed_over(folder):
    quantise_in_fp8(folder)
    assert "got 28 of quantised layers or adapters that nothing takes" in refusal(folder, UnsupportedError)


def test_an_adapter_inside_the_weights_is_not_passed_over(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "got 1 of quantised layers or adapters" in refusal(folder, UnsupportedError)


def test_without_peft_an_adapter_is_refused_with_how_to_install_it(folder, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(ModelError, match=f"must hold its weights as {ADAPTER_WEIGHTS}"):
        load_checkpoint(find_checkpoint(adapter))
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match=f"must hold its weights as {ADAPTER_WEIGHTS}"):
        load_checkpoint(find_checkpoint(adapter))
    save_file({"x": torch.ones(1)}, adapter / ADAPTER_WEIGHTS)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedError, match=r"needs peft, which is not installed. Fix: pip install"):
        load_checkpoint(find_checkpoint(adapter))


def save_adapter(folder, adapter, kind, **options):
    """A random adapter of the model in a folder; the logits of both together."""
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(
        load_model(folder, torch.float32, "cpu"), getattr(peft, kind)(**options)
    ).eval()
    model.peft_config["default"].base_model_name_or_path = str(folder)
    with torch.inference_mode():
        logits = model(random_texts()["a"][None]).logits
    model.save_pretrained(adapter)
    return logits


LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
IA3 = {
    "target_modules": ["k_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
    "init_ia3_weights": False,
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoraConfig", LORA),
        ("LoraConfig", LORA | {"modules_to_save": ["lm_head"], "use_dora": True}),
        ("IA3Config", IA3),
    ],
)
def test_an_adapter_is_merged_into_its_model(folder, tmp_path, kind, options):
    pytest.importorskip("peft")
    text = random_texts()["a"][None]
    wanted = save_adapter(folder, tmp_path / "adapter", kind, **options)
    model = load_checkpoint(find_checkpoint(tmp_path / "adapter"))
    with torch.inference_mode():
        plain = load_model(folder, torch.float32, "cpu")(text).logits
        torch.testing.assert_close(model(text).logits, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - plain).abs().max() > 1e-2, "the adapter changes nothing"
    assert type(model) is type(tiny_model("llama"))
    assert PagedModel.load(tmp_path / "adapter", num_pages=4, backend="reference").num_pages == 4


def test_an_adapter_that_peft_cannot_merge_is_refused(folder, tmp_path):
    pytest.importorskip("peft")
    save_adapter(
        folder, tmp_path / "adapter", "PromptTuningConfig", num_virtual_tokens=3, task_type="CAUSAL_LM"
    )
    with pytest.raises(UnsupportedError, match="must be one that peft can merge into a LlamaForCausalLM"):
        load_checkpoint(find_checkpoint(tmp_path / "adapter"))


def test_an_adapter_that_fits_in_part_is_refused(folder, tmp_path):
    pytest.importorskip("peft")
    save_adapter(folder, tmp_path / "adapter", "LoraConfig", **LORA)
    weights = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    name = next(name for name in weights if "layers.0" in name)
    for changed in ({name.replace("layers.0", "layers.7"): weights[name].clone()}, {name: None}):
        kept = {key: value for key, value in (weights | changed).items() if value is not None}
        save_file(kept, tmp_path / "adapter" / ADAPTER_WEIGHTS)
        with pytest.raises(ModelError, match="got 1 that are missing or that nothing takes, first"):
            load_checkpoint(find_checkpoint(tmp_path / "adapter"))


def test_an_encoder_decoder_folder_is_refused_too(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=32)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(QuireError):
        PagedModel.load(tmp_path)
