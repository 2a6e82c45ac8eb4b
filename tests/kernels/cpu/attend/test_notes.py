"""What plan.explain() says of the CPU kernels is what they are."""

from dataclasses import replace

import pytest
import torch

import quire
from quire.kernels.cpu.attend import config, notes
from quire.kernels.cpu.simd.llvm import LANES


def explained(seq_lens, q_lens, spec):
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return quire.plan(torch.zeros(len(lens), 64, dtype=torch.int32), lens, spec, starts).explain()


@pytest.mark.parametrize(
    ("has_pairs", "numbers"), [(True, "pairs of bfloat16 numbers"), (False, "float32 numbers")]
)
def test_tiles_and_what_they_multiply(monkeypatch, has_pairs, numbers):
    monkeypatch.setattr(config, "has_pair_products", lambda: has_pairs)
    text = explained([900, 700], [1, 200], quire.AttentionSpec(8, 2, 64))
    assert f"\n  decode tile: 1 token × 64 keys, 4 rows; multiplies {numbers}\n" in text
    assert f"\n  prefill tile: 24 tokens × 64 keys, 96 rows; multiplies {numbers}\n" in text


def test_int8_is_multiplied_as_shorts_with_avx2(monkeypatch):
    monkeypatch.setattr(config, "has_pair_products", lambda: False)
    monkeypatch.setattr(config, "has_short_products", lambda: True)
    spec = quire.AttentionSpec(8, 2, 64, kv_dtype="int8")
    assert "4 rows; multiplies integers of 16 bits, in pairs\n" in explained([900], [1], spec)
    assert "multiplies float32 numbers" in explained([900], [1], replace(spec, head_dim=80))


@pytest.mark.skipif(LANES != 16, reason="bytes are multiplied in vectors of 512 bits alone")
@pytest.mark.parametrize(
    ("has_bytes", "numbers"), [(True, "bytes, in fours"), (False, "pairs of bfloat16 numbers")]
)
def test_pages_of_8_bits_are_multiplied_otherwise_by_decode_alone(monkeypatch, has_bytes, numbers):
    monkeypatch.setattr(config, "has_pair_products", lambda: True)
    monkeypatch.setattr(config, "has_byte_products", lambda: has_bytes)
    text = explained([900, 700], [1, 200], quire.AttentionSpec(8, 2, 64, kv_dtype="int8"))
    assert f"decode tile: 1 token × 64 keys, 4 rows; multiplies {numbers}\n" in text
    assert "prefill tile: 24 tokens × 64 keys, 96 rows; multiplies float32" in text
    text = explained([900], [1], quire.AttentionSpec(8, 2, 64, kv_dtype="fp8_e4m3"))
    assert "multiplies pairs of bfloat16 numbers\n" in text


def test_a_kernel_that_does_not_run_is_not_spoken_of():
    spec = quire.AttentionSpec(8, 2, 64)
    assert "prefill tile" not in explained([900], [1], spec)
    assert "decode tile" not in explained([900], [20], spec)
    assert "vectors" not in explained([0], [0], spec)


def test_threads_are_those_of_now(set_threads):
    spec = quire.AttentionSpec(8, 2, 64)
    set_threads(1)
    assert f"\n  1 thread; vectors of {LANES} float32 numbers" in explained([900], [1], spec)
    set_threads(3)
    assert "\n  3 threads; vectors" in explained([900], [1], spec)


def test_little_work_is_one_threads(set_threads):
    set_threads(3)
    text = explained([40], [1], quire.AttentionSpec(8, 2, 64))
    assert "decode: 2 items on 1 worker, 0 tiles split" in text
    assert "\n  1 thread; vectors" in text


def test_a_cpu_that_was_named_without_its_features_has_no_known_registers(monkeypatch):
    for bits, said in ((256, ", in registers of 256 bits"), (0, "")):
        monkeypatch.setattr(notes, "register_bits", lambda features, bits=bits: bits)
        assert notes.describe_machine(2) == f"2 threads; vectors of {LANES} float32 numbers{said}"


def test_registers_are_the_widest_that_llvm_may_use():
    assert notes.register_bits("+sse2,+avx,+avx2,+avx512f") == 512
    assert notes.register_bits("+sse2,+avx,+avx2,-avx512f") == 256
    assert notes.register_bits("+neon") == 128
    assert notes.register_bits("") == 0
