"""Model names, digests, Convoy's version, and functions that make outside text safe to print."""

import hashlib
import importlib.metadata
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from msgspec import Meta, ValidationError

from registry.core.errors import UsageError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Model names become folder names, URL segments and metric labels; MLflow refuses "/" and ":".
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


def sha256_hex(data: bytes) -> str:
    """The SHA-256 digest of ``data`` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def check_model_name(name: str) -> str:
    """``name`` unchanged, if it is a valid model name.

    Raises:
        UsageError: it is not 1 to 63 letters, digits, ``_`` or ``-``, a letter or digit first.
    """
    if not MODEL_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a model name; use 1 to 63 letters, digits, '_' or '-', "
            "a letter or digit first"
        )
    return name


def one_line(text: str) -> str:
    """``text`` with its control characters escaped: line breaks, ANSI codes, changes of direction.

    The result cannot start a second line, move a terminal's cursor or hide the text after it.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def shortened(text: str, most: int) -> str:
    """``text``, cut to ``most`` characters. A cut text ends with its original length."""
    text = text.encode(errors="replace").decode()  # a tag cannot hold surrogates
    if len(text) <= most:
        return text
    note = f"… ({len(text):,} characters)"
    return text[: most - len(note)] + note


def unusable(
    error: ValidationError, variables: Mapping[str, str], values: Mapping[str, object]
) -> str:
    """The message of ``error``, with the environment variable and its value instead of the field.

    Args:
        error: raised when ``values`` were converted to a record.
        variables: environment variable → name of its field.
        values: name of a field → its value.
    """
    text = str(error)
    for name, field in variables.items():
        text = text.replace(f"`$.{field}`", f"{name}={values.get(field)!r}")
    return f"a setting cannot be used: {text}"


def convoy_version() -> str:
    """Convoy's version, from the installed package, or else from pyproject.toml.

    Images have Convoy's folders and pyproject.toml, but no installed package.
    """
    try:
        return importlib.metadata.version("convoy")
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        project = tomllib.loads(PYPROJECT.read_text())["project"]
    except FileNotFoundError:
        return "(not installed as a package)"
    return str(project["version"])
