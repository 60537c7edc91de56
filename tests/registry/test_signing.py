"""Signatures of versions, and what an attacker without a trusted key cannot do."""

import base64
import json
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.cli.main import main
from registry.core.errors import BundleInvalid, UsageError
from registry.core.paths import Paths
from registry.delivery import signing
from registry.delivery.deployment import read_deployment, version_folder
from registry.delivery.puller import Puller
from registry.delivery.signing import SIGNATURE, TrustedKeys, check_expiry, make_key, sign
from registry.model.refs import Canary, ModelRef, ModelVersion
from registry.promotion.promotion import promote, roll_back
from registry.store.mlflow_store import ModelStore
from tests.conftest import MakeBundle

REF = ModelRef("digits", alias="champion")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return tmp_path / "ann.pem"


@pytest.fixture
def trusted(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of trusted keys, and the variable that names it."""
    file = tmp_path / "trusted"
    file.write_text(f"# ours\n\n{make_key(key)}  # ann's\n")
    monkeypatch.setenv("CONVOY_TRUSTED_KEYS", str(file))
    return file


def version(number: int = 3, digest: str = "ab" * 32) -> ModelVersion:
    return ModelVersion(
        name="digits",
        version=number,
        manifest_sha256=digest,
        aliases=(),
        run_id="",
        created_unix_s=0.0,
    )


def test_a_signed_version_is_accepted(key: Path, trusted: Path) -> None:
    envelope = sign(version(), key, days=30)
    signed = TrustedKeys.from_environment().check(envelope, "digits", 3, "ab" * 32)
    assert (signed.by, signed.statement.version) == ("ann", 3)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "number", "digest"),
    [("other", 3, "ab" * 32), ("digits", 4, "ab" * 32), ("digits", 3, "cd" * 32)],
)
def test_a_signature_for_another_version_is_refused(
    key: Path, trusted: Path, name: str, number: int, digest: str
) -> None:
    envelope = sign(version(), key, days=30)
    with pytest.raises(BundleInvalid, match="its signature is for digits version 3"):
        TrustedKeys.from_environment().check(envelope, name, number, digest)


def test_a_change_of_any_signed_byte_is_refused(key: Path, trusted: Path) -> None:
    keys = TrustedKeys.from_environment()
    envelope = sign(version(), key, days=30)
    believed = 0
    for at in range(len(envelope)):
        changed = envelope[:at] + chr(ord(envelope[at]) ^ 1) + envelope[at + 1 :]
        try:
            signed = keys.check(changed, "digits", 3, "ab" * 32)
        except BundleInvalid:
            continue
        believed += 1
        assert signed.statement.version == 3  # only keyid, a hint, may be changed
    assert believed <= 16 + len('"keyid":')


def test_a_signature_by_an_unknown_key_or_of_another_type_is_refused(
    key: Path, trusted: Path, tmp_path: Path
) -> None:
    keys = TrustedKeys.from_environment()
    make_key(tmp_path / "mallory.pem")
    forged = sign(version(), tmp_path / "mallory.pem", days=30)
    with pytest.raises(BundleInvalid, match="no trusted key"):
        keys.check(forged, "digits", 3, "ab" * 32)
    private = signing._read_private_key(key)
    payload = base64.b64decode(json.loads(sign(version(), key, 30))["payload"])
    other = "application/vnd.in-toto+json"
    envelope = {
        "payloadType": other,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {
                "keyid": "",
                "sig": base64.b64encode(private.sign(signing._to_sign(other, payload))).decode(),
            }
        ],
    }
    with pytest.raises(BundleInvalid, match="has the payload type"):
        keys.check(json.dumps(envelope), "digits", 3, "ab" * 32)


@pytest.mark.parametrize("envelope", [None, "", "{}", "[" * 5000, "x" * 100_000, "null"])
def test_with_trusted_keys_a_version_without_a_signature_is_refused(
    trusted: Path, envelope: str | None
) -> None:
    with pytest.raises(BundleInvalid):
        TrustedKeys.from_environment().check(envelope, "digits", 3, "ab" * 32)


def test_a_version_whose_signature_has_expired_cannot_be_chosen(key: Path, trusted: Path) -> None:
    signed = TrustedKeys.from_environment().check(sign(version(), key, 1), "digits", 3, "ab" * 32)
    check_expiry(signed, signed.statement.expires_unix_s)
    with pytest.raises(BundleInvalid, match="has expired"):
        check_expiry(signed, signed.statement.expires_unix_s + 1)


@pytest.mark.parametrize("text", ["", "ann\n", "ann !!!\n", "ann aGVsbG8=\n", "a b c\n"])
def test_a_file_without_valid_keys_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    monkeypatch.setenv("CONVOY_TRUSTED_KEYS", str(file))
    with pytest.raises(UsageError, match="CONVOY_TRUSTED_KEYS"):
        TrustedKeys.from_environment()


def test_keygen_does_not_overwrite_a_key(key: Path, trusted: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        make_key(key)


def test_a_signed_version_is_pulled_and_a_roll_back_needs_no_new_signature(
    key: Path,
    trusted: Path,
    store: ModelStore,
    registry_paths: Paths,
    publish: Callable[..., ModelVersion],
    capsys: pytest.CaptureFixture[str],
) -> None:
    puller = Puller(lambda: store, registry_paths, (REF,))
    publish(seed=0)
    promote(store, "digits", 1)
    with pytest.raises(BundleInvalid, match="not signed"):
        puller.pull(REF)
    assert read_deployment(registry_paths.models, REF) is None
    assert main(["verify", "digits", "1"]) == 2
    assert main(["sign", "digits", "1", "--key", str(key)]) == 0
    assert main(["verify", "digits", "champion"]) == 0
    assert "signed by ann" in capsys.readouterr().out
    assert puller.pull(REF).versions[0].version == 1
    assert (version_folder(registry_paths.models, "digits", 1) / SIGNATURE).is_file()

    publish(seed=1)
    promote(store, "digits", 2, force=True, reason="test")
    assert main(["sign", "digits", "2", "--key", str(key)]) == 0
    assert puller.pull(REF).versions[0].version == 2
    key.unlink()  # the private key is not available now
    roll_back(store, "digits", "an emergency")
    assert puller.pull(REF).versions[0].version == 1


def test_a_worker_checks_the_signature_of_its_bundle(
    key: Path, trusted: Path, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle()
    keys = TrustedKeys.from_environment()
    with pytest.raises(BundleInvalid, match="not signed"):
        signing.check_signature(bundle, "digits", 3, keys)
    envelope = sign(version(3, bundle.manifest_sha256), key, 1)
    (bundle.folder / SIGNATURE).write_text(envelope)
    assert signing.check_signature(bundle, "digits", 3, keys).by == "ann"
    for name, number in (("digits", 4), ("letters", 3)):
        with pytest.raises(BundleInvalid, match="is for digits version 3"):
            signing.check_signature(bundle, name, number, keys)
    (bundle.folder / SIGNATURE).unlink()
    (bundle.folder / SIGNATURE).mkdir()
    with pytest.raises(BundleInvalid):
        signing.check_signature(bundle, "digits", 3, keys)


def test_the_commands_for_keys_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store: ModelStore
) -> None:
    assert main(["keygen", str(tmp_path / "bob.pem")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("bob ")
    assert "keep it secret" in captured.err
    assert main(["keygen", str(tmp_path / "bob.pem")]) == 2
    assert main(["token", "add", "ann", "--role", "classify"]) == 0
    assert main(["token", "list"]) == 0
    assert "ann" in capsys.readouterr().out
    assert main(["token", "remove", "ann"]) == 0
    assert main(["token", "remove", "ann"]) == 2
    assert main(["sign", "digits", "1", "--key", "x", "--days", "0"]) == 2
    assert main(["sign", "digits", "1", "--key", "x"]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_file_that_is_not_a_key_cannot_sign(tmp_path: Path) -> None:
    for text in ("", "not a key"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(UsageError, match="cannot be read"):
            sign(version(), tmp_path / "key", 1)


def test_a_version_whose_signature_has_expired_goes_on_serving_but_is_not_chosen_again(
    key: Path,
    trusted: Path,
    store: ModelStore,
    registry_paths: Paths,
    publish: Callable[..., ModelVersion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    puller, models = Puller(lambda: store, registry_paths, (REF,)), registry_paths.models
    for seed in (0, 1):
        publish(seed=seed)
    for number in ("1", "2"):
        assert main(["sign", "digits", number, "--key", str(key)]) == 0
    promote(store, "digits", 2)
    assert puller.pull(REF).versions[0].version == 2
    store.aliases.set_champion(
        "digits", champion=None, previous=None, canary=Canary(version=1, share=1.0)
    )
    assert puller.pull(REF).canary == Canary(version=1, share=1.0)
    (version_folder(models, "digits", 1) / SIGNATURE).write_bytes(b"\xff\xfe")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 400 * signing.DAY_S)
    assert puller.pull(REF).canary == Canary(version=1, share=1.0)  # its signature file is repaired
    store.aliases.set_champion("digits", champion=None, previous=None, canary=None)
    assert puller.pull(REF).canary is None
    store.aliases.set_champion(
        "digits", champion=None, previous=None, canary=Canary(version=1, share=1.0)
    )
    assert puller.pull(REF).canary is None  # it would have to be chosen again
