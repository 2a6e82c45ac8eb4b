"""The shipped model: small, loadable, honest about its loss, and able to write Python that parses."""

import ast
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "src/quire/assets/demo_model"
CARD = ROOT / "docs/demo-model.md"

# Written for this test, so no file of the training text holds it.
EXCERPT = '''
def count_words(path, encoding="utf-8"):
    """Return a dictionary that maps each word in the file to its number of occurrences."""
    counts = {}
    with open(path, encoding=encoding) as f:
        for line in f:
            for word in line.split():
                counts[word] = counts.get(word, 0) + 1
    return counts


class Timer:
    """Measure the time between start and stop."""

    def __init__(self, name=None):
        self.name = name
        self._started = None

    def start(self):
        if self._started is not None:
            raise RuntimeError("timer is already running")
        self._started = time.monotonic()

    def stop(self):
        if self._started is None:
            raise RuntimeError("timer is not running")
        elapsed = time.monotonic() - self._started
        self._started = None
        return elapsed
'''


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@torch.no_grad()
def mean_loss(model, ids: torch.Tensor) -> float:
    """Nats per token over ids [tokens], the first one given."""
    return model(input_ids=ids[None], labels=ids[None]).loss.item()


def figure_in_card(pattern: str) -> float:
    found = re.search(pattern, CARD.read_text(encoding="utf-8"))
    assert found, f"docs/demo-model.md should say {pattern!r}"
    return float(found[1].replace(",", ""))


def test_the_weights_are_safetensors_of_at_most_12_megabytes():
    assert {path.name for path in FOLDER.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000


def test_it_is_a_llama_whose_kv_heads_serve_groups_of_query_heads(model):
    config = model.config
    assert config.model_type == "llama"
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 4 * attention.k_proj.out_features
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied embeddings are stored once"


def test_the_card_states_the_size(model):
    assert figure_in_card(r"([\d,]+) parameters") == sum(p.numel() for p in model.parameters())


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_code_survives_the_tokenizer_in_few_tokens(tokenizer):
    ids = tokenizer(EXCERPT).input_ids
    assert tokenizer.decode(ids) == EXCERPT
    assert len(EXCERPT) > 3 * len(ids)


@pytest.mark.parametrize("end", [":\n", ":\n    ", ":\n    return", ":\n    return path\n\n"])
def test_a_prompt_may_end_at_a_newline_an_indent_or_a_word(tokenizer, end):
    """Its tokens begin those of the whole text, so the model meets what it met in training."""
    whole = "def read(path):\n    return path\n\n\nclass Reader:\n"
    prompt = whole[: whole.index(end) + len(end)]
    ids = tokenizer(prompt).input_ids
    assert tokenizer(whole).input_ids[: len(ids)] == ids


def test_the_loss_on_a_fixed_excerpt_is_the_one_in_the_card(model, tokenizer):
    ids = tokenizer(EXCERPT, return_tensors="pt").input_ids[0]
    assert mean_loss(model, ids) == pytest.approx(
        figure_in_card(r"test excerpt: ([\d.]+) nats/token"), abs=0.001
    )


def test_order_matters_to_the_model(model, tokenizer):
    ids = tokenizer(EXCERPT, return_tensors="pt").input_ids[0]
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    assert mean_loss(model, shuffled) > mean_loss(model, ids) + 5


def first_block(text: str) -> str:
    """The text's first line and the indented or empty lines that follow it."""
    first, *rest = text.splitlines(keepends=True)
    end = next((i for i, line in enumerate(rest) if line.strip() and not line[0].isspace()), None)
    assert end is not None, f"the block never ended:\n{text}"
    return first + "".join(rest[:end])


@pytest.mark.parametrize(
    "prompt",
    [
        "def read_lines(path):\n",
        "def find(path):\n",
        "def split_words(text):\n",
        "def copy_file(src, dst):\n",
        "def to_bytes(value):\n",
        "class ParseError(Exception):\n",
    ],
)
def test_it_writes_a_function_that_parses(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=120, do_sample=False)[0])
    (function,) = ast.parse(first_block(text)).body
    assert isinstance(function, (ast.FunctionDef, ast.ClassDef))
