"""The progress bar of generate."""

from __future__ import annotations

import sys

from quire.engine.progress import progress_bar
from quire.engine.request import CompletionOutput, Delta, RequestOutput


def finished(request_id: int) -> RequestOutput:
    return RequestOutput(request_id, None, [1], [CompletionOutput(0, "", [2], "length")], 0.1, 0.2, 0)


def test_it_counts_requests_and_tokens_on_stderr(capsys):
    with progress_bar(2, shown=True) as advance:
        advance([Delta(0, 0, "a", [1, 2]), Delta(1, 1, "b", [3])])
        advance([Delta(0, 0, "c", [4], finished(0)), Delta(1, 1, "d", [5], finished(1))])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2 requests · 5 tokens" in " ".join(captured.err.split())


def test_by_default_nothing_is_shown_where_stderr_is_no_terminal(capsys):
    with progress_bar(1, shown=None) as advance:
        assert advance is None
    assert capsys.readouterr().err == ""


def test_by_default_it_is_shown_on_a_terminal_and_can_be_turned_off(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar(1, shown=False) as advance:
        assert advance is None
    assert capsys.readouterr().err == ""
    with progress_bar(1, shown=None) as advance:
        advance([Delta(0, 0, "a", [1], finished(0))])
    assert "1/1" in capsys.readouterr().err


def test_only_one_bar_is_shown_at_a_time(capsys):
    with progress_bar(1, shown=True) as first, progress_bar(1, shown=True) as second:
        assert first is not None
        assert second is None
    with progress_bar(1, shown=True) as third:
        assert third is not None
