"""The store against a real MLflow registry in SQLite."""

import sqlite3
from pathlib import Path

import mlflow
import pytest

from registry.bundle import HELDOUT, WEIGHTS
from registry.contract import ModelRef
from registry.errors import (
    BundleInvalid,
    PromotionRefused,
    RegistryUnavailable,
    UsageError,
    VersionNotFound,
)
from registry.home import Home
from registry.promotion import promote, roll_back
from registry.store import ModelStore


def artifact(home: Home, name: str) -> Path:
    (path,) = home.artifacts.rglob(name)
    return path


def test_a_published_version_is_the_challenger_and_comes_back_whole(
    store: ModelStore, publish, tmp_path: Path
) -> None:
    version = publish()
    assert (version.name, version.version, version.aliases) == ("digits", 1, ("challenger",))
    assert store.models() == ["digits"]
    ((listed, tags),) = store.versions("digits")
    assert listed == version
    assert tags["convoy.recipe"] == "tiny"
    bundle = store.download(version, tmp_path / "down")
    bundle.verify()
    assert bundle.manifest_sha256 == version.manifest_sha256


def test_only_the_wanted_files_are_fetched(store: ModelStore, publish, tmp_path: Path) -> None:
    store.download(publish(), tmp_path / "down", lambda _: [HELDOUT])
    assert sorted(path.name for path in (tmp_path / "down").iterdir()) == [HELDOUT, "manifest.json"]


def test_what_does_not_exist_is_named(store: ModelStore, publish) -> None:
    publish()
    with pytest.raises(VersionNotFound, match="no model 'nobody'"):
        store.resolve(ModelRef("nobody", version=1))
    with pytest.raises(VersionNotFound, match="no version 7"):
        store.resolve(ModelRef("digits", version=7))
    with pytest.raises(VersionNotFound, match="no alias 'champion'; its aliases are: challenger"):
        store.resolve(ModelRef("digits", alias="champion"))


def test_a_truncated_artefact_is_found_out(
    store: ModelStore, publish, registry_home: Home, tmp_path: Path
) -> None:
    version = publish()
    path = artifact(registry_home, WEIGHTS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleInvalid, match=r"bytes\) has sha256"):
        store.download(version, tmp_path / "down")


def test_a_missing_artefact_is_found_out(
    store: ModelStore, publish, registry_home: Home, tmp_path: Path
) -> None:
    version = publish()
    artifact(registry_home, WEIGHTS).unlink()
    with pytest.raises(BundleInvalid, match="missing"):
        store.download(version, tmp_path / "down")


def test_a_swapped_manifest_is_found_out(
    store: ModelStore, publish, registry_home: Home, tmp_path: Path
) -> None:
    version = publish()
    path = artifact(registry_home, "manifest.json")
    path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(BundleInvalid, match="the registry says"):
        store.download(version, tmp_path / "down")


def test_versions_that_convoy_did_not_publish_are_refused(store: ModelStore) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model("foreign")
    client.create_model_version("foreign", "file:///nowhere")
    with pytest.raises(BundleInvalid, match="not published by Convoy"):
        store.resolve(ModelRef("foreign", version=1))


def test_a_registry_of_another_schema_says_what_to_do(registry_home: Home) -> None:
    with sqlite3.connect(registry_home.root / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'f00dfeed0000'")
    # MLflow keeps one opened store per address and process; another spelling is another address.
    home = Home(registry_home.root / ".." / registry_home.root.name)
    with pytest.raises(RegistryUnavailable, match=r"another MLflow version.*mlflow db upgrade"):
        ModelStore(home).models()


def test_a_registry_that_is_down_answers_soon_and_hides_its_password(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(RegistryUnavailable) as caught:
        ModelStore(home).models()
    assert "127.0.0.1:9" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_first_version_is_promoted_without_a_comparison(store: ModelStore, publish) -> None:
    publish()
    assert "no champion" in str(promote(store, "digits", 1).verdict)
    assert store.aliases("digits") == {"champion": 1}
    (decision,) = store.decisions("digits")
    assert (decision.action, decision.from_version, decision.to_version) == ("promoted", None, 1)


@pytest.fixture
def two_versions(publish, better_and_worse_seed: tuple[int, int]) -> tuple[int, int]:
    """Two published versions: the number of the better one, and of the worse one."""
    better, worse = better_and_worse_seed
    return publish(seed=better).version, publish(seed=worse).version


def test_a_worse_version_is_refused_with_the_figures_and_can_be_forced(
    store: ModelStore, two_versions: tuple[int, int]
) -> None:
    better, worse = two_versions
    promote(store, "digits", better)
    with pytest.raises(
        PromotionRefused, match=r"challenger 0\.\d+, champion 0\.\d+ .* 64 held-out"
    ):
        promote(store, "digits", worse)
    assert store.aliases("digits")["champion"] == better
    with pytest.raises(UsageError, match="--reason"):
        promote(store, "digits", worse, force=True, reason=" ")
    decision = promote(store, "digits", worse, force=True, reason="a drill")
    assert "worse than the champion" in str(decision.verdict)
    assert store.aliases("digits")["champion"] == worse
    assert store.aliases("digits")["previous"] == better
    actions = [(each.action, each.reason) for each in store.decisions("digits")]
    assert actions == [("promoted", None), ("refused", None), ("forced", "a drill")]
    with pytest.raises(PromotionRefused, match="champion already"):
        promote(store, "digits", worse)


def test_a_better_version_takes_over_and_is_rolled_back(
    store: ModelStore, two_versions: tuple[int, int]
) -> None:
    better, worse = two_versions
    promote(store, "digits", worse)
    with pytest.raises(VersionNotFound, match="no previous champion"):
        roll_back(store, "digits")
    decision = promote(store, "digits", better)
    assert decision.action == "promoted"
    assert "gained" in str(decision.verdict)
    assert roll_back(store, "digits", "looks odd") == (better, worse)
    aliases = store.aliases("digits")
    assert (aliases["champion"], aliases["previous"]) == (worse, better)
    assert store.decisions("digits")[-1].action == "rolled back"


def test_a_damaged_challenger_never_becomes_champion(
    store: ModelStore, publish, registry_home: Home
) -> None:
    publish()
    path = artifact(registry_home, WEIGHTS)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(PromotionRefused, match="has sha256"):
        promote(store, "digits", 1)
    assert "champion" not in store.aliases("digits")
