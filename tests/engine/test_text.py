"""Tokens to text, one at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from quire.engine.text import TextStream

from .fakes import EOS, byte_tokenizer

BYTES = byte_tokenizer().backend_tokenizer
texts = st.text(st.sampled_from("ab\n é€😀漢\u0301"), max_size=12)
stops = st.lists(st.text(st.sampled_from("ab€"), min_size=1, max_size=3), max_size=3)


def pieces_of(stream: TextStream, tokens) -> list[str]:
    """The text gained with each token, up to and including the one that completes a stop string."""
    pieces = []
    for token in tokens:
        before = len(stream.text)
        stopped = stream.push(token)
        pieces.append(stream.text[before:])
        if stopped:
            break
    return pieces


@given(texts)
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    stream = TextStream(BYTES, [], ())
    pieces = pieces_of(stream, text.encode())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert not stream.close(cut_off=True)
    assert stream.text == text


@given(texts, stops)
def test_text_ends_before_the_stop_string_that_is_complete_first_or_with_it(text, stops):
    expected = text
    end_of_stop = len(text)
    for end in range(len(text) + 1):
        starts = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if starts:
            expected, end_of_stop = text[: min(starts)], end
            break
    for include_stop, whole in ((False, expected), (True, text[:end_of_stop])):
        stream = TextStream(BYTES, [], tuple(stops), include_stop=include_stop)
        pieces = pieces_of(stream, text.encode())
        stream.close(cut_off=False)
        assert stream.text == whole
        assert whole.startswith("".join(pieces)), "something was shown that had to be taken back"


@given(texts, stops, st.integers(0, 12))
def test_a_stop_string_counts_only_if_it_ends_behind_the_tokens_that_may_not_stop(text, stops, free):
    stream = TextStream(BYTES, [], tuple(stops))
    stopped = False
    for count, token in enumerate(text.encode(), 1):
        stopped = stream.push(token, may_stop=count > free)
        if stopped:
            break
    stream.close(cut_off=False)
    expected = text
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts and len(text[:end].encode()) > free:
            expected = text[: min(starts)]
            break
    assert stream.text == expected
    assert stopped == (expected != text)


@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_text_end_as_the_tokenizer_decodes_them(tokens):
    stream = TextStream(BYTES, [], ())
    pieces_of(stream, tokens)
    shown = stream.text
    stream.close(cut_off=False)
    assert stream.text == BYTES.decode(tokens)
    assert stream.text.startswith(shown)


def test_a_character_cut_off_by_the_length_is_left_out():
    stream = TextStream(BYTES, [], ())
    pieces_of(stream, "a€".encode()[:-1])
    stream.close(cut_off=True)
    assert stream.text == "a"


def test_a_replacement_character_the_model_wrote_itself_is_kept():
    stream = TextStream(BYTES, [], ())
    assert pieces_of(stream, "x\ufffdy".encode())[-1] == "\ufffdy"


def test_text_that_only_began_like_a_stop_string_comes_out_in_the_end():
    stream = TextStream(BYTES, [], ("END",))
    assert pieces_of(stream, b"the EN") == ["t", "h", "e", " ", "", ""]
    assert not stream.close(cut_off=True)
    assert stream.text == "the EN"


def test_a_stop_string_hidden_behind_a_character_cut_off_still_counts():
    tokenizer = byte_tokenizer(b"D\xe2").backend_tokenizer
    stream = TextStream(tokenizer, [], ("END",))
    assert pieces_of(stream, [*b"the EN", EOS + 1])[-1] == ""
    assert stream.close(cut_off=True)
    assert stream.text == "the "


def test_special_tokens_are_no_text():
    stream = TextStream(BYTES, [EOS], ())
    pieces_of(stream, [ord("a"), EOS, ord("b")])
    stream.close(cut_off=False)
    assert stream.text == "ab"


def test_special_tokens_are_text_where_that_is_asked():
    stream = TextStream(BYTES, [EOS], (), skip_special_tokens=False)
    assert pieces_of(stream, [ord("a"), EOS, ord("b")]) == ["a", "<eos>", "b"]
    stream.close(cut_off=False)
    assert stream.text == "a<eos>b"


def test_the_first_word_keeps_the_space_that_divides_it_from_the_prompt():
    vocab = {"<unk>": 0, "▁hello": 1, "▁world": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert tokenizer.decode([2]) == "world", "this tokenizer drops a leading space"
    stream = TextStream(tokenizer, [1], ())
    assert pieces_of(stream, [2, 3, 4, 5, 2]) == [" world", "", "", "€", " world"]
    stream.close(cut_off=True)
    assert stream.text == " world€ world"


def test_a_prompt_that_ends_inside_a_character_is_not_repeated():
    stream = TextStream(BYTES, list("ab€".encode()[:-1]), ())
    pieces_of(stream, b"xy")
    stream.close(cut_off=False)
    assert stream.text == "xy"
