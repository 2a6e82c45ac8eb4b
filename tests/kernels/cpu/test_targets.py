"""The same kernels on other CPUs: right with AVX2 and with SSE2 alone, and made of vectors on ARM.

Each target needs a process of its own, for Numba asks once which CPU it compiles for.
"""

import pytest
from other_cpus import ON_X86, found_on, pytest_on

# What kernels may ask the rest of the process for: the C library's, and OpenMP's, which torch brings along.
LIBRARY = {"exp2f", "log2f", "memset", "memcpy", "GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num"}

# A kernel takes seconds to compile, so each target runs a few; with the exhaustive cases every page dtype and odd
# head_dim goes through decode on one target and through prefill on the other, int8 decode on both.
SHAPES = [
    "float32-same-d40-g2",
    "bfloat16-same-d72-g4",
    "float16-same-d80-g3",
    "bfloat16-int8-d96-g1",
    "float16-fp8_e4m3-d37-g2",
    "float32-fp8_e5m2-d20-g4",
]
EVEN = [f"decode-{shape}" for shape in SHAPES[::2]] + [f"prefill-{shape}" for shape in SHAPES[1::2]]
ODD = [f"decode-{shape}" for shape in SHAPES[1::2]] + [f"prefill-{shape}" for shape in SHAPES[::2]]
INT8_DECODE = "decode-bfloat16-int8-d96-g1"
STORES = [f"store-{shape}" for shape in SHAPES[2:]]
QUANTISED_STORES = STORES[1:3]
NO_PAIRS = [
    "decode-bfloat16-same-d32-g1",
    "decode-bfloat16-int8-d64-g1",
]  # multiplied in pairs where that is fast
FEW = ["decode-float32-same-d20-g2", "prefill-float16-fp8_e4m3-d20-g2"]
TILES = ["decode-bfloat16-same-d128-g4", "prefill-float32-same-d128-g1", "decode-float32-same-d128-g1"]


@pytest.mark.skipif(not ON_X86, reason="x86's extensions cannot be turned off here")
@pytest.mark.parametrize(
    ("cpu", "cases", "registers", "fuses"),
    [
        ("haswell", [*TILES[:2], QUANTISED_STORES[0]], {"xmm", "ymm"}, True),
        pytest.param("haswell", [*NO_PAIRS, FEW[1]], {"xmm", "ymm"}, True, marks=pytest.mark.exhaustive),
        pytest.param("x86-64", [*FEW, *QUANTISED_STORES], {"xmm"}, False, marks=pytest.mark.exhaustive),
        pytest.param(
            "haswell", [*EVEN, INT8_DECODE, *STORES], {"xmm", "ymm"}, True, marks=pytest.mark.exhaustive
        ),
        pytest.param("x86-64", [*ODD, *STORES], {"xmm"}, False, marks=pytest.mark.exhaustive),
    ],
    ids=["avx2", "avx2, no pairs", "sse2", "avx2, every dtype", "sse2, every dtype"],
)
def test_kernels_are_right_on_narrower_x86(cpu, cases, registers, fuses, tmp_path):
    found = found_on(cpu, tmp_path, "run", *cases)
    assert found["pair_products"] == 0
    assert found["kernels"] == len(cases) + 1, "each case compiles a kernel, the first a merge too"
    assert set(found["registers"]) == registers
    if cases[:2] == TILES[:2]:  # on all targets: test_no_loop_that_multiplies_moves_its_sums_to_the_stack
        assert len(found["spills"]) >= 4, "both products of both kernels are found"
        assert not any(found["spills"])
    assert (found["fused"] > 0) == fuses
    assert set(found["called"]) <= LIBRARY


@pytest.mark.skipif(not ON_X86, reason="x86's extensions cannot be turned off here")
def test_every_dtype_is_converted_to_the_bit_where_no_instruction_does_it(tmp_path):
    result = pytest_on(
        "x86-64",
        tmp_path,
        "read or stores",
        "simd/memory",
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(not ON_X86, reason="x86's extensions cannot be turned off here")
@pytest.mark.parametrize("cpu", ["haswell", pytest.param("x86-64", marks=pytest.mark.exhaustive)])
def test_linear_layers_are_right_on_narrower_x86(cpu, tmp_path):
    """Whole tiles and tails of each, in every dtype."""
    result = pytest_on(cpu, tmp_path, "exact_as_torch and (8-32-64 or 3-21-7)", "linear")
    assert result.returncode == 0, result.stdout
    assert "12 passed" in result.stdout


PAIRS = ["decode-bfloat16-same-d32-g1", "prefill-bfloat16-same-d32-g1", "decode-bfloat16-int8-d64-g1"]
SINGLE = ["decode-bfloat16-same-d20-g1", "decode-float16-int8-d64-g1"]  # a tail; queries that are finer


@pytest.mark.parametrize(
    ("cpu", "in_pairs", "singly"),
    [
        ("znver4", PAIRS[2:], SINGLE[1:]),
        pytest.param("znver4", PAIRS[:2], SINGLE[:1], marks=pytest.mark.exhaustive),
        # Intel's cost four multiply-adds.
        pytest.param("sapphirerapids", [], PAIRS[:1], marks=pytest.mark.exhaustive),
    ],
)
def test_bfloat16_pairs_and_bytes_are_multiplied_where_that_is_fast(cpu, in_pairs, singly, tmp_path):
    """Compiled, not run."""
    found = found_on(cpu, tmp_path, "cross", "x86_64-unknown-linux-gnu", *in_pairs, *singly)
    multiplying = [case for case, code in found.items() if code["pair_products"]]
    assert multiplying == in_pairs
    of_bytes = [case for case, code in found.items() if code["byte_products"]]
    assert of_bytes == [case for case in in_pairs if "int8" in case]


@pytest.mark.skipif(not ON_X86, reason="x86's extensions cannot be turned off here")
@pytest.mark.parametrize(
    "chosen",
    [
        "d64-g4 and (far_apart or negative)",
        pytest.param("test_", marks=pytest.mark.exhaustive),
    ],
    ids=["one shape", "every shape"],
)
def test_int8_decode_is_right_as_shorts_with_avx2(chosen, tmp_path):
    result = pytest_on("haswell", tmp_path, chosen, "attend/byte_products")
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
    assert " failed" not in result.stdout


def test_int8_decode_multiplies_shorts_with_avx2_and_never_sums_in_16_bits(tmp_path):
    """Compiled, not run: bfloat16 queries alone, and rows of whole lines."""
    shorts = "decode-bfloat16-int8-d64-g4"
    floats = ["decode-float16-int8-d64-g1"]
    found = found_on("haswell", tmp_path, "cross", "x86_64-unknown-linux-gnu", shorts, *floats)
    assert found[shorts]["short_products"] >= 16, "eight sums in each of two products"
    assert not any(code["saturating"] for code in found.values())
    assert not any(found[case]["short_products"] for case in floats)


# Two of them are run for AVX2 and looked at by the first test above, where this is an x86.
@pytest.mark.parametrize(
    ("triple", "cpu"),
    [
        pytest.param("x86_64-unknown-linux-gnu", "haswell", marks=[pytest.mark.exhaustive] if ON_X86 else []),
        pytest.param("x86_64-unknown-linux-gnu", "cascadelake", marks=pytest.mark.exhaustive),
        pytest.param("x86_64-unknown-linux-gnu", "znver4", marks=pytest.mark.exhaustive),
    ],
    ids=["avx2", "avx512", "avx512, pairs"],
)
def test_no_loop_that_multiplies_moves_its_sums_to_the_stack(triple, cpu, tmp_path):
    """Compiled, not run: a tile of sums fits the registers of its target."""
    for case, code in found_on(cpu, tmp_path, "cross", triple, *TILES).items():
        assert len(code["spills"]) >= 2, f"{case}: both products are found"
        assert not any(code["spills"]), case


WIDENING = {"bfloat16-same": "shl.4s", "float16-int8": "scvtf.4s", "float32-fp8_e4m3": "fcvtl.4s"}


@pytest.mark.parametrize(
    "cases",
    [
        ["decode-bfloat16-same-d128-g4"],
        pytest.param(
            ["decode-float16-int8-d64-g1", "prefill-float32-fp8_e4m3-d72-g1"], marks=pytest.mark.exhaustive
        ),
    ],
    ids=", ".join,
)
def test_arm_gets_vector_instructions_and_nothing_from_libraries_it_may_lack(cases, tmp_path):
    """Compiled, not run: whatever machine this is."""
    found = found_on("neoverse-n1", tmp_path, "cross", "aarch64-unknown-linux-gnu", *cases)
    for case, code in found.items():
        count = code["instructions"].get
        widening = next(name for pages, name in WIDENING.items() if pages in case)
        assert count("fmla.4s", 0) >= 64, f"{case}: products are fused, four lanes at a time"
        assert count(widening, 0) >= 8, f"{case}: pages are widened in vectors"
        assert count("ldr.q", 0) + count("ldp.q", 0) >= 64, f"{case}: rows are loaded 16 bytes at a time"
        element_by_element = sum(count(name, 0) for name in ("ldrh.w", "ldrsb.w", "ldrb.w", "ldr.h", "ldr.b"))
        assert element_by_element <= 16, f"{case}: elements are taken one by one"
        if (
            "g4" in case or "prefill" in case
        ):  # a tile of one head loads more values at once than NEON has registers
            assert not any(code["spills"]), f"{case}: a tile of sums fits the registers"
        assert count("fmadd.s", 0) == 0, f"{case}: a product of single numbers"
        assert set(code["called"]) <= LIBRARY
