"""`quire demo` from end to end, with few tokens: its pictures and its table hold together."""

import re

import pytest

from quire import LLM, cli
from quire.cli.prompts import PROMPTS

# One worker loads the model and compiles its kernels, not both.
pytestmark = pytest.mark.xdist_group("cli-demo-model")

MAX_TOKENS = 4


@pytest.fixture(scope="module")
def prompt_lengths():
    return [len(tokens) for tokens in LLM(num_pages=1).tokenizer(list(PROMPTS))["input_ids"]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Everything one run prints, and its picture."""
    picture = tmp_path_factory.mktemp("demo") / "demo.svg"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("sys.stdout.write", printed.append)
        patch.setattr("quire.cli.demo.warning", lambda: "this machine is busy: very")
        code = cli.run(["demo", "--max-tokens", str(MAX_TOKENS), "--runs", "1", "--save", str(picture)])
    return code, "".join(printed), picture.read_text(encoding="utf-8")


def figure(text, label):
    [row] = re.findall(rf"^ *{label} (.*)$", text, re.MULTILINE)
    return row


def numbers(row):
    return [int(number.replace(",", "")) for number in re.findall(r"(?<![\d.])[\d,]+(?![\d.,]* %)", row)]


def test_the_prompts_are_eight_of_different_lengths_some_of_them_long(prompt_lengths):
    assert len(set(prompt_lengths)) == len(PROMPTS) == 8
    assert min(prompt_lengths) < 16
    assert max(prompt_lengths) > 500


def test_it_ends_well_and_the_texts_agree(shown):
    code, text, _ = shown
    assert code == 0
    assert "greedy texts that agree, token for token: 8/8" in text


def test_a_busy_machine_is_named_beside_the_figures(shown):
    _, text, picture = shown
    assert text.index("tokens per second") < text.index("this machine is busy: very")
    assert "busy" in picture


def test_the_first_snapshot_shows_the_pages_it_says(shown):
    head = re.search(r"after step (\d+): (\d+) of (\d+) pages in use.*\n((?:[A-H*.]+\n)+)", shown[1])
    _, used, pool, cells = head.groups()
    cells = cells.replace("\n", "")
    assert len(cells) == int(pool)
    assert len(cells) - cells.count(".") == int(used)


def test_the_figures_of_the_table_follow_from_the_prompts(shown, prompt_lengths):
    text = shown[1]
    longest = max(prompt_lengths) + MAX_TOKENS - 1
    pages = int(figure(text, "pages at peak").split()[0])
    assert pages <= sum(-(-(n + MAX_TOKENS - 1) // 16) for n in prompt_lengths)
    paged_slots, padded_slots = numbers(figure(text, "slots at peak"))
    assert (paged_slots, padded_slots) == (pages * 16, 8 * longest)
    paged_bytes, padded_bytes = numbers(figure(text, "KV cache at peak, bytes"))
    bytes_per_token = LLM(num_pages=1).model.bytes_per_page // 16
    assert (paged_bytes, padded_bytes) == (paged_slots * bytes_per_token, padded_slots * bytes_per_token)
    assert wasted(text)[1] == padded_slots - sum(n + MAX_TOKENS - 1 for n in prompt_lengths)
    assert 0 <= wasted(text)[0] < 8 * 16  # never a page per request


def wasted(text):
    return [int(n.replace(",", "")) for n in re.findall(r"([\d,]+)  \(", figure(text, "slots wasted"))]


def test_the_picture_holds_the_map_and_the_table_and_asks_nobody_for_a_font(shown):
    picture = shown[2]
    assert picture.startswith("<svg")
    for part in ("■", "who", "tokens", "8/8"):
        assert part in picture
    assert "@font-face" not in picture


def test_too_few_pages_make_requests_take_turns_with_the_same_end(capsys):
    assert cli.run(["demo", "--max-tokens", "20", "--runs", "1", "--num-pages", "100", "--no-compare"]) == 0
    text = capsys.readouterr().out
    assert int(figure(text, "pages given back and computed again").split()[0]) > 0
    assert "padded" not in text


def test_a_seed_shuffles_the_prompts(capsys):
    def first_snapshot(*seed):
        assert cli.run(["demo", "--max-tokens", "2", "--runs", "1", "--no-compare", *seed]) == 0
        return capsys.readouterr().out

    one, same, other = (first_snapshot("--seed", seed) for seed in ("1", "1", "2"))
    maps = [re.findall(r"^[A-H*.]+$", text, re.MULTILINE) for text in (one, same, other)]
    assert maps[0] == maps[1] != maps[2]


REFUSED = {
    "a pool smaller than one prompt": (["--num-pages", "10"], "must fit the pool"),
    "texts past the model's context": (["--max-tokens", "5000"], "max_tokens must be at most"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_refused_with_a_sentence(capsys, options, said):
    assert cli.run(["demo", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
