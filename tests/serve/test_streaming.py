"""Streams: joined they are the whole answer, and whoever leaves takes nothing along and loses nobody anything."""

from __future__ import annotations

import asyncio
import json
import random
import time

import anyio
import httpx
import pytest
from engine.fakes import EOS

from quire.engine import SamplingParams
from quire.serve.limits import Limits
from quire.serve.streaming import EventStream

from .conftest import HANGS, make_engine, serving, until

MESSAGES = [{"role": "user", "content": "Hello"}]
USAGE = {"include_usage": True}


def test_a_streamed_completion_is_the_whole_one(running):
    ask = {
        "model": "tiny", "prompt": ["one", "two"], "n": 3, "seed": 1, "max_tokens": 14, "logprobs": 2, "stop": "Q",
    }  # fmt: skip
    whole = running.client().completions.create(**ask)
    chunks = list(running.client().completions.create(**ask, stream=True, stream_options=USAGE))
    for choice in whole.choices:
        own = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [one for each in own if each.logprobs for one in getattr(each.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_streamed_echo_begins_with_the_prompt(running, max_tokens):
    ask = {
        "model": "tiny",
        "prompt": ["one", [116, 119, 111]],
        "temperature": 0,
        "max_tokens": max_tokens,
        "echo": True,
    }
    whole = running.client().completions.create(**ask)
    chunks = list(running.client().completions.create(**ask, stream=True))
    assert [choice.text[:3] for choice in whole.choices] == ["one", "two"]
    for choice in whole.choices:
        own = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert own[-1].finish_reason == "length"


def test_a_streamed_chat_is_the_whole_one(running):
    ask = {
        "model": "tiny", "messages": MESSAGES, "n": 2, "seed": 1, "max_tokens": 14, "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    whole = running.client().chat.completions.create(**ask)
    chunks = list(running.client().chat.completions.create(**ask, stream=True, stream_options=USAGE))
    for choice in whole.choices:
        own = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert [each.delta.role for each in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        joined = [one for each in own if each.logprobs for one in each.logprobs.content]
        assert joined == choice.logprobs.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_tokens_come_while_later_ones_are_computed():
    """The stream's first tokens are read before the model is let to compute the others."""
    engine = make_engine()
    forward, may_go_on = engine.model.forward, asyncio.Event()

    def held(step):
        until(lambda: len(engine.model.step_sizes) < 4 or may_go_on.is_set())
        return forward(step)

    engine.model.forward = held
    with serving(engine) as running:
        stream = running.client().completions.create(
            model="tiny", prompt="x", max_tokens=9, stream=True, logit_bias={"256": -100}, logprobs=0
        )
        tokens = 0
        for chunk in stream:
            tokens += len(chunk.choices[0].logprobs.tokens if chunk.choices[0].logprobs else ())
            if tokens == 4:
                may_go_on.set()
        assert tokens == 9


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_of_64_streams_those_who_stay_get_everything_and_those_who_leave_give_all_pages_back(seed):
    """In a pool that is far too small for all, with nonsense in between."""
    rng = random.Random(seed)
    engine = make_engine(num_pages=60)
    asks = []
    for i in range(64):
        params = {
            "max_tokens": rng.randint(1, 40),
            "seed": i,
            "temperature": rng.choice((0.5, 1.0)),
            "n": rng.choice((1, 1, 2)),
        }
        asks.append((chr(65 + i % 8) * rng.randint(1, 30), params, rng.random() < 0.4))
    prompts, params, _ = zip(*asks, strict=True)
    outputs = make_engine(num_pages=4000).generate(prompts, [SamplingParams(**each) for each in params])
    expected = [output.outputs for output in outputs]
    nonsense = (
        b"",
        b"{",
        b"[]",
        b'{"prompt": 7}',
        b'{"prompt": "x", "n": 1000}',
        b"\xff\xfe",
        b'{"prompt": []}',
    )

    async def one(client, http, prompt, params, leaves, texts):
        await asyncio.sleep(rng.random() * 0.2)
        if rng.random() < 0.3:
            answer = await http.post(
                "/v1/completions", content=rng.choice(nonsense), headers={"content-type": "application/json"}
            )
            assert answer.status_code == 400
            assert answer.json()["error"]["message"]
        if leaves and rng.random() < 0.5:  # before anything came
            with anyio.move_on_after(rng.random() * 0.1):
                await client.completions.create(model="tiny", prompt=prompt, **params)
            return
        stream = await client.completions.create(model="tiny", prompt=prompt, stream=True, **params)
        got, ends, most = [""] * params["n"], {}, rng.randint(1, 20)
        async for chunk in stream:
            [choice] = chunk.choices
            got[choice.index] += choice.text
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
            most -= 1
            if leaves and most == 0:
                await stream.close()
                return
        assert got == [text.text for text in texts]
        assert ends == {text.index: text.finish_reason for text in texts}

    async def everyone(running):
        async with (
            running.async_client() as client,
            httpx.AsyncClient(base_url=running.url, timeout=HANGS, verify=False) as http,
        ):
            jobs = [one(client, http, *ask, texts) for ask, texts in zip(asks, expected, strict=True)]
            await asyncio.wait_for(asyncio.gather(*jobs), 2 * HANGS)

    with serving(engine) as running:
        asyncio.run(everyone(running))
        running.check_idle()
        [after] = engine.generate("after", SamplingParams(max_tokens=5))
        assert after.token_ids == engine.model.continuation(list(b"after"), 5)
    assert engine.model.allocator.num_available == 60


LONG = 3000


def long_engine():
    """Takes seconds for LONG tokens, so that a test sees whether they were all computed."""
    engine = make_engine(num_pages=4000, max_seq_len=None)
    forward = engine.model.forward

    def slow(step):
        time.sleep(0.002)
        return forward(step)

    engine.model.forward = slow
    return engine


def long_text(running, **options):
    body = {"prompt": "x", "max_tokens": LONG, "logit_bias": {str(EOS): -100}, **options}
    return httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=HANGS, verify=False)


def test_a_client_that_vanishes_gives_its_pages_back_while_others_go_on():
    engine = long_engine()
    with serving(engine) as running:
        with long_text(running, stream=True, n=4) as stream, long_text(running, stream=True) as other:
            next(stream.iter_lines())
            lines = other.iter_lines()
            next(lines)
            stream.close()
            until(lambda: len(engine.requests) == 1)
            assert all(line.startswith("data: {") for line in (next(lines), next(lines)) if line)
        running.check_idle()
    assert engine.stats.generated_tokens < LONG


def test_a_client_that_vanishes_before_the_answer_gives_its_pages_back():
    engine = long_engine()
    with serving(engine) as running:
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(timeout=0.2, verify=False) as client,
        ):
            client.post(
                f"{running.url}/v1/completions", json={"prompt": "x", "max_tokens": LONG, "ignore_eos": True}
            )
        running.check_idle()
    assert 0 < engine.stats.generated_tokens < LONG


def test_a_client_that_takes_nothing_is_left():
    closed = []

    async def events():
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def stalls(message):
        if message["type"] == "http.response.body" and b"x" in message["body"]:
            await asyncio.sleep(10 * HANGS)

    async def stays():
        await asyncio.sleep(10 * HANGS)

    async def serve():
        source = events()
        await anext(source)
        await EventStream(b"data: first\n\n", source, 0.05)({"type": "http"}, stays, stalls)

    asyncio.run(asyncio.wait_for(serve(), HANGS))
    assert closed == [True]


def test_what_fails_in_a_stream_is_its_last_event_and_touches_no_later_request():
    engine = make_engine()
    forward = engine.model.forward

    def fails(step):
        if len(engine.model.step_sizes) == 5:
            engine.model.forward = forward
            raise RuntimeError("secrets of the machine")
        return forward(step)

    engine.model.forward = fails
    with serving(engine) as running:
        with long_text(running, stream=True, max_tokens=100) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        error = json.loads(lines[-2])["error"]
        assert error["type"] == "server_error"
        assert "secrets" not in error["message"]
        said = running.client().completions.create(model="tiny", prompt="y", temperature=0, max_tokens=3)
        assert said.usage.completion_tokens == 3
        running.check_idle()


def test_what_has_not_ended_when_the_server_stops_gets_what_there_is():
    engine = make_engine(num_pages=4000, max_seq_len=None)
    with (
        serving(engine, limits=Limits(grace_seconds=0.2)) as running,
        long_text(running, stream=True) as stream,
    ):
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        next(lines)
        running.server.should_exit = True
        *_, last, done = lines
        assert json.loads(last)["choices"][0]["finish_reason"] == "abort"
        assert done == "[DONE]"
    assert running.is_idle()
