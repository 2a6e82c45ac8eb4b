"""What the backend would launch on each chip, compiled without one: it fits, loads whole vectors, spills no more."""

import os
from dataclasses import replace

import pytest
import torch
import triton
from machine_code import CHIPS, KIB, assembler_remarks, read_machine_code, standing_in
from pairs import every_pair
from support import Shape, features, make_batch
from waiting import done_before_waiting

from quire.kernels import triton as backend
from quire.kernels.call import AttentionCall, Scoring
from quire.kernels.triton import hopper, tune
from quire.planning.step import plan_step

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="where kernels are interpreted, none is compiled"
)

HOPPERS_TRITON = triton.__version__.startswith(hopper.TRITON)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LLAMA = Shape(BF16, 128, group=4)
SHAPES = [
    LLAMA,
    Shape(BF16, 128, group=4, kv_dtype="int8"),
    Shape(F32, 128, group=1),
    Shape(BF16, 128, group=4, kv_dtype="fp8_e4m3"),
    Shape(F16, 64, group=8, kv_dtype="fp8_e5m2"),
    Shape(F16, 80, group=1),
    Shape(BF16, 256, group=2),
]
FEATURES = ["window", "softcap", "alibi", "sinks", "tree"]
Q_LENS = {"decode": [1, 1], "prefill": [40, 30]}
exhaustive = pytest.mark.exhaustive
# Every chip compiles the first shape, the one that the tile table is made for a few more; exhaustive cases are every
# shape there, and five of them on every chip.
FEW = [SHAPES[1], SHAPES[2], SHAPES[4]]
CASES = [
    pytest.param(
        (chip, shape, step), marks=[] if shape == LLAMA or (chip == "sm_90" and shape in FEW) else exhaustive
    )
    for shape in SHAPES
    for step in Q_LENS
    for chip in (CHIPS if shape in SHAPES[:5] else ["sm_90"])
]
# Bytes of registers that a thread spills to memory, where it is more than none, as Hopper's Triton compiles them.
# They may only go down; where tiles that spill less were measured, they were slower (docs/experiments.md).
SPILLS = {
    "sm_90-bfloat16-same-d128-g4-prefill": 24,  # Hopper's kernel, outside its loops
    "sm_100-bfloat16-same-d128-g4-prefill": 8,
    "sm_80-bfloat16-int8-d128-g4-prefill": 48,
    "sm_90-bfloat16-int8-d128-g4-prefill": 8,
    "sm_90-bfloat16-fp8_e4m3-d128-g4-prefill": 8,
    "sm_80-bfloat16-fp8_e4m3-d128-g4-prefill": 48,  # outside the loops over keys
    "sm_90-float16-fp8_e5m2-d64-g8-prefill": 56,
    "sm_100-float16-fp8_e5m2-d64-g8-decode": 32,  # outside the loop over keys
    "sm_80-float32-same-d128-g1-prefill": 40,
    "sm_89-float32-same-d128-g1-prefill": 56,
    "sm_90-float32-same-d128-g1-prefill": 128,
    "sm_100-float32-same-d128-g1-prefill": 112,
    "sm_90-bfloat16-same-d256-g2-prefill": 144,
}


def compile_attention(chip, shape, q_lens, **asked):
    """The one attention kernel that a step of this shape launches."""
    batch = make_batch(shape, [100, 70], q_lens, page_size=16)
    rules = features(batch, **asked)
    window_left = rules.pop("window_left", -1)
    with standing_in(CHIPS[chip]) as kernels:
        attend(batch, rules, window_left)
    (kernel,) = kernels
    return kernel


def attend(batch, rules, window_left=-1, batch_invariant=False):
    spec = batch.shape.spec(batch.page_size)
    tiling = backend.tiling(spec, batch.q.device, len(batch.seq_lens))
    if batch_invariant:
        tiling = tiling.batch_invariant("triton")
    step = plan_step(
        batch.page_table, batch.seq_lens, batch.cu_seqlens_q, num_kv_heads=spec.num_kv_heads, page_size=spec.page_size,
        causal=True, window_left=window_left, tiling=tiling,
    )  # fmt: skip
    lse = torch.empty(batch.q.shape[:2])
    call = AttentionCall(*batch.pages, torch.empty_like(batch.q), lse, Scoring(**batch.scales, **rules))
    backend.bind(backend.prepare(spec, step, batch.q.device), call)(*call.tensors)


def name(case):
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_attention_fits_its_chip_and_loads_whole_vectors(case):
    chip, shape, step = case
    kernel = compile_attention(chip, shape, Q_LENS[step])
    code = read_machine_code(kernel)
    print(code)
    assert code.shared_bytes <= CHIPS[chip].shared_bytes
    if HOPPERS_TRITON:
        assert code.spilled_bytes <= SPILLS.get(name(case), 0)
    if kernel.metadata.name == "hopper_prefill":  # whole boxes, by the copy engine
        assert code.count("UTMALDG")
        assert code.count("UTMASTG")
        return
    assert code.count(code.vector_loads) * code.threads * 16 >= 2 * shape.head_dim * 16 * shape.dtype.itemsize
    assert code.count(code.narrow_loads) == 0


# Queries that fill shared memory: what is not refused must compile.
LARGE = [Shape(F32, 256, group=4), Shape(F32, 128, group=64), Shape(BF16, 256, group=128)]
LARGE += [Shape(BF16, 128, group=128, kv_dtype="int8"), Shape(F32, 256, group=16, kv_dtype="int8")]


@pytest.mark.parametrize(
    ("chip", "shape"),
    [
        *(("sm_89", shape) for shape in LARGE[:2]),
        *(pytest.param("sm_89", shape, marks=exhaustive) for shape in LARGE[2:]),
        *(pytest.param("sm_90", shape, marks=exhaustive) for shape in LARGE),
    ],
    ids=str,
)
def test_a_tile_fits_shared_memory_or_is_refused_before(chip, shape):
    known = CHIPS[chip].known
    if not tune.fits(shape.spec(16), known):
        assert shape.group * shape.head_dim * shape.dtype.itemsize > known.shared_bytes // 5
        return
    for step in Q_LENS:
        code = read_machine_code(compile_attention(chip, shape, Q_LENS[step]))
        assert code.shared_bytes <= CHIPS[chip].shared_bytes


@pytest.mark.parametrize(
    ("chip", "shape", "asked"),
    [
        ("sm_90", LLAMA, {}),
        ("sm_100", LLAMA, {}),
        ("sm_90", Shape(BF16, 128, group=4, kv_dtype="int8"), dict.fromkeys(FEATURES, True)),
    ],
)
def test_decode_reads_nothing_but_its_plan_and_never_ends_before_the_kernel_ahead_has(chip, shape, asked):
    done = done_before_waiting(compile_attention(chip, shape, Q_LENS["decode"], **asked))
    assert done == {
        "ld.global.b32": {"items", "worker_indptr", "page_table"},
        "prefetch.global.L2": {"k", "v"},  # brings what may yet change no further than the cache all share
    }


STORED = [
    (case.pop("chip"), Shape(**case))
    for case in every_pair(
        {
            "kv_dtype": ["int8", "fp8_e4m3", "fp8_e5m2"],
            "head_dim": [64, 128, 256],
            "dtype": [BF16, F16],
            "group": [4, 8],
            "chip": ["sm_80", "sm_90"],
        }
    )
]


@pytest.mark.parametrize(
    "case", [*STORED[:3], *(pytest.param(case, marks=exhaustive) for case in STORED[3:])], ids=name
)
def test_stored_values_pass_through_shared_memory_once(case):
    """Room for the stages in flight and the queries: none for a block of values made float16 and laid down again."""
    chip, shape = case
    spec = shape.spec(16)
    tile = tune.decode_tile(spec, CHIPS[chip].known, few_rows=True, many_items=False)
    stage = tile.kv_tokens * (tune.token_bytes(spec) + 2 * F32.itemsize)
    needed = (tile.num_stages - 1) * stage + tune.query_bytes(spec, tile.rows)
    again = tile.kv_tokens * tune.block_dim(shape.head_dim) * F16.itemsize
    for_the_rest = KIB
    assert for_the_rest < again
    code = read_machine_code(compile_attention(chip, shape, Q_LENS["decode"]))
    assert needed <= code.shared_bytes <= needed + for_the_rest


@pytest.mark.parametrize(
    "chip", [chip if chip in ("sm_90", "gfx942") else pytest.param(chip, marks=exhaustive) for chip in CHIPS]
)
def test_every_feature_compiles(chip):
    asked = dict.fromkeys(FEATURES, True)
    code = read_machine_code(compile_attention(chip, Shape(BF16, 64, 2, "fp8_e5m2"), [40, 30], **asked))
    assert code.shared_bytes <= CHIPS[chip].shared_bytes


@pytest.mark.parametrize(
    ("chip", "step", "units"),
    [
        ("sm_80", "decode", "HMMA"),
        ("sm_80", "prefill", "HMMA"),
        ("sm_90", "decode", "HMMA"),
        ("sm_90", "prefill", "HGMMA"),
        ("sm_100", "prefill", "UTCHMMA"),
        ("gfx942", "prefill", "v_mfma"),
    ],
)
def test_products_run_on_the_chips_best_matrix_units(chip, step, units):
    kernel = compile_attention(chip, LLAMA, Q_LENS[step])
    code = read_machine_code(kernel)
    assert code.count(units) > 0
    if units == "HGMMA":
        assert code.count("HMMA") == 0
        assert "serialized" not in assembler_remarks(kernel)


@pytest.mark.parametrize(
    "head_dim", [pytest.param(64, marks=exhaustive), 128, pytest.param(256, marks=exhaustive)]
)
def test_the_portable_prefill_too_runs_on_hoppers_best_matrix_units(head_dim, monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda *_: "the portable kernel is asked for")
    kernel = compile_attention("sm_90", replace(LLAMA, head_dim=head_dim), Q_LENS["prefill"])
    assert kernel.metadata.name == "attend"
    code = read_machine_code(kernel)
    assert code.count("HGMMA") > 0
    assert code.count("HMMA") == 0
    assert "serialized" not in assembler_remarks(kernel)


HOPPER = [
    Shape(dtype, head_dim, group) for dtype in (F16, BF16) for head_dim in (64, 128) for group in (1, 7)
]


@pytest.mark.skipif(not HOPPERS_TRITON, reason=f"Hopper's kernel is served by Triton {hopper.TRITON}x alone")
@pytest.mark.parametrize(
    "page_size", [16, 48, *(pytest.param(size, marks=exhaustive) for size in (64, 128, 256))]
)
def test_prefill_on_hopper_is_a_kernel_of_its_own_that_never_waits_for_single_products(page_size):
    shape = HOPPER[page_size % 7]
    batch = make_batch(shape, [100, 70], [40, 30], page_size=page_size)
    with standing_in(CHIPS["sm_90"]) as kernels:
        attend(batch, {})
    (kernel,) = kernels
    assert kernel.metadata.name == "hopper_prefill"
    assert "serialized" not in assembler_remarks(kernel)
    assert read_machine_code(kernel).shared_bytes <= CHIPS["sm_90"].shared_bytes


@pytest.mark.parametrize(
    ("chip", "shape", "page_size", "asked"),
    [
        ("sm_100", LLAMA, 16, {}),
        ("sm_90", Shape(F32, 128), 16, {}),
        pytest.param("sm_90", Shape(F16, 80), 16, {}, marks=exhaustive),
        ("sm_90", Shape(BF16, 128, group=4, kv_dtype="int8"), 16, {}),
        ("sm_90", replace(LLAMA, head_dim=64), 24, {}),
        ("sm_90", replace(LLAMA, head_dim=64), 16, {"window": True}),
        *(
            pytest.param("sm_90", replace(LLAMA, head_dim=64), 16, {name: True}, marks=exhaustive)
            for name in FEATURES[1:]
        ),
    ],
)
def test_where_hoppers_kernel_does_not_serve_the_portable_one_does(chip, shape, page_size, asked):
    batch = make_batch(shape, [100, 70], [40, 30], page_size=page_size)
    rules = features(batch, **asked)
    with standing_in(CHIPS[chip]) as kernels:
        attend(batch, rules, rules.pop("window_left", -1))
    assert [kernel.metadata.name for kernel in kernels] == ["attend"]


def test_another_triton_means_the_portable_kernel(monkeypatch):
    """Gluon's meaning changes between releases: what compiles need not compute the same."""
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    batch = make_batch(LLAMA, [100, 70], [40, 30])
    with standing_in(CHIPS["sm_90"]) as kernels:
        attend(batch, {})
    assert [kernel.metadata.name for kernel in kernels] == ["attend"]


def test_batch_invariant_steps_go_to_the_portable_kernel():
    """Hopper's moves the last page's keys to the end of its columns, so a row's sums depend on the end of its tile."""
    batch = make_batch(LLAMA, [100, 70], [40, 30])
    with standing_in(CHIPS["sm_90"]) as kernels:
        attend(batch, {}, batch_invariant=True)
    assert [kernel.metadata.name for kernel in kernels] == ["attend"]


def test_rows_that_the_copy_engine_cannot_read_go_to_the_portable_kernel():
    batch = make_batch(LLAMA, [100, 70], [40, 30], strided_q=True)
    with standing_in(CHIPS["sm_90"]) as kernels:
        attend(batch, {})
    assert [kernel.metadata.name for kernel in kernels] == ["attend"]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8_e4m3", "fp8_e5m2"])
def test_writing_needs_no_fp8_and_no_memory_of_its_own(chip, kv_dtype):
    shape = Shape(BF16, 128, kv_dtype=kv_dtype)
    pages = torch.empty(2, 4, 16, shape.head_dim, dtype=shape.spec(16).storage_dtype)
    scales = [None if kv_dtype is None else torch.empty(2, 4, 16) for _ in range(2)]
    rows = torch.empty(5, 2, shape.head_dim, dtype=shape.dtype)
    with standing_in(CHIPS[chip]) as kernels:
        tensors = rows, rows, pages, pages.clone(), torch.arange(5), *scales
        backend.bind_write(*tensors)(*tensors)
    (kernel,) = kernels
    assert read_machine_code(kernel).spilled_bytes == 0


@pytest.mark.parametrize(
    ("chip", "kv_dtype"),
    [
        ("sm_90", "fp8_e4m3"),
        ("gfx942", "int8"),
        pytest.param("sm_90", "int8", marks=exhaustive),
        pytest.param("gfx942", "fp8_e4m3", marks=exhaustive),
    ],
)
def test_given_scales_are_written_with_and_read_through_strides_of_zero(chip, kv_dtype):
    batch = make_batch(Shape(BF16, 64, kv_dtype=kv_dtype), [100], page_size=16)
    batch.scales = {name: torch.tensor(0.1).expand(scale.shape) for name, scale in batch.scales.items()}
    rows = torch.empty(5, 2, 64, dtype=BF16)
    with standing_in(CHIPS[chip]) as kernels:
        tensors = rows, rows, *batch.pages[1:], torch.arange(5), *batch.scales.values()
        backend.bind_write(*tensors, True)(*tensors)
        attend(batch, {})
    assert [read_machine_code(kernel).spilled_bytes for kernel in kernels] == [0, 0]


def test_a_whole_number_for_a_scale_compiles_nothing_that_another_scale_must_not_meet():
    batch = make_batch(Shape(F16, 16), [100], page_size=16)
    with standing_in(CHIPS["sm_90"]) as kernels:
        for softmax_scale in (1, 16, 0.5, None):
            attend(batch, {"softmax_scale": softmax_scale})
    assert len(kernels) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_kernel_is_never_handed_less_alignment_than_it_was_compiled_for(order):
    batch = make_batch(Shape(F16, 16), [100], page_size=16)
    shifted = torch.empty(batch.k_pages.numel() + 4, dtype=F16)[4:].view(batch.k_pages.shape)
    pages = [batch.k_pages, shifted]
    with standing_in(CHIPS["sm_90"]) as kernels:
        for first in order:
            batch.k_pages, batch.v_pages = pages[first], pages[1 - first]
            attend(batch, {})
    assert len(kernels) == 2
