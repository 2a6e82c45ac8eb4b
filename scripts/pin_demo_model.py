"""Bring what quotes the demo model up to date: after training, once its folder is in src/quire/assets.

    python scripts/pin_demo_model.py --report report.json

It writes the loss of the tests' excerpt and the report's figures into docs/demo-model.md, the prompts whose functions
parse into tests/test_demo_model.py, and what the code blocks of README and docs print below them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from demo_model.judge import SAMPLES, complete, parses  # noqa: E402
from test_demo_model import CARD, EXCERPT, FOLDER, mean_loss  # noqa: E402
from test_examples import FENCED, PAGES, blocks_of  # noqa: E402

TEST = ROOT / "tests/test_demo_model.py"
FIGURES = re.compile(r"<!-- judged -->.*?<!-- end -->", re.DOTALL)
PROMPTS = (*SAMPLES, "def find(path):\n", "class Queue:\n", "def main():\n", "def is_even(n):\n")


def pin_excerpt() -> None:
    """The loss that every test run measures again."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    loss = mean_loss(model, tokenizer(EXCERPT, return_tensors="pt").input_ids[0])
    text = CARD.read_text(encoding="utf-8")
    CARD.write_text(re.sub(r"test excerpt: [\d.]+", f"test excerpt: {loss:.4f}", text), encoding="utf-8")
    print(f"excerpt: {loss:.4f} nats/token")

    prompts = [prompt for prompt in PROMPTS if prompt.startswith(("def ", "class "))]
    written = [complete(model, tokenizer.backend_tokenizer, [prompt], 120)[0] for prompt in prompts]
    texts = [p + tokenizer.decode(ids) for p, ids in zip(prompts, written, strict=True)]
    good = [p for p, text in zip(prompts, texts, strict=True) if parses(text)]
    print(f"functions that parse: {len(good)} of {len(prompts)}")
    listed = "".join(f"        {json.dumps(prompt)},\n" for prompt in good[:6])
    test = TEST.read_text(encoding="utf-8")
    old = re.compile(r'(    "prompt",\n    \[\n).*?(    \],\n\)\ndef test_it_writes_a_function)', re.DOTALL)
    TEST.write_text(old.sub(lambda found: found[1] + listed + found[2], test), encoding="utf-8")


def pin_figures(report: dict[str, Any]) -> None:
    """The table of before and after in the card, between its marks."""
    rows = {name: report[name] for name in ("shipped", "unmended", "mended") if name in report}
    names = {
        "shipped": "the model before",
        "unmended": "after training",
        "mended": "after the lessons on loops",
    }
    lines = [
        "| | nats/token | perplexity | bits/byte | end in a loop | end by themselves | first function parses |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {names[name]} | {row['nats_per_token']:.4f} | {row['perplexity']:.2f} | {row['bits_per_byte']:.4f} | "
            f"{row['loop_rate']:.1%} | {row['ended']:.1%} | {row['parses']:.1%} |"
        )
    table = "<!-- judged -->\n\n" + "\n".join(lines) + "\n\n<!-- end -->"
    text = CARD.read_text(encoding="utf-8")
    if not FIGURES.search(text):
        raise SystemExit(f"{CARD} must hold <!-- judged --> … <!-- end -->. Fix: put the two marks back")
    CARD.write_text(FIGURES.sub(lambda _: table, text), encoding="utf-8")


def pin_page(page: Path) -> None:
    """Run a page's blocks in order, and write what each prints into the block below it."""
    text = page.read_text(encoding="utf-8")
    if not blocks_of(text):
        return
    namespace: dict[str, Any] = {"__name__": "__main__"}
    pieces, end = [], 0
    fences = list(FENCED.finditer(text))
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] != "python":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(fence[2], str(page), "exec"), namespace)
        if (
            following is not None
            and following[1] in ("text", "output")
            and not text[fence.end() : following.start()].strip()
            and out.getvalue().rstrip() != following[2].rstrip()
        ):
            pieces.append(text[end : following.start(2)] + out.getvalue().rstrip("\n") + "\n")
            end = following.end(2)
    if pieces:
        page.write_text("".join(pieces) + text[end:], encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {len(pieces)} outputs anew")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, help="report.json of the training")
    args = parser.parse_args()
    pin_excerpt()
    if args.report:
        pin_figures(json.loads(args.report.read_text(encoding="utf-8")))
    for page in PAGES:
        pin_page(page)


if __name__ == "__main__":
    main()
