"""What is served: cases in the order of their worth, the most telling first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.serving.shapes import LLAMA_2, Shape

SHORTEST_PROMPT, FEWEST_NEW = 8, 8  # below these a scaled case would show nothing


@dataclass(frozen=True)
class Asked:
    """One request: when it arrives, in seconds after the start, and its tokens."""

    arrival: float
    prompt_len: int
    new_tokens: int

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return self.prompt_len + self.new_tokens


@dataclass(frozen=True)
class Case:
    """Requests for one model.

    Attributes:
        key: as typed after --only.
        name: the case in words.
        ladder: cases of one ladder ask for more and more; who is out of memory on a rung climbs no further.
        seconds: what a contestant may be expected to take on a data-centre GPU, loading included.
    """

    key: str
    name: str
    shape: Shape
    asked: tuple[Asked, ...]
    ladder: str = ""
    seconds: float = 40.0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(each.length for each in self.asked)

    @property
    def at_once(self) -> bool:
        """Whether all requests are there from the start."""
        return not any(each.arrival for each in self.asked)

    def prompts(self, seed: int = 0) -> list[list[int]]:
        """Random token ids, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randint(3, self.shape.vocab, (each.prompt_len,), generator=generator).tolist()
            for each in self.asked
        ]


def poisson_arrivals(count: int, mean_gap: float, seed: int) -> list[float]:
    """Seconds at which requests arrive independently of one another: the gaps are drawn exponentially.

    The first is there at 0.
    """
    draw = random.Random(seed)
    arrivals = [0.0]
    while len(arrivals) < count:
        arrivals.append(arrivals[-1] + draw.expovariate(1 / mean_gap))
    return arrivals[:count]


def spread(shortest: int, longest: int, count: int, seed: int) -> list[int]:
    """Lengths evenly spread from the shortest to the longest, in no order."""
    lengths = [shortest + (longest - shortest) * i // max(count - 1, 1) for i in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def make_cases(scale: int = 1, seed: int = 0) -> list[Case]:
    """All cases, the most telling first.

    Args:
        scale: divides layers, width, vocabulary and lengths; the number of requests stays.
        seed: of lengths' order, new tokens and arrivals.
    """
    seven, thirteen = (LLAMA_2[name].scaled(scale) for name in ("7B", "13B"))

    def length(tokens: int) -> int:
        return max(SHORTEST_PROMPT, tokens // scale)

    new = max(FEWEST_NEW, 128 // scale)

    def eight_k(count: int) -> Case:
        asked = tuple(Asked(0.0, length(8192), new) for _ in range(count))
        return Case(
            f"7b-8k-{count}", f"{seven.name}, {_requests(count)} of {length(8192):,} tokens", seven, asked
        )

    def up_to_32k(count: int) -> Case:
        asked = tuple(Asked(0.0, length(32768 >> i % 4), new) for i in range(count))
        name = f"{thirteen.name}, {_requests(count)} of up to {length(32768):,} tokens"
        return Case(f"13b-32k-{count}", name, thirteen, asked, "13b-32k", 60.0)

    def many(count: int) -> Case:
        lengths = spread(length(128), length(2048), count, seed)
        name = f"{seven.name}, {_requests(count)} of {length(128):,} to {length(2048):,} tokens"
        return Case(f"7b-2k-{count}", name, seven, tuple(Asked(0.0, n, new) for n in lengths), "7b-2k", 60.0)

    arrivals = poisson_arrivals(8, 0.25, seed)
    lengths = spread(length(256), length(8192), 8, seed)
    texts = spread(max(FEWEST_NEW, new // 2), new * 2, 8, seed + 1)
    mixed = Case(
        "7b-mixed-8",
        f"{seven.name}, 8 requests of {min(lengths):,} to {max(lengths):,} tokens, arriving at random",
        seven,
        tuple(Asked(*each) for each in zip(arrivals, lengths, texts, strict=True)),
    )
    return [
        eight_k(4), mixed, up_to_32k(1), up_to_32k(2), up_to_32k(4), eight_k(8), many(64), eight_k(1), up_to_32k(8),
        many(256),
    ]  # fmt: skip


def chosen(cases: Sequence[Case], keys: Sequence[str]) -> list[Case]:
    """The cases of these keys, in their own order; all where none is given.

    Raises:
        ValueError: a key that no case has.
    """
    known = [case.key for case in cases]
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(f"--only must be some of {', '.join(known)}; got {', '.join(unknown)}")
    return [case for case in cases if not keys or case.key in keys]


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"
