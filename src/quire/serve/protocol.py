"""The bodies of requests, with bounds on everything that costs time or memory.

Names are OpenAI's; those that OpenAI lacks are vLLM's. null means the default, as it does there. A field that is not
here is refused: nothing that a client asks for is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import MaxLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from quire.engine.admission import list_prompts

MAX_SAMPLES = 128  # as OpenAI's
MAX_LOGPROBS = 20  # as OpenAI's chat
_MAX_STOPS, _MAX_STOP_CHARS = (
    16,
    256,
)  # text is held back while it may be the start of one: looked for at every token
_MAX_BIASES = 1024
_MAX_TOKEN_IDS = 1024


def _check_size(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MAX_BIASES:
        raise ValueError(f"must have at most {_MAX_BIASES} entries; got {len(value)}")
    return value


def _prompts(value: Any) -> list[Any]:
    prompts: list[Any] = list_prompts(value)
    if not prompts:
        raise ValueError(
            "prompt must be text, token ids or a list of these; got an empty list. Fix: one prompt"
        )
    return prompts


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Stop = Annotated[str, MaxLen(_MAX_STOP_CHARS)]
_Stops = Annotated[list[_Stop], FailFast(), MaxLen(_MAX_STOPS), BeforeValidator(_listed)]
_TokenIds = Annotated[list[int], FailFast(), MaxLen(_MAX_TOKEN_IDS)]
_Biases = Annotated[dict[str, float], BeforeValidator(_check_size)]


class _Object(BaseModel):
    """An object whose fields are all known; null is a field that is not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data:
            if name not in cls.model_fields:
                raise ValueError(
                    f"{name!a:.60} must be left out, as this server does not know it. Fix: leave it out"
                )
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(_Object):
    """How to stream."""

    include_usage: bool = False


class JsonSchema(_Object):
    """A schema that the text must be JSON of."""

    name: str = Field(default="", max_length=64)
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        names = {"name", "description", "schema", "strict"}  # model_fields has no aliases
        if isinstance(data, dict) and not data.keys() <= names:
            raise ValueError(
                f"json_schema must hold {', '.join(sorted(names))}; got others. Fix: leave them out"
            )
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class ResponseFormat(_Object):
    """What kind of text comes back."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(
                "response_format must have json_schema with type 'json_schema', and not with another. "
                "Fix: {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {…}}}"
            )
        return self


class _Asked(_Object):
    """What both APIs have."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stops = Field(default_factory=list)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: _Biases = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Of vLLM.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: _TokenIds = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: str | None = Field(default=None, max_length=256)
    # These change nothing in an answer, anywhere.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _streams(self) -> _Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must be left out without stream. Fix: stream=true")
        if self.ignore_eos and self.response_format is not None:
            raise ValueError(
                "ignore_eos must be false with response_format, whose texts end. Fix: leave it out"
            )
        return self


class CompletionBody(_Asked):
    """The body of /v1/completions.

    prompt: a list of prompts, each text or token ids.
    """

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    suffix: str = Field(default="", max_length=0)

    @model_validator(mode="after")
    def _fits(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of must be n, {self.n}; got {self.best_of}. Fix: leave it out")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("logprobs must be left out of an echo that streams. Fix: stream=false")
        return self


def _text(content: Any) -> Any:
    """The text of a message's content, which may be parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise ValueError("content must be text, or parts of type 'text'; got another. Fix: text alone")
        texts.append(part["text"])
    return "".join(texts)


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str = Field(max_length=64)
    content: Annotated[str | None, BeforeValidator(_text)] = None
    name: str | None = Field(default=None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """Leave out what clients send back of an answer, as long as it says nothing."""
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if value or name in cls.model_fields}
        for name in kept:
            if name not in cls.model_fields:
                raise ValueError(
                    f"{name!a:.60} of a message must be left out: only text is served. Fix: leave it out"
                )
        return kept


class ChatBody(_Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _fits(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must be left out without logprobs. Fix: logprobs=true")
        return self
