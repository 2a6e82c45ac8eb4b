"""Configs, threads, processes and the cache on disk."""

from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
import torch
from processes import run_python
from support import Shape, attend, make_batch, plan_for

from quire.kernels.cpu import threads as launch
from quire.kernels.cpu.attend.config import DTYPE_CODES, Config
from quire.kernels.cpu.simd import memory
from quire.kernels.cpu.simd.vectors import LANES
from quire.kernels.cpu.threads import ConfigType

SHAPE = Shape(torch.float32, 16, 3)  # compiled by other modules too
own_worker = pytest.mark.xdist_group("decode-float32-same-d16-g3")


# --- Config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [1, 8, 15, 16, 17, 40, 64, 72, 80, 96, 112, 128, 192, 256, 576])
def test_rows_are_whole_vectors_and_a_tail(head_dim):
    config = Config(0, 0, head_dim)
    assert config.vectors * LANES + config.tail == head_dim
    assert 0 <= config.tail < LANES
    assert config.row_bytes % 64 == 0
    assert 0 <= config.row_bytes // 4 - head_dim < LANES


@pytest.mark.parametrize("heads", range(1, 17))
@pytest.mark.parametrize("head_dim", [8, 16, 80, 128, 256])
def test_a_decode_tile_fills_vectors_of_scores_and_fits_registers(heads, head_dim):
    config = Config(0, 0, head_dim, heads)
    assert heads <= config.padded_heads < 2 * heads
    assert config.tokens * config.padded_heads == LANES
    assert config.strip >= 1
    assert config.vectors % config.strip == 0
    assert config.strip_tile <= LANES


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.int8, 127), (torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)]
)
def test_the_largest_value_is_that_of_the_pages_dtype(dtype, largest):
    config = Config(memory.F32, DTYPE_CODES[dtype], 16)
    assert config.kv_largest == largest
    assert torch.tensor(float(largest)).to(dtype).float() == largest


def test_a_config_is_another_type_once_the_sources_change():
    config = Config(0, 0, 16)
    assert ConfigType(config, "today") == ConfigType(config, "today")
    assert ConfigType(config, "today") != ConfigType(config, "tomorrow")
    assert ConfigType(config, "today") != ConfigType(Config(0, 0, 32), "today")


# --- threads ---------------------------------------------------------------------------------------------


@launch.part
def _count_visit(index, base, stride):
    at = base + index * stride
    memory.store_i64(at, memory.load_i64(at) + 1)


@numba.njit(nogil=True)
def _visit_all(threads, count, base, stride):
    launch.parallel_for(_count_visit, threads, count, (base, stride))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_a_parallel_loop_visits_every_index_once(threads, count):
    visits = torch.zeros(count + 1, dtype=torch.int64)
    _visit_all(threads, count, visits.data_ptr(), 8)
    assert visits.tolist() == [1] * count + [0]


def test_kernels_run_on_torchs_threads(set_threads):
    assert launch.HAS_OPENMP, "torch's OpenMP runtime was not found: kernels would run on one thread"
    for threads in (1, 2, 3):
        set_threads(threads)
        assert launch.num_threads() == threads


@own_worker
@pytest.mark.parametrize(("seq_lens", "q_lens"), [([700, 3, 90], None), ([300, 90, 7], [20, 90, 1])])
def test_the_same_input_gives_the_same_bits_run_after_run_on_any_threads(seq_lens, q_lens, set_threads):
    batch = make_batch(SHAPE, seq_lens, q_lens)
    plan = plan_for(batch, 5)
    first = plan.run(*batch.pages, return_state=True)
    for threads in (1, 2, 2, 4, 1):
        set_threads(threads)
        again = plan.run(*batch.pages, return_state=True)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@own_worker
@pytest.mark.parametrize("q_lens", [[1, 1], [40, 40]])
def test_workers_side_by_side_keep_out_of_one_anothers_scratch(q_lens, set_threads):
    batch = make_batch(SHAPE, [3000, 3000], q_lens)  # long enough for both to be at it at once
    plan = plan_for(batch, 2)
    set_threads(1)
    alone = plan.run(*batch.pages)
    set_threads(2)
    for _ in range(10):
        assert torch.equal(plan.run(*batch.pages), alone)


@own_worker
def test_calls_from_several_python_threads_at_once_do_not_disturb_one_another(set_threads):
    set_threads(2)
    batches = [make_batch(SHAPE, [40 * i + 1, 500, 3], [1, 20, 1], seed=i) for i in range(6)]
    wanted = [attend(batch).out for batch in batches]

    def repeat(i):
        return [attend(batches[i]).out for _ in range(15)]

    with ThreadPoolExecutor(6) as pool:
        for i, outs in enumerate(pool.map(repeat, range(6))):
            for out in outs:
                torch.testing.assert_close(out, wanted[i], atol=1e-6, rtol=0)


@own_worker
def test_a_kernel_is_compiled_once_however_many_tensors_it_meets():
    attend(make_batch(SHAPE, [3, 50], [1, 5]))
    before = len(launch._compiled)
    for seed in range(3):
        attend(make_batch(SHAPE, [3, 50], [1, 5], seed=seed, layout="nhd"))
    assert len(launch._compiled) == before


# --- processes -------------------------------------------------------------------------------------------


def test_a_second_process_finds_every_kernel_on_disk(tmp_path):
    code = """
        import json, torch, quire
        from numba.core import compiler
        from quire.kernels.cpu.attend.decode import decode
        from quire.kernels.cpu.attend.merge import merge
        from quire.kernels.cpu.attend.prefill import prefill
        from quire.kernels.cpu.store import write

        compiled = []
        original = compiler.compile_extra
        def counted(typingctx, targetctx, func, *rest, **named):
            compiled.append(func.__name__)
            return original(typingctx, targetctx, func, *rest, **named)
        compiler.compile_extra = counted

        torch.set_num_threads(2)
        torch.manual_seed(0)
        k, v = torch.empty(1, 80, 16, 1), torch.empty(1, 80, 16, 1)
        quire.write_kv(torch.randn(1280, 1, 1), torch.randn(1280, 1, 1), k, v, torch.arange(1280))
        table = torch.arange(80, dtype=torch.int32).view(2, 40)
        lens, starts = torch.tensor([640, 600], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
        out = quire.paged_attention(torch.randn(3, 1, 1), k, v, table, lens, starts)
        torch.set_num_threads(3)
        out = quire.paged_attention(torch.randn(3, 1, 1), k, v, table, lens, starts)
        assert out.isfinite().all()
        kernels = {"decode": decode, "prefill": prefill, "merge": merge, "write": write}
        hits = {name: sum(kernel.stats.cache_hits.values()) for name, kernel in kernels.items()}
        print(json.dumps({"compiled": compiled, "hits": hits}))
        """
    first = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert {"decode", "prefill", "merge", "write"} <= set(first["compiled"])
    assert first["hits"] == {"decode": 0, "prefill": 0, "merge": 0, "write": 0}
    second = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert second["compiled"] == []
    assert min(second["hits"].values()) >= 1


def test_a_kernel_that_no_cache_can_hold_is_compiled_all_the_same():
    names = {}
    exec("def add_one(x): return x + 1", names)  # code from no file: Numba finds no place for its cache
    assert launch.kernel(names["add_one"])(1) == 2
