"""A bar on a terminal, a line every few seconds elsewhere."""

from io import StringIO

import pytest

from convoy.classify.progress import INTERVAL_S, Progress


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_appears_every_few_seconds() -> None:
    now_s = 0.0
    stream = StringIO()
    with Progress(10_000, stream, lambda: now_s) as progress:
        for number in range(1, 2001):
            now_s = number * INTERVAL_S / 1000
            progress.advance(failed=number % 500 == 0)
    assert stream.getvalue().splitlines() == [
        "1,000 of 10,000 pictures, 2 failed, 200/s",
        "2,000 of 10,000 pictures, 4 failed, 200/s",
    ]


def test_a_narrow_terminal_shows_how_many_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (40, 24))
    stream = Terminal()
    with Progress(20_000, stream) as progress:
        for _ in range(20_000):
            progress.advance(failed=True)
    last = stream.getvalue().splitlines()[-1]
    assert len(last) <= 40
    assert "20000/20000, 20,000 failed" in last


def test_a_terminal_has_a_bar() -> None:
    stream = Terminal()
    with Progress(2, stream) as progress:
        progress.advance()
        progress.advance(failed=True)
    assert "2/2" in stream.getvalue()
    assert "1 failed" in stream.getvalue()
