"""Names of models, digests, and texts of others made fit for a terminal, a log or a tag."""

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, ValidationError

from registry.core.errors import UsageError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Model names become folder names, URL segments and metric labels; MLflow refuses "/" and ":".
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


def sha256_hex(data: bytes) -> str:
    """The SHA-256 digest of ``data`` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def check_model_name(name: str) -> str:
    """``name`` itself.

    Raises:
        UsageError: when it has other characters than letters, digits, ``_`` and ``-``.
    """
    if not MODEL_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no model name: use 1 to 63 letters, digits, '_' or '-', "
            "a letter or digit first"
        )
    return name


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
