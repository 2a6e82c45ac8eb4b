"""Tokens to text while they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_INCOMPLETE = "\ufffd"  # how a decoder shows bytes that are no character, or not one yet
_CONTEXT_TOKENS = 8  # prompt tokens the decoder sees first, so that a leading space is kept


class TextStream:
    """The text of one request, token by token.

    `text` only grows, and never by a part of a character whose bytes are spread over several
    tokens, nor by what may turn out to be the start of a stop string.

    Args:
        tokenizer: decodes.
        prompt_token_ids: what the generated tokens continue.
        stop: strings that end the text.
        include_stop: leave the one that ended it in the text.
        skip_special_tokens: leave special tokens out of the text.
    Cost: one decode of a few tokens per push.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: tuple[str, ...],
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._tokens: list[int] = []
        self._alone: dict[int, str] = {}  # texts of single tokens: a text repeats its likely ones
        self._decoded_chars = 0
        self._undecoded = False  # whether the last tokens still wait for the rest of a character
        self._held = ""  # decoded, but perhaps the start of a stop string
        context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._context = [] if self._decode(context).endswith(_INCOMPLETE) else context
        self._stream = DecodeStream(self._context, skip_special_tokens=skip_special_tokens)

    def push(self, token: int, *, may_stop: bool = True) -> bool:
        """Add a token; True when it completed a stop string. Without may_stop such a string is text like any other."""
        self._tokens.append(token)
        chunk = self._stream.step(self._tokenizer, token)
        self._undecoded = chunk is None
        return chunk is not None and self._release(chunk, may_stop)

    def decode_token(self, token: int) -> str:
        """A token's text alone, also that of a special one."""
        text = self._alone.get(token)
        if text is None:
            text = self._alone[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return text

    def close(self, *, cut_off: bool, may_stop: bool = True) -> bool:
        """Release what is held back, as no token will follow; True when that completed a stop string.

        Bytes that are no character by now are shown as the tokenizer shows them, unless the text was
        cut off, so that the rest of the character may only be missing: then they are left out.
        """
        rest = ""
        if self._undecoded:
            full = self._decode(self._context + self._tokens)
            rest = full[len(self._decode(self._context)) + self._decoded_chars :]
            rest = rest.rstrip(_INCOMPLETE) if cut_off else rest
        stopped = self._release(rest, may_stop)
        self.text += self._held
        self._held = ""
        self._undecoded = False
        return stopped

    def _release(self, chunk: str, may_stop: bool) -> bool:
        self._decoded_chars += len(chunk)
        if not self._stop:
            self.text += chunk
            return False
        num_held = len(self._held)
        self._held += chunk
        found = self._first_stop(num_held) if may_stop else None
        if found is not None:
            start, end = found
            self.text += self._held[: end if self._include_stop else start]
            self._held = ""
            return True
        certain = len(self._held) - self._possible_stop_chars()
        self.text += self._held[:certain]
        self._held = self._held[certain:]
        return False

    def _first_stop(self, num_old: int) -> tuple[int, int] | None:
        """Where the first stop string in the held text that ends behind its num_old characters starts and ends."""
        found = [
            (start, start + len(stop))
            for stop in self._stop
            if (start := self._held.find(stop, max(num_old - len(stop) + 1, 0))) >= 0
        ]
        return min(found, default=None)

    def _possible_stop_chars(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)
        return text
