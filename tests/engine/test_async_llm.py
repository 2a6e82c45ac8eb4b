"""Coroutines: everyone gets their own tokens, nobody holds up a loop, and whoever leaves gives the pages back."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import quire
from quire.engine import AsyncLLM
from quire.engine.core import Engine
from quire.engine.llm import LLM
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.errors import ArgumentError, QuireError, UnsupportedError
from quire.hf import PagedModel

from .conftest import NEW_TOKENS
from .fakes import EOS, FakeModel, byte_tokenizer
from .test_threads import HANGS, Gate, all_pages_are_free, running, until

GREEDY = SamplingParams(max_tokens=12)
ENDLESS = SamplingParams(max_tokens=5000)
LONG = SamplingParams(max_tokens=60)


@pytest.fixture(autouse=True)
def _nobody_relies_on_a_timeout(monkeypatch):
    monkeypatch.setattr("quire.engine.core.SILENCE", 10 * HANGS)


def served(coroutine):
    """The result of a coroutine in a loop of its own, which is not to hang."""
    return asyncio.run(asyncio.wait_for(coroutine, 10 * HANGS))


def fake(**options) -> Engine:
    return Engine(FakeModel(**options))


def texts(num_pages: int = 200) -> Engine:
    """An engine whose tokens are bytes."""
    return Engine(FakeModel(vocab_size=257, eos_token_ids=(EOS,), num_pages=num_pages), byte_tokenizer())


def thread_of(llm: AsyncLLM) -> threading.Thread:
    return llm._worker._thread


async def comes(condition) -> None:
    """Wait for what another thread is about to do."""
    while not condition():
        await asyncio.sleep(0.001)


def test_an_answer_is_the_same_awaited_iterated_and_in_deltas_as_that_of_the_engine():
    engine = texts()
    params = SamplingParams(max_tokens=20, n=2, temperature=1.0, seed=1, logprobs=1)
    [expected] = engine.generate("some text", params)

    async def all_three():
        async with AsyncLLM(engine) as llm:
            whole = await llm.generate("some text", params)
            grown = [output async for output in llm.generate("some text", params)]
            deltas = [delta async for delta in llm.generate("some text", params).deltas()]
        return whole, grown, deltas

    whole, grown, deltas = served(all_three())
    assert whole.outputs == grown[-1].outputs == deltas[-1].output.outputs == expected.outputs
    assert [output.finished for output in grown] == [False] * (len(grown) - 1) + [True]
    for i, final in enumerate(expected.outputs):
        for earlier in grown:
            so_far = earlier.outputs[i]
            count = len(so_far.token_ids)
            assert so_far.token_ids == final.token_ids[:count]
            assert so_far.logprobs == final.logprobs[:count]
            assert final.text.startswith(so_far.text)
        assert "".join(delta.text for delta in deltas if delta.sequence == i) == final.text


def test_an_answer_may_be_awaited_after_some_of_it_was_read_and_again():
    engine = fake()

    async def partly():
        answer = AsyncLLM(engine).generate([1, 2], GREEDY)
        first = await anext(aiter(answer))
        return first, await answer, await answer, [output async for output in answer]

    first, whole, again, rest = served(partly())
    assert whole.token_ids == engine.model.continuation([1, 2], 12)
    assert first.token_ids == whole.token_ids[: len(first.token_ids)]
    assert again is whole
    assert rest == []


def test_a_chat_is_that_of_the_engine():
    engine = texts()
    engine.tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "hello"}]
    [expected] = engine.chat(messages, GREEDY)

    async def chats():
        llm = AsyncLLM(engine)
        with pytest.raises(ArgumentError, match="messages must be one conversation; got 2"):
            await llm.chat([messages, messages], GREEDY)
        return await llm.chat(messages, GREEDY)

    output = served(chats())
    assert (output.prompt, output.text) == (expected.prompt, expected.text) == ("[user]hello", expected.text)


def test_a_beam_search_is_that_of_the_engine_among_other_requests():
    engine = texts()
    beams = BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=0.5)
    [expected] = engine.beam_search("some text", beams)
    assert len(expected.outputs) == 3

    async def all_three():
        async with AsyncLLM(engine) as llm:
            other = asyncio.ensure_future(llm.generate("some", GREEDY))
            whole = await llm.generate("some text", beams)
            grown = [output async for output in llm.generate("some text", beams)]
            deltas = [delta async for delta in llm.generate("some text", beams).deltas()]
            return whole, grown, deltas, await other

    whole, grown, deltas, other = served(all_three())
    assert [output.outputs for output in grown] == [expected.outputs] == [whole.outputs]
    assert [delta.output.outputs for delta in deltas] == [expected.outputs]
    assert (deltas[0].text, deltas[0].token_ids) == (expected.text, expected.token_ids)
    assert other.token_ids == engine.generate("some", GREEDY)[0].token_ids
    assert all_pages_are_free(engine)


@pytest.mark.parametrize("leave", ["cancels", "closes", "times out", "drops"])
def test_whoever_leaves_a_beam_search_gives_all_its_pages_back(leave):
    engine = fake(num_pages=2000)
    gate = Gate(engine.model, at=4)

    async def ask():
        llm = AsyncLLM(engine)
        answer = llm.generate([1], BeamSearchParams(beam_width=4, max_tokens=400))
        task = asyncio.ensure_future(answer)
        await comes(gate.reached.is_set)
        held = engine.model.allocator.num_owned
        if leave == "cancels":
            task.cancel()
        elif leave == "closes":
            await answer.aclose()
        elif leave == "drops":
            task.cancel()
            del answer, task
        else:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.01)
        gate.opened.set()
        await comes(lambda: all_pages_are_free(engine))
        if leave == "closes":  # it waits meanwhile, and gets what was found until then
            assert {each.finish_reason for each in (await task).outputs} == {"abort"}
        assert not engine.requests
        return held, (await llm.generate([2], GREEDY)).token_ids

    held, after = served(ask())
    assert held > 1
    assert after == engine.model.continuation([2], 12)
    assert engine.stats.steps < 40, "the search went on for nobody"


def test_a_beam_search_without_a_number_to_choose_fails_its_coroutine_alone():
    model = FakeModel(rule=lambda history: np.full(50, np.nan) if 7 in history else model.logits_of(history))
    engine = Engine(model)

    async def ask():
        llm = AsyncLLM(engine)
        beams = BeamSearchParams(beam_width=2, max_tokens=6)
        return await asyncio.gather(
            llm.generate([7], beams),
            llm.generate([8], beams),
            llm.generate([9], "fast"),
            return_exceptions=True,
        )

    failed, searched, refused = served(ask())
    assert isinstance(failed, ArgumentError)
    assert "logits of a beam search must leave a token to choose" in str(failed)
    assert [each.token_ids for each in searched.outputs] == [
        tokens for tokens, _ in engine.model.beams([8], BeamSearchParams(beam_width=2, max_tokens=6))
    ]
    assert isinstance(refused, ArgumentError)
    assert all_pages_are_free(engine)


@pytest.mark.parametrize("seed", range(3))
def test_sixty_four_coroutines_that_leave_at_any_moment_give_all_pages_back_and_lose_nobody_a_token(seed):
    rng = random.Random(seed)
    engine = Engine(FakeModel(num_pages=30), max_batch_tokens=16, max_num_seqs=8)
    prompts = [[i % 5, *range(i % 9), i % 50] for i in range(64)]
    leaves = [rng.choice(["stays", "stays", "cancelled", "breaks", "closes", "never reads"]) for _ in prompts]
    got = {}

    async def ask(llm, i):
        answer = llm.generate(prompts[i], GREEDY)
        if leaves[i] == "never reads":
            return
        if leaves[i] in ("stays", "cancelled") and i % 2:
            got[i] = (await answer).token_ids
            return
        async for output in answer:
            await asyncio.sleep(0)
            if leaves[i] in ("breaks", "closes") and len(output.token_ids) > i % 10:
                break
            got[i] = output.token_ids
        if leaves[i] == "closes":
            await answer.aclose()

    async def all_of_them():
        llm = AsyncLLM(engine)
        tasks = [asyncio.create_task(ask(llm, i)) for i in range(64)]
        for i in rng.sample(range(64), 64):
            await asyncio.sleep(0.0005 * rng.random())
            if leaves[i] == "cancelled":
                tasks[i].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await comes(lambda: all_pages_are_free(engine))
        assert not engine.requests
        assert not llm._worker._live

    served(all_of_them())
    for i, prompt in enumerate(prompts):
        tokens = engine.model.continuation(prompt, 12)
        if leaves[i] == "stays":
            assert got[i] == tokens
        elif i in got:
            assert got[i] == tokens[: len(got[i])]


def test_coroutines_join_the_batch_of_threads_and_of_other_engines_on_a_real_model(
    model, prompts, expected, set_threads
):
    set_threads(1)
    paged = PagedModel(model, page_size=4, num_pages=40, backend="reference")
    llm, other = LLM(paged, max_batch_tokens=24), LLM(paged, max_batch_tokens=24)
    params = SamplingParams(max_tokens=NEW_TOKENS)
    outputs = {}

    async def ask():
        async with AsyncLLM(llm) as asynchronous:
            return await asyncio.gather(*[asynchronous.generate(prompt, params) for prompt in prompts[:4]])

    with running(
        lambda: outputs.update(coroutines=served(ask())),
        lambda: outputs.update(thread=llm.generate(prompts[:4], params)),
        lambda: outputs.update(other=other.generate(prompts[:4], params)),
    ):
        pass
    for who in ("coroutines", "thread", "other"):
        assert [output.token_ids for output in outputs[who]] == expected[:4], who
    assert paged.allocator.num_owned == 0


def test_loops_of_several_threads_share_the_batch_also_through_two_async_llms():
    engine = fake()
    llms, got = [AsyncLLM(engine), AsyncLLM(engine)], {}

    async def ask(i):
        outputs = await asyncio.gather(*[llms[i % 2].generate([i, j], GREEDY) for j in range(5)])
        got[i] = [output.token_ids for output in outputs]

    with running(*[lambda i=i: served(ask(i)) for i in range(4)]):
        pass
    assert got == {i: [engine.model.continuation([i, j], 12) for j in range(5)] for i in range(4)}
    assert engine.stats.steps < 20 * 12 / 2, "the loops did not share steps"


def test_what_fails_for_one_request_reaches_its_coroutine_alone():
    engine = fake()

    def fails(token_ids, logits):
        if len(token_ids) == 3:
            raise LookupError("my own")
        return logits

    async def ask():
        llm = AsyncLLM(engine)
        own = SamplingParams(max_tokens=12, logits_processors=[fails])
        failing, long = llm.generate([2], own), llm.generate([3], SamplingParams(max_tokens=999))
        got = await asyncio.gather(
            llm.generate([1], GREEDY), failing, long, llm.generate([], GREEDY), return_exceptions=True
        )
        with pytest.raises(UnsupportedError, match="an answer must be awaited before it ends by a failure"):
            await failing
        return got

    good, own, long, empty = served(ask())
    assert good.token_ids == engine.model.continuation([1], 12)
    assert isinstance(own, LookupError)
    assert "prompt of 1 tokens plus 999" in str(long)
    assert "prompt must not be empty" in str(empty)
    assert all_pages_are_free(engine)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_step_that_fails_ends_the_coroutines_requests_and_no_later_one(error):
    engine = fake()
    forward = engine.model.forward

    def failing(step):
        if len(engine.model.step_sizes) == 5:
            raise error("no memory")
        return forward(step)

    engine.model.forward = failing

    async def ask():
        llm = AsyncLLM(engine)
        failed = await asyncio.gather(*[llm.generate([i], GREEDY) for i in range(3)], return_exceptions=True)
        engine.model.forward = forward
        return failed, await llm.generate([1], GREEDY)

    failed, after = served(ask())
    for each in failed:
        assert isinstance(each, QuireError)
        assert f"served by steps that do not fail; got {error.__name__}: no memory" in str(each)
        assert isinstance(each.__cause__, error)
    assert len({id(each) for each in failed}) == 3, "a traceback is each coroutine's own"
    assert after.token_ids == engine.model.continuation([1], 12)
    assert all_pages_are_free(engine)


async def cancels(answer, task):
    task.cancel()


async def closes(answer, task):
    await answer.aclose()


@pytest.mark.parametrize("leave", [cancels, closes])
def test_leaving_and_coming_wait_for_no_step(leave):
    engine = fake()
    gate = Gate(engine.model, at=3)

    async def ask():
        llm = AsyncLLM(engine)
        left, kept = llm.generate([1], LONG), llm.generate([2], GREEDY)
        tasks = [asyncio.ensure_future(left), asyncio.ensure_future(kept)]
        await comes(gate.reached.is_set)
        later = asyncio.ensure_future(llm.generate([3], GREEDY))
        await comes(lambda: len(engine.requests) == 3)
        await leave(left, tasks[0])
        assert not gate.opened.is_set()  # all of this while the step runs
        gate.opened.set()
        return await asyncio.gather(*tasks, later, return_exceptions=True)

    left, kept, later = served(ask())
    if leave is cancels:
        assert isinstance(left, asyncio.CancelledError)
    else:  # whoever waits meanwhile gets what there is
        assert left.finish_reason == "abort"
        assert left.token_ids == engine.model.continuation([1], 60)[: len(left.token_ids)]
    assert kept.token_ids == engine.model.continuation([2], 12)
    assert later.token_ids == engine.model.continuation([3], 12)
    assert all_pages_are_free(engine)


def test_a_timeout_aborts_and_a_dropped_answer_too():
    engine = fake(num_pages=2000)
    gate = Gate(engine.model, at=3)

    async def ask():
        llm = AsyncLLM(engine)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(llm.generate([1], ENDLESS), 0.01)
        gate.opened.set()
        async for _ in llm.generate([2], ENDLESS):
            break
        async for _ in llm.generate([3], ENDLESS).deltas():
            break
        await comes(lambda: all_pages_are_free(engine))
        assert not engine.requests

    served(ask())


def test_requests_of_a_loop_that_was_closed_are_ended():
    engine = fake(num_pages=2000)
    gate = Gate(engine.model, at=3)
    llm, loop = AsyncLLM(engine), asyncio.new_event_loop()

    async def waits():
        async for _ in llm.generate([1], ENDLESS):
            pass

    task = loop.create_task(waits())
    loop.run_until_complete(comes(gate.reached.is_set))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    gate.opened.set()
    until(lambda: not engine.requests)
    assert engine.stats.generated_tokens < 10
    assert all_pages_are_free(engine)
    task._log_destroy_pending = False


def test_a_prompt_that_takes_long_to_encode_holds_up_nobody():
    engine = texts()
    encode, opened = engine._intake._encode, threading.Event()

    def slow(prompts, **options):
        assert "slow" not in prompts or opened.wait(HANGS)
        return encode(prompts, **options)

    engine._intake._encode = slow

    async def ask():
        llm = AsyncLLM(engine)
        first = asyncio.ensure_future(llm.generate("slow", GREEDY))
        second = await llm.generate("fast", GREEDY)
        opened.set()
        return await first, second

    assert [output.prompt for output in served(ask())] == ["slow", "fast"]


def test_an_answer_keeps_neither_its_request_nor_its_engine_once_it_is_read():
    kept = []

    async def ask():
        llm = AsyncLLM(fake())
        answers = [llm.generate([1], GREEDY) for _ in range(3)]
        await answers[0]
        await anext(aiter(answers[1]))
        kept.extend(weakref.ref(request) for request in llm.engine.requests.values())
        await answers[1].aclose()
        task = asyncio.ensure_future(answers[2])
        await comes(lambda: len(kept) + len(llm.engine.requests) == 2)
        kept.extend(weakref.ref(request) for request in llm.engine.requests.values())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        await comes(lambda: all_pages_are_free(llm.engine))
        llm.shutdown()
        return answers

    gc.disable()  # no circles are made
    try:
        answers = served(ask())
        assert len(kept) == 2
        until(lambda: all(request() is None for request in kept))
    finally:
        gc.enable()
    assert answers[0]._output is not None


def test_a_shutdown_inside_a_step_is_refused():
    engine = fake()
    forward, refused = engine.model.forward, []

    async def ask():
        llm = AsyncLLM(engine)

        def shuts_down(step):
            with pytest.raises(UnsupportedError, match="inside a step"):
                llm.shutdown()
            refused.append(step)
            return forward(step)

        engine.model.forward = shuts_down
        return await llm.generate([1], GREEDY)

    assert served(ask()).token_ids == engine.model.continuation([1], 12)
    assert len(refused) == 12


def test_a_loop_is_woken_once_a_step_and_for_a_whole_answer_once():
    engine = fake()

    async def ask(read):
        llm, loop, wakes = AsyncLLM(engine), asyncio.get_running_loop(), []
        call_soon = loop.call_soon_threadsafe

        def counted(callback, *args, **options):
            if "_deliver" in repr(callback):
                wakes.append(callback)
            return call_soon(callback, *args, **options)

        loop.call_soon_threadsafe = counted
        steps = engine.stats.steps
        await asyncio.gather(*[read(llm.generate([i], LONG)) for i in range(8)])
        return len(wakes), engine.stats.steps - steps

    async def iterate(answer):
        async for _ in answer:
            pass

    async def whole(answer):
        await answer

    wakes, steps = served(ask(iterate))
    assert wakes <= steps
    wakes, _ = served(ask(whole))
    assert wakes <= 8


def test_no_step_is_run_for_nobody():
    engine = fake()

    async def ask():
        llm = AsyncLLM(engine)
        await llm.generate([1], GREEDY)
        turns = engine._num_turns
        assert turns <= 12 + 1
        engine.add_request([1], GREEDY)  # for whoever calls step
        await asyncio.sleep(0.05)
        assert engine._num_turns == turns
        assert thread_of(llm).is_alive()

    served(ask())


def test_an_answer_is_awaited_by_one_coroutine_at_a_time():
    engine = fake()
    gate = Gate(engine.model)

    async def ask():
        answer = AsyncLLM(engine).generate([1], GREEDY)
        first = asyncio.ensure_future(answer)
        await comes(gate.reached.is_set)
        with pytest.raises(UnsupportedError, match="awaited by one coroutine at a time"):
            await answer
        gate.opened.set()
        return await first

    assert served(ask()).token_ids == engine.model.continuation([1], 12)


def test_a_shutdown_gives_coroutines_what_they_have_and_refuses_what_comes_later():
    engine = fake(num_pages=400)
    gate = Gate(engine.model, at=4)

    async def ask():
        async with AsyncLLM(engine) as llm:
            waits = asyncio.ensure_future(llm.generate([1], SamplingParams(max_tokens=1000)))
            await comes(gate.reached.is_set)
            gate.opened.set()
        assert not thread_of(llm).is_alive()
        with pytest.raises(UnsupportedError, match="must not be shut down when a request is made"):
            await llm.generate([2], GREEDY)
        llm.shutdown()
        return await waits

    output = served(ask())
    assert output.finish_reason == "abort"
    assert output.token_ids == engine.model.continuation([1], 1000)[: len(output.token_ids)]
    assert all_pages_are_free(engine)
    [after] = engine.generate([3], GREEDY)  # the engine itself goes on
    assert after.token_ids == engine.model.continuation([3], 12)


def test_an_async_llm_that_is_dropped_ends_its_thread_and_lets_its_engine_go_but_not_under_an_answer():
    model = FakeModel()
    gone = []

    async def ask():
        llm = AsyncLLM(Engine(model))
        gone.append(weakref.ref(llm.engine))
        answer = llm.generate([1], GREEDY)
        await anext(aiter(answer))
        thread = thread_of(llm)
        del llm
        return thread, await answer

    async def never_kept():
        return await AsyncLLM(Engine(model)).generate([1], GREEDY)

    thread, output = served(ask())
    assert output.token_ids == served(never_kept()).token_ids == model.continuation([1], 12)
    thread.join(HANGS)
    assert not thread.is_alive()
    gc.collect()
    assert gone[0]() is None
    assert model.allocator.num_available == model.num_pages


def test_the_interpreter_ends_while_requests_live_and_says_nothing():
    code = """
import asyncio, atexit, sys
atexit.register(lambda: print(llm._worker._thread.is_alive()))  # called after those that were registered later
sys.path.insert(0, "tests")
from engine.fakes import FakeModel
from quire.engine import AsyncLLM, Engine, SamplingParams

llm = AsyncLLM(Engine(FakeModel(num_pages=4000)))
answer = llm.generate([1], SamplingParams(max_tokens=10_000))

async def begin():
    print((await anext(aiter(answer))).token_ids[:1])

loop = asyncio.new_event_loop()
loop.run_until_complete(begin())
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=5 * HANGS
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"{FakeModel().continuation([1], 1)}\nFalse\n"


def test_it_is_made_of_what_an_llm_takes_or_of_an_engine(model):
    assert quire.AsyncLLM is AsyncLLM
    llm = AsyncLLM(model, num_pages=20, backend="reference")
    assert isinstance(llm.engine, LLM)
    assert repr(llm).startswith("AsyncLLM(LLM(0 running")
    assert served(_whole(llm, [1, 2])).token_ids == llm.engine.generate([1, 2], GREEDY)[0].token_ids
    with pytest.raises(ArgumentError, match="num_pages must be left out, as an Engine has them already"):
        AsyncLLM(llm.engine, num_pages=3)


async def _whole(llm, prompt):
    return await llm.generate(prompt, GREEDY)
