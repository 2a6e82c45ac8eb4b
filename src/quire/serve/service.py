"""One request's way: checks, a place, answers of the engine, and their end, however it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from quire.engine import Answer, AsyncLLM, Engine, RequestOutput
from quire.engine.params import LogitsProcessor
from quire.errors import ArgumentError
from quire.serve.asking import sampling_params
from quire.serve.errors import Refusal, as_refusal, error_object
from quire.serve.grammar import ANY_OBJECT, Grammars
from quire.serve.limits import Limits, Places
from quire.serve.metrics import Metrics
from quire.serve.pages import View
from quire.serve.protocol import ChatBody, CompletionBody
from quire.serve.shapes import ChatShape, Shape, TextShape
from quire.serve.streaming import DONE, event, merge

Body = ChatBody | CompletionBody


class Service:
    """Answers bodies with one engine; used in one event loop.

    Args:
        engine: its other callers, if any, share the batch.
        names: what the model is called, at least one; the first is the one that answers give.
    Attributes:
        is_closing: whether requests are refused from now on.
        places: the texts on their way.
        view: what the page about the pool shows.
    Raises:
        ArgumentError: an engine without a tokenizer, or no name.
    """

    def __init__(self, engine: Engine, names: Sequence[str], limits: Limits) -> None:
        if engine.tokenizer is None:
            raise ArgumentError(
                "engine must have a tokenizer, as requests are text; got one without. Fix: LLM(model, tokenizer=…)"
            )
        if not names:
            raise ArgumentError("names must hold at least one name; got none. Fix: names=['model']")
        self.engine = engine
        self.names = list(names)
        self.limits = limits
        self.metrics = Metrics(engine)
        self.view = View(engine)
        self.places = Places(limits.max_texts)
        self.is_closing = False
        self._llm = AsyncLLM(engine)
        self._grammars = Grammars(engine)

    def shape(self, body: Body) -> Shape:
        """What the answer to a body looks like.

        Raises:
            Refusal: another model is asked for, or the server is about to stop.
        """
        if self.is_closing:
            raise Refusal(503, "the server must not be about to stop; got a request. Fix: ask again later")
        if body.model is not None:
            self.check_name(body.model)
        if isinstance(body, ChatBody):
            return ChatShape(body, self.names[0])
        return TextShape(body, self.names[0], self._decode)

    def check_name(self, name: str) -> None:
        """Refuse a model that is not served."""
        if name not in self.names:
            raise Refusal(
                404,
                f"model must be one of {', '.join(self.names)}; got {name:.100}. Fix: see /v1/models",
                code="model_not_found",
                param="model",
            )

    async def whole(self, body: Body, shape: Shape) -> dict[str, Any]:
        """The answer to a body, at once.

        Raises:
            Refusal: no places.
            ArgumentError, UnsupportedError: a prompt or parameters that cannot be served.
            Exception: what ended the request.
        """
        with self.places.take(shape.num_texts):
            answers = await self._ask(body)
            try:
                outputs = await asyncio.gather(*answers)
            finally:
                for answer in answers:
                    await answer.aclose()
            self._observe(outputs)
            return shape.whole(outputs)

    async def events(self, body: Body, shape: Shape) -> AsyncGenerator[bytes, None]:
        """The answer to a body, as server-sent events; what fails behind the first one is an event, too.

        Raises:
            as `whole`, before the first event.
        """
        has_begun = False
        with self.places.take(shape.num_texts):
            answers = await self._ask(body)
            outputs: list[RequestOutput] = []
            try:
                async with aclosing(merge(answers)) as gained:
                    async for prompt, delta in gained:
                        for chunk in shape.chunks(prompt, delta):
                            has_begun = True
                            yield event(chunk)
                        if delta.output is not None:
                            outputs.append(delta.output)
            except Exception as error:
                if not has_begun:
                    raise
                yield event(error_object(as_refusal(error)))
            else:
                self._observe(outputs)
                for chunk in shape.last_chunks(outputs):
                    yield event(chunk)
            yield DONE

    async def end(self) -> None:
        """Abort what has not finished; those who wait for it get what there is."""
        self.is_closing = True
        await asyncio.get_running_loop().run_in_executor(None, self._llm.shutdown)

    async def _ask(self, body: Body) -> list[Answer]:
        config = self.engine.model.generation_config
        samples = bool(getattr(config, "do_sample", False))
        params = sampling_params(body, await self._processors(body), samples=samples)
        if isinstance(body, ChatBody):
            return [self._llm.chat([m.model_dump(exclude_none=True) for m in body.messages], params)]
        return [self._llm.generate(prompt, params) for prompt in body.prompt]

    async def _processors(self, body: Body) -> list[LogitsProcessor]:
        form = body.response_format
        if form is None or form.type == "text":
            return []
        schema = ANY_OBJECT if form.json_schema is None else form.json_schema.schema_
        make, loop = self._grammars.of_schema, asyncio.get_running_loop()
        return [await loop.run_in_executor(None, make, schema, body.n)]

    def _observe(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.metrics.observe(output)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        backend = self.engine.tokenizer.backend_tokenizer
        text: str = backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text
