"""An address, signals, and the end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from quire.errors import ArgumentError
from quire.serve.service import Service

_CLOSING_SECONDS = 5  # for what was aborted to be sent


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything else takes long; port 0: a free one.

    Raises:
        ArgumentError: no such address here, or someone has it.
    """
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise _no_address(host, port, error) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise _no_address(host, port, error) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


class Server(uvicorn.Server):
    """Serves an app of `create_app` until SIGINT, SIGTERM or `should_exit`.

    Then it takes no more connections, and requests have the limits' `grace_seconds` to end. What has not is aborted:
    clients get what there is, with the finish reason "abort". A second Ctrl-C does not wait.
    """

    def __init__(self, app: FastAPI, *, access_log: bool = True) -> None:
        self._service: Service = app.state.service
        grace = self._service.limits.grace_seconds
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                access_log=access_log,
                server_header=False,
                timeout_graceful_shutdown=int(grace) + 1 + _CLOSING_SECONDS,
            )
        )
        logging.getLogger("uvicorn.access").addFilter(_is_no_look)

    def run_until_signal(self, bound: socket.socket) -> None:
        """Serve on a bound socket in this thread; returns after the first signal, when everything has ended."""
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            self.run(sockets=[bound])
        except KeyboardInterrupt:  # uvicorn raises the signal again once it has served
            pass
        finally:
            signal.signal(signal.SIGTERM, before)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End it, as the class says."""
        self._service.is_closing = True
        ending = asyncio.ensure_future(self._end_late())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_late(self) -> None:
        await asyncio.sleep(self._service.limits.grace_seconds)
        await self._service.end()


def _is_no_look(record: logging.LogRecord) -> bool:
    """Whether a line of the access log says more than that a page about the pool is still open."""
    return not (isinstance(record.args, tuple) and "/pages.json" in record.args and 200 in record.args)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _no_address(host: str, port: int, error: Exception) -> ArgumentError:
    return ArgumentError(
        f"--host and --port must be an address of this machine that nobody has; got {host}:{port}: {error}. "
        "Fix: another --port, or --port 0 for a free one"
    )
