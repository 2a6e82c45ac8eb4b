"""The page on which people see the pool, and what it reads."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time

from quire.assets import PAGES_PAGE
from quire.engine import Engine

LEAST_SECONDS = 0.2  # between two snapshots, however many look


class View:
    """The engine's latest snapshot, the same for everyone who looks; used in one event loop.

    Nothing is taken while nobody asks, and one snapshot at a time, in a thread: it waits for the step that runs. Who
    leaves leaves nothing behind but that.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._latest: asyncio.Future[bytes] | None = None
        self._taken_at = 0.0

    async def json(self) -> bytes:
        """A snapshot no older than a fifth of a second when it was begun, as JSON of at most some hundred KB."""
        latest = self._latest
        if latest is None or (latest.done() and time.monotonic() - self._taken_at >= LEAST_SECONDS):
            latest = asyncio.get_running_loop().run_in_executor(None, self._take)
            latest.add_done_callback(self._note)
            self._latest = latest
        return await asyncio.shield(latest)  # others may wait for it, too

    def _take(self) -> bytes:
        snapshot = self._engine.snapshot()
        return json.dumps(snapshot.as_json(), separators=(",", ":"), allow_nan=False).encode()

    def _note(self, taken: asyncio.Future[bytes]) -> None:
        self._taken_at = time.monotonic()
        if not taken.cancelled():
            taken.exception()  # whoever waited has seen it; nobody may have


def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers: it runs its own script alone, and asks nobody but this server."""
    text = PAGES_PAGE.read_text(encoding="utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
