"""A model that remembers nothing but what its pages hold, and tokenizers of known bytes."""

from __future__ import annotations

import threading
import weakref
import zlib
from collections import abc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from quire.engine import BeamSearchParams, Engine, SamplingParams
from quire.engine.sampler import sample
from quire.engine.sequence import Sequence
from quire.hf import Step
from quire.pages import PageAllocator, PrefixCache, Swap, SwapCosts
from quire.spec import Visibility

EMPTY = -1
EOS = 256
SIX_TOKENS = SamplingParams(max_tokens=6)

Rule = Callable[[np.ndarray], np.ndarray]


class FakeModel:
    """Logits are a function of a sequence's tokens, which it reads back from its slots.

    A slot given to two sequences, a page table in the wrong order or a position off by one changes the
    history, and with it every later token. The position is kept beside the token and checked.

    groups: what the layers of each page table see; each of them reads back what its queries see, and a page that was
    given back holds nothing. Logits depend on what the group sees that sees most.

    runs_ahead: take a step before the one before it has been handed out, with its tokens as a tensor, as a GPU does.
    num_host_pages: pages that host memory has room for; they always come back, as copies take no time here.
    """

    device = torch.device("cpu")
    generation_config: GenerationConfig | None = None
    bytes_per_page = 64

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        vocab_size: int = 50,
        max_seq_len: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        rule: Rule | None = None,
        groups: tuple[Visibility, ...] = (Visibility(),),
        num_host_pages: int = 0,
        runs_ahead: bool = False,
    ) -> None:
        self.runs_ahead = runs_ahead
        self.allocator = PageAllocator(num_pages, on_drop=self.poison)
        self.groups = groups
        self.prefix_cache = PrefixCache(self.allocator, page_size, groups)
        self.lock = threading.RLock()
        self.num_pages = num_pages
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.eos_token_ids = eos_token_ids
        self.slots = np.full((num_pages * page_size, 2), EMPTY)
        self.swap = None
        if num_host_pages:
            self.swap = Swap(self.prefix_cache, FakeStore(self, num_host_pages), SwapCosts(float("inf")))
        self._rule = rule or self.logits_of
        self.step_sizes: list[int] = []
        self.logits_rows: list[int] = []

    def rule(self, history: np.ndarray) -> np.ndarray:
        """Logits after a text, of which the last token may see a part only."""
        return self._rule(history[min(sight.first_key(len(history) - 1) for sight in self.groups) :])

    def logits_of(self, history: np.ndarray) -> np.ndarray:
        seed = zlib.crc32(np.ascontiguousarray(history, dtype=np.int64).tobytes())
        return np.random.default_rng(seed).standard_normal(self.vocab_size).astype(np.float32)

    def __repr__(self) -> str:
        return f"FakeModel({self.allocator!r})"

    def poison(self, pages: abc.Iterable[int]) -> None:
        self.slots.reshape(self.num_pages, self.page_size, 2)[list(pages)] = EMPTY

    def copy_pages(self, copies: abc.Sequence[tuple[int, int]]) -> None:
        pages = self.slots.reshape(self.num_pages, self.page_size, 2)
        for source, destination in copies:
            pages[destination] = pages[source]

    def forward(self, step: Step, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        if input_ids is not None:
            step = replace(step, input_ids=input_ids)
        slots = step.slot_mapping.numpy()
        assert len(set(slots.reshape(-1).tolist())) == slots.size, "two tokens of one step in one slot"
        assert step.num_groups == len(self.groups)
        self.slots[slots, 0] = step.input_ids.numpy()
        self.slots[slots, 1] = step.position_ids.numpy()
        self.step_sizes.append(step.num_tokens)
        self.logits_rows.append(len(step.logits_indices))
        ends = step.cu_seqlens_q.numpy()[1:]
        rows = [np.zeros((0, self.vocab_size), dtype=np.float32)]
        histories = [self._history(step, sequence) for sequence in range(len(ends))]
        for row in step.logits_indices.tolist():
            sequence = int(np.searchsorted(ends, row, side="right"))
            history = histories[sequence]
            rows.append(self.rule(history[: len(history) - (ends[sequence] - 1 - row)])[None])
        return torch.from_numpy(np.concatenate(rows))

    def _history(self, step: Step, sequence: int) -> np.ndarray:
        """The tokens of a sequence as far as its queries see them; those before are EMPTY."""
        length = int(step.seq_lens[sequence])
        first_query = length - int(step.cu_seqlens_q.diff()[sequence])
        history = np.full(length, EMPTY)
        for group, sight in enumerate(self.groups):
            pages = step.table_of(group)[sequence].numpy()[: -(-length // self.page_size)]
            assert (pages >= 0).all(), "a plan refuses this page table"
            slots = (pages[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)[:length]
            seen = np.arange(sight.first_key(first_query), length)
            tokens, positions = self.slots[slots[seen]].T
            assert (positions == seen).all(), "a token is not where its page table says"
            assert ((history[seen] == tokens) | (history[seen] == EMPTY)).all(), (
                "groups hold different tokens"
            )
            history[seen] = tokens
        return history

    def continuation(self, prompt: abc.Sequence[int], num_tokens: int) -> list[int]:
        """What greedy generation must give, computed without any pages."""
        history = list(prompt)
        for _ in range(num_tokens):
            history.append(int(np.argmax(self.rule(np.array(history)))))
        return history[len(prompt) :]

    def samples(self, prompt: abc.Sequence[int], params: SamplingParams) -> list[list[int]]:
        """What each sample of a request with a seed must be, drawn one after the other and without any pages."""
        texts = []
        for index in range(params.n):
            alone = replace(params, n=1, seed=params.seed + index)
            length = len(prompt) + params.max_tokens
            sequence = Sequence(0, prompt, alone, max_length=length, stop_token_ids=frozenset())
            while sequence.finish_reason is None:
                [token] = sample(torch.from_numpy(self.rule(np.array(sequence.tokens)))[None], [sequence])
                sequence.accept(token)
            texts.append(sequence.tokens[len(prompt) :].tolist())
        return texts

    def beams(self, prompt: abc.Sequence[int], params: BeamSearchParams) -> list[tuple[list[int], float]]:
        """What a beam search must find, tokens and score, by the rule of early_stopping=False and without any pages."""
        running, ended = [([], np.float32(0))], []
        for length in range(1, params.max_tokens + 1):
            followed = []
            for text, total in running:
                logits = torch.from_numpy(self.rule(np.array([*prompt, *text])))
                logprobs = logits.log_softmax(dim=-1).numpy() + total
                followed += [([*text, token], logprobs[token]) for token in range(self.vocab_size)]
            followed.sort(key=lambda each: -each[1])
            divisor = length**params.length_penalty
            stops = [text[-1] in self.eos_token_ids or length == params.max_tokens for text, _ in followed]
            best = zip(followed[: params.beam_width], stops, strict=False)
            ended += [(text, total / divisor) for (text, total), stop in best if stop]
            ended = sorted(ended, key=lambda each: -each[1])[: params.beam_width]
            going = zip(followed, stops, strict=True)
            running = [each for each, stop in going if not stop][: params.beam_width]
            full = len(ended) == params.beam_width
            if not running or (full and not running[0][1] / divisor > ended[-1][1]):
                break
        return ended


class FakeStore:
    """Host memory of a FakeModel."""

    bytes_per_page = 1

    def __init__(self, model: FakeModel, num_pages: int) -> None:
        self.num_pages = num_pages
        self.model = weakref.proxy(model)  # or models would live until the garbage collector comes
        self.slots = np.full((num_pages, model.page_size, 2), EMPTY)

    @property
    def _pages(self) -> np.ndarray:
        return self.model.slots.reshape(-1, self.model.page_size, 2)

    def save(self, pages: abc.Sequence[int], host_pages: abc.Sequence[int]) -> None:
        assert len(set(host_pages)) == len(set(pages)) == len(pages) == len(host_pages)
        assert (self._pages[pages] != EMPTY).all(), "a page that is not full, or was dropped before"
        self.slots[host_pages] = self._pages[pages]

    def load(self, host_pages: abc.Sequence[int], pages: abc.Sequence[int]) -> None:
        assert len(set(host_pages)) == len(set(pages)) == len(pages) == len(host_pages)
        assert (self._pages[pages] == EMPTY).all(), "a page that is in use"
        self._pages[pages] = self.slots[host_pages]

    def checksum(self, host_page: int) -> int:
        return zlib.crc32(self.slots[host_page].tobytes())


def fork(engine: Engine, request_id: int, token: int) -> Sequence:
    """Give a request that has just generated its first token a second sequence, which generated `token` instead."""
    request = engine.requests[request_id]
    [first] = request.sequences
    prompt = first.tokens[: first.num_prompt_tokens]
    assert len(first.tokens) == len(prompt) + 1
    second = Sequence(
        1000 + request_id, prompt, first.params, max_length=first.max_length, stop_token_ids=frozenset()
    )
    second.tokens.append(token)
    second.num_computed = first.num_computed
    second.prefix = first.prefix
    engine.table.fork(first.seq_id, second.seq_id)
    request._sequences.append(second)
    return second


def scripted(model_vocab: int, prompt_length: int, script: abc.Sequence[int]) -> Rule:
    """A rule that says the tokens of a script one after the other, whatever the prompt."""

    def rule(history: np.ndarray) -> np.ndarray:
        logits = np.zeros(model_vocab, dtype=np.float32)
        logits[script[(len(history) - prompt_length) % len(script)]] = 1.0
        return logits

    return rule


def byte_tokenizer(*pairs: bytes) -> PreTrainedTokenizerFast:
    """256 tokens of one byte each, token id = byte; then <eos>, then a token for each pair of bytes given."""
    characters = [_byte_character(byte) for byte in range(256)]
    vocab = {character: byte for byte, character in enumerate(characters)}
    vocab["<eos>"] = EOS
    merges = [(characters[pair[0]], characters[pair[1]]) for pair in pairs]
    vocab |= {"".join(merge): EOS + 1 + i for i, merge in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def _byte_character(byte: int) -> str:
    """The printable character that byte-level BPE writes for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sorted(set(range(256)) - set(printable)).index(byte))


def ask(engine: Engine, prompt, params: SamplingParams = SIX_TOKENS):
    """One request alone: its output, which must be what the model says, and how many tokens each step computed."""
    before = len(engine.model.step_sizes)
    [output] = engine.generate([list(prompt)], params)
    assert output.token_ids == engine.model.continuation(prompt, params.max_tokens)
    return output, engine.model.step_sizes[before:]


def drain(engine: Engine) -> dict:
    """Step until nothing is left; the outputs by request id."""
    outputs = {}
    while engine.has_unfinished:
        outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output}
    return outputs
