"""Which path does what."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

from quire.engine import Engine
from quire.serve.errors import Json, say_errors
from quire.serve.limits import Door, Limits
from quire.serve.metrics import CountResponses
from quire.serve.pages import page
from quire.serve.protocol import ChatBody, CompletionBody
from quire.serve.service import Body, Service
from quire.serve.streaming import EventStream, unless_gone

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
router = APIRouter()


def create_app(
    engine: Engine, *, names: Sequence[str], api_key: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """OpenAI's API over an engine, as an ASGI app; at the end of its lifespan, what has not finished is aborted.

    Args:
        engine: with a tokenizer. Its other callers share the batch.
        names: what the model is called; the first is the one that answers give.
        api_key: what clients must send; None: nothing.
        limits: default: Limits().
    Raises:
        ArgumentError: an engine without a tokenizer, no name, or an empty key.
    """
    limits = limits or Limits()
    service = Service(engine, names, limits)
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="Quire", docs_url=None, redoc_url=None, lifespan=_lifespan)
    app.state.service = service
    app.state.started = int(time.time())
    app.include_router(router)
    say_errors(app)
    paths = [route.path for route in router.routes if hasattr(route, "path")]
    app.add_middleware(Door, limits=limits, api_key=api_key)
    app.add_middleware(CountResponses, metrics=service.metrics, paths=paths)  # around the door
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await _service(app).end()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """The next turn of a conversation."""
    return await _answer(request, body)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """What follows a prompt, or several."""
    return await _answer(request, body)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The names that the model has."""
    return Json({"object": "list", "data": [_model(request, name) for name in _service(request.app).names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One of them."""
    _service(request.app).check_name(name)
    return Json(_model(request, name))


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether requests are served: 200, or 503 once the server is to stop."""
    return Response(status_code=503 if _service(request.app).is_closing else 200)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_service(request.app).metrics.page(), media_type=_PROMETHEUS)


@router.get("/pages")
async def pages() -> Response:
    """The live picture of the pool; it holds no data, so that it needs no key."""
    content, headers = page()
    return Response(content, media_type="text/html", headers=headers)


@router.get("/pages.json")
async def pages_json(request: Request) -> Response:
    """What it shows: the latest snapshot."""
    content = await unless_gone(request.receive, _service(request.app).view.json())
    return Response(content, media_type="application/json", headers={"cache-control": "no-store"})


async def _answer(request: Request, body: Body) -> Response:
    service = _service(request.app)
    shape = service.shape(body)
    if not body.stream:
        return Json(await unless_gone(request.receive, service.whole(body, shape)))
    events = service.events(body, shape)
    first = await unless_gone(request.receive, _next(events))
    return EventStream(first, events, service.limits.send_seconds)


async def _next(events: AsyncIterator[bytes]) -> bytes:
    return await events.__anext__()


def _model(request: Request, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "quire",
        "max_model_len": _service(request.app).engine.model.max_seq_len,
    }


def _service(app: FastAPI) -> Service:
    service: Service = app.state.service
    return service
