"""A plan's memory under several streams and CUDA graphs: who waits for whom, on streams that only take notes."""

import contextlib
import os
from dataclasses import dataclass, field

import pytest
import torch
from machine_code import CHIPS, standing_in
from support import Shape, make_batch

from quire.errors import ArgumentError
from quire.kernels import triton as backend
from quire.kernels.call import AttentionCall
from quire.kernels.triton import streams
from quire.kernels.triton.device_plan import DevicePlan
from quire.kernels.triton.streams import StreamOrder
from quire.planning.step import plan_step

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="where kernels are interpreted, there are no streams"
)


@dataclass(eq=False)
class Stream:
    """A stream that takes notes of what it waits for."""

    raw: int
    gpu: "GPU"

    def wait_stream(self, other):
        self.gpu.notes.append((self.raw, other.raw))


@dataclass
class GPU:
    """A device with a current stream, perhaps captured."""

    current: int = 0
    capturing: bool = False
    notes: list = field(default_factory=list)

    def stream(self, _index=None):
        return Stream(self.current, self)


@dataclass
class Buffer:
    """Memory on that device."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    is_cuda: bool = True
    recorded: list = field(default_factory=list)

    def record_stream(self, stream):
        self.recorded.append(stream.raw)


@pytest.fixture
def gpu(monkeypatch):
    gpu = GPU()
    monkeypatch.setattr(torch.cuda, "current_stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream(0, gpu))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: gpu.current, raising=False)
    monkeypatch.setattr(streams, "_captured", [])
    return gpu


def launch(order, gpu, stream):
    gpu.current = stream
    if stream != order.quiet:
        order.before_launch(stream)


def copy(order, gpu, stream):
    gpu.current = stream
    order.before_copy()


def test_on_one_stream_nothing_waits(gpu):
    for stream in (0, 7):
        gpu.current = stream
        order = StreamOrder(Buffer())
        for use in (copy, launch, launch, copy, launch):
            use(order, gpu, stream)
    assert gpu.notes == []


def test_the_default_stream_is_not_even_asked(gpu):
    order = StreamOrder(Buffer())
    copy(order, gpu, 0)
    assert order.quiet == 0


def test_a_launch_on_another_stream_waits_for_the_copy_once(gpu):
    order = StreamOrder(Buffer())
    copy(order, gpu, 0)
    for _ in range(3):
        launch(order, gpu, 7)
    assert gpu.notes == [(7, 0)]


def test_the_next_copy_waits_for_launches_on_another_stream(gpu):
    order = StreamOrder(Buffer())
    copy(order, gpu, 0)
    launch(order, gpu, 7)
    copy(order, gpu, 0)
    assert gpu.notes == [(7, 0), (0, 7)]


def test_layers_on_two_streams_take_turns_in_the_memory_of_split_tiles(gpu):
    order = StreamOrder(Buffer())
    copy(order, gpu, 5)
    for stream in (5, 7, 5, 0):
        launch(order, gpu, stream)
    assert gpu.notes == [(5, 0), (7, 5), (5, 7), (0, 5)]


def test_memory_that_another_stream_reads_is_not_given_away_too_soon(gpu):
    buffer = Buffer()
    order = StreamOrder(buffer)
    copy(order, gpu, 0)
    launch(order, gpu, 7)
    launch(order, gpu, 7)
    assert buffer.recorded == [7]


def test_memory_that_a_graph_reads_is_held_and_its_capture_waits_for_nothing(gpu):
    buffer = Buffer()
    order = StreamOrder(buffer)
    copy(order, gpu, 0)
    gpu.capturing = True
    launch(order, gpu, 7)
    launch(order, gpu, 7)
    assert gpu.notes == []
    assert streams._captured == [buffer]
    gpu.capturing = False
    launch(order, gpu, 0)
    assert gpu.notes == []


def test_capture_on_the_very_stream_of_planning_is_seen_too(gpu):
    gpu.current = 7
    buffer = Buffer()
    order = StreamOrder(buffer)
    copy(order, gpu, 7)
    launch(order, gpu, 7)
    gpu.capturing = True
    launch(order, gpu, 7)
    assert streams._captured == [buffer]


def test_memory_that_was_only_launched_on_is_not_held(gpu):
    order = StreamOrder(Buffer())
    copy(order, gpu, 0)
    launch(order, gpu, 7)
    assert streams._captured == []


def test_planning_inside_a_capture_is_refused(gpu):
    order = StreamOrder(Buffer())
    gpu.capturing = True
    with pytest.raises(ArgumentError, match="planned outside of a graph's capture"):
        copy(order, gpu, 7)


@pytest.mark.parametrize("q_lens", [[1, 1], [40, 30]], ids=["decode", "prefill"])
def test_every_launch_on_another_stream_asks_for_the_order(q_lens, monkeypatch):
    """Hopper's prefill too: by the launcher itself, with the stream that it launches on."""
    batch = make_batch(Shape(torch.bfloat16, 128, 4), [100, 70], q_lens)
    asked = []
    monkeypatch.setattr(StreamOrder, "before_launch", lambda order, raw: asked.append(raw))
    with standing_in(CHIPS["sm_90"]):
        spec = batch.shape.spec(16)
        rules = {"num_kv_heads": 2, "page_size": 16, "causal": True, "window_left": -1}
        step = plan_step(*batch.lengths, **rules, tiling=backend.tiling(spec, batch.q.device, 2))
        call = AttentionCall(*batch.pages, torch.empty_like(batch.q), torch.empty(batch.q.shape[:2]))
        bound = backend.bind(backend.prepare(spec, step, batch.q.device), call)
        bound(*call.tensors)
        assert asked == []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7)
        bound(*call.tensors)
        bound(*call.tensors)
    assert asked == [7, 7]


def test_each_plan_orders_before_it_copies(monkeypatch):
    batch = make_batch(Shape(torch.float32, 32, 1), [5, 3])
    before = []
    monkeypatch.setattr(StreamOrder, "before_copy", lambda order: before.append(order))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_, **__: before.append("copy"))
    spec = batch.shape.spec(16)
    rules = {"num_kv_heads": 2, "page_size": 16, "causal": True, "window_left": -1}
    step = plan_step(*batch.lengths, **rules, tiling=backend.tiling(spec, torch.device("cpu"), 2))
    plan = DevicePlan.reserve(step.capacity, ((16, 32), (16, 32)), torch.device("cpu"))
    plan.fill(step)
    assert before == [plan.order, "copy"]
