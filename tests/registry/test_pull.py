"""Following the registry: what lies on disk is whole, verified, and survives the registry."""

from pathlib import Path
from threading import Event, Thread

import pytest

from registry.bundle import WEIGHTS, open_bundle
from registry.contract import ModelRef
from registry.errors import BundleInvalid, RegistryUnavailable
from registry.home import Home
from registry.promotion import promote
from registry.pull import VERSIONS_KEPT, Puller
from registry.releases import read_release, read_status, release_file, version_folder
from registry.store import ModelStore

REF = ModelRef("digits", alias="champion")


@pytest.fixture
def puller(store: ModelStore, registry_home: Home) -> Puller:
    return Puller(lambda: store, registry_home.models, (REF,))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_champion_is_laid_out_with_only_what_serving_needs(
    puller: Puller, store: ModelStore, publish, registry_home: Home
) -> None:
    version = publish()
    promote(store, "digits", 1)
    release = puller.pull(REF)
    assert [each.version for each in release.versions] == [1]
    folder = version_folder(registry_home.models, "digits", 1)
    bundle = open_bundle(folder, version.manifest_sha256)
    assert files(folder) == {*bundle.serving_files(), "manifest.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["1"]
    assert puller.pull(REF) == release


def test_a_new_champion_is_followed_and_a_fixed_number_is_not(
    puller: Puller, store: ModelStore, publish, registry_home: Home
) -> None:
    publish(seed=0)
    promote(store, "digits", 1)
    assert puller.pull(REF).generation == 1
    publish(seed=1)
    promote(store, "digits", 2, force=True, reason="test")
    assert puller.pull(REF).versions[0].version == 2
    fixed = puller.pull(ModelRef("digits", version=1))
    assert (fixed.versions[0].version, fixed.versions[0].alias) == (1, None)
    assert fixed.generation == 3


def test_a_copy_that_was_damaged_on_disk_is_fetched_again(
    store: ModelStore, publish, registry_home: Home
) -> None:
    publish()
    promote(store, "digits", 1)
    weights = version_folder(registry_home.models, "digits", 1) / WEIGHTS
    puller = Puller(lambda: store, registry_home.models, (REF,))
    puller.pull(REF)
    for each in (puller, Puller(lambda: store, registry_home.models, (REF,))):
        weights.write_bytes(b"damaged")
        each.pull(REF)
        open_bundle(weights.parent).verify([WEIGHTS])


def test_a_download_that_fails_leaves_what_serves_alone(
    puller: Puller, store: ModelStore, publish, registry_home: Home
) -> None:
    publish(seed=0)
    promote(store, "digits", 1)
    before = puller.pull(REF)
    publish(seed=1)
    promote(store, "digits", 2, force=True, reason="test")
    for path in registry_home.artifacts.rglob(WEIGHTS):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleInvalid):
        puller.pull(REF)
    assert read_release(registry_home.models, "digits") == before
    versions = version_folder(registry_home.models, "digits", 1).parent
    assert [path.name for path in versions.iterdir()] == ["1"]
    assert not puller.pull_all()
    status = read_status(registry_home.models, "digits")
    assert status.agreed_unix_s is None
    assert "has sha256" in str(status.error)


def test_a_registry_that_goes_away_is_noted_and_comes_back(
    store: ModelStore, publish, registry_home: Home
) -> None:
    publish()
    promote(store, "digits", 1)
    answers = iter([store, RegistryUnavailable("down"), store])

    def open_store() -> ModelStore:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    puller = Puller(open_store, registry_home.models, (REF,))
    assert puller.pull_all()
    puller._store = None
    assert not puller.pull_all()
    assert read_status(registry_home.models, "digits").error == "down"
    assert read_release(registry_home.models, "digits") is not None
    assert puller.pull_all()
    assert read_status(registry_home.models, "digits").error is None


def test_a_damaged_release_file_is_written_anew(
    puller: Puller, store: ModelStore, publish, registry_home: Home
) -> None:
    publish()
    promote(store, "digits", 1)
    puller.pull(REF)
    release_file(registry_home.models, "digits").write_text("{")
    assert puller.pull(REF).versions[0].version == 1


def test_a_disk_that_cannot_be_written_is_reported_not_fatal(
    puller: Puller, store: ModelStore, publish, registry_home: Home, caplog
) -> None:
    publish()
    promote(store, "digits", 1)
    registry_home.models.write_text("a file where the folder should be")
    assert not puller.pull_all()
    assert "cannot follow" in caplog.text
    assert "cannot note" in caplog.text


def test_old_versions_are_removed_but_enough_are_kept(
    puller: Puller, store: ModelStore, publish, registry_home: Home
) -> None:
    versions = registry_home.models / "digits" / "versions"
    for number in range(100, 100 + VERSIONS_KEPT + 3):
        (versions / str(number)).mkdir(parents=True)
    publish()
    promote(store, "digits", 1)
    puller.pull(REF)
    assert len(list(versions.iterdir())) == VERSIONS_KEPT + 1
    assert (versions / "1").is_dir()


def test_watching_goes_on_until_it_is_stopped(
    puller: Puller, store: ModelStore, publish, registry_home: Home
) -> None:
    stop = Event()
    seen = Event()
    original = puller.pull_all

    def counted() -> bool:
        seen.set()
        return original()

    puller.pull_all = counted  # type: ignore[method-assign]
    thread = Thread(target=puller.watch, args=(stop, 0.01))
    thread.start()
    assert seen.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
