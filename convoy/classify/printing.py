"""Prints answers on standard output: as a table, or as JSON lines."""

import json
import sys
from collections.abc import Iterable

from convoy.classify.bulk import Source, Summary
from convoy.classify.inputs import Picture, read_picture
from convoy.classify.progress import discard, warn
from convoy.classify.rows import Answer
from registry.core.errors import UsageError
from registry.core.names import one_line

BAR_WIDTH = 24


def show(text: str) -> None:
    """Print ``text`` on standard output, at once.

    Raises:
        BrokenPipeError: the reader of the output, such as ``head``, has ended.
        UsageError: the output cannot be written: its disk may be full.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(f"standard output cannot be written: {error.strerror}") from error


def print_answers(source: Source, pictures: Iterable[Picture], *, as_json: bool) -> int:
    """Print the answer for each picture; returns the number of pictures that failed.

    Args:
        source: what answers.
        pictures: read one at a time.
        as_json: print one JSON object a line, not a table. Errors of a table go to standard error.

    Raises:
        ConvoyError: as ``source.answers``.
        BrokenPipeError, UsageError: as ``show``.
    """
    failed = 0
    for picture, answer in source.answers(map(read_picture, pictures)):
        failed += isinstance(answer, str)
        if as_json:
            show(json.dumps({"file": picture.uri, **_record(answer)}))
        elif isinstance(answer, str):
            warn(f"{one_line(picture.uri)}: {one_line(answer)}")
        else:
            show(_table(picture.uri, answer))
    return failed


def summary_text(summary: Summary, output: str) -> str:
    """The text that a run into a file prints at its end."""
    parts = [f"{summary.answered:,} answered"]
    if summary.answered_before:
        parts.append(f"{summary.answered_before:,} answered before")
    if summary.failed:
        parts.append(f"{summary.failed:,} failed (column error)")
    by = f" by {', '.join(summary.versions)}" if summary.versions else ""
    noun = "picture" if summary.pictures == 1 else "pictures"
    return f"{summary.pictures:,} {noun}: {', '.join(parts)}{by}; see {output}"


def skipped_text(skipped: dict[str, int]) -> str:
    """The entries that are not classified, by reason; empty if there are none."""
    parts = [f"{number:,} {reason}" for reason, number in skipped.items() if number]
    return f"skipped: {', '.join(parts)}" if parts else ""


def _record(answer: Answer | str) -> dict[str, object]:
    if isinstance(answer, str):
        return {"error": answer}
    return {
        "model": {"name": answer.model, "version": answer.version, "alias": answer.alias},
        "predictions": [
            {"label": each.label, "index": each.index, "probability": each.probability}
            for each in answer.predictions
        ],
        "request_id": answer.request_id,
        "timings_ms": answer.timings_ms,
    }


def _table(name: str, answer: Answer) -> str:
    took_ms = answer.timings_ms.get("total", 0.0)
    lines = [f"{one_line(name)}  ({answer.model} version {answer.version}, {took_ms:.1f} ms)"]
    block = _block()
    for each in answer.predictions:
        bar = block * round(each.probability * BAR_WIDTH)
        lines.append(f"  {each.probability:7.2%}  {bar:<{BAR_WIDTH}}  {one_line(each.label)}")
    return "\n".join(lines)


def _block() -> str:
    """The character of which bars consist: one that standard output can encode."""
    try:
        "█".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "#"
    return "█"
