"""A server on a free port of this machine, over a model that remembers nothing but what its pages hold."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai
import pytest
from engine.fakes import EOS, FakeModel, byte_tokenizer

from quire.engine import Engine
from quire.serve.app import create_app
from quire.serve.limits import Limits
from quire.serve.server import Server, bind, url_of
from quire.serve.service import Service

HANGS = 60  # seconds after which a test has failed
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ('user', 'assistant', 'system') %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"
)


@dataclass
class Running:
    """A server that runs."""

    url: str
    engine: Engine
    service: Service
    server: Server

    # Nothing here is encrypted, and to read a system's certificates takes longer than to answer a request.
    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(http_client=httpx.Client(verify=False), **self.options(**options))

    def async_client(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(http_client=httpx.AsyncClient(verify=False), **self.options(**options))

    def options(self, **options):
        return {"base_url": f"{self.url}/v1", "api_key": "-", "max_retries": 0, "timeout": HANGS, **options}

    def post(self, path: str, body=None, **options) -> httpx.Response:
        options = options or {"json": body}
        return httpx.post(f"{self.url}{path}", timeout=HANGS, verify=False, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=HANGS, verify=False, **options)

    def is_idle(self) -> bool:
        """Whether nothing is left of any request."""
        return (
            self.engine.model.allocator.num_owned == 0
            and not self.engine.requests
            and self.service.places.taken == 0
        )

    def check_idle(self) -> None:
        until(self.is_idle)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def make_engine(num_pages: int = 400, *, template: str | None = TEMPLATE, **options) -> Engine:
    """Tokens are bytes, 256 ends a text; logits are random and depend on the whole text."""
    options = {"vocab_size": 257, "eos_token_ids": (EOS,), "max_seq_len": 400, **options}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Engine(FakeModel(num_pages=num_pages, **options), tokenizer)


@contextmanager
def serving(engine: Engine, *, api_key: str | None = None, limits: Limits | None = None) -> Iterator[Running]:
    app = create_app(engine, names=["tiny", "other"], api_key=api_key, limits=limits)
    server, bound = Server(app, access_log=False), bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(url_of(bound), engine, app.state.service, server)
    finally:
        server.should_exit = True
        thread.join(HANGS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(make_engine()) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test all pages of the shared server are back."""
    yield
    if "running" in request.fixturenames:
        request.getfixturevalue("running").check_idle()
