"""The Hopper kernel on a simulated multiprocessor, against the float64 reference; and mistakes it must show."""

import importlib.util
import math
from pathlib import Path

import gluon_language
import gluon_machine
import pytest
import torch
from accuracy import assert_accurate, exact, plain
from pairs import every_pair, one_in
from support import Shape, make_batch

import quire
from quire.kernels.triton.device_plan import DevicePlan, PartialShape
from quire.kernels.triton.hopper import attend, finish, geometry, load
from quire.planning.step import plan_step
from quire.planning.work_list import TileShape, Tiling

F16, BF16 = torch.float16, torch.bfloat16
MODULES = {"geometry": geometry, "load": load, "finish": finish, "attend": attend}
BLOCK_N = 128

# Lengths and query tokens: several tiles over prefixes and without; more queries than keys and no keys at all; a tile
# that is split among many workers.
STEPS = {
    "prefixes": ([300, 17, 257], [100, 17, 130]),
    "empty": ([5, 0, 200, 1], [9, 4, 33, 1]),
    "split": ([900, 40], [20, 5]),
}


def simulate(batch, *, causal=True, workers=3, num_stages=2, seed=0, modules=MODULES):
    """The kernel's answer, with every row and every partial state poisoned before."""
    shape, (tokens, heads, head_dim) = batch.shape, batch.q.shape
    group_rows = 1 << (shape.group - 1).bit_length()
    box = math.gcd(batch.page_size, BLOCK_N)
    tile = TileShape(geometry.BLOCK_M.value // group_rows, BLOCK_N)
    step = plan_step(
        batch.page_table, batch.seq_lens, batch.cu_seqlens_q, num_kv_heads=shape.num_kv_heads,
        page_size=batch.page_size, causal=causal, window_left=-1,
        tiling=Tiling(workers, tile, tile, decode_max_q_len=0, whole_tiles=True),
    )  # fmt: skip
    work = step.prefill
    out = torch.full(batch.q.shape, math.nan, dtype=shape.dtype)
    lse = torch.full((tokens, heads), math.nan)
    partial = PartialShape(geometry.BLOCK_M.value, head_dim)
    plan = DevicePlan.reserve(step.capacity, (partial, partial), torch.device("cpu"))
    plan.fill(step)
    moved = plan.prefill
    arrivals = moved.arrivals.tensor

    def by_group(rows):
        sizes = (tokens, shape.num_kv_heads, shape.group, head_dim)
        return gluon_machine.Descriptor(
            rows.view(sizes), [geometry.HALF.value // group_rows, 1, group_rows, head_dim]
        )

    def by_page(pages):
        return gluon_machine.Descriptor(pages, [1, 1, box, load.SLAB.value], inside=(0, 1))

    gluon_language.run(
        list(modules.values()),
        "hopper_prefill",
        workers,
        {
            "q_descriptor": by_group(batch.q),
            "k_descriptor": by_page(batch.k_pages),
            "v_descriptor": by_page(batch.v_pages),
            "o_descriptor": by_group(out),
            "out": out,
            "lse": lse,
            "items": moved.items.tensor,
            "worker_indptr": moved.worker_indptr.tensor,
            "arrivals": arrivals,
            "page_table": batch.page_table,
            "partial_out": torch.full(
                (max(1, work.num_partials), geometry.BLOCK_M.value, head_dim), math.nan
            ),
            "partial_lse": torch.full((max(1, work.num_partials), geometry.BLOCK_M.value), math.nan),
            "scale_log2": head_dim**-0.5 * math.log2(math.e),
            "table_row": batch.page_table.stride(0),
            "out_token": out.stride(0),
            "out_head": out.stride(1),
            "lse_token": lse.stride(0),
            "GROUP": shape.group,
            "PAGE": batch.page_size,
            "BLOCK_N": BLOCK_N,
            "STAGES": num_stages,
            "CAUSAL": causal,
            "LOADER_REGISTERS": 40,
            "CONSUMER_REGISTERS": 232,
        },
        seed,
    )
    assert not arrivals.any(), "counters must be ready for the next layer"
    return quire.SoftmaxState(out, lse)


def judge(batch, *, causal=True, **how):
    state = simulate(batch, causal=causal, **how)
    assert_accurate(state, exact(batch, causal=causal), plain(batch, causal=causal), batch.largest_value)


CASES = every_pair(
    {
        "step": list(STEPS),
        "page_size": [16, 48, 64, 128, 256],
        "group": [1, 3, 4, 8],
        "head_dim": [64, 128],
        "dtype": [F16, BF16],
        "layout": ["pool", "nhd", "hnd"],
        "causal": [True, False],
        "workers": [1, 5],
        "num_stages": [2, 3],
        "share": [0.0, 0.4],
    }
)


@pytest.mark.parametrize("number", one_in(2, range(len(CASES))))
def test_every_pair_of_choices(number):
    case = CASES[number]
    lens, q_lens = STEPS[case["step"]]
    shape = Shape(case["dtype"], case["head_dim"], case["group"])
    batch = make_batch(
        shape,
        lens,
        q_lens,
        page_size=case["page_size"],
        layout=case["layout"],
        share=case["share"],
        seed=number,
    )
    judge(batch, causal=case["causal"], workers=case["workers"], num_stages=case["num_stages"], seed=number)


def small_batch(seed):
    """Tiles of one to four blocks, a last page with unused slots among them."""
    return make_batch(Shape(BF16, 64, group=4), [500, 77, 200], [40, 77, 5], page_size=32, seed=seed)


@pytest.mark.parametrize("seed", one_in(4, range(8)))
def test_any_order_of_events_gives_the_same_bits(seed):
    batch = small_batch(0)
    assert torch.equal(simulate(batch, seed=seed).out, simulate(batch, seed=seed + 100).out)


# What a mistake in the protocol would look like in the source.
MISTAKES = {
    "values read before they land": (
        "attend",
        "    mbarrier.wait(v_full.index(v_stage), v_phase)\n    product",
        "    product",
    ),
    "keys read before they land": (
        "attend",
        "    mbarrier.wait(k_full.index(next_stage), next_phase, pred=has_next)\n",
        "",
    ),
    "queries read before they land": ("attend", "        mbarrier.wait(q_full, q_phase)\n", ""),
    "values given back while they are read": (
        "attend",
        "    o, weights = warpgroup_mma_wait(0, deps=(product, weights))\n"
        "    mbarrier.arrive(k_free.index(stage), count=1)\n"
        "    mbarrier.arrive(v_free.index(v_stage), count=1)\n",
        "    mbarrier.arrive(k_free.index(stage), count=1)\n"
        "    mbarrier.arrive(v_free.index(v_stage), count=1)\n"
        "    o, weights = warpgroup_mma_wait(0, deps=(product, weights))\n",
    ),
    "a stage free when one warpgroup has read it": (
        "attend",
        "mbarrier.init(free.index(i), count=2)",
        "mbarrier.init(free.index(i), count=1)",
    ),
    "queries given back before the last scores": (
        "attend",
        "        mbarrier.arrive(k_free.index(stage), count=1)\n        last_block",
        "        mbarrier.arrive(k_free.index(stage), count=1)\n"
        "        mbarrier.arrive(q_free, count=1)\n        last_block",
    ),
    "a loader that does not wait for room": ("load", "    mbarrier.wait(free, phase)\n", ""),
    "phases that start wrong": ("load", "    phase = 1\n", "    phase = 0\n"),
    "a phase that never flips": ("geometry", "gl.where(wraps, phase ^ 1, phase)", "phase"),
    "half the bytes waited for": ("load", "BLOCK_N * D * 2)", "BLOCK_N * D)"),
    "unused slots of the last page read": ("geometry", "key % PAGE - missing", "key % PAGE"),
    "pages looked up past the last": ("load", ", mask=key < kv_end, other=0)", ")"),
    "results overwritten on their way": ("finish", "    tma.store_wait(0)\n", ""),
    "nobody last to arrive": ("finish", "before == num_parts - 1", "before == num_parts"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake, tmp_path):
    module, right, wrong = MISTAKES[mistake]
    source = Path(MODULES[module].__file__).read_text()
    assert right in source
    path = tmp_path / f"{module}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"wrong_{module}", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    modules = {name: mutant if name == module else right for name, right in MODULES.items()}
    for seed in range(12):
        batch = small_batch(seed)
        if mistake == "nobody last to arrive":
            batch = make_batch(Shape(BF16, 64, group=4), *STEPS["split"], seed=seed)
        try:
            judge(batch, workers=3, seed=seed, modules=modules)
        except (AssertionError, gluon_machine.Deadlock):
            return
    pytest.fail("twelve runs did not show it")
