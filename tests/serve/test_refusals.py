"""What cannot be served is said in OpenAI's JSON, and nothing is left of it."""

from __future__ import annotations

import asyncio
import socket

import httpx
import openai
import pytest
from engine.test_threads import Gate

from quire.engine import Engine
from quire.errors import ArgumentError
from quire.serve.app import create_app
from quire.serve.limits import Limits
from quire.serve.server import bind, is_loopback

from .conftest import HANGS, make_engine, serving, until

JSON = {"content-type": "application/json"}
KEY = "a long random kéy"
SMALL = Limits(max_texts=3, max_body_bytes=2000, body_seconds=0.3)


@pytest.fixture(scope="module")
def guarded():
    with serving(make_engine(), api_key=KEY, limits=SMALL) as running:
        yield running


def bearer(key: str) -> dict[str, bytes]:
    return {"authorization": f"Bearer {key}".encode()}


def check_error(answer: httpx.Response, status: int, said: str = "") -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]


BODIES = {
    "nothing": (b"", ""),
    "half": (b'{"prompt": "x"', "the body must be JSON"),
    "no object": (b'["x"]', "must be a JSON object"),
    "no utf-8": (b'{"prompt": "\xff"}', ""),
    "deep": (b'{"prompt": ' + b"[" * 100_000, ""),
    "deep and whole": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
    "long number": (b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", ""),
    "large number": (b'{"prompt": "x", "seed": 99999999999999999999}', "seed"),
    "no prompt": (b"{}", "prompt"),
    "empty prompt": (b'{"prompt": ""}', "prompt must not be empty"),
    "no prompts": (b'{"prompt": []}', "prompt must be text"),
    "an empty one": (b'{"prompt": ["a", []]}', "prompt must not be empty"),
    "mixed": (b'{"prompt": ["a", 7]}', "prompts must be text"),
    "negative token": (b'{"prompt": [-1]}', "from 0 to 256"),
    "large token": (b'{"prompt": [999999999999999999999999]}', "from 0 to 256"),
    "bool token": (b'{"prompt": [true]}', "prompts must be text"),
    "fraction": (b'{"prompt": [[1.5]]}', "int token ids"),
    "half a pair": (b'{"prompt": "\\ud800"}', "lone surrogate"),
    "long": (b'{"prompt": "' + b"x" * 500 + b'"}', "shorter than the model's 400 tokens"),
    "nan": (b'{"prompt": "x", "temperature": NaN}', "temperature"),
    "infinite": (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    "cold": (b'{"prompt": "x", "temperature": -1}', "temperature"),
    "n of text": (b'{"prompt": "x", "n": "2"}', "n"),
    "n of 0": (b'{"prompt": "x", "n": 0}', "n"),
    "many samples": (b'{"prompt": "x", "n": 129}', "n"),
    "greedy samples": (b'{"prompt": "x", "n": 2, "temperature": 0}', "n must be 1"),
    "best of": (b'{"prompt": "x", "best_of": 4}', "best_of must be n"),
    "suffix": (b'{"prompt": "x", "suffix": "y"}', "suffix"),
    "unknown": (b'{"prompt": "x", "beam_width": 4}', "'beam_width' must be left out"),
    "odd name": (b'{"prompt": "x", "\\ud800": 4}', "must be left out"),
    "many stops": (b'{"prompt": "x", "stop": [' + b'"x",' * 16 + b'"x"]}', "stop"),
    "long stop": (b'{"prompt": "x", "stop": "' + b"x" * 257 + b'"}', "stop"),
    "empty stop": (b'{"prompt": "x", "stop": ""}', "stop must be a non-empty string"),
    "many logprobs": (b'{"prompt": "x", "logprobs": 21}', "logprobs"),
    "bias of no token": (b'{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias must name tokens"),
    "bias of another": (b'{"prompt": "x", "logit_bias": {"257": 1}}', "logit_bias must hold token ids"),
    "odd bias": (b'{"prompt": "x", "logit_bias": {"\xc2\xb2": 1}}', "logit_bias must name tokens"),
    "options alone": (b'{"prompt": "x", "stream_options": {}}', "stream_options must be left out"),
    "echo": (b'{"prompt": "x", "echo": true, "logprobs": 1, "stream": true}', "logprobs must be left out"),
    "too many texts": (b'{"prompt": ["x", "x", "x", "x", "x"], "n": 100}', "at most 384 texts"),
    "ends": (
        b'{"prompt": "x", "ignore_eos": true, "response_format": {"type": "json_object"}}',
        "ignore_eos",
    ),
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("body", "said"), BODIES.values(), ids=BODIES)
def test_a_malformed_body_is_refused_with_a_sentence(running, path, body, said):
    answer = running.post(path, content=body, headers=JSON)
    check_error(answer, 400, said if path == "/v1/completions" else "")
    running.check_idle()  # soon: a good prompt beside a wrong one has begun, and the engine's thread aborts it


@pytest.mark.parametrize("stream", [True, False])
def test_a_wrong_prompt_is_a_status_also_of_a_stream(running, stream):
    check_error(
        running.post("/v1/completions", {"prompt": ["good", ""], "stream": stream}), 400, "not be empty"
    )


CHATS = {
    "no messages": ({"messages": []}, "messages"),
    "no role": ({"messages": [{"content": "x"}]}, "role"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "content must be text",
    ),
    "no such role": ({"messages": [{"role": "robot", "content": "x"}]}, "no such role"),
    "a call": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
        "'tool_calls' of a message must be left out",
    ),
    "tools": ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "'tools' must be left out"),
    "top logprobs": (
        {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 1},
        "top_logprobs must be left out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "said"), CHATS.values(), ids=CHATS)
def test_a_chat_that_cannot_be_served_is_refused(running, body, said):
    check_error(running.post("/v1/chat/completions", body), 400, said)


def test_a_body_that_is_not_said_to_be_json_is_refused(running):
    """Other pages in a browser may send such bodies to this machine without being asked."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = running.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind})
        check_error(answer, 400, "content-type: application/json")


def test_another_model_and_another_path_are_not_found(running):
    check_error(
        running.post("/v1/completions", {"model": "gpt", "prompt": "x"}), 404, "model must be one of tiny"
    )
    check_error(running.get("/v1/models/gpt"), 404, "got gpt")
    check_error(running.get("/v1/engines"), 404, "/v1/engines")
    check_error(running.get("/v1/completions"), 405)
    with pytest.raises(openai.NotFoundError):
        running.client().models.retrieve("gpt")


def test_a_tokenizer_without_a_template_is_said_so():
    with serving(make_engine(template=None)) as running:
        body = {"messages": [{"role": "user", "content": "x"}]}
        check_error(
            running.post("/v1/chat/completions", body), 400, "chat needs a tokenizer with a chat template"
        )


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": b"Bearer"}, bearer(KEY[:-1]), bearer(f"{KEY}x"), {"authorization": KEY.encode()}],
)
def test_without_the_key_nothing_of_the_api_is_there(guarded, headers):
    for path in ("/v1/completions", "//v1/completions", "/v1/models", "/openapi.json", "/x"):
        check_error(
            guarded.post(path, json={"prompt": "x"}, headers=headers), 401, "Authorization must be 'Bearer'"
        )
    assert guarded.get("/health").status_code == 200


def test_with_the_key_it_is(guarded):
    headers = {"authorization": f"bearer {KEY}".encode()}
    assert guarded.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_above_the_limit_is_refused_before_it_is_read_whole(guarded, chunked):
    body = b'{"prompt": "' + b"x" * 3000 + b'"}'
    content = iter([body[:1500], body[1500:]]) if chunked else body
    answer = guarded.post("/v1/completions", content=content, headers={**JSON, **bearer(KEY)})
    check_error(answer, 413, "at most 2000 bytes")


def test_a_body_that_does_not_come_is_given_up(guarded):
    with socket.create_connection(
        guarded.url.removeprefix("http://").split(":"), timeout=HANGS
    ) as connection:
        key = KEY.encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key
            + b"\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )  # fmt: skip
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_beyond_the_queue_requests_are_told_to_come_back(guarded):
    """Three texts have places; the fourth is refused until they have ended."""
    gate, headers = Gate(guarded.engine.model, at=3), bearer(KEY)
    ask = {"prompt": "x", "n": 3, "max_tokens": 20, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{guarded.url}/v1/completions", json=ask, headers=headers, timeout=HANGS
    ) as stream:
        assert gate.reached.wait(HANGS)
        answer = guarded.post("/v1/completions", json={"prompt": "y"}, headers=headers)
        check_error(answer, 429, "got 3 of 3 taken")
        assert answer.headers["retry-after"] == "1"
        gate.opened.set()
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
    until(lambda: guarded.service.places.taken == 0)
    assert guarded.post("/v1/completions", json={"prompt": "y"}, headers=headers).status_code == 200


def test_a_step_that_fails_is_said_without_its_secrets_and_the_next_request_is_served():
    engine = make_engine()
    forward = engine.model.forward

    def fails(step):
        engine.model.forward = forward
        raise RuntimeError("secrets of the machine")

    engine.model.forward = fails
    with serving(engine) as running:
        answer = running.post("/v1/completions", {"prompt": "x"})
        check_error(answer, 500, "could not be served")
        assert "secrets" not in answer.text
        assert running.post("/v1/completions", {"prompt": "x"}).status_code == 200
        running.check_idle()


def test_an_address_that_someone_has_is_one_sentence():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(ArgumentError, match="must be an address of this machine that nobody has"):
            bind("127.0.0.1", first.getsockname()[1])
    with pytest.raises(ArgumentError, match="must be an address of this machine"):
        bind("no.such.host.invalid", 80)


def test_loopback_is_told_from_other_addresses():
    with bind("localhost", 0) as inside, bind("0.0.0.0", 0) as outside:
        assert is_loopback(inside)
        assert not is_loopback(outside)


def test_what_an_app_cannot_be_made_of_is_said_so():
    with pytest.raises(ArgumentError, match="engine must have a tokenizer"):
        create_app(Engine(make_engine().model), names=["x"])
    with pytest.raises(ArgumentError, match="names must hold at least one name"):
        create_app(make_engine(), names=[])
    for name in ("max_texts", "max_body_bytes", "send_seconds"):
        with pytest.raises(ArgumentError, match=name):
            Limits(**{name: 0})


def test_a_server_that_is_about_to_stop_says_so():
    app = create_app(make_engine(), names=["x"])
    app.state.service.is_closing = True

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/health"), await client.post("/v1/completions", json={"prompt": "x"})

    health, answer = asyncio.run(ask())
    assert health.status_code == 503
    check_error(answer, 503, "about to stop")
