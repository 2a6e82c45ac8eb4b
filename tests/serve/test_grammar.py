"""response_format: every text is JSON of its schema, over random logits, and a wrong schema is its request's alone."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from engine.fakes import EOS

from quire.errors import ArgumentError
from quire.serve.grammar import Grammars

from .conftest import make_engine

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["alpha", "beta"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["kind", "size"],
    "additionalProperties": False,
}


def of_schema(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def is_right(text: str) -> bool:
    value = json.loads(text)
    return list(value) == ["kind", "size"] and value["kind"] in ("alpha", "beta") and 0 <= value["size"] <= 99


def test_every_sample_of_a_chat_is_json_of_the_schema(running):
    said = running.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], n=8, seed=1,
        response_format=of_schema(SCHEMA, strict=True),
    )  # fmt: skip
    assert all(is_right(choice.message.content) for choice in said.choices)
    assert {choice.finish_reason for choice in said.choices} == {"stop"}
    assert len({choice.message.content for choice in said.choices}) > 4


def test_several_prompts_stream_json(running):
    chunks = running.client().completions.create(
        model="tiny", prompt=["a", "b"], n=2, seed=1, max_tokens=60, stream=True,
        extra_body={"response_format": of_schema(SCHEMA)},
    )  # fmt: skip
    texts = [""] * 4
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert all(map(is_right, texts))


def test_a_json_object_is_any_object(running):
    said = running.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], seed=1, max_tokens=300,
        response_format={"type": "json_object"}, logit_bias={str(ord("}")): 3, str(EOS): 3},
    )  # fmt: skip
    assert said.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(said.choices[0].message.content), dict)


def deep(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "what"},
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1:9/x"},
        {"$ref": "file:///etc/hostname"},
        {"type": "string", "pattern": "(" * 900 + ")" * 900},
        {"enum": ["x" * 70000]},
        deep(400),
    ],
    ids=["unknown", "endless", "elsewhere", "file", "pattern", "large", "deep"],
)
def test_a_schema_that_cannot_be_served_is_said_so(running, schema):
    with pytest.raises(openai.BadRequestError, match="response_format must have a JSON schema") as refusal:
        running.client().completions.create(
            model="tiny", prompt="x", extra_body={"response_format": of_schema(schema)}
        )
    assert "Fix: " in str(refusal.value)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "yaml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA, "grammar": "x"}},
        {"type": "json_schema", "json_schema": {"schema": []}},
    ],
)
def test_a_response_format_of_another_form_is_refused(running, form):
    assert running.post("/v1/completions", {"prompt": "x", "response_format": form}).status_code == 400


def test_a_text_whose_matcher_is_gone_is_read_again_and_matchers_do_not_pile_up():
    processor = Grammars(make_engine()).of_schema(SCHEMA, num_samples=2)
    text = list(b'{"kind":"beta","size":42}')

    def allowed(tokens):
        return (processor(tokens, torch.zeros(257)) == 0).nonzero().ravel().tolist()

    for i, token in enumerate(text):
        assert token in allowed(text[:i])
        assert allowed(list(b'{"kind":"a')) == list(b"l")
        assert len(processor._matchers) <= 2
    assert allowed(text) == [EOS]
    assert allowed(text) == [EOS]  # asked again, as after an interruption
    with pytest.raises(ArgumentError, match="no token goes on with after 2"):
        allowed(list(b"{x"))
