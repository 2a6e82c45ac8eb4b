"""Events while they come, for a client that may leave, or stop reading."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.engine import Answer, Delta
from quire.serve.errors import logger

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it has left.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _end(working, gone)


async def merge(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Delta], None]:
    """What several answers gain, each with its place, as it comes; closes them at the end."""
    streams = [answer.deltas() for answer in answers]
    waits = {asyncio.ensure_future(_next(stream)): place for place, stream in enumerate(streams)}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = waits.pop(task)
                delta = task.result()
                if delta.output is None:
                    waits[asyncio.ensure_future(_next(streams[place]))] = place
                yield place, delta
    finally:
        await _end(*waits)
        for answer in answers:
            await answer.aclose()


class EventStream(Response):
    """Sends events as they come, and closes their source when the client leaves or does not take one for too long.

    Args:
        first: what has come already, so that what failed before could be said by a status.
        rest: what will come.
        seconds: within which an event must be taken.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], seconds: float) -> None:
        self._first = first
        self._rest = rest
        self._seconds = seconds
        self.status_code = 200
        self.background = None
        # nginx would hold events back otherwise.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them all, or those up to the client's end."""
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except TimeoutError:  # returning before the end closes the connection
            logger.warning("a client took nothing for %g seconds and was left", self._seconds)
        finally:
            await _end(sending, gone)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._rest) as rest:
            await self._take(
                send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            )
            await self._take(send({"type": "http.response.body", "body": self._first, "more_body": True}))
            async for each in rest:
                await self._take(send({"type": "http.response.body", "body": each, "more_body": True}))
            await self._take(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _take(self, sent: Awaitable[None]) -> None:
        with anyio.fail_after(self._seconds):
            await sent


async def _next(stream: AsyncIterator[Delta]) -> Delta:
    return await stream.__anext__()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what has not ended, and wait until it has; what it raised then is nobody's."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
