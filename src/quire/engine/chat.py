"""Conversations to prompts, by a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.errors import ArgumentError, UnsupportedError

Messages = Sequence[Mapping[str, Any]]


def render_chats(tokenizer: Any, messages: Messages | Sequence[Messages]) -> list[str]:
    """The text of each conversation, up to where the assistant's next turn begins.

    Raises:
        ArgumentError: neither a conversation nor a list of them, or messages that the template refuses.
        UnsupportedError: no tokenizer, or one without a chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        got = "no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__} without one"
        raise UnsupportedError(
            f"chat needs a tokenizer with a chat template; got {got}. "
            "Fix: the folder of a chat model, tokenizer.chat_template = '…', or generate with a prompt of text"
        )
    conversations = _list_conversations(messages)
    return [_render(tokenizer, conversation) for conversation in conversations]


def _render(tokenizer: Any, conversation: Messages) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(conversation), add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # what a template raises is Jinja's, transformers' or Python's
        raise ArgumentError(
            "messages must be a conversation that the tokenizer's chat template accepts; got "
            f"{type(error).__name__}: {str(error).strip():.200}. Fix: roles and their order as the model expects them"
        ) from error
    return text


def _list_conversations(messages: Any) -> list[Messages]:
    if not _is_list(messages):
        raise _wrong(messages)
    several = len(messages) > 0 and all(map(_is_list, messages))
    conversations = list(messages) if several else [messages]
    for conversation in conversations:
        if len(conversation) == 0:
            raise _wrong(conversation)
        for message in conversation:
            _check_message(message)
    return conversations


def _check_message(message: Any) -> None:
    if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
        raise _wrong(message)
    content = message.get("content")
    if content is not None and not isinstance(content, str):  # a template would write it as Python does
        raise ArgumentError(
            f"a message's content must be text; got {type(content).__name__} {content!r:.60}. "
            "Fix: join its parts to one string"
        )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _wrong(got: object) -> ArgumentError:
    return ArgumentError(
        "messages must be a conversation, a list of at least one {'role': …, 'content': …}, or a list of "
        f"conversations; got {type(got).__name__} {got!r:.60}. Fix: [{{'role': 'user', 'content': 'Hello'}}]"
    )
