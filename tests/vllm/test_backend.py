"""The backend's classes as vLLM calls them, on a machine without vLLM: each layer computes what the reference does."""

import pytest
import torch
import vllm_stand_in as stand_in
from accuracy import exact
from support import Batch, Shape, make_batch

import quire
from quire.errors import UnsupportedError

SHAPE, PAGE = Shape(torch.float32, head_dim=16, group=2), 16
HEADS, KV_HEADS, DIM = 4, 2, 16
# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-d16-g2")


@pytest.fixture
def backend(monkeypatch):
    backend = stand_in.install(monkeypatch)
    monkeypatch.setattr(backend, "warm_up", lambda *specs: None)
    return backend


@pytest.fixture(autouse=True)
def model_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def layer_of(backend, **rules):
    impl = backend.QuireCPUImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, **rules)
    impl.process_weights_after_loading(torch.float32)
    return stand_in.Attention(impl)


def builder_of(backend, layers, spec=None):
    config = stand_in.config(layers={str(i): layer for i, layer in enumerate(layers)})
    return backend.QuireCPUBuilder(
        spec or stand_in.CacheSpec(PAGE), list(config.layers), config, torch.device("cpu")
    )


def step_of(batch: Batch, requests=0, **changed):
    """vLLM's metadata of a step, with so many requests of padding."""
    table, lens, starts = batch.lengths
    pad = (0, requests)
    given = {
        "num_reqs": len(lens) + requests,
        "num_actual_tokens": len(batch.q),
        "block_table_tensor": torch.nn.functional.pad(table, (0, 0, *pad), value=-9),
        "seq_lens": torch.nn.functional.pad(lens, pad),
        "query_start_loc_cpu": torch.nn.functional.pad(starts, pad, value=int(starts[-1])),
        "causal": True,
    }
    return stand_in.SimpleNamespace(**{**given, **changed})


def cache_of(batch: Batch, dtype=torch.float32):
    """The batch's pages as vLLM keeps a layer's."""
    return torch.cat([batch.k_pages, batch.v_pages], -1).transpose(0, 1).contiguous().to(dtype)


def attend(layer, metadata, batch, cache, padding=3):
    """The layer's results, with rows of padding that must be left alone."""
    rows = torch.full((padding, *batch.q.shape[1:]), torch.nan)
    q, out = torch.cat([batch.q, rows]), torch.full((len(batch.q) + padding, HEADS, DIM), 7.0)
    assert layer.impl.forward(layer, q, q, q, cache, metadata, out) is out
    assert (out[len(batch.q) :] == 7.0).all()
    return out[: len(batch.q)]


RULES = {
    "plain": ({}, {}),
    "window": ({"sliding_window": 6}, {"window_left": 5}),
    "softcap": ({"logits_soft_cap": 1.5}, {"softcap": 1.5}),
    "alibi": ({"alibi_slopes": [0.5, 0.25, 0.1, 0.3]}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.3])}),
    "sinks": ({"sinks": torch.tensor([0.5, -1, 2, 0]).bfloat16()}, {"sinks": torch.tensor([0.5, -1, 2, 0])}),
}


@pytest.mark.parametrize("given", RULES)
@pytest.mark.parametrize("requests", [0, 2])
def test_a_layer_computes_its_rules_on_mixed_steps_with_padding(given, requests, backend):
    rules, meant = RULES[given]
    batch = make_batch(SHAPE, [9, 36, 50, 0], [1, 36, 5, 1], page_size=PAGE)
    layer = layer_of(backend, **rules)
    metadata = builder_of(backend, [layer]).build(0, step_of(batch, requests))
    got = attend(layer, metadata, batch, cache_of(batch))
    torch.testing.assert_close(got.double(), exact(batch, **meant).out, atol=2e-6, rtol=2e-6)


def test_layers_of_one_kind_share_a_plan_and_others_have_their_own(backend):
    batch = make_batch(SHAPE, [9, 36], [1, 36], page_size=PAGE)
    layers = [layer_of(backend, **rules) for rules in ({}, {"sliding_window": 6}, {}, {"sliding_window": 6})]
    metadata = builder_of(backend, layers).build(0, step_of(batch))
    assert len(metadata.plans) == 2
    for layer, meant in zip(layers, ({}, {"window_left": 5}) * 2, strict=True):
        got = attend(layer, metadata, batch, cache_of(batch))
        torch.testing.assert_close(got.double(), exact(batch, **meant).out, atol=2e-6, rtol=2e-6)


def test_a_group_with_other_pages_takes_the_step_over(backend):
    batch = make_batch(SHAPE, [9, 36], [1, 36], page_size=PAGE)
    layer = layer_of(backend)
    builder = builder_of(backend, [layer])
    assert builder.supports_update_block_table
    first = builder.build(0, step_of(batch, requests=1))
    order = torch.randperm(batch.k_pages.shape[1], generator=torch.Generator().manual_seed(0))
    cache = torch.empty_like(cache_of(batch))
    cache[order] = cache_of(batch)
    table = torch.full((3, 5), -9, dtype=torch.int32)
    for row, used in enumerate((1, 3)):
        table[row, :used] = order[batch.page_table[row, :used].long()]
    second = builder.update_block_table(first, table, torch.empty(0))
    wanted = exact(batch).out
    for metadata, pages in ((first, cache_of(batch)), (second, cache)):
        got = attend(layer, metadata, batch, pages)
        torch.testing.assert_close(got.double(), wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ["auto", "fp8"])
def test_keys_and_values_are_written_to_their_slots_and_attended_to(name, backend):
    """Padding behind the last slot, and slots of −1, are written nowhere."""
    layer = layer_of(backend, kv_cache_dtype=name)
    tokens, dtype = 20, torch.float32 if name == "auto" else torch.uint8
    k, v = torch.randn(2, tokens, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    cache = torch.zeros(4, KV_HEADS, PAGE, 2 * DIM, dtype=dtype)
    table = torch.tensor([[2, 1]], dtype=torch.int32)
    slots = torch.cat([torch.arange(16) + 32, torch.arange(4) + 16, torch.tensor([-1, -1])])
    nans = torch.full((2, KV_HEADS, DIM), torch.nan)
    layer.impl.do_kv_cache_update(layer, torch.cat([k, nans]), torch.cat([v, nans]), cache, slots)
    assert not cache[[0, 3]].any()
    q = torch.randn(1, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    step = stand_in.SimpleNamespace(
        num_reqs=1, block_table_tensor=table, seq_lens=torch.tensor([tokens], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 1], dtype=torch.int32), causal=True,
    )  # fmt: skip
    got = torch.empty(1, HEADS, DIM)
    layer.impl.forward(layer, q, k, v, cache, builder_of(backend, [layer]).build(0, step), got)
    weights = torch.einsum("qhd,thd->hqt", q, k.repeat_interleave(2, 1)) * DIM**-0.5
    wanted = torch.einsum("hqt,thd->qhd", weights.softmax(-1), v.repeat_interleave(2, 1))
    close = {"auto": 2e-6, "fp8": 0.1}[name]
    torch.testing.assert_close(got, wanted, atol=close, rtol=close)


def test_while_memory_is_measured_there_is_no_cache_and_the_result_is_zero(backend):
    layer, q = layer_of(backend), torch.randn(3, HEADS, DIM)
    assert (layer.impl.forward(layer, q, q, q, torch.tensor([]), None, torch.full_like(q, 7.0)) == 0).all()


@pytest.mark.parametrize("kind", ["encoder", "encoder_only", "encoder_decoder"])
def test_attention_that_is_no_decoders_goes_to_vllms_own_classes(kind, backend):
    layer = layer_of(backend, attn_type=kind, alibi_slopes=None)
    own = layer.impl._vllms_own
    assert own.args[:4] == (HEADS, DIM, DIM**-0.5, KV_HEADS)
    assert kind in own.args
    assert layer.impl.forward(layer, *[None] * 6) == "vLLM's own forward"
    layer.impl.do_kv_cache_update(layer, *[None] * 4)
    assert own.asked == ["process_weights_after_loading", "forward", "do_kv_cache_update"]
    for spec in (stand_in.EncoderOnlyAttentionSpec(), stand_in.CrossAttentionSpec()):
        builder = builder_of(backend, [layer], spec)
        assert builder.build(0, None) == "vLLM's own build"
        assert not builder.supports_update_block_table


REFUSED = {
    "kv_cache_dtype": ({"kv_cache_dtype": "int4_per_token_head"}, {}, "kv_cache_dtype not supported"),
    "another dtype": (
        {"kv_cache_dtype": "float16"},
        {},
        "float16 not supported with a model of torch.float32",
    ),
    "an unknown rule": ({"chunk_lookback": 1}, {}, "chunk_lookback=1 not supported"),
    "images": ({}, {"model_config": {"is_mm_prefix_lm": True, "rswa_window": None}}, "use_mm_prefix"),
    "a reference window": ({}, {"model_config": {"is_mm_prefix_lm": False, "rswa_window": 8}}, "use_rswa"),
    "split contexts": (
        {},
        {"parallel_config": {"prefill_context_parallel_size": 1, "decode_context_parallel_size": 2}},
        "use_dcp",
    ),
    "trimmed drafts": ({}, {"speculative_config": {"enable_adaptive_verification": True}}, "use_adaptive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_quire_cannot_serve_is_refused_while_the_model_is_built(case, backend):
    rules, changed, reason = REFUSED[case]
    parts = {name: stand_in.SimpleNamespace(**values) for name, values in changed.items()}
    stand_in.Current.config = stand_in.config(**parts)
    with pytest.raises(
        UnsupportedError, match=rf"a model's attention must be .*{reason}.* Fix: QUIRE_VLLM=0"
    ):
        layer_of(backend, **rules)


def test_dtypes_without_kernels_are_refused(backend, model_dtype):
    model_dtype(torch.float64)
    with pytest.raises(UnsupportedError, match="dtype not supported"):
        layer_of(backend)


def test_what_only_the_layer_or_the_step_tells_is_refused_there(backend):
    narrow = layer_of(backend)
    narrow.head_size_v = 8
    with pytest.raises(UnsupportedError, match="values of layer 0 must be as wide as its keys, 16; got 8"):
        builder_of(backend, [narrow])
    foreign = stand_in.Attention(stand_in.SimpleNamespace(head_size=DIM))
    with pytest.raises(UnsupportedError, match="layer 0 must have Quire's attention; got SimpleNamespace"):
        builder_of(backend, [foreign])
    layer, batch = layer_of(backend), make_batch(SHAPE, [9, 36], [1, 36], page_size=PAGE)
    with pytest.raises(UnsupportedError, match="a step must be causal, or not, as a whole; got 2 requests"):
        builder_of(backend, [layer]).build(0, step_of(batch, causal=torch.tensor([True, False])))
    q = torch.zeros(3, HEADS, DIM)
    with pytest.raises(UnsupportedError, match="outputs must be of the model's dtype"):
        layer.impl.forward(layer, q, q, q, q, None, q, output_scale=torch.ones(()))


def test_a_quantised_row_has_room_for_its_scales(backend):
    spec = stand_in.CacheSpec(PAGE, 40, stand_in.QuantMode.INT8_PER_TOKEN_HEAD)
    assert backend.QuireCPUBackend.customize_spec(spec).state_content_bytes == 2 * 40 + 8
    plain = stand_in.CacheSpec(PAGE, 40)
    assert backend.QuireCPUBackend.customize_spec(plain) is plain


def test_all_kernels_are_compiled_while_vllm_builds(backend, monkeypatch):
    warmed = []
    monkeypatch.setattr(backend, "warm_up", lambda *specs: warmed.extend(specs))
    layers = [layer_of(backend), layer_of(backend, sliding_window=6), layer_of(backend, kv_cache_dtype="fp8")]
    builder_of(backend, layers)
    plain = quire.AttentionSpec(HEADS, KV_HEADS, DIM, PAGE, torch.float32)
    assert set(warmed) == {plain, quire.AttentionSpec(HEADS, KV_HEADS, DIM, PAGE, torch.float32, "fp8_e4m3")}


def test_one_answer_is_planned_for_where_vllm_asks_for_it(backend, monkeypatch):
    monkeypatch.setattr(backend.envs, "VLLM_BATCH_INVARIANT", True)
    batch = make_batch(SHAPE, [9, 36], [1, 36], page_size=PAGE)
    metadata = builder_of(backend, [layer_of(backend)]).build(0, step_of(batch))
    assert all(plan.step.kv_split for plan in metadata.plans.values())
