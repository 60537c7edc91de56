"""Versions of a model: how one is named, and what the registry knows of it.

Light, as ``registry.model.manifest``: msgspec only.
"""

import re
from typing import Annotated

from msgspec import Meta, Struct

from registry.core.errors import UsageError
from registry.core.names import Sha256, check_model_name

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_MODEL_URI = re.compile(
    r"models:/(?P<name>[^/@]+)(?:/(?P<version>[1-9]\d{0,8})|@(?P<alias>[\w-]+))"
)
Share = Annotated[float, Meta(ge=0, le=1)]


class ModelVersion(Struct, frozen=True, kw_only=True):
    """One version of a model as the registry knows it; ``signature`` is an envelope, unchecked."""

    name: str
    version: int
    manifest_sha256: Sha256
    aliases: tuple[str, ...]
    run_id: str
    created_unix_s: float
    signature: str | None = None


class ForeignVersion(Struct, frozen=True, kw_only=True):
    """A version in the registry that Convoy did not publish, so no bundle of it can be read.

    ``why`` says by what it shows.
    """

    name: str
    version: int
    why: str


class Canary(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A challenger that is tried on real traffic beside the champion.

    ``share`` of the requests are answered by it, the same ones each time. Of the images that the
    champion answers, it scores the part ``shadow`` too, and nobody waits for that.
    """

    version: Annotated[int, Meta(ge=1)]
    share: Share = 0.0
    shadow: Share = 0.0

    def __str__(self) -> str:
        parts = [f"{100 * self.share:.3g} % of the requests"] if self.share else []
        if self.shadow:
            parts.append(f"{100 * self.shadow:.3g} % of the champion's images in its shadow")
        return f"version {self.version} on {' and '.join(parts) or 'nothing'}"


class ModelRef(Struct, frozen=True):
    """Which version of a model is wanted: a fixed number, or wherever an alias points."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        selector = f"/{self.version}" if self.alias is None else f"@{self.alias}"
        return f"models:/{self.name}{selector}"


def ref_of(name: str, version: str) -> ModelRef:
    """The version of ``name`` that somebody typed: ``7`` is a number, anything else an alias."""
    return parse_model_ref(f"models:/{name}{'/' if version.isdigit() else '@'}{version}")


def parse_model_ref(text: str) -> ModelRef:
    """The reference in ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER``.

    Raises:
        UsageError: any other form.
    """
    match = _MODEL_URI.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is no model reference; write models:/NAME@ALIAS or models:/NAME/NUMBER"
        )
    check_model_name(match["name"])
    version = int(match["version"]) if match["version"] else None
    return ModelRef(match["name"], version, match["alias"])


DEFAULT_MODEL = "models:/fashion@champion"


def parse_model_refs(text: str | None, said_by: str = "CONVOY_MODEL") -> tuple[ModelRef, ...]:
    """The references in ``text``, one or several with commas between them; by default the champion.

    Raises:
        UsageError: one has another form, or a model is named twice.
    """
    try:
        refs = tuple(parse_model_ref(part) for part in (text or DEFAULT_MODEL).split(","))
    except UsageError as error:
        raise UsageError(f"{said_by}={text!r}: {error}") from error
    if len({ref.name for ref in refs}) != len(refs):
        raise UsageError(f"{said_by}={text!r} names a model twice")
    return refs
