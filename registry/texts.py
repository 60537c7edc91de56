"""Texts of others, made fit for a line of a terminal or a log, and for a tag of the registry."""

import re
from collections.abc import Mapping

from msgspec import ValidationError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """``text`` with its control characters escaped: line breaks, ANSI codes, changes of direction.

    So that a text cannot make a second line, move a terminal's cursor or hide what follows it.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def shortened(text: str, most: int) -> str:
    """``text`` in UTF-8, cut to ``most`` characters; the end says how many there were."""
    text = text.encode(errors="replace").decode()  # without surrogates, which no tag can hold
    if len(text) <= most:
        return text
    note = f"… ({len(text):,} characters)"
    return text[: most - len(note)] + note


def unusable(
    error: ValidationError, variables: Mapping[str, str], values: Mapping[str, object]
) -> str:
    """What ``error`` says, with the environment variable and its value in place of the field.

    Args:
        error: of a record that was made of ``values``.
        variables: the name of each variable → its field.
        values: by field.
    """
    text = str(error)
    for name, field in variables.items():
        text = text.replace(f"`$.{field}`", f"{name}={values.get(field)!r}")
    return f"a setting cannot be used: {text}"
