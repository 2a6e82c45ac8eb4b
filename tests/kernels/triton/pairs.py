"""Few cases that still meet every pair of choices: most mistakes need two things to come together, not five."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def every_pair(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Choices of one value per factor such that any two values of any two factors meet in some choice.

    Greedy: each case starts from a pair that is still missing, and takes for every other factor the value that
    brings the most missing pairs. Source: AETG, Cohen et al. 1997.
    """
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }
    cases = []
    while missing:
        case = dict(min(missing, key=lambda pair: [(names.index(name), value) for name, value in pair]))
        for name in names:
            if name not in case:
                case[name] = max(
                    range(len(factors[name])),
                    key=lambda value, name=name: _gain(missing, case, names, name, value),
                )
        missing -= {(x, y) for x, y in combinations(((name, case[name]) for name in names), 2)}
        cases.append({name: factors[name][case[name]] for name in names})
    return cases


def one_in(stride: int, cases: Sequence[Any]) -> list[Any]:
    """Parameters of which every stride-th runs always and the others with the exhaustive cases."""
    return [
        case if i % stride == 0 else pytest.param(case, marks=pytest.mark.exhaustive)
        for i, case in enumerate(cases)
    ]


def _gain(missing: set[Any], case: Mapping[str, int], names: Sequence[str], name: str, value: int) -> int:
    """Missing pairs that this value makes with the values chosen so far."""
    mine = names.index(name)
    return sum(
        (((other, chosen), (name, value)) if names.index(other) < mine else ((name, value), (other, chosen)))
        in missing
        for other, chosen in case.items()
    )
