"""The page map shows each page as what it is: whose, how full, shared or free."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from quire.cli.page_map import CACHED, FREE, FULL, PARTIAL, SHARED, colour_of, draw, plain
from quire.pages import PageAllocator, PageTable
from quire.spec import Visibility

PAGE_SIZE = 4


def request(request_id, *, prompt=2, generated=0, computed=None, finish_reason=None, preemptions=0, text=""):
    sequence = SimpleNamespace(
        seq_id=request_id,
        text=text,
        tokens=[0] * (prompt + generated),
        num_prompt_tokens=prompt,
        num_computed=prompt if computed is None else computed,
    )
    return SimpleNamespace(
        sequences=[sequence],
        prompt="def f():\n",
        finished=finish_reason is not None,
        preemptions=preemptions,
    )


@pytest.fixture
def engine():
    """Two full pages of A, a full and a partly filled one of B, one that C and D share, two free ones."""
    table = PageTable(PageAllocator(7), PAGE_SIZE)
    for request_id, length in ((10, 8), (11, 7), (12, 4)):
        table.add(request_id)
        table.append(request_id, length)
    table.fork(12, 13)
    return SimpleNamespace(table=table, model=SimpleNamespace(bytes_per_page=500_000))


REQUESTS = [request(10), request(11), request(12), request(13)]


def drawn(engine, requests, width=80):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor", record=True
    )
    console.print(draw(engine, requests, step=7, width=width))
    return console


def test_pages_of_all_groups_of_layers_are_shown_and_those_given_back_are_not():
    table = PageTable(PageAllocator(9), PAGE_SIZE, (Visibility(), Visibility(3)))
    table.add(10)
    table.append(10, 11)
    table.release_unseen(10)
    engine = SimpleNamespace(table=table, model=SimpleNamespace(bytes_per_page=500_000))
    head, row = plain(engine, REQUESTS[:1], step=7).splitlines()
    assert "4 of 9 pages in use, 2.0 MB" in head
    assert row.count("A") == 4
    assert row.count(".") == 5
    text = drawn(engine, REQUESTS[:1]).export_text()
    cells = text[: text.index("state")]
    assert cells.count(PARTIAL) == 2 + 1, "the last page of each group, and the legend"
    assert cells.count(FULL) == 2 + 1


def test_letters_name_the_owner_of_each_page(engine):
    head, row = plain(engine, REQUESTS, step=7).splitlines()
    pages = engine.table.pages
    expected = ["."] * 7
    for page, letter in (*((p, "A") for p in pages(10)), *((p, "B") for p in pages(11)), (pages(12)[0], "*")):
        expected[page] = letter
    assert row == "".join(expected)
    # 8 + 7 + 4 tokens in 20 slots: those that C and D share count once.
    assert head.startswith("after step 7: 5 of 7 pages in use, 2.5 MB, 5.0 % of their slots empty")


def test_rows_of_letters_break_at_the_given_width_and_lose_no_page(engine):
    rows = plain(engine, REQUESTS, step=1, columns=4).splitlines()[1:]
    assert [len(row) for row in rows] == [4, 3]


def test_totals_count_slots_of_pages_in_use_only():
    table = PageTable(PageAllocator(10), PAGE_SIZE)
    table.add(0)
    table.append(0, 5)
    engine = SimpleNamespace(table=table, model=SimpleNamespace(bytes_per_page=250_000))
    # two pages, eight slots, five filled
    assert "2 of 10 pages in use, 0.5 MB, 37.5 % of their slots empty" in plain(engine, [request(0)], step=1)
    table.free(0)
    assert "0 of 10 pages in use, 0.0 MB, no slot in use" in plain(engine, [request(0)], step=2)


def test_cells_show_full_partly_filled_shared_and_free_pages(engine):
    row = drawn(engine, REQUESTS).export_text().splitlines()[1]
    cells = row.strip("│ ").split(" ")
    expected = [FREE] * 7
    for page in (*engine.table.pages(10), engine.table.pages(11)[0]):
        expected[page] = FULL
    expected[engine.table.pages(11)[1]] = PARTIAL
    expected[engine.table.pages(12)[0]] = SHARED
    assert cells == expected


def test_pages_that_stay_after_their_request_are_shown_as_cached(engine):
    cached = engine.table.pages(10)
    engine.table.allocator.keep(cached)
    engine.table.free(10)
    row = plain(engine, REQUESTS, step=7).splitlines()[1]
    assert [page for page, sign in enumerate(row) if sign == "-"] == cached
    cells = drawn(engine, REQUESTS).export_text().splitlines()[1].strip("│ ").split(" ")
    assert [page for page, sign in enumerate(cells) if sign == CACHED] == cached
    assert cells.count(FREE) == row.count(".") == 2


def test_a_page_has_its_request_s_colour(engine):
    svg = drawn(engine, REQUESTS[:2]).export_svg()
    assert colour_of(0) in svg
    assert colour_of(1) in svg
    assert colour_of(4) not in svg
    assert len({colour_of(i) for i in range(8)}) == 8


def test_a_picture_does_not_change_with_later_steps(engine):
    picture = draw(engine, REQUESTS, step=7, width=80)
    console = Console(file=io.StringIO(), width=80)
    console.print(picture)
    engine.table.free(10)
    again = Console(file=io.StringIO(), width=80)
    again.print(picture)
    assert again.file.getvalue() == console.file.getvalue()


STATES = {
    "waiting": request(99, computed=0),
    "gave pages": request(99, computed=0, preemptions=1),
    "reading": request(10, prompt=9, computed=8),
    "writing": request(10, generated=3),
    "done": request(99, generated=3, finish_reason="length"),
}


@pytest.mark.parametrize(("state", "shown"), STATES.items())
def test_a_row_says_what_its_request_is_doing(engine, state, shown):
    [row] = [line for line in drawn(engine, [shown]).export_text().splitlines() if f"{FULL} A" in line]
    assert row.split(f"{FULL} A")[1].strip().startswith(state)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_long_text_keeps_its_end_and_every_line_fits(engine, width):
    text = "    x = 1\n" * 50 + "return last_word"
    lines = drawn(engine, [request(10, text=text)], width).export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.rstrip().endswith("last_word") for line in lines)


def test_a_text_cannot_break_out_of_its_row(engine):
    text = drawn(engine, [request(10, text="a\x1b[2J\r\n\n  b")]).export_text()
    assert "␛[2J" in text
    assert "⏎ b" in text
