"""Who serves: transformers' contiguous caches, its continuous batching, and Quire, by one clock.

A contestant is made from a model and a case, and serves the case's prompts at their times of arrival. What it returns
is when each token reached the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol

import torch

from benchmarks.serving.cases import Asked, Case
from benchmarks.serving.memory import NoRoom
from benchmarks.turns import Absent

MAX_BATCH_TOKENS = 2048  # of a step, for both that batch continuously
CACHE_SHARE = 0.9  # of what the weights leave of the budget; the rest is for activations
WARM_UP = (Asked(0.0, 40, 4), Asked(0.0, 7, 4))


@dataclass
class Served:
    """What came of a trace.

    Attributes:
        tokens: of each request, in the order of the trace.
        times: for each of these tokens, seconds from the trace's start until it was on the host.
        allocated_slots, filled_slots: of the KV cache at its largest; a slot holds one token, in all layers.
        preemptions: how often a request gave its memory back and was computed again.
    """

    tokens: list[list[int]]
    times: list[list[float]]
    allocated_slots: int = 0
    filled_slots: int = 0
    preemptions: int = 0

    @classmethod
    def nothing(cls, count: int) -> Served:
        """Before the first token of so many requests."""
        return cls([[] for _ in range(count)], [[] for _ in range(count)])


@dataclass(frozen=True)
class Room:
    """What a contestant may know of its task beforehand.

    Attributes:
        slots: most slots that the memory budget leaves for keys and values.
        asked: the requests to come.
    """

    slots: int
    asked: Sequence[Asked]

    def pages(self, page_size: int) -> int:
        """Pages for all requests at once, or as many as the budget leaves.

        Raises:
            NoRoom: not even the longest request fits.
        """
        needed = [-(-each.length // page_size) for each in self.asked]
        pages = min(sum(needed), self.slots // page_size)
        if pages < max(needed):
            raise NoRoom(
                f"the budget leaves {self.slots:,} slots, the longest request needs {max(needed) * page_size:,}"
            )
        return pages


class Contestant(Protocol):
    """Serves a trace: prompts with their arrivals.

    Attributes:
        reserved: slots that it allocated for keys and values before the first prompt.
        written: of these, those that it has written to all the same, so that on a CPU they are resident.
    """

    reserved: int
    written: int

    def serve(self, prompts: list[list[int]], asked: Sequence[Asked]) -> Served:
        """All prompts in, all tokens out."""

    def close(self) -> None:
        """Give back what it holds."""


class Quire:
    """quire's engine: requests join the running batch as they arrive."""

    def __init__(self, model: Any, room: Room, **options: Any) -> None:
        import quire

        page_size = 16
        try:
            self.llm = quire.LLM(
                model,
                page_size=page_size,
                num_pages=room.pages(page_size),
                max_num_seqs=len(room.asked),
                max_batch_tokens=MAX_BATCH_TOKENS,
                enable_prefix_caching=False,  # as for the others: no prompt is asked twice
                **options,
            )
        except quire.UnsupportedError as error:
            raise Absent(str(error)) from error
        self.reserved, self.written = self.llm.model.num_pages * page_size, 0

    def serve(self, prompts: list[list[int]], asked: Sequence[Asked]) -> Served:
        from quire import SamplingParams
        from quire.engine import EngineStats

        llm, served = self.llm, Served.nothing(len(asked))
        llm.stats = EngineStats()
        to_come = deque(sorted(range(len(asked)), key=lambda i: asked[i].arrival))
        number: dict[int, int] = {}
        start = time.perf_counter()
        while to_come or llm.has_unfinished:
            while to_come and asked[to_come[0]].arrival <= time.perf_counter() - start:
                i = to_come.popleft()
                params = SamplingParams(max_tokens=asked[i].new_tokens, ignore_eos=True)
                number[llm.add_request(prompts[i], params)] = i
            if not llm.has_unfinished:
                _sleep_until(start + asked[to_come[0]].arrival)
                continue
            deltas = llm.step()
            now = time.perf_counter() - start
            for delta in deltas:
                i = number[delta.request_id]
                served.tokens[i] += delta.token_ids
                served.times[i] += [now] * len(delta.token_ids)
                if delta.output is not None:
                    served.preemptions += delta.output.preemptions
        served.allocated_slots = llm.stats.peak_pages * llm.model.page_size
        served.filled_slots = served.allocated_slots - llm.stats.peak_unused_slots
        return served

    def close(self) -> None:
        del self.llm


class Generate:
    """model.generate with a contiguous cache: whoever has arrived becomes a batch, padded on the left, run to its end.

    Args:
        static: the cache is allocated at full length, and the decode step compiled, which transformers does on GPUs.
    """

    reserved = written = 0

    def __init__(self, model: Any, room: Room, *, static: bool = False) -> None:
        self._model, self._static = model, static
        if static and model.device.type != "cuda":
            raise Absent("transformers compiles its static cache on GPUs alone")
        if static and any(each.arrival for each in room.asked):
            raise Absent(
                "each batch would be compiled anew: the number of requests that arrive together varies"
            )

    def serve(self, prompts: list[list[int]], asked: Sequence[Asked]) -> Served:
        served = Served.nothing(len(asked))
        to_come = deque(sorted(range(len(asked)), key=lambda i: asked[i].arrival))
        start = time.perf_counter()
        while to_come:
            _sleep_until(start + asked[to_come[0]].arrival)
            now = time.perf_counter() - start
            batch = [i for i in to_come if asked[i].arrival <= now]
            to_come = deque(i for i in to_come if asked[i].arrival > now)
            self._run(batch, prompts, asked, served, start)
        return served

    def _run(
        self, batch: list[int], prompts: list[list[int]], asked: Sequence[Asked], served: Served, start: float
    ) -> None:
        device = self._model.device
        widest = max(len(prompts[i]) for i in batch)
        longest = max(asked[i].new_tokens for i in batch)
        padding = [widest - len(prompts[i]) for i in batch]
        ids = torch.tensor([[0] * pad + prompts[i] for pad, i in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (widest - pad) for pad in padding])
        clock = _Clock(start)
        tokens = self._model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=longest,
            do_sample=False,
            streamer=clock,
            **({"cache_implementation": "static"} if self._static else {}),
        )[:, widest:].tolist()
        for i, row in zip(batch, tokens, strict=True):
            served.tokens[i] = row[: asked[i].new_tokens]
            served.times[i] = clock.times[: asked[i].new_tokens]
        # The last token of a text is handed out, never computed: it takes no slot.
        allocated = len(batch) * (widest + longest - 1)
        if allocated > served.allocated_slots:
            served.allocated_slots = allocated
            served.filled_slots = sum(asked[i].length - 1 for i in batch)

    def close(self) -> None:
        del self._model


class GenerateBatch:
    """transformers' continuous batching: the loop behind `generate_batch`, given each request as it arrives."""

    PAGE_SIZE = 256  # its default

    def __init__(self, model: Any, room: Room) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._model = model
        self._config = GenerationConfig(
            max_new_tokens=max(each.new_tokens for each in room.asked),
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        page_size = self._page_size = min(
            self.PAGE_SIZE, 1 << (max(each.length for each in room.asked) - 1).bit_length()
        )
        # transformers 5.17 gave it another name.
        size = "page_size" if "page_size" in signature(ContinuousBatchingConfig).parameters else "block_size"
        self._batching = ContinuousBatchingConfig(
            **{size: page_size},
            num_blocks=room.pages(page_size) + 1,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_requests_per_batch=len(room.asked),
            allow_block_sharing=False,
        )
        self.reserved = self.written = self._batching.num_blocks * page_size  # it fills its cache with zeros
        self._manager: Any = None

    def serve(self, prompts: list[list[int]], asked: Sequence[Asked]) -> Served:
        if self._manager is None:
            self._manager = self._model.init_continuous_batching(
                generation_config=self._config, continuous_batching_config=self._batching
            )
            self._manager.warmup()
            self._manager.start()
        served, manager = Served.nothing(len(asked)), self._manager
        start = time.perf_counter()
        number: dict[str, int] = {}
        for i in sorted(range(len(asked)), key=lambda i: asked[i].arrival):
            _sleep_until(start + asked[i].arrival)
            name = manager.add_request(prompts[i], max_new_tokens=asked[i].new_tokens, record_timestamps=True)
            number[name] = i
        for _ in asked:
            result = self._next_result()
            i = number[result.request_id]
            served.tokens[i] = list(result.generated_tokens)
            served.times[i] = [at - start for at in result.timestamps]
        page = self._page_size
        # Computed, where it says nothing itself: only the last page of a request is not full.
        served.allocated_slots = sum(-(-(each.length - 1) // page) * page for each in asked)
        served.filled_slots = sum(each.length - 1 for each in asked)
        return served

    def _next_result(self) -> Any:
        while True:
            result = self._manager.get_result(timeout=0.5)
            if result is not None:
                if result.error is not None:
                    raise RuntimeError(result.error)
                if result.is_finished():
                    return result
            elif not self._manager.is_running():
                fatal = self._manager.background_thread_status.fatal_error
                raise RuntimeError(f"its thread ended: {fatal}")

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=10)
            self._manager.destroy()
        del self._model


CONTESTANTS: dict[str, Any] = {
    "generate, dynamic cache": Generate,
    "generate, static cache, compiled": lambda model, room: Generate(model, room, static=True),
    "generate_batch": GenerateBatch,
    "quire": Quire,
    "quire, compiled": lambda model, room: Quire(model, room, compile=True),
}
BY_DEFAULT = [name for name in CONTESTANTS if name != "quire, compiled"]


def warm_up_of(who: str, case: Case) -> Sequence[Asked]:
    """What a contestant serves before the clock starts: a little, or all where it is compiled for these very sizes."""
    if who == "generate, static cache, compiled":
        return case.asked
    longest = max(1, case.longest - WARM_UP[0].new_tokens)
    return [Asked(0.0, min(each.prompt_len, longest), each.new_tokens) for each in WARM_UP[: len(case.asked)]]


@dataclass
class _Clock:
    """A streamer that notes when each token of a batch is on the host."""

    start: float
    times: list[float] = field(default_factory=list)
    _read_prompt: bool = False

    def put(self, tokens: torch.Tensor) -> None:
        """The prompts come first, then a token of each row."""
        if self._read_prompt:
            self.times.append(time.perf_counter() - self.start)
        self._read_prompt = True

    def end(self) -> None:
        """All tokens were there before."""


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))
