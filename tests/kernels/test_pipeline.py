"""How compiled functions are made: parts are inlined, and what a config rules out is never looked at."""

import re
from typing import NamedTuple

import numba
import pytest

from quire.kernels import compile as compiling
from quire.kernels.compile import compile_time, part


@compile_time
class Options(NamedTuple):
    count: int
    wide: int = 0

    @property
    def doubled(self):
        return 2 * self.count


def compiled(function):
    """As ``compiled`` of the kernels, without a file of machine code."""
    return numba.njit(pipeline_class=compiling.KernelCompiler, **compiling.OPTIONS)(function)


def call(function, *arguments):
    """As kernels are called: by the types of these arguments, of which Numba's own dispatch sees no config's value."""
    return compiling.machine_code(function, *arguments)(*arguments)


@part
def add_up(options, start):
    total = start
    for i in range(options.count):
        total += i * options.doubled
    return total


@part
def twice(options, start):
    return add_up(options, start) + add_up(options, start + 1)


def test_fields_and_properties_are_numbers_and_parts_within_parts_compute():
    @compiled
    def run(options, start):
        return twice(options, start) + options.doubled

    assert call(run, Options(4), 10) == 2 * (6 * 8) + 21 + 8
    assert call(run, Options(0), 10) == 21


def test_a_branch_that_a_config_rules_out_is_not_typed():
    @part
    def wrong(value):
        return value.no_such_field

    @compiled
    def run(options, start):
        if options.wide:
            return wrong(start)
        return start + 1

    assert call(run, Options(1), 1) == 2
    with pytest.raises(numba.TypingError, match="no_such_field"):
        call(run, Options(1, wide=1), 1)


def test_parts_leave_no_function_and_no_call_in_the_machine_code():
    @compiled
    def run(options, start):
        return twice(options, start)

    call(run, Options(3), 1)
    [made] = [compiled.library.get_asm_str() for compiled in run.overloads.values()]
    calls = re.findall(r"^\s+(?:callq?|bl)\s.*|movabsq\s+\$_ZN\S+", made, re.M)
    assert not [call for call in calls if "add_up" in call or "twice" in call]
    for function in (add_up, twice):
        assert all(
            each.library.get_pointer_to_function(each.fndesc.llvm_func_name) == 0
            for each in function.overloads.values()
        )


def test_an_error_inside_a_part_reaches_the_caller():
    @part
    def refuse(options, start):
        if start > options.count:
            raise ValueError("too many")
        return start

    @compiled
    def run(options, start):
        return refuse(options, start)

    assert call(run, Options(3), 3) == 3
    with pytest.raises(ValueError, match="too many"):
        call(run, Options(3), 4)
