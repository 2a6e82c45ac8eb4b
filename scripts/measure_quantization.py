"""Measure what quantised pages cost in quality: perplexity, retrieval, and the error of attention itself.

Examples:
    python scripts/measure_quantization.py --windows 4 --names 4           # a minute: does everything work?
    python scripts/measure_quantization.py --out benchmarks/results/quantization.csv    # docs/quantization.md

Everything goes through Quire's pages, and what is judged is decoded, one token at a time, as in generation.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from train_demo_model import CONTEXT, encode, held_out_loss, read_corpus  # noqa: E402

import quire  # noqa: E402
from benchmarks import environment, records  # noqa: E402
from benchmarks.quantization_report import WITHOUT_PAGES  # noqa: E402
from quire.hf.model import PagedModel  # noqa: E402
from quire.hf.step import Step  # noqa: E402

MODEL = ROOT / "src/quire/assets/demo_model"
KV_DTYPES = (None, "int8", "fp8_e4m3", "fp8_e5m2")
PAGE_SIZE = 16
DISTANCES = (100, 300, 900)  # tokens from a name's definition to its use; the last nearly fills the context

Measured = list[dict[str, str]]


def row(
    measure: str, setting: str, kv_dtype: str | None, metric: str, value: float, samples: int
) -> dict[str, str]:
    """One number: which measure of what, on which pages, over how many tokens, names or elements."""
    return {
        "measure": measure, "setting": setting, "kv_dtype": kv_dtype or "none", "metric": metric,
        "value": f"{value:.6g}", "samples": str(samples),
    }  # fmt: skip


# --- running texts through pages --------------------------------------------------------------------------


class Texts:
    """Several token sequences in one model's pages, advanced together."""

    def __init__(self, model: PagedModel, texts: Sequence[torch.Tensor]) -> None:
        self.model, self.texts, self.read = model, texts, 0
        per_text = -(-CONTEXT // PAGE_SIZE)
        pages = torch.randperm(per_text * len(texts), generator=torch.Generator().manual_seed(0))
        self.page_table = pages.view(len(texts), per_text).to(torch.int32)

    def advance(self, upto: int) -> tuple[list[int], torch.Tensor]:
        """Read every text up to a position, in one packed step: their numbers, and the logits of their last tokens."""
        going = [i for i, text in enumerate(self.texts) if len(text) >= upto]
        new = upto - self.read
        positions = torch.arange(self.read, upto).repeat(len(going))
        owner = torch.tensor(going).repeat_interleave(new)
        slots = self.page_table[owner, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        step = Step(
            input_ids=torch.cat([self.texts[i][self.read : upto] for i in going]),
            position_ids=positions,
            page_table=self.page_table[going],
            seq_lens=torch.full((len(going),), upto, dtype=torch.int32),
            cu_seqlens_q=torch.arange(len(going) + 1, dtype=torch.int32) * new,
            slot_mapping=slots,
            logits_indices=torch.arange(1, len(going) + 1) * new - 1,
        )
        self.read = upto
        return going, self.model.forward(step)


def paged_models(num_texts: int) -> dict[str | None, PagedModel]:
    """The demo model in float32, once per kind of page."""
    pages = num_texts * -(-CONTEXT // PAGE_SIZE)
    return {
        kv_dtype: PagedModel.load(MODEL, page_size=PAGE_SIZE, num_pages=pages, kv_dtype=kv_dtype)
        for kv_dtype in KV_DTYPES
    }


def progress(steps: Sequence[int], what: str) -> Iterator[int]:
    yield from track(steps, description=what, console=Console(stderr=True))


# --- perplexity -------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_perplexity(num_windows: int) -> Measured:
    """Loss on held-out text, every token decoded; and how far each token's prediction moved from exact pages'."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL).backend_tokenizer
    documents = encode(tokenizer, read_corpus()[1])
    windows = [
        torch.from_numpy(document[start : start + CONTEXT + 1])
        for document in documents
        for start in range(0, len(document) - 1, CONTEXT)
    ]
    windows = [w.long() for w in windows[:: -(-len(windows) // num_windows)]]
    models = paged_models(len(windows))
    texts = {kv_dtype: Texts(model, [w[:-1] for w in windows]) for kv_dtype, model in models.items()}
    sums: dict[str | None, torch.Tensor] = {
        kv_dtype: torch.zeros(3, dtype=torch.float64) for kv_dtype in KV_DTYPES
    }
    tokens = sum(len(w) - 1 for w in windows)
    for upto in progress(range(1, max(map(len, windows))), "perplexity"):
        exact = None
        for kv_dtype in KV_DTYPES:
            going, logits = texts[kv_dtype].advance(upto)
            log_p = F.log_softmax(logits, -1)
            exact = log_p if exact is None else exact
            targets = torch.stack([windows[i][upto] for i in going])
            loss = F.nll_loss(log_p, targets, reduction="sum")
            divergence = F.kl_div(log_p, exact, log_target=True, reduction="sum")
            same = (log_p.argmax(-1) == exact.argmax(-1)).sum()
            sums[kv_dtype] += torch.stack([loss, divergence, same.double()])
    rows: Measured = []
    for kv_dtype, total in sums.items():
        loss, divergence, same = (total / tokens).tolist()
        figures = {"nats/token": loss, "perplexity": math.exp(loss), "KL": divergence, "same choice": same}
        rows += [
            row("perplexity", "decode", kv_dtype, name, value, tokens) for name, value in figures.items()
        ]
    whole = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    loss = held_out_loss(whole, [w.numpy() for w in windows])
    for name, value in (("nats/token", loss), ("perplexity", math.exp(loss))):
        rows.append(row("perplexity", WITHOUT_PAGES, None, name, value, tokens))
    return rows


# --- retrieval --------------------------------------------------------------------------------------------

_SYLLABLES = (
    "bra",
    "cul",
    "dax",
    "fen",
    "gor",
    "hib",
    "jun",
    "kel",
    "lom",
    "mip",
    "nar",
    "pof",
    "quil",
    "rud",
    "sot",
)
CUED = 8  # tokens before the answer that are decoded too, so that it is decode that looks back


def needles(
    tokenizer: Any, filler: torch.Tensor, count: int, distance: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Texts of one length that end in the first half of a made-up name, and its second half, the answer.

    Each name comes twice: first with its definition `distance` tokens before, then with other code in its place.
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        cue, rest = ("".join(rng.choice(_SYLLABLES, 3)) for _ in range(2))
        definition = tokenizer(f"def {cue}_{rest}(value):\n    return value + 1\n\n").input_ids
        use = tokenizer(f"\n\nresult = {cue}_").input_ids
        answer = tokenizer(f"{cue}_{rest}").input_ids[len(tokenizer(f"{cue}_").input_ids) :]
        code = filler[i * 1300 : i * 1300 + 1300].tolist()
        before, between, other = code[:40], code[100 : 100 + distance - len(use)], code[1200:]
        for shown in (definition, other[: len(definition)]):
            yield [0, *before[len(shown) - 40 :], *shown, *between, *use], answer


@torch.inference_mode()
def measure_retrieval(count: int) -> Measured:
    """A made-up name, defined once; much text later its first half: is its second half retrieved?

    The model answers no questions, but it does go on with names it saw, which is what a needle in a haystack
    asks for. "absent" is the same text without the definition: what can be guessed without retrieving.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    filler = tokenizer("\n\n".join(read_corpus()[1]), return_tensors="pt").input_ids[0]
    models = paged_models(2 * count)
    rows: Measured = []
    for distance in progress(DISTANCES, "retrieval"):
        cases = list(needles(tokenizer, filler, count, distance))
        for kv_dtype, model in models.items():
            rows += retrieve(model, kv_dtype, distance, cases)
    return rows


def retrieve(
    model: PagedModel, kv_dtype: str | None, distance: int, cases: list[tuple[list[int], list[int]]]
) -> Measured:
    """Loss on the answers, and the share of names whose every token was the first choice."""
    tokens = [torch.tensor([*text, *answer]) for text, answer in cases]
    (length,) = {len(text) for text, _ in cases}
    texts = Texts(model, [t[:-1] for t in tokens])
    losses: dict[str, list[float]] = {"defined": [], "absent": []}
    right = [True] * len(cases)
    texts.advance(length - CUED)
    for upto in range(length - CUED + 1, max(map(len, tokens))):
        going, logits = texts.advance(upto)
        for i, log_p in zip(going, F.log_softmax(logits, -1), strict=True):
            if upto >= length:
                losses["absent" if i % 2 else "defined"].append(-log_p[tokens[i][upto]].item())
                right[i] &= int(log_p.argmax()) == int(tokens[i][upto])
    rows = []
    for label, found in (("defined", right[::2]), ("absent", right[1::2])):
        setting = f"{label} {distance} tokens before"
        loss = float(np.mean(losses[label]))
        rows.append(row("retrieval", setting, kv_dtype, "nats/token", loss, len(losses[label])))
        rows.append(row("retrieval", setting, kv_dtype, "retrieved", float(np.mean(found)), len(found)))
    return rows


# --- attention --------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_attention() -> Measured:
    """Error of decode's output against float64 attention over the values before they were rounded to pages."""
    heads, kv_heads, head_dim, seq_len, batch = 32, 8, 128, 4096, 4
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(batch * seq_len, kv_heads, head_dim, generator=generator) for _ in range(2))
    q = torch.randn(batch, heads, head_dim, generator=generator)
    table = torch.randperm(batch * seq_len // PAGE_SIZE, generator=generator).view(batch, -1).to(torch.int32)
    lens = torch.full((batch,), seq_len, dtype=torch.int32)
    slots = (table[:, :, None].long() * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
    kinds = [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None)]
    kinds += [(torch.float32, kv_dtype) for kv_dtype in KV_DTYPES[1:]]
    exact, rows = None, []
    for dtype, kv_dtype in kinds:
        spec = quire.AttentionSpec(heads, kv_heads, head_dim, PAGE_SIZE, dtype, kv_dtype)
        pool = quire.KVPool(spec, num_layers=1, num_pages=table.numel())
        scales = {} if kv_dtype is None else {"k_scale": pool.k_scale[0], "v_scale": pool.v_scale[0]}
        quire.write_kv(k.to(dtype), v.to(dtype), pool.k[0], pool.v[0], slots, **scales)
        arguments = (q.to(dtype), pool.k[0], pool.v[0], table, lens)
        if exact is None:
            exact = quire.paged_attention(*arguments, backend="reference").double()
        error = quire.paged_attention(*arguments, **scales).double() - exact
        relative = (error.square().mean() / exact.square().mean()).sqrt().item()
        setting = str(dtype).removeprefix("torch.")
        rows.append(row("attention", setting, kv_dtype, "relative error", relative, error.numel()))
        rows.append(row("attention", setting, kv_dtype, "bytes/token", spec.bytes_per_page / PAGE_SIZE, 1))
    return rows


def main() -> None:
    summary, _, examples = (__doc__ or "").partition("Examples:")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--windows", type=int, default=40, help="held-out windows of 1024 tokens (default %(default)s)")
    option("--names", type=int, default=40, help="names to retrieve per distance (default %(default)s)")
    option("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    facts = environment.facts(" ".join(["python scripts/measure_quantization.py", *sys.argv[1:]]))
    rows: Measured = []
    for measured in (
        measure_attention,
        lambda: measure_retrieval(args.names),
        lambda: measure_perplexity(args.windows),
    ):
        for r in measured():
            print(", ".join(r.values()), flush=True)
            rows.append(r)
    if args.out:
        records.write(args.out, [facts | {"case": r["measure"]} | r for r in rows])


if __name__ == "__main__":
    main()
