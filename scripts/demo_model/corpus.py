"""The demo model's text: which files it reads, how they become tokens, and the order they are read in."""

from __future__ import annotations

import ast
import hashlib
import multiprocessing
import os
import sysconfig
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_model.turns import (
    ASSISTANT,
    END_OF_TEXT,
    SYSTEM,
    SYSTEM_PROMPTS,
    USER,
    Turn,
    derived_turns,
    render,
    written_turns,
)

Documents = list[np.ndarray]  # each one's tokens, int32, END_OF_TEXT first

SPECIAL_TOKENS = (END_OF_TEXT, SYSTEM, USER, ASSISTANT)
VOCAB_SIZE = 4096
HELD_OUT_PERCENT = 5
STDLIB = "stdlib"
# Pure Python under BSD, MIT or Apache licences. What is not installed is left out, and said to be.
PACKAGES = (
    "numpy", "scipy", "sympy", "mpmath", "networkx", "jinja2", "fsspec", "packaging", "click", "rich", "httpx",
    "httpcore", "anyio", "huggingface_hub", "tokenizers", "jax", "torch", "transformers", "numba", "onnx", "pip",
)  # fmt: skip
PERMISSIVE = ("bsd", "mit", "apache", "psf", "python software foundation")
BYTES_PER_PACKAGE = 8_000_000  # so that none of them sets the tone
STDLIB_REPEATS = 2  # per pass over the rest
WRITTEN_REPEATS = 12

# Tests and IDLE are not on every machine; encodings/ is character tables, not code.
SKIPPED_DIRECTORIES = {
    "site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "idle_test", "encodings",
    "_vendor", "__pycache__",
}  # fmt: skip

# Newlines and indents are tokens of their own, so that a prompt may end after either and the model sees what
# it saw in training; a single space belongs to the word or the operator behind it.
PRE_TOKEN = r"\n| {2,}| ?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+|\s"


class Source(NamedTuple):
    """The files of one package, as read."""

    name: str
    version: str
    licence: str
    training: list[str]
    held_out: list[str]


class Texts(NamedTuple):
    """What is learned from and what is kept back."""

    files: list[str]  # training
    snippets: list[str]  # functions and classes of the training files, each by itself
    turns: list[str]  # conversations
    held_out: list[str]  # files of the standard library
    held_out_turns: list[Turn]


def read_sources(packages: tuple[str, ...], max_files: int | None = None) -> list[Source]:
    """The standard library of this Python and the packages, where they are installed and their licence permits.

    A file is held out when the hash of its relative path says so: the same files on every machine that has them.
    A file most of whose lines were in files before it is left out.
    """
    seen: set[int] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [_read(STDLIB, sysconfig.get_python_version(), "PSF-2.0", root, max_files, None, seen)]
    for name in packages:
        found = util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            print(f"text: {name} is not installed, left out")
            continue
        version, licence = _licence(name)
        if not any(kind in licence.lower() for kind in PERMISSIVE) or "gpl" in licence.lower():
            print(f"text: {name} is left out, its licence is {licence!r}")
            continue
        folder = Path(next(iter(found.submodule_search_locations)))
        sources.append(_read(name, version, licence, folder, max_files, BYTES_PER_PACKAGE, seen))
    return sources


def read_held_out() -> list[str]:
    """The standard library's files that no training sees."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for path in _python_files(root) if _is_held_out(path, root)]


def _licence(package: str) -> tuple[str, str]:
    distribution = next(iter(metadata.packages_distributions().get(package, [package])))
    about = metadata.metadata(distribution)
    classifiers = " ".join(c for c in about.get_all("Classifier") or [] if c.startswith("License"))
    short = about.get("License-Expression") or classifiers or (about.get("License") or "unknown")
    return metadata.version(distribution), short.strip().splitlines()[0][:80]


def _read(
    name: str,
    version: str,
    licence: str,
    root: Path,
    max_files: int | None,
    limit: int | None,
    seen: set[int],
) -> Source:
    source, size = Source(name, version, licence, [], []), 0
    paths = list(_python_files(root))
    if limit is not None:  # a sample of the package, not its first folders
        paths.sort(key=lambda path: _bucket(path, root))
    for path in paths[:max_files]:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if any(token in text for token in SPECIAL_TOKENS):
            continue
        if _is_held_out(path, root):
            source.held_out.append(text)
            continue
        lines = [hash_of(line) for line in map(str.strip, text.splitlines()) if len(line) > 20]
        if lines and sum(line in seen for line in lines) > 0.6 * len(lines):
            continue
        seen.update(lines)
        if limit is not None and size + len(text) > limit:
            break
        size += len(text)
        source.training.append(text)
    return source


def hash_of(line: str) -> int:
    """The same in every process, which Python's own hash is not."""
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")


def _python_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - SKIPPED_DIRECTORIES)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(directory, name)


def _bucket(path: Path, root: Path) -> int:
    return int(hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest(), 16)


def _is_held_out(path: Path, root: Path) -> bool:
    return _bucket(path, root) % 100 < HELD_OUT_PERCENT


def gather(sources: list[Source], processes: int) -> Texts:
    """All documents, in a fixed order."""
    files = [text for source in sources for text in source.training]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = pool.map(_parts_of, files, chunksize=16)
    standard = sources[0].training * (STDLIB_REPEATS - 1)
    snippets = [snippet for found, _ in parts for snippet in found]
    derived = [[turn] for _, found in parts for turn in found]
    written = written_turns()
    kept_back = [talk for i, talk in enumerate(written) if i % 20 == 19]
    learned = [talk for i, talk in enumerate(written) if i % 20 != 19]
    talks = learned * WRITTEN_REPEATS + derived
    systems = (None, None, *SYSTEM_PROMPTS)
    turns = [render(talk, systems[i % len(systems)]) for i, talk in enumerate(talks)]
    held_out_turns = [talk[0] for talk in kept_back if "def " in talk[0].answer]
    return Texts(files + standard, snippets, turns, sources[0].held_out, held_out_turns)


def _parts_of(source: str) -> tuple[list[str], list[Turn]]:
    """The functions and classes at the top of a file that a page holds, and what turns they give."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return [], []
    lines = source.splitlines(keepends=True)
    snippets = [
        "".join(lines[node.lineno - 1 : node.end_lineno])
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.decorator_list
        and 2 <= (node.end_lineno or 0) - node.lineno <= 50
    ]
    return [s if s.endswith("\n") else s + "\n" for s in snippets], list(derived_turns(source))


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
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Documents:
    """Encode each document as END_OF_TEXT followed by its tokens."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([end, *encoding.ids], dtype=np.int32) for encoding in tokenizer.encode_batch(documents)]


def training_windows(
    documents: Documents, context: int, batch: int, seed: int
) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """Yield for every step, for ever, where its windows start: int64 [batch], in a stream of tokens.

    The stream, int32 [tokens], comes with the first step of each pass over the documents, None with the others. A
    pass lays the documents end to end in a new order and cuts windows from a random start, so windows begin anywhere
    in a file, and never twice at the same place. One window in eight begins with the first token of a document
    instead, without the END_OF_TEXT before it, as prompts do.
    """
    lengths = np.array([len(document) for document in documents])
    for epoch in range(2**31):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(documents))
        stream = np.concatenate([documents[i] for i in order])
        last = len(stream) - context - 1
        if last < 0:
            raise ValueError(f"the text must have more tokens than a window of {context}; got {len(stream)}")
        beginnings = np.concatenate([[0], np.cumsum(lengths[order])[:-1]]) + 1
        beginnings = beginnings[beginnings <= last]
        starts = rng.permutation(np.arange(rng.integers(min(context, last + 1)), last + 1, context))
        at_beginning = rng.random(len(starts)) < 1 / 8
        starts[at_beginning] = rng.choice(beginnings, at_beginning.sum())
        for i, group in enumerate(range(0, max(1, len(starts) - batch + 1), batch)):
            chosen = starts[group : group + batch]
            yield (stream if i == 0 else None), np.resize(chosen, batch)
