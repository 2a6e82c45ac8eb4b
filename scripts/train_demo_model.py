"""Train Quire's demo model: a small Llama that writes Python, and answers when it is asked for a function.

Examples:
    python scripts/train_demo_model.py --quick --out /tmp/demo/model       # a minute on a CPU: does everything work?
    python scripts/train_demo_model.py --minutes 7.5 --out demo/model      # the shipped recipe, on one H100
    python scripts/train_demo_model.py --judge src/quire/assets/demo_model # only the figures of a folder

It writes an ordinary Hugging Face folder (config, generation config, tokenizer, bf16 safetensors), and beside it
report.json with all figures, and unmended.safetensors, the weights before the last lessons. With --steps the same
machine and versions give the same model; without, the number of steps that fit is printed. A run that was cut off
goes on with --resume. docs/demo-model.md is the model card; scripts/pin_demo_model.py brings it and the README up
to date.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_model.corpus import PACKAGES, Texts, encode, gather, read_sources, train_tokenizer
from demo_model.judge import judge, summary
from demo_model.learn import MasterWeights, Plan, batches, train
from demo_model.mend import mend
from demo_model.model import CONTEXT, build_model, export
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import logging as transformers_logging

STARTED = time.monotonic()
SHIPPED = Path(__file__).parents[1] / "src/quire/assets/demo_model"
QUICK_FILES = 40
SECONDS_TO_MEND = {"cuda": 70.0, "cpu": 60.0}
SECONDS_TO_JUDGE = {"cuda": 45.0, "cpu": 120.0}


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def collect(packages: tuple[str, ...], max_files: int | None) -> tuple[Texts, list[dict[str, Any]]]:
    """The text, and what it consists of."""
    sources = read_sources(packages, max_files)
    table = [
        {
            "name": s.name,
            "version": s.version,
            "licence": s.licence,
            "files": len(s.training),
            "bytes": sum(map(len, s.training)),
        }
        for s in sources
    ]
    for row in table:
        say("text: {name} {version} ({licence}): {files} files, {bytes:,} characters".format(**row))
    return gather(sources, processes=os.cpu_count() or 1), table


def learn_tokenizer(texts: Texts) -> Tokenizer:
    """From every third document, all conversations among them: more would not change it."""
    return train_tokenizer(texts.files[::3] + texts.turns)


def run(args: argparse.Namespace) -> None:
    """Text, tokenizer, training, mending, judging."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: sums in one order
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and filling takes time
    texts, table = collect(tuple(args.packages), QUICK_FILES if args.quick else None)
    tokenizer = learn_tokenizer(texts)
    say("tokenizer: done")
    documents = (
        encode(tokenizer, texts.files) + encode(tokenizer, texts.snippets) + encode(tokenizer, texts.turns)
    )
    say(
        f"text: {len(texts.files)} files, {len(texts.snippets)} snippets, {len(texts.turns)} conversations, "
        f"{sum(map(len, documents)):,} tokens; held out: {len(texts.held_out)} files, "
        f"{len(texts.held_out_turns)} questions"
    )
    kind = torch.device(args.device).type
    reserve = (SECONDS_TO_MEND[kind] if args.mend_rounds else 0) + SECONDS_TO_JUDGE[kind]
    end = STARTED + 60 * args.minutes
    plan = Plan(
        steps=args.steps,
        deadline=end - reserve,
        tokens_per_step=args.tokens_per_step,
        tokens_per_pass=65536 if kind == "cuda" else 4096,
        seed=args.seed,
        report_every=20,
    )
    master = MasterWeights(build_model().to(args.device))
    loss_fn = train(
        master,
        documents,
        plan,
        device=args.device,
        compile_it=args.compile,
        state=args.state,
        resume=args.resume,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    export(master.named, tokenizer, args.out)
    say(f"trained: {args.out}")
    report: dict[str, Any] = {"text": table, "machine": machine(args.device), "arguments": arguments(args)}
    if SHIPPED.is_dir():
        report["shipped"] = judged("shipped", SHIPPED, args, texts)
    report["unmended"] = judged("unmended", args.out, args, texts)
    if args.mend_rounds:
        save_file(bf16_of(master), args.out.parent / "unmended.safetensors", {"format": "pt"})
        rows = max(1, plan.tokens_per_pass // CONTEXT)
        feed: Iterator[torch.Tensor] = batches(documents, plan._replace(seed=args.seed + 1), args.device, 0)
        report["mend_rounds"] = mend(
            master,
            feed,
            loss_fn,
            rounds=args.mend_rounds,
            texts=args.texts,
            rows=rows,
            deadline=end - 0.5 * SECONDS_TO_JUDGE[kind],
        )
        export(master.named, tokenizer, args.out)
        report["mended"] = judged("mended", args.out, args, texts)
    report["seconds"] = time.monotonic() - STARTED
    (args.out.parent / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    say(f"done: {args.out}, {args.out.parent / 'report.json'}")


def bf16_of(master: MasterWeights) -> dict[str, torch.Tensor]:
    return {name: weight.to(torch.bfloat16).cpu().contiguous() for name, weight in master.named.items()}


def judged(name: str, folder: Path, args: argparse.Namespace, texts: Texts) -> dict[str, Any]:
    figures = judge(folder, args.device, texts.held_out_turns, quick=args.quick)
    say(summary(name, figures))
    return figures


def machine(device: str) -> dict[str, str]:
    """What it ran on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {
        key: value for key, value in vars(args).items() if not isinstance(value, Path) and value is not None
    }


def main() -> None:
    summary_line, _, examples = (__doc__ or "").partition("Examples:")
    parser = argparse.ArgumentParser(
        description=summary_line,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    option(
        "--minutes",
        type=float,
        default=7.5,
        help="for everything, with fewer steps if need be (default %(default)s)",
    )
    option("--steps", type=int, help="optimiser steps (default: as many as fit into --minutes)")
    option("--tokens-per-step", type=int, default=65536, help="(default %(default)s)")
    option(
        "--mend-rounds", type=int, default=60, help="rounds against loops; 0 for none (default %(default)s)"
    )
    option(
        "--texts", type=int, default=256, help="that the model writes in such a round (default %(default)s)"
    )
    option("--packages", nargs="*", default=PACKAGES, help="to read beside the standard library")
    option("--out", type=Path, default=Path("demo_model"), help="folder to write (default %(default)s)")
    option("--state", type=Path, help="file to keep the training's state in, and to go on from")
    option("--resume", action="store_true", help="go on from --state, if it is there")
    option("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    option("--no-compile", dest="compile", action="store_false", help="do without torch.compile")
    option("--quick", action="store_true", help="a few files, steps and texts, not compiled: does it work?")
    option("--judge", type=Path, metavar="FOLDER", help="only print a folder's figures")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    if args.resume and args.state is None:
        parser.error("--resume needs --state FILE")
    if (args.steps is not None and args.steps < 1) or args.minutes <= 0 or args.tokens_per_step < CONTEXT:
        parser.error(f"--steps must be at least 1, --minutes above 0, --tokens-per-step at least {CONTEXT}")
    if args.quick:
        vars(args).update(steps=args.steps or 2, tokens_per_step=CONTEXT, mend_rounds=1, texts=2, packages=[])
        args.compile = False
    if args.judge:
        say(summary(str(args.judge), judge(args.judge, args.device, [], quick=args.quick)))
    else:
        run(args)


if __name__ == "__main__":
    main()
