"""What a model is called → its folders: a folder, a snapshot in the cache, or a download, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from quire.errors import ArgumentError, ModelError, UnsupportedError
from quire.hf import checkpoint
from quire.hf.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, find_checkpoint

from .fake_hub import MAIN, OLD, cached, serving
from .families import tiny_model

ID = "someone/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_text(json.dumps({"name": name}))  # files of equal content are downloaded once
    return path


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache, as HF_HOME gives it, and the machine offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(home, monkeypatch):
    with serving() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def refusal(*arguments, kind=ModelError) -> str:
    with pytest.raises(kind) as raised:
        find_checkpoint(*arguments)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert "Fix: " in sentence
    return sentence


def test_a_folder_is_what_it_was(home, folder):
    assert find_checkpoint(folder) == Checkpoint(str(folder), folder)
    assert find_checkpoint(str(folder)).folder == folder


def test_a_snapshot_in_the_cache_is_found_offline_by_its_id(home, folder):
    snapshot = cached(home, ID, folder)
    assert find_checkpoint(ID) == Checkpoint(ID, snapshot)


def test_a_revision_finds_its_own_snapshot(home, folder):
    cached(home, ID, folder)
    old = cached(home, ID, folder, OLD, "old")
    assert find_checkpoint(ID, "old").folder == old
    assert find_checkpoint(ID, OLD).folder == old
    assert "at revision 'new' must be on this machine, as HF_HUB_OFFLINE is set" in refusal(ID, "new")


def test_a_folder_of_that_name_wins_over_the_id(home, folder):
    cached(home, ID, folder)
    Path(ID).mkdir(parents=True)
    assert find_checkpoint(ID) == Checkpoint(ID, Path(ID))
    said = refusal(ID, "main", kind=ArgumentError)
    assert "revision must be None, as 'someone/tiny' is a folder" in said


def test_a_path_is_never_an_id(home, folder):
    cached(home, ID, folder)
    assert "which is none" in refusal(Path(ID))


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./tiny", "a/b/c", "", "a b", "someone/tiny.", "../tiny"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused(home, name):
    assert "model must be a folder, or the id of a model" in refusal(name)


@pytest.mark.parametrize("revision", ["", 3, ["main"]])
def test_a_revision_is_a_text(home, revision):
    assert "revision must be None, or a branch" in refusal(ID, revision, kind=ArgumentError)


def test_offline_a_model_that_is_not_there_is_one_sentence(home):
    said = refusal(ID)
    assert "must be on this machine, as HF_HUB_OFFLINE is set" in said
    assert str(home / "hub") in said


def test_a_snapshot_that_lacks_weights_is_refused(home, folder):
    snapshot = cached(home, ID, folder)
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )
    assert "1 of 2 files missing" in refusal(ID)
    (snapshot / "model.safetensors").unlink()
    assert "must have its weights as *.safetensors" in refusal(ID)


OTHERS = {
    "pytorch_model.bin": b"a pickle",
    "modeling_tiny.py": b"code",
    "README.md": b"words",
    "consolidated.safetensors": b"the same weights",
    "onnx/model.json": b"{}",
    "original/model.safetensors": b"the same weights",
}


def test_the_files_that_are_needed_are_downloaded_once_and_no_others(hub, folder):
    hub.add(ID, folder, **OTHERS)
    found = find_checkpoint(ID)
    names = {path.name for path in folder.iterdir()}
    assert hub.downloaded() == names == {path.name for path in found.folder.iterdir()}
    for path in folder.iterdir():
        assert (found.folder / path.name).read_bytes() == path.read_bytes()
    hub.asked.clear()
    assert find_checkpoint(ID) == found
    assert hub.downloaded() == set()


def test_a_download_shows_its_progress_on_stderr(hub, folder, capfd):
    hub.add(ID, folder)
    find_checkpoint(ID)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


def test_a_revision_is_downloaded_where_it_is_asked_for(hub, folder, tmp_path):
    hub.add(ID, folder)
    hub.add(ID, folder, OLD, **{"config.json": b'{"old": 1}'})
    assert (find_checkpoint(ID, "old").folder / "config.json").read_bytes() == b'{"old": 1}'
    assert find_checkpoint(ID).folder.name == MAIN
    assert "must be a branch, tag or commit of someone/tiny; got 'new'" in refusal(ID, "new")


def test_a_snapshot_is_used_where_the_hub_does_not_answer(home, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert "as http://127.0.0.1:9 does not answer" in refusal(ID)
    snapshot = cached(home, ID, folder)
    assert find_checkpoint(ID).folder == snapshot


def test_an_unknown_and_a_gated_model_are_one_sentence(hub, folder):
    assert f"neither here nor on {hub.endpoint}" in refusal(ID)
    hub.add(ID, folder)
    hub.gated.add(ID)
    assert "gated" in refusal(ID)


def test_a_model_of_pickles_downloads_none_of_them(hub, tmp_path):
    (tmp_path / "pickles").mkdir()
    hub.add(ID, tmp_path / "pickles", **{"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    assert "must have its weights as *.safetensors, as no pickle is opened" in refusal(ID)
    assert hub.downloaded() == {"config.json"}


def test_a_folder_asks_nobody(hub, folder):
    from quire.engine.llm import load_tokenizer
    from quire.hf.load import load_checkpoint

    load_checkpoint(find_checkpoint(folder))
    with pytest.raises(ModelError, match="must hold a tokenizer"):
        load_tokenizer(folder)
    assert hub.asked == []


def make_adapter(path: Path, **config) -> Path:
    path.mkdir(parents=True)
    (path / ADAPTER_CONFIG).write_text(json.dumps(config))
    (path / ADAPTER_WEIGHTS).write_bytes(b"")
    return path


def test_an_adapter_brings_the_model_it_is_for_and_a_tokenizer_where_it_has_one(home, folder):
    adapter = make_adapter(home / "adapter", base_model_name_or_path=str(folder))
    found = find_checkpoint(adapter)
    assert found == Checkpoint(str(adapter), folder, adapter)
    assert found.tokenizer_folder == folder
    (adapter / "tokenizer_config.json").write_text("{}")
    assert found.tokenizer_folder == adapter


def test_an_adapter_in_a_folder_downloads_nothing_and_one_of_the_hub_downloads_its_model(hub, home, folder):
    hub.add(ID, folder)
    adapter = make_adapter(home / "local", base_model_name_or_path=ID)
    assert "a folder's adapter downloads nothing" in refusal(adapter)
    assert hub.asked == []
    hub.add("someone/lora", adapter)
    found = find_checkpoint("someone/lora")
    assert (found.adapter / ADAPTER_CONFIG).is_file()
    assert (found.folder / "model.safetensors").is_file()
    assert find_checkpoint(adapter).folder == found.folder, "it is in the cache now"


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "must name the model it is for"),
        (["x"], "must name the model it is for"),
        ("/no/such/folder", "got '/no/such/folder', which is none"),
    ],
)
def test_an_adapter_for_nothing_is_refused(home, base, said):
    assert said in refusal(make_adapter(home / "adapter", base_model_name_or_path=base))


def test_an_adapter_beside_weights_and_one_of_an_adapter_are_refused(home, folder):
    adapter = make_adapter(home / "adapter", base_model_name_or_path=str(folder))
    second = make_adapter(home / "second", base_model_name_or_path=str(adapter))
    assert "which is for the adapter" in refusal(second, kind=UnsupportedError)
    (adapter / "model.safetensors").write_bytes(b"")
    assert "must lie in a folder of its own" in refusal(adapter, kind=UnsupportedError)


def test_hf_home_and_hf_hub_offline_are_those_of_the_environment(tmp_path, folder):
    snapshot = cached(tmp_path, ID, folder)
    room = Path(checkpoint.__file__).parent
    program = f"""
import sys, types
sys.modules["quire.hf"] = room = types.ModuleType("quire.hf")  # without the models, which take seconds to import
room.__path__ = [{str(room)!r}]
from quire.hf.checkpoint import find_checkpoint
print(find_checkpoint({ID!r}).folder)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert said.stdout == f"{snapshot}\n", said.stderr
