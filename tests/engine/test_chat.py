"""Conversations to prompts by a chat template, and what is generated after them."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError, UnsupportedError

from .fakes import EOS, FakeModel, byte_tokenizer

TEMPLATE = (
    "{{ '<eos>' }}{% for m in messages %}"
    "{% if m['role'] not in ('user', 'assistant', 'system') %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FIRST = [{"role": "user", "content": "Hello"}]
SECOND = [*FIRST, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "é?"}]
"""A conversation begins with <eos>, which stands for the token that a text begins with."""


def chat_engine(template: str | None = TEMPLATE) -> Engine:
    engine = Engine(FakeModel(vocab_size=257), byte_tokenizer())
    engine.tokenizer.chat_template = template
    return engine


def test_chat_is_generate_on_what_the_template_makes_of_each_conversation():
    engine = chat_engine()
    params = [
        SamplingParams(max_tokens=8, logprobs=1),
        SamplingParams(max_tokens=5, temperature=1.0, seed=2, repetition_penalty=1.2),
    ]
    texts = ["<eos>[user]Hello\n[assistant]", "<eos>[user]Hello\n[assistant]Hi\n[user]é?\n[assistant]"]
    outputs = engine.chat([FIRST, SECOND], params)
    token_ids = [
        engine.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in (FIRST, SECOND)
    ]
    wanted = engine.generate(token_ids, params)
    for output, text, ids, want in zip(outputs, texts, token_ids, wanted, strict=True):
        assert (output.prompt, output.prompt_token_ids) == (text, ids)
        assert (output.text, output.outputs) == (want.text, want.outputs)
    [alone] = engine.chat(SECOND, params[1])
    assert alone.token_ids == outputs[1].token_ids


def test_chat_begins_a_text_once():
    """The tokenizer puts its first token before every text, and the template writes it too."""
    engine = chat_engine()
    engine.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", EOS)]
    )
    assert engine.tokenizer("a")["input_ids"] == [EOS, ord("a")]
    params = SamplingParams(max_tokens=1)
    [output] = engine.chat(FIRST, params)
    assert output.prompt_token_ids == [EOS, *b"[user]Hello\n[assistant]"]
    assert engine.generate("a", params)[0].prompt_token_ids == [EOS, ord("a")]


def test_a_prompt_that_begins_with_the_token_a_text_begins_with_begins_with_it_once():
    engine = chat_engine()
    tokenizer = engine.tokenizer
    tokenizer.bos_token = "<eos>"
    params = SamplingParams(max_tokens=1)

    def ids_of(*texts):
        return [output.prompt_token_ids for output in engine.generate(list(texts), params)]

    # A tokenizer that adds nothing: a text is what it says.
    assert ids_of("<eos>a", "<eos><eos>a") == [[EOS, ord("a")], [EOS, EOS, ord("a")]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", EOS)]
    )
    assert tokenizer("<eos>a")["input_ids"] == [EOS, EOS, ord("a")]
    assert ids_of("a", "<eos>a", "<eos>") == [[EOS, ord("a")], [EOS, ord("a")], [EOS]]
    assert ids_of("<eos><eos>a") == [[EOS, EOS, ord("a")]], "the second one is the caller's own"
    rendered = tokenizer.apply_chat_template(FIRST, add_generation_prompt=True, tokenize=False)
    [chatted] = engine.chat(FIRST, params)
    assert ids_of(rendered) == [chatted.prompt_token_ids]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages must be a conversation, a list of at least one"),
        ("Hello", "messages must be a conversation.*got str 'Hello'"),
        ([{"content": "Hello"}], "messages must be a conversation.*got dict"),
        ([FIRST, []], r"messages must be a conversation.*got list \[\]"),
        ([FIRST, "Hello"], "messages must be a conversation.*got list"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            "content must be text; got list",
        ),
        ([{"role": "robot", "content": "Hello"}], "chat template accepts; got TemplateError: no such role"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_sentence(messages, sentence):
    engine = chat_engine()
    with pytest.raises(ArgumentError, match=sentence) as refusal:
        engine.chat(messages)
    assert "Fix: " in str(refusal.value)
    assert not engine.has_unfinished


def test_a_tokenizer_without_a_template_and_no_tokenizer_are_one_sentence():
    engine = chat_engine(None)
    with pytest.raises(
        UnsupportedError, match="chat needs a tokenizer with a chat template; got TokenizersBackend"
    ):
        engine.chat(FIRST)
    with pytest.raises(
        UnsupportedError, match="chat needs a tokenizer with a chat template; got no tokenizer"
    ):
        Engine(engine.model).chat(FIRST)
