"""The example's JSON by a schema, over random logits: every text is of its schema, whoever else is in the batch."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine.fakes import EOS, FakeModel, byte_tokenizer

from quire.engine import Engine, SamplingParams

EXAMPLE = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples/json_schema.py")))
OTHER_EOS, PADDED = 257, 300  # the model has more rows than the tokenizer has tokens
SCHEMAS = [
    *EXAMPLE.SCHEMAS.values(),
    {"type": "array", "items": {"enum": ["é", "😀", None, 1.5]}, "minItems": 1, "maxItems": 4},
]


def is_of(value: object, schema: dict) -> bool:
    """Whether a value is of a schema that names what the schemas here do."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}[schema["type"]]
    if type(value) is not kind:
        return False
    if kind is dict:
        return list(value) == schema["required"] and all(
            is_of(value[k], schema["properties"][k]) for k in value
        )
    if kind is list:
        return schema["minItems"] <= len(value) <= schema["maxItems"] and all(
            is_of(v, schema["items"]) for v in value
        )
    if kind is str:
        return len(value) <= schema["maxLength"]
    return kind is bool or schema.get("minimum", value) <= value <= schema["maximum"]


def make_engine(num_pages: int = 400) -> Engine:
    model = FakeModel(vocab_size=PADDED, eos_token_ids=(EOS, OTHER_EOS), num_pages=num_pages)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    assert len(tokenizer) == OTHER_EOS + 1 < PADDED
    return Engine(model, tokenizer)


def asks(engine: Engine, schema: dict, **params) -> SamplingParams:
    processor = EXAMPLE.JsonSchema(schema, EXAMPLE.grammar_tokenizer(engine))
    return SamplingParams(temperature=1.0, max_tokens=None, logits_processors=[processor], **params)


@pytest.mark.parametrize(("num_pages", "preempted"), [(400, False), (60, True)])
def test_every_sample_of_every_request_is_json_of_its_own_schema_and_others_are_left_alone(
    num_pages, preempted
):
    engine = make_engine(num_pages)
    plain = SamplingParams(max_tokens=30)
    alone = make_engine().generate("free", plain)[0].token_ids
    params = [asks(engine, schema, n=3, seed=10 * i) for i in range(3) for schema in SCHEMAS]
    *outputs, free = engine.generate([*["JSON: "] * len(params), "free"], [*params, plain])
    assert free.token_ids == alone
    for output, schema in zip(outputs, SCHEMAS * 3, strict=True):
        for sample in output.outputs:
            assert is_of(json.loads(sample.text), schema), sample.text
            assert sample.finish_reason == "stop"
            assert sample.token_ids[-1] in (EOS, OTHER_EOS)
    assert len({sample.text for output in outputs for sample in output.outputs}) > 20
    assert {sample.token_ids[-1] for output in outputs for sample in output.outputs} == {EOS, OTHER_EOS}
    assert any(output.preemptions for output in outputs) == preempted


def test_an_interrupted_step_asks_again_and_gets_the_same_text():
    engine = make_engine()
    schema = SCHEMAS[0]
    [expected] = engine.generate("x", asks(engine, schema, seed=1))
    params = asks(engine, schema, seed=1)
    [processor] = params.logits_processors
    matcher = processor._matcher
    interruptions = [KeyboardInterrupt()]

    def consume(tokens):
        matcher.consume_tokens(tokens)
        if interruptions and tokens:
            raise interruptions.pop()

    processor._matcher = SimpleNamespace(
        consume_tokens=consume,
        reset=matcher.reset,
        compute_logit_bias=matcher.compute_logit_bias,
        is_error=matcher.is_error,
    )
    request_id = engine.add_request("x", params)
    deltas = []
    while engine.has_unfinished:
        try:
            deltas += engine.step()
        except KeyboardInterrupt:
            deltas += ["interrupted"]
    assert deltas.count("interrupted") == 1
    assert deltas[-1].request_id == request_id
    assert deltas[-1].output.token_ids == expected.token_ids


def test_a_schema_that_the_library_does_not_know_is_refused_before_any_work():
    with pytest.raises(ValueError, match="schema must be one that llguidance knows; got Invalid type: what"):
        asks(make_engine(), {"type": "what"})


def test_a_token_that_the_grammar_rules_out_ends_the_request_with_an_error():
    engine = make_engine()
    [processor] = asks(engine, {"type": "boolean"}).logits_processors
    with pytest.raises(ValueError, match="no token goes on from here"):
        processor(list(b"x"), torch.zeros(PADDED))
