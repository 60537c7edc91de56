"""Signs and verifies versions: Ed25519 signatures over a manifest's digest.

The publisher keeps the private key off the registry's host. So an attacker who can write to the
registry, its database and its artefacts still cannot have an unsigned version served. The signed
statement names the model, the version and the second at which the signature expires. So an attacker
cannot present a version under another name, and a puller does not choose it after that time. A
puller may choose an earlier version with a valid signature again: a roll-back needs no new
signature. To revoke signatures, remove their key from the trusted ones. The envelope is DSSE's
(github.com/secure-systems-lab/dsse, version 1).
"""

import base64
import binascii
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from registry.core.errors import BundleInvalid, UsageError
from registry.core.names import Sha256, sha256_hex
from registry.model.bundle import Bundle
from registry.model.refs import ModelVersion

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE = "signature.json"
"""The file of the envelope in a version's folder, as the registry had it."""

PAYLOAD_TYPE = "application/vnd.convoy.version+json"
MAX_BYTES = 16_384
DAY_S = 86_400


class Statement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a signature covers: until it expires, this manifest is this version of this model."""

    model: str
    version: int
    manifest_sha256: Sha256
    expires_unix_s: int


class KeySignature(Struct, frozen=True):
    """One signature of an envelope; ``keyid`` is a hint and proves nothing."""

    keyid: str
    sig: str


class Envelope(Struct, frozen=True, rename="camel"):
    """A DSSE envelope: a signed statement as JSON, whose payload and signatures are base64."""

    payload_type: str
    payload: str
    signatures: tuple[KeySignature, ...]


class Signed(Struct, frozen=True):
    """A statement that a trusted key has signed, and the name of that key."""

    statement: Statement
    by: str


class TrustedKeys:
    """The public keys whose signatures count here; without any, versions need no signature."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        """``keys``: raw public keys of 32 bytes, by name."""
        self._keys = keys

    @classmethod
    def from_environment(cls) -> "TrustedKeys":
        """The keys in the file that ``CONVOY_TRUSTED_KEYS`` names; none if it is not set.

        Raises:
            UsageError: the file has no valid keys, or the package cryptography is not installed.
        """
        name = os.environ.get("CONVOY_TRUSTED_KEYS")
        return cls(read_public_keys(Path(name))) if name else cls({})

    def __bool__(self) -> bool:
        return bool(self._keys)

    def check(self, envelope: str | None, name: str, version: int, manifest_sha256: str) -> Signed:
        """The statement by which a trusted key has signed this version.

        Raises:
            BundleInvalid: no trusted key has signed this version.
        """
        what = f"{name} version {version}"
        if not envelope:
            raise BundleInvalid(
                f"{what} is not signed, and CONVOY_TRUSTED_KEYS requires a signature; sign it"
            )
        signed = self._open(envelope, what)
        statement = signed.statement
        if (statement.model, statement.version, statement.manifest_sha256) != (
            name,
            version,
            manifest_sha256,
        ):
            raise BundleInvalid(
                f"{what}: its signature is for {statement.model} version {statement.version}, "
                f"manifest {statement.manifest_sha256[:12]}…"
            )
        return signed

    def _open(self, text: str, what: str) -> Signed:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            envelope = msgspec.json.decode(text[:MAX_BYTES], type=Envelope)
            payload = base64.b64decode(envelope.payload, validate=True)
            signatures = [base64.b64decode(s.sig, validate=True) for s in envelope.signatures]
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BundleInvalid(f"{what}: its signature cannot be read: {error}") from error
        signed_bytes = _to_sign(envelope.payload_type, payload)
        for by, key in self._keys.items():
            for signature in signatures:
                try:
                    Ed25519PublicKey.from_public_bytes(key).verify(signature, signed_bytes)
                except InvalidSignature:
                    continue
                if envelope.payload_type != PAYLOAD_TYPE:
                    raise BundleInvalid(
                        f"{what}: its signature has the payload type {envelope.payload_type!r}, "
                        f"not {PAYLOAD_TYPE!r}"
                    )
                try:
                    return Signed(msgspec.json.decode(payload, type=Statement), by)
                except (msgspec.MsgspecError, ValueError) as error:
                    raise BundleInvalid(
                        f"{what}: the signed payload is not a statement: {error}"
                    ) from error
        raise BundleInvalid(f"{what}: no trusted key has signed it")


def sign(version: ModelVersion, key: Path, days: int) -> str:
    """The envelope that signs ``version`` with the private key in the file ``key``, for ``days``.

    Raises:
        UsageError: the file does not hold an Ed25519 private key.
    """
    private = _read_private_key(key)
    statement = Statement(
        model=version.name,
        version=version.version,
        manifest_sha256=version.manifest_sha256,
        expires_unix_s=int(time.time()) + days * DAY_S,
    )
    payload = msgspec.json.encode(statement)
    signature = private.sign(_to_sign(PAYLOAD_TYPE, payload))
    public = private.public_key().public_bytes_raw()
    envelope = Envelope(
        PAYLOAD_TYPE,
        base64.b64encode(payload).decode(),
        (KeySignature(key_id(public), base64.b64encode(signature).decode()),),
    )
    return msgspec.json.encode(envelope).decode()


def check_signature(bundle: Bundle, name: str, version: int, keys: TrustedKeys) -> Signed:
    """The statement in the signature file of ``bundle``'s folder.

    ``name`` is the model that is to be served. The manifest's own name proves nothing: the folder
    may contain a bundle that was signed for another model.

    Raises:
        BundleInvalid: no trusted key has signed this bundle as this version of the model ``name``.
    """
    try:
        envelope = (bundle.folder / SIGNATURE).read_bytes()[: MAX_BYTES + 1]
    except FileNotFoundError:
        envelope = b""
    except OSError as error:
        raise BundleInvalid(f"{bundle.folder / SIGNATURE}: {error.strerror}") from error
    return keys.check(envelope.decode(errors="replace"), name, version, bundle.manifest_sha256)


def check_expiry(signed: Signed, now_unix_s: float) -> None:
    """Raise ``BundleInvalid`` if the signature has expired at ``now_unix_s``."""
    statement = signed.statement
    if now_unix_s > statement.expires_unix_s:
        raise BundleInvalid(
            f"{statement.model} version {statement.version}: its signature has expired; sign it "
            "again"
        )


def make_key(file: Path) -> str:
    """Write a new private key to ``file``, with mode 600; returns the public key as a line.

    Raises:
        UsageError: the file exists already or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(pem)
    public = private.public_key().public_bytes_raw()
    return f"{file.stem} {base64.b64encode(public).decode()}"


def read_public_keys(file: Path) -> dict[str, bytes]:
    """The keys in ``file``: on each line a name and 32 bytes in base64; ``#`` starts a comment."""
    try:
        import cryptography  # noqa: F401 - fail now, not at the first version
    except ImportError as error:
        raise UsageError(
            "CONVOY_TRUSTED_KEYS is set, and needs the package cryptography: install it"
        ) from error
    keys = {}
    try:
        for line in file.read_text().splitlines():
            if words := line.partition("#")[0].split():
                name, text = words
                keys[name] = base64.b64decode(text, validate=True)
                if len(keys[name]) != 32:
                    raise ValueError(f"the key {name} has {len(keys[name])} bytes, not 32")
    except (OSError, ValueError, binascii.Error) as error:
        raise UsageError(f"CONVOY_TRUSTED_KEYS={file}: {error}") from error
    if not keys:
        raise UsageError(
            f"CONVOY_TRUSTED_KEYS={file} has no key, so no version could be served; add the line "
            "that `convoy keygen` printed"
        )
    return keys


def key_id(public: bytes) -> str:
    """A short name of a raw public key."""
    return sha256_hex(public)[:16]


def _read_private_key(file: Path) -> "Ed25519PrivateKey":
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{file} does not hold an Ed25519 key; make one with keygen")
    return key


def _to_sign(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
