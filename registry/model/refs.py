"""References to versions of a model, and the registry's record of a version.

Imports msgspec only, like ``registry.model.manifest``.
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
    """The registry's record of one version.

    ``signature`` is an envelope, not yet verified. ``evaluation_sha256`` is the digest of a later
    evaluation, if there is one.
    """

    name: str
    version: int
    manifest_sha256: Sha256
    aliases: tuple[str, ...]
    run_id: str
    created_unix_s: float
    signature: str | None = None
    evaluation_sha256: Sha256 | None = None


class ForeignVersion(Struct, frozen=True, kw_only=True):
    """A version in the registry that Convoy did not publish. It has no readable bundle.

    ``why`` says how Convoy knows that. ``flavours`` are MLflow's names of the ways to load it, if
    they were asked for, such as ``onnx``.
    """

    name: str
    version: int
    why: str
    flavours: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """The command that would import it."""
        known = "--labels FILE --preprocess FILE --reference CSV"
        if "onnx" in self.flavours:
            return f"convoy import models:/{self.name}/{self.version} {known}"
        if "pytorch" in self.flavours:
            return f"convoy import models:/{self.name}/{self.version} --run-code {known}"
        return f"export it as ONNX, then convoy import FILE.onnx {known}"


class Canary(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A challenger that answers real traffic next to the champion.

    It answers the part ``share`` of the requests; a repeated request gets the same version. It also
    scores the part ``shadow`` of the images that the champion answers; no client waits for that.
    """

    version: Annotated[int, Meta(ge=1)]
    share: Share = 0.0
    shadow: Share = 0.0

    def __str__(self) -> str:
        parts = [f"{100 * self.share:.3g} % of the requests"] if self.share else []
        if self.shadow:
            parts.append(f"{100 * self.shadow:.3g} % of the champion's images in shadow")
        return f"version {self.version} on {' and '.join(parts) or 'nothing'}"


class ModelRef(Struct, frozen=True):
    """A reference to a version of a model: a fixed number, or the version of an alias."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        selector = f"/{self.version}" if self.alias is None else f"@{self.alias}"
        return f"models:/{self.name}{selector}"


def ref_of(name: str, version: str) -> ModelRef:
    """A reference from a typed version: ``7`` is a version number, any other text an alias."""
    return parse_model_ref(f"models:/{name}{'/' if version.isdigit() else '@'}{version}")


def parse_model_ref(text: str) -> ModelRef:
    """The reference in ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER``.

    Raises:
        UsageError: ``text`` has another form.
    """
    match = _MODEL_URI.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not a model reference; write models:/NAME@ALIAS or models:/NAME/NUMBER"
        )
    check_model_name(match["name"])
    version = int(match["version"]) if match["version"] else None
    return ModelRef(match["name"], version, match["alias"])


DEFAULT_MODEL = "models:/fashion@champion"


def parse_model_refs(text: str | None, said_by: str = "CONVOY_MODEL") -> tuple[ModelRef, ...]:
    """The references in ``text``, separated by commas; ``DEFAULT_MODEL`` if there is none.

    Args:
        text: the references.
        said_by: where ``text`` comes from, for error messages.

    Raises:
        UsageError: a reference has another form, or a model is named twice.
    """
    try:
        refs = tuple(parse_model_ref(part) for part in (text or DEFAULT_MODEL).split(","))
    except UsageError as error:
        raise UsageError(f"{said_by}={text!r}: {error}") from error
    if len({ref.name for ref in refs}) != len(refs):
        raise UsageError(f"{said_by}={text!r} names a model twice; name each model once")
    return refs
