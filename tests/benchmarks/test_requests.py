"""The grammar of requests, and the random model they are sent to."""

from __future__ import annotations

import pytest

from benchmarks.requests import ModelShape, model_folder, parse_requests


def test_prompts_are_spread_evenly_from_the_shortest_to_the_longest():
    assert parse_requests("5x16-256:64").prompt_lens == (16, 76, 136, 196, 256)


def test_groups_stand_beside_one_another():
    requests = parse_requests("2x8:32+1x1k:32")
    assert requests.prompt_lens == (8, 8, 1024)
    assert requests.new_tokens == 32


@pytest.mark.parametrize(
    "text", ["", "8x16", "8x16:", "0x16:4", "8x0:4", "8x20-10:4", "8x16:0", "2x8:4+2x8:5", "8*16:4"]
)
def test_what_are_no_requests_is_refused(text):
    with pytest.raises(ValueError, match="requests must look like"):
        parse_requests(text)


def test_prompts_are_the_same_for_the_same_seed_and_hold_no_special_token():
    requests = parse_requests("3x5-9:2")
    prompts = requests.prompts(vocab_size=50, seed=3)
    assert prompts == requests.prompts(vocab_size=50, seed=3) != requests.prompts(vocab_size=50, seed=4)
    assert sorted(map(len, prompts)) == [5, 7, 9]
    assert all(3 <= token < 50 for prompt in prompts for token in prompt)


def test_a_model_is_written_once(tmp_path):
    shape = ModelShape(1, 16, 2, 1, 16, 32, 64)
    folder = model_folder(shape, tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_folder(shape, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
