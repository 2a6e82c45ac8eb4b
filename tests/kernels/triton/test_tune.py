"""The table of tiles: every chip holds what it is given, and a step's rows fit the tile that it was cut for."""

import itertools

import pytest
import torch
from support import Shape, make_batch

import quire
from quire.kernels import triton as backend
from quire.kernels.triton import tune

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NVIDIA = [tune.known_chip("cuda", capability, 132) for capability in (80, 86, 89, 90, 100, 120)]
AMD = tune.known_chip("hip", 0, 304)
SPECS = [
    Shape(dtype, head_dim, group=group, kv_dtype=kv_dtype).spec(16)
    for dtype in (BF16, F16, F32)
    for head_dim in (16, 64, 80, 128, 256)
    for group in (1, 3, 4, 8, 16, 128)
    for kv_dtype in (None, "int8")
]


@pytest.mark.parametrize("chip", [*NVIDIA, AMD], ids=lambda chip: f"{chip.name}{chip.capability}")
def test_a_tile_holds_the_query_heads_of_a_kv_head_and_its_stages_fit_the_chip(chip):
    for spec in SPECS:
        if not tune.fits(spec, chip):
            continue
        decodes = (tune.decode_tile(spec, chip, few_rows=False, many_items=many) for many in (False, True))
        for tile in (*decodes, tune.prefill_tile(spec, chip)):
            assert tile.rows >= spec.group_size
            assert tile.kv_tokens & (tile.kv_tokens - 1) == 0
            in_flight = max(tile.num_stages - 1, 1) * tile.kv_tokens * tune.token_bytes(spec)
            assert in_flight * tile.workers_per_sm <= chip.shared_bytes


@pytest.mark.parametrize("chip", [*NVIDIA, AMD], ids=lambda chip: f"{chip.name}{chip.capability}")
def test_few_rows_change_nothing_that_work_is_cut_by(chip):
    for spec, many_items in itertools.product(SPECS, (False, True)):
        usual, few = (tune.decode_tile(spec, chip, few_rows, many_items) for few_rows in (False, True))
        assert few._replace(rows=usual.rows, transposed=usual.transposed) == usual
        assert few.rows <= usual.rows


def test_bfloat16_decode_of_few_rows_lies_transposed_and_serves_four_tokens_all_the_same():
    spec, hopper = Shape(BF16, 128, group=4).spec(16), tune.known_chip("cuda", 90, 132)
    few = tune.decode_tile(spec, hopper, few_rows=True, many_items=False)
    assert (few.rows, few.transposed) == (tune.MIN_COLUMNS, True)
    assert tune.decode_tile(spec, hopper, few_rows=False, many_items=False).rows // spec.group_size == 4


@pytest.mark.parametrize(("batch", "workers", "kv_tokens"), [(32, 132, 128), (33, 264, 64)])
def test_on_hopper_two_workers_share_a_multiprocessor_once_each_has_two_items(
    batch, workers, kv_tokens, monkeypatch
):
    monkeypatch.setattr(tune, "chip_of", lambda _: tune.known_chip("cuda", 90, 132))
    spec = quire.AttentionSpec(32, 8, 128, 16, BF16)
    tiling = backend.tiling(spec, torch.device("cuda"), batch)
    assert (tiling.num_workers, tiling.decode.kv_tokens) == (workers, kv_tokens)


@pytest.mark.interpreted
@pytest.mark.parametrize(("q_lens", "rows"), [([1, 2], 8), ([1, 3], 16), ([4, 1], 16)])
def test_a_step_is_launched_with_the_rows_that_its_longest_decode_needs(q_lens, rows):
    batch = make_batch(Shape(BF16, 64, group=4), [40, 30], q_lens, page_size=16)
    plan = quire.plan(*batch.lengths[:2], batch.shape.spec(16), batch.cu_seqlens_q, backend="triton")
    assert f"decode tile: {rows} rows" in plan.explain()
    assert "prefill" not in plan.explain().split("decode tile")[1]


@pytest.mark.interpreted
def test_a_planners_plans_say_the_rows_that_are_launched_whatever_a_step_needs():
    batch = make_batch(Shape(BF16, 64, group=4), [40, 30], [1, 1], page_size=16)
    for max_q_len, rows in ((1, 8), (40, 16)):
        planner = quire.Planner(
            batch.shape.spec(16),
            max_batch=2,
            max_seq_len=64,
            max_q_len=max_q_len,
            backend="triton",
            device="cpu",
        )
        assert f"decode tile: {rows} rows" in planner.plan(*batch.lengths).explain()


@pytest.mark.interpreted
def test_slots_further_apart_than_32_bits_say_are_refused():
    spec = Shape(BF16, 64, group=4).spec(16)
    batch = make_batch(Shape(BF16, 64, group=4), [20], [1], page_size=16)
    plan = quire.plan(*batch.lengths[:2], spec, batch.cu_seqlens_q, backend="triton")
    shape = spec.num_kv_heads, 2, 16, 64
    far = torch.empty_strided(shape, (64, 0, 2**27, 1), dtype=BF16, device="meta")  # 16 · 2^27 is 2^31
    call = backend.AttentionCall(batch.q, far, far, torch.empty_like(batch.q), None)
    with pytest.raises(quire.UnsupportedError, match="k_pages must have a page's slots within"):
        backend.bind(plan._prepared, call)
