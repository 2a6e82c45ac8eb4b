"""Who may come in, with how much, and how many at once."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.engine.core import DEFAULT_MAX_NUM_SEQS
from quire.errors import ArgumentError
from quire.serve.errors import Refusal, refused
from quire.spec import check_size

DEFAULT_MAX_QUEUE = 256
# Without a key, the first two as vLLM's: nothing of a request is in them. What /pages shows comes by /pages.json.
_OPEN_PATHS = ("/health", "/metrics", "/pages")


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Args:
        max_texts: texts at once, running and waiting: prompts times n, of all requests. More are refused with 429.
        max_body_bytes: of one request.
        body_seconds: within which a body must have come.
        send_seconds: within which a client must take what it is sent; one that does not is left.
        grace_seconds: which requests have to end once the server is to stop.
    Raises:
        ArgumentError: a limit below one.
    """

    max_texts: int = DEFAULT_MAX_NUM_SEQS + DEFAULT_MAX_QUEUE
    max_body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        check_size("max_texts", self.max_texts)
        check_size("max_body_bytes", self.max_body_bytes)
        for name in ("body_seconds", "send_seconds", "grace_seconds"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ArgumentError(
                    f"{name} must be a number of seconds above 0; got {value!r}. Fix: {name}=10.0"
                )


class Places:
    """How many texts are on their way; used in one event loop."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0

    @contextmanager
    def take(self, num_texts: int) -> Iterator[None]:
        """Hold places for some texts.

        Raises:
            Refusal: there are not so many now, or never.
        """
        if num_texts > self.total:
            raise Refusal(
                400,
                f"a request must ask for at most {self.total} texts; got {num_texts}. Fix: fewer prompts, or n",
            )
        if self.taken + num_texts > self.total:
            raise Refusal(
                429,
                f"the server must have room for {num_texts} more texts; got {self.taken} of {self.total} taken. "
                "Fix: ask again a little later",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        self.taken += num_texts
        try:
            yield
        finally:
            self.taken -= num_texts


class Door:
    """Lets requests in that have the key and whose body is small; before anything reads them.

    Args:
        app: gets what is let in, its body in one piece.
        api_key: None: everyone is let in.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, api_key: str | None) -> None:
        self._app = app
        self._limits = limits
        self._key = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._read(scope, receive)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _first(body, receive), send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in _OPEN_PATHS:
            return
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Latin-1 gives the header's bytes back. Digests are equally long: the time to compare them says nothing.
        is_right = hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key)
        if kind.lower() != "bearer" or not is_right:
            raise Refusal(
                401,
                "the header Authorization must be 'Bearer' and the server's key; got another, or none. "
                "Fix: OpenAI(api_key=…)",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None where the client has left."""
        limit = self._limits.max_body_bytes
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdecimal() and int(said[:20]) > limit:
            raise _too_large(limit)
        try:
            return await asyncio.wait_for(_read_body(receive, limit), self._limits.body_seconds)
        except asyncio.TimeoutError:
            raise Refusal(
                408,
                f"a body must come within {self._limits.body_seconds:g} seconds; got a part of it. Fix: ask again",
                headers={"connection": "close"},
            ) from None


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return bytes(body)


def _first(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, then what the connection says."""
    given = False

    async def receive_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        f"a body must have at most {limit} bytes; got more. Fix: fewer or shorter prompts in one request",
        headers={"connection": "close"},  # the rest of it is not read
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
