from pathlib import Path

import pytest

from registry.core.errors import BundleInvalid
from registry.core.files import LOCK
from registry.delivery.deployment import (
    DeployedVersion,
    deployment_file,
    read_deployment,
    read_status,
    write_deployment,
    write_status,
)
from registry.model.refs import ModelRef

REF = ModelRef("fashion", alias="champion")
ONE = DeployedVersion(version=1, manifest_sha256="a" * 64, alias="champion")
TWO = DeployedVersion(version=2, manifest_sha256="b" * 64, alias="champion")


def test_without_a_deployment_the_reader_gets_none(tmp_path: Path) -> None:
    assert read_deployment(tmp_path, REF) is None
    assert read_status(tmp_path, REF).agreed_unix_s is None


def test_the_generation_grows_only_with_a_change(tmp_path: Path) -> None:
    assert write_deployment(tmp_path, REF, (ONE,)).generation == 1
    assert write_deployment(tmp_path, REF, (ONE,)).generation == 1
    assert write_deployment(tmp_path, REF, (TWO,)).generation == 2
    deployment = read_deployment(tmp_path, REF)
    assert deployment is not None
    assert deployment.versions == (TWO,)
    files = {path.name for path in (tmp_path / "fashion").iterdir()}
    assert files == {"deployment@champion.json", LOCK}  # and no temporary file


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 5000, b'{"schema_version":1}', b'{"versions": []}', b'{"model": "\xff"}'],
)
def test_a_damaged_deployment_is_reported_and_can_be_replaced(
    tmp_path: Path, content: bytes
) -> None:
    write_deployment(tmp_path, REF, (ONE,))
    deployment_file(tmp_path, REF).write_bytes(content)
    with pytest.raises(BundleInvalid, match="cannot be read"):
        read_deployment(tmp_path, REF)
    assert write_deployment(tmp_path, REF, (TWO,)).versions == (TWO,)


def test_a_deployment_for_another_model_is_refused(tmp_path: Path) -> None:
    write_deployment(tmp_path, REF, (ONE,))
    (tmp_path / "digits").mkdir()
    digits = ModelRef("digits", alias="champion")
    deployment_file(tmp_path, REF).rename(deployment_file(tmp_path, digits))
    with pytest.raises(BundleInvalid, match="for model fashion"):
        read_deployment(tmp_path, digits)


def test_an_error_keeps_the_time_of_the_last_successful_pull(tmp_path: Path) -> None:
    write_status(tmp_path, REF, None)
    agreed = read_status(tmp_path, REF).agreed_unix_s
    assert agreed is not None
    write_status(tmp_path, REF, "registry down")
    status = read_status(tmp_path, REF)
    assert (status.agreed_unix_s, status.error) == (agreed, "registry down")
