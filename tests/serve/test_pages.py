"""/pages and /pages.json: what is shown, to whom, and that those who look cost little and leave nothing behind."""

from __future__ import annotations

import concurrent.futures
import logging
import re
import socket
import threading

import httpx
import pytest
from browser import dom
from engine.test_threads import Gate

from quire.engine import Engine, SamplingParams
from quire.engine.snapshot import MAX_CELLS, Snapshot
from quire.serve import pages

from .conftest import HANGS, make_engine, serving, until

KEY = "a+long&random=kéy"


def half_served(**options) -> Engine:
    """An engine in the middle of three requests that share a beginning; nobody steps it further."""
    engine = make_engine(**options)
    for i in range(3):
        engine.add_request([7] * 16 + [i] * (5 * i), SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(4):
        engine.step()
    return engine


def figures(document: str) -> dict[str, str]:
    return dict(re.findall(r'<dd data-figure="([^"]*)">([^<]*)</dd>', document))


def test_the_json_is_the_engines_snapshot_and_the_page_needs_nothing_else():
    engine = half_served()
    with serving(engine) as running:
        found = Snapshot.from_json(httpx.get(f"{running.url}/pages.json", timeout=HANGS).json())
        expected = engine.snapshot()
        assert (found.cells, found.num_shared, found.num_running) == (expected.cells, 4, 3)
        page = httpx.get(f"{running.url}/pages", timeout=HANGS)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert re.search(r"(?:src|href)\s*=|https?://|@import|url\(", page.text) is None, "loads something else"


def test_a_browser_shows_it_by_the_key_in_the_fragment_and_asks_for_one_otherwise(tmp_path):
    engine = half_served()
    expected = engine.snapshot()
    with serving(engine, api_key=KEY) as running:
        url = f"{running.url}/pages"
        document = dom(f"{url}#key=a%2Blong%26random%3Dk%C3%A9y", tmp_path)
        asked = dom(url, tmp_path)
    shown = figures(document)
    expected_figures = {
        "owned": f"{expected.num_owned} of 400", "shared": "4", "cached": str(expected.num_cached),
        "free": str(expected.num_free), "running": "3", "waiting": "0",
        "slots without a token": f"{100 * expected.unused_slots / expected.held_slots:.1f} %",
        "tokens found in pages": f"{100 * expected.hit_rate:.1f} %", "time to first token": "–",
    }  # fmt: skip
    assert {name: shown.get(name) for name in expected_figures} == expected_figures
    assert 'data-cells="400"' in document
    assert document.count("<td>running</td>") == 3
    assert re.search(r'<form id="door" hidden', document)
    assert "The server wants its key." in asked
    assert figures(asked) == {}
    assert not re.search(r'<form id="door" hidden', asked)


def test_a_key_guards_what_is_shown_and_not_the_empty_page():
    with serving(make_engine(), api_key=KEY) as running:
        assert httpx.get(f"{running.url}/pages").status_code == 200
        for headers in ({}, {"authorization": "Bearer another"}):
            assert httpx.get(f"{running.url}/pages.json", headers=headers).status_code == 401
        assert httpx.get(f"{running.url}/pages.json?key={KEY}").status_code == 401
        right = {"authorization": f"Bearer {KEY}".encode()}
        assert httpx.get(f"{running.url}/pages.json", headers=right).json()["num_pages"] == 400


def test_a_pool_of_many_pages_is_shown_in_cells_of_several():
    engine = half_served(num_pages=100_003)
    with serving(engine) as running:
        answer = httpx.get(f"{running.url}/pages.json", timeout=HANGS)
    found = Snapshot.from_json(answer.json())
    assert (found.pages_per_cell, len(found.cells) <= MAX_CELLS) == (25, True)
    assert sum(cell.owned + cell.shared for cell in found.cells) == engine.model.allocator.num_owned
    assert len(answer.content) < 20_000


def test_all_who_look_share_one_snapshot_and_who_leaves_leaves_nothing(monkeypatch):
    """Twenty look while a step runs, and half of them leave before it ends."""
    monkeypatch.setattr(pages, "LEAST_SECONDS", 1000)
    engine, taken = make_engine(), []
    take, gate = engine.snapshot, Gate(engine.model, at=2)
    monkeypatch.setattr(engine, "snapshot", lambda: taken.append(take()) or taken[-1])
    with serving(engine) as running, concurrent.futures.ThreadPoolExecutor(10) as threads:
        steps = threading.Thread(target=engine.generate, args=([[1] * 9], SamplingParams(max_tokens=5)))
        steps.start()
        assert gate.reached.wait(HANGS)
        host, port = running.url.removeprefix("http://").split(":")
        leaving = [socket.create_connection((host, int(port))) for _ in range(10)]
        for each in leaving:
            each.sendall(b"GET /pages.json HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: running.service.view._latest is not None)
        staying = [threads.submit(httpx.get, f"{running.url}/pages.json", timeout=HANGS) for _ in range(10)]
        for each in leaving:
            each.close()
        assert httpx.get(f"{running.url}/health", timeout=HANGS).status_code == 200, "nothing else waits"
        gate.opened.set()
        answers = [each.result(HANGS).content for each in staying]
        steps.join(HANGS)
        assert len(set(answers)) == len(taken) == 1
        running.check_idle()
        until(lambda: not running.server.server_state.connections)


def test_a_snapshot_that_fails_is_an_error_and_the_next_one_is_taken_again(monkeypatch):
    monkeypatch.setattr(pages, "LEAST_SECONDS", 0)
    engine = make_engine()
    take, fails = engine.snapshot, [True]

    def sometimes():
        if fails.pop() if fails else False:
            raise RuntimeError("no")
        return take()

    monkeypatch.setattr(engine, "snapshot", sometimes)
    with serving(engine) as running:
        assert httpx.get(f"{running.url}/pages.json").status_code == 500
        assert httpx.get(f"{running.url}/pages.json").status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "shown"),
    [
        ("/pages.json", 200, False),
        ("/pages.json", 401, True),
        ("/pages", 200, True),
        ("/v1/models", 200, True),
    ],
)
def test_an_open_page_does_not_fill_the_access_log(path, status, shown):
    with serving(make_engine()):
        pass
    line = logging.LogRecord(
        "uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', ("::1:5", "GET", path, "1.1", status), None
    )  # fmt: skip
    assert bool(logging.getLogger("uvicorn.access").filter(line)) == shown
