"""A bar on a terminal, a line every few seconds elsewhere."""

from io import StringIO

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


def test_a_terminal_has_a_bar() -> None:
    stream = Terminal()
    with Progress(2, stream) as progress:
        progress.advance()
        progress.advance(failed=True)
    assert "2/2" in stream.getvalue()
    assert "failed=1" in stream.getvalue()
