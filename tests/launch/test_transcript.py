"""What a terminal was sent, as lines of a log."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from launch.transcript import OPEN_LINES, Transcript


def lines(*pieces: bytes) -> list[str]:
    transcript = Transcript()
    data = b"".join([*(transcript.feed(piece) for piece in pieces), transcript.finish()])
    return data.decode().splitlines()


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo", ["one", "two"]),
        (b"10 %\r20 %\r30 %\n", ["30 %"]),
        (b"a longer line\rab\n", ["ab" + "longer line"]),
        (b"a longer line\r\x1b[2Kab\n", ["ab"]),
        (b"a longer line\x1b[4G\x1b[K\n", ["a l"]),
        (b"top\nbar 1\n\x1b[1A\x1b[2Kbar 2\n", ["top", "bar 2"]),
        (b"\x1b[1;31mred\x1b[0m \x1b]8;;x\x1b\\link\x1b]8;;\x1b\\ \x1b]0;title\x07end\n", ["red link end"]),
        (b"ab\x08c\n", ["ac"]),
        ("§ größer ✓\n".encode(), ["§ größer ✓"]),
        (b"gap\n\nend\n\n\n", ["gap", "", "end"]),
        (b"\xff\n", ["\N{REPLACEMENT CHARACTER}"]),
        (b"\x1b[5A up is at most to the first line\n", [" up is at most to the first line"]),
    ],
)
def test_lines_as_a_person_saw_them(sent, kept):
    assert lines(sent) == kept
    assert lines(*(bytes([byte]) for byte in sent)) == kept


def test_a_rich_progress_bar_leaves_its_last_state():
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=60)
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("train", total=50)
        for step in range(50):
            progress.advance(task)
            progress.refresh()
            if step == 20:
                console.print("saved at 20")
    kept = lines(terminal.getvalue().encode())
    assert kept[0] == "saved at 20"
    assert len(kept) == 2
    assert "100%" in kept[1]


def test_old_lines_are_written_while_the_program_goes_on():
    transcript = Transcript()
    written = transcript.feed(b"".join(b"line %d\n" % index for index in range(100)))
    assert written.splitlines()[0] == b"line 0"
    assert len(written.splitlines()) == 101 - OPEN_LINES


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_any_bytes_are_survived_however_they_are_cut(pieces):
    assert lines(*pieces) == lines(b"".join(pieces))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1), max_size=60))
def test_plain_lines_are_kept_as_they_are(texts):
    assert lines("".join(text + "\n" for text in texts).encode()) == texts
