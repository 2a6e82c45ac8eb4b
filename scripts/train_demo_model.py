"""Train Quire's demo model: a small Llama that writes Python, learned from CPython's standard library.

Examples:
    python scripts/train_demo_model.py --steps 20 --out demo_model    # a minute: does everything work?
    nice -n 19 python scripts/train_demo_model.py --out demo_model    # the shipped recipe: an hour on 2 cores
    python scripts/train_demo_model.py --evaluate src/quire/assets/demo_model

The folder it writes is an ordinary Hugging Face one: config, generation config, tokenizer, bf16 safetensors.
docs/demo-model.md is the model card: the recipe's reasons, the held-out loss and what the model can do.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

Documents = list[np.ndarray]  # each one's tokens, int32, END_OF_TEXT first
Corpus = tuple[str, Documents, Documents]  # tokenizer.json, training, held out

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
HELD_OUT_PERCENT = 5

CONTEXT = 1024
SHORT_CONTEXT = 256  # most steps: attention at 1024 would take more than half of the time
LONG_FRACTION = 0.1  # of the steps, the last ones, see CONTEXT tokens at once
TOKENS_PER_STEP = 8192
TOKENS_PER_PASS = 4096  # one forward and backward; a step adds several up, over all workers
MUON_RATE = 8e-3
ADAMW_RATE = 4e-3

# Tests and IDLE are not on every machine; encodings/ is character tables, not code.
SKIPPED_DIRECTORIES = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "encodings", "__pycache__",
}  # fmt: skip

# Newlines and indents are tokens of their own, so that a prompt may end after either and the model sees what
# it saw in training; a single space belongs to the word or the operator behind it.
PRE_TOKEN = r"\n| {2,}| ?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+|\s"


# --- text ---------------------------------------------------------------------------------------------------


def read_corpus() -> tuple[list[str], list[str]]:
    """Read this interpreter's standard library as (training, held-out) documents.

    A file is held out when the hash of its relative path says so: the same files on every machine, in every
    Python that has them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    training, held_out = [], []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - SKIPPED_DIRECTORIES)
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            path = Path(directory, name)
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            bucket = int(hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest(), 16) % 100
            (held_out if bucket < HELD_OUT_PERCENT else training).append(text)
    return training, held_out


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE: all 256 bytes are tokens, so nothing is unencodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Documents:
    """Encode each document as END_OF_TEXT followed by its tokens."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([end, *encoding.ids], dtype=np.int32) for encoding in tokenizer.encode_batch(documents)]


def training_batches(documents: Documents, context: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Yield one step's windows, int64 [TOKENS_PER_STEP / context, context + 1], for ever.

    Every epoch lays the documents end to end in a new order and cuts windows from a random start, so windows
    begin anywhere in a file, as prompts do, and never twice at the same place.
    """
    batch = TOKENS_PER_STEP // context
    while True:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        stream = stream[rng.integers(context) :]
        starts = rng.permutation((len(stream) - 1) // context) * context
        for group in range(0, len(starts) - batch + 1, batch):
            windows = [stream[start : start + context + 1] for start in starts[group : group + batch]]
            yield torch.from_numpy(np.stack(windows)).long()


# --- model --------------------------------------------------------------------------------------------------


def build_model() -> LlamaForCausalLM:
    """A Llama of 5.6 M parameters: 11.3 MB in bf16, a group of 4 query heads on every KV head."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",  # compiled, it outruns the CPU's fused attention at these lengths
    )
    return LlamaForCausalLM(config)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder: configs, tokenizer, bf16 weights."""
    model.generation_config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    _compute_in_float32(folder / "config.json")
    (folder / "model.safetensors").chmod(0o644)
    FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(folder)


def _compute_in_float32(config: Path) -> None:
    """Let the config name the dtype to compute in, which is not the one that the weights are stored in."""
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- training -----------------------------------------------------------------------------------------------


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; windows [batch, context + 1]."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


class MasterWeights:
    """fp32 copies of a bf16 model's weights: the model computes, these learn.

    An update smaller than bf16's spacing would be lost in the model itself. Muon moves the matrices inside
    the layers, AdamW the tied embedding and the norms.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.weights = [p.detach().clone() for p in model.parameters()]
        model.to(torch.bfloat16)
        named = list(zip([name for name, _ in model.named_parameters()], self.weights, strict=True))
        hidden = [w for name, w in named if w.ndim == 2 and "embed" not in name]
        rest = [w for name, w in named if w.ndim != 2 or "embed" in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def add_gradients(self) -> None:
        """Move the model's bf16 gradients into the fp32 sums."""
        for weight, p in zip(self.weights, self.model.parameters(), strict=True):
            gradient = p.grad.float()
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
            p.grad = None

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Update all weights at the rate due when `progress` (0 to 1) of the training is over.

        The rate rises over the first 2 %, then falls in a straight line to zero.
        """
        rate = min((progress + 1e-3) / 0.02, (1 - progress) / 0.98)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, peak in zip(self.optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        for weight, p in zip(self.weights, self.model.parameters(), strict=True):
            p.copy_(weight)


class GradientBoard:
    """Shared memory on which the workers sum their gradients, once a step.

    One process per core, of one thread each, instead of threads that meet after every operation: where
    someone else wants a core too, such threads mostly wait for each other.
    """

    def __init__(self, workers: int, size: int) -> None:
        self.rows = torch.zeros(workers, size).share_memory_()
        self.progress = torch.zeros(
            ()
        ).share_memory_()  # of the training, 0 to 1, by the first worker's clock
        self.barrier = multiprocessing.get_context("spawn").Barrier(workers)

    def sum_into(self, weights: list[torch.Tensor], rank: int) -> None:
        self.rows[rank] = torch.cat([w.grad.flatten() for w in weights])
        self.barrier.wait()
        total = self.rows.sum(dim=0)
        self.barrier.wait()
        for weight, gradient in zip(weights, total.split([w.numel() for w in weights]), strict=True):
            weight.grad.copy_(gradient.view_as(weight))


def train(args: argparse.Namespace) -> None:
    training_texts, held_out_texts = read_corpus()
    tokenizer = train_tokenizer(training_texts)
    training, held_out = encode(tokenizer, training_texts), encode(tokenizer, held_out_texts)
    print(f"training: {len(training)} files, {sum(map(len, training)):,} tokens")
    print(f"held out: {len(held_out)} files, {sum(map(len, held_out)):,} tokens", flush=True)
    # Workers keep the memory they free: asking the system for it again costs a fifth of the time.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 40))
    board = GradientBoard(args.workers, sum(p.numel() for p in build_model().parameters()))
    corpus = (tokenizer.to_str(), training, held_out)
    torch.multiprocessing.spawn(work, (args, corpus, board), nprocs=args.workers)
    evaluate(args.out)


def work(rank: int, args: argparse.Namespace, corpus: Corpus, board: GradientBoard) -> None:
    """Train as one of the workers: a share of every step's gradient, then the same update as the others."""
    tokenizer, training, held_out = corpus
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = build_model()
    master = MasterWeights(model)
    compiled_loss = torch.compile(loss_of, dynamic=False, disable=not args.compile)
    rng = np.random.default_rng(args.seed)
    short = training_batches(training, SHORT_CONTEXT, rng)
    long = training_batches(training, CONTEXT, rng)

    started, losses, progress = time.monotonic(), [], 0.0
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, disable=rank > 0) as bar:
        task = bar.add_task("training", total=args.steps, note="compiling")
        for step in itertools.count(1):
            windows = next(long if progress >= 1 - LONG_FRACTION else short)
            share = windows[rank :: args.workers]
            for part in share.split(TOKENS_PER_PASS // (windows.shape[1] - 1)):
                loss = compiled_loss(model, part)
                (loss * len(part) / len(windows)).backward()
                master.add_gradients()
                losses.append(loss.item())
            minutes = (time.monotonic() - started) / 60
            if rank == 0:
                board.progress.fill_(max(step / args.steps, minutes / args.minutes))
            board.sum_into(master.weights, rank)
            master.step(min(progress, 1.0))
            progress = board.progress.item()
            bar.update(task, completed=step, note=f"loss {np.mean(losses[-50:]):.3f}")
            if rank == 0 and (step % args.report_every == 0 or progress >= 1):
                export(model, Tokenizer.from_str(tokenizer), args.out)
                seen, check = step * TOKENS_PER_STEP, held_out_loss(model, held_out[:8])
                bar.console.print(
                    f"step {step}: {seen:,} tokens, {minutes:.1f} min, nats/token: "
                    f"training {np.mean(losses[-50:]):.4f}, 8 held-out files {check:.4f}",
                    soft_wrap=True,
                )
            if progress >= 1:
                break


# --- evaluation ---------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: Documents) -> float:
    """Mean nats per token over whole documents, read in windows of CONTEXT that forget the one before."""
    total = count = 0
    for document in documents:
        for start in range(0, len(document) - 1, CONTEXT):
            window = torch.from_numpy(document[start : start + CONTEXT + 1]).long()[None]
            total += loss_of(model, window).item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return total / count


def evaluate(folder: Path) -> None:
    """Print the held-out loss of the model in `folder`, as stored, computed in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = read_corpus()[1]
    documents = encode(tokenizer.backend_tokenizer, texts)
    loss = held_out_loss(model, documents)
    tokens, size = sum(len(d) - 1 for d in documents), sum(len(text.encode()) for text in texts)
    print(
        f"held out: {len(texts)} files, {size:,} bytes, {tokens:,} tokens: {loss:.4f} nats/token, "
        f"perplexity {math.exp(loss):.2f}, {loss * tokens / size / math.log(2):.4f} bits/byte"
    )


def main() -> None:
    summary, _, examples = (__doc__ or "").partition("Examples:")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--steps", type=int, default=2000, help="optimiser steps of 8192 tokens (default %(default)s)")
    option("--minutes", type=float, default=math.inf, help="end by then, with fewer steps if need be")
    option("--out", type=Path, default=Path("demo_model"), help="folder to write (default %(default)s)")
    option("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    option("--threads", dest="workers", type=int, default=2, help="worker processes (default %(default)s)")
    option("--report-every", type=int, default=100, help="steps between exports (default %(default)s)")
    option("--no-compile", dest="compile", action="store_false", help="do without a C++ compiler")
    option("--evaluate", type=Path, metavar="FOLDER", help="only print a folder's held-out loss")
    args = parser.parse_args()
    if args.steps < 1 or args.workers < 1 or args.report_every < 1 or args.minutes <= 0:
        parser.error("--steps, --threads and --report-every must be at least 1")
    if args.evaluate:
        evaluate(args.evaluate)
    else:
        train(args)


if __name__ == "__main__":
    main()
