"""JSON by a schema: a grammar library rules out every token that would break it, request by request.

    python examples/json_schema.py

Needs llguidance (`pip install '.[grammar]'`). The embedded model knows Python only: what its texts say means nothing,
but each is JSON of its schema.
"""

from __future__ import annotations

import json

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

import quire

SCHEMAS = {
    "A release of Python, as JSON: ": {
        "type": "object",
        "properties": {
            "major": {"type": "integer", "minimum": 0, "maximum": 9},
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["alpha", "beta", "final"]},
        },
        "required": ["major", "name", "kind"],
        "additionalProperties": False,
    },
    "Three sizes: ": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 999},
        "minItems": 3,
        "maxItems": 3,
    },
    "Is it open? ": {"type": "boolean"},
}


def grammar_tokenizer(llm: quire.LLM) -> LLTokenizer:
    """The library's view of a model's tokens, made once per model: it takes up to a second.

    The vocabulary is the model's, which may have more rows than the tokenizer has tokens, and the end of a grammar is
    every token at which the model's texts end.
    """
    eos = list(llm.model.eos_token_ids)
    return from_tokenizer(llm.tokenizer, n_vocab=llm.model.vocab_size, eos_token=eos)


class JsonSchema:
    """A logits processor for one request: allows the tokens after which JSON of a schema is still possible.

    Where the JSON is complete, these are the model's end-of-text tokens alone, so that the text ends with "stop".
    """

    def __init__(self, schema: dict[str, object], tokenizer: LLTokenizer) -> None:
        # Without the choice of spaces a model cannot write them for ever.
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        wrong = LLMatcher.validate_grammar(grammar, tokenizer)
        if wrong:
            raise ValueError(f"schema must be one that llguidance knows; got {wrong}")
        self._matcher = LLMatcher(tokenizer, grammar)
        self._seen: list[int] | None = []  # the tokens that the matcher has consumed; None: unknown

    def __call__(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen, self._seen = self._seen, None  # where Ctrl-C comes before the end, the next call begins anew
        if (
            seen is None or token_ids[: len(seen)] != seen
        ):  # another sample of the request has been here: n > 1
            self._matcher.reset()
            seen = []
        self._matcher.consume_tokens(token_ids[len(seen) :])
        self._seen = list(token_ids)
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        if self._matcher.is_error():
            raise ValueError(f"no token goes on from here: {self._matcher.get_error()}")
        return logits.masked_fill_(~allowed.to(logits.device), -torch.inf)


def main() -> None:
    """Serve all schemas in one batch, beside a request without one."""
    llm = quire.LLM(num_pages=256)
    tokenizer = grammar_tokenizer(llm)
    # A text that max_tokens cuts off is no JSON: the limits in the schemas keep these shorter.
    params = [
        quire.SamplingParams(max_tokens=80, logits_processors=[JsonSchema(schema, tokenizer)])
        for schema in SCHEMAS.values()
    ]
    plain = "def read(path):\n"
    *texts, free = llm.generate([*SCHEMAS, plain], [*params, quire.SamplingParams(max_tokens=16)])
    for output in texts:
        assert output.finish_reason == "stop"
        print(f"{output.prompt}{json.loads(output.text)}")
    print(free.prompt + free.text)


if __name__ == "__main__":
    main()
