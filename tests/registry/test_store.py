"""The store against a real MLflow registry in SQLite."""

import contextlib
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from msgspec.structs import replace
from sqlalchemy.exc import IntegrityError

from registry.cli.main import main as command
from registry.core.errors import (
    BundleInvalid,
    PromotionConflict,
    PromotionRefused,
    RegistryUnavailable,
    UsageError,
    VersionNotFound,
)
from registry.core.paths import Paths
from registry.model.bundle import HELDOUT, WEIGHTS
from registry.model.refs import Canary, ModelRef
from registry.promotion import decisions
from registry.promotion.gate_runner import GateRunner
from registry.promotion.promotion import promote, roll_back, start_canary, stop_canary
from registry.store import mlflow_store as registry_store
from registry.store import model_names
from registry.store.aliases import Aliases
from registry.store.audit_log import Entry
from registry.store.audit_log_store import AuditLogStore
from registry.store.mlflow_store import ModelStore
from tests.conftest import WAIT_TIMEOUT_S, Publish


def artifact(paths: Paths, name: str) -> Path:
    (path,) = paths.artifacts.rglob(name)
    return path


def test_a_published_version_is_the_challenger_and_comes_back_whole(
    store: ModelStore, publish: Publish, tmp_path: Path
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


def test_only_the_wanted_files_are_fetched(
    store: ModelStore, publish: Publish, tmp_path: Path
) -> None:
    store.download(publish(), tmp_path / "down", lambda _: [HELDOUT])
    assert sorted(path.name for path in (tmp_path / "down").iterdir()) == [HELDOUT, "manifest.json"]


def test_a_file_that_the_manifest_does_not_name_is_named(
    store: ModelStore, publish: Publish, tmp_path: Path
) -> None:
    with pytest.raises(BundleInvalid, match=r"the manifest names no file training\.zip"):
        store.download(publish(), tmp_path / "down", lambda _: ["training.zip"])


def test_a_missing_model_version_or_alias_is_named(store: ModelStore, publish: Publish) -> None:
    publish()
    with pytest.raises(VersionNotFound, match="no model 'other'"):
        store.resolve(ModelRef("other", version=1))
    with pytest.raises(VersionNotFound, match="no version 7"):
        store.resolve(ModelRef("digits", version=7))
    with pytest.raises(VersionNotFound, match="no version 6090089627946417389568"):
        store.resolve(ModelRef("digits", version=6090089627946417389568))  # no database has such
    with pytest.raises(VersionNotFound, match="no alias 'champion'; its aliases are: challenger"):
        store.resolve(ModelRef("digits", alias="champion"))


def test_a_truncated_artefact_is_found_out(
    store: ModelStore, publish: Publish, registry_paths: Paths, tmp_path: Path
) -> None:
    version = publish()
    path = artifact(registry_paths, WEIGHTS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleInvalid, match=r"bytes\) has sha256"):
        store.download(version, tmp_path / "down")


def test_a_missing_artefact_is_found_out(
    store: ModelStore, publish: Publish, registry_paths: Paths, tmp_path: Path
) -> None:
    version = publish()
    artifact(registry_paths, WEIGHTS).unlink()
    with pytest.raises(BundleInvalid, match="missing"):
        store.download(version, tmp_path / "down")


def test_a_swapped_manifest_is_found_out(
    store: ModelStore, publish: Publish, registry_paths: Paths, tmp_path: Path
) -> None:
    version = publish()
    path = artifact(registry_paths, "manifest.json")
    path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(BundleInvalid, match="but the registry has"):
        store.download(version, tmp_path / "down")


def test_more_than_was_published_is_not_fetched(
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = publish()
    path = artifact(registry_paths, WEIGHTS)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BundleInvalid, match=r"bytes long; at most [\d,]+ bytes are fetched"):
        store.download(version, tmp_path / "one")
    assert not list((tmp_path / "one").rglob(WEIGHTS))
    monkeypatch.setattr(registry_store, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(BundleInvalid, match=r"bytes long; at most 1,000 bytes are fetched"):
        store.manifest(version)
    manifest = artifact(registry_paths, "manifest.json")
    manifest.unlink()
    manifest.mkdir()
    (manifest / "large").write_bytes(bytes(2000))
    with pytest.raises(BundleInvalid, match="is not a file"):
        store.download(version, tmp_path / "two")
    assert list((tmp_path / "two").rglob("large")) == []


class Endless(BaseHTTPRequestHandler):
    """Sends a file that has no end."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(64 * 1024))

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_server_that_sends_a_manifest_without_end_is_left(
    store: ModelStore, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer of the registry may name a server of their own as the place of a version."""
    publish()
    monkeypatch.setattr(registry_store, "MAX_MANIFEST_BYTES", 1_000_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = f"http://127.0.0.1:{server.server_address[1]}/artifacts"
        tags = {model_names.DIGEST_TAG: "0" * 64}
        mlflow.MlflowClient().create_model_version("digits", source, tags=tags)
        with pytest.raises(BundleInvalid, match=r"is longer; at most 1,000,000 bytes are fetched"):
            store.manifest(store.resolve(ModelRef("digits", 2)))
        server.shutdown()


def test_versions_that_convoy_did_not_publish_are_refused(store: ModelStore) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model("foreign")
    client.create_model_version("foreign", "file:///nowhere")
    with pytest.raises(BundleInvalid, match="not published by Convoy"):
        store.resolve(ModelRef("foreign", version=1))


def test_a_registry_of_another_schema_says_what_to_do(registry_paths: Paths) -> None:
    with sqlite3.connect(registry_paths.root / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'f00dfeed0000'")
    # MLflow keeps one opened store per address and process; another spelling is another address.
    paths = Paths(registry_paths.root / ".." / registry_paths.root.name)
    with pytest.raises(RegistryUnavailable, match=r"another MLflow version.*mlflow db upgrade"):
        ModelStore(paths).models()


def test_a_registry_that_is_down_answers_soon_and_hides_its_password(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pragma: allowlist nextline secret
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(RegistryUnavailable) as caught:
        ModelStore(paths).models()
    assert "127.0.0.1:9" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_first_version_is_promoted_without_a_comparison(
    store: ModelStore, publish: Publish
) -> None:
    publish()
    assert "no champion" in str(promote(store, "digits", 1).entry.details)
    assert store.aliases.read("digits") == {"champion": 1}
    (line,) = store.audit_logs.read("digits").lines
    assert (line.entry.action, line.entry.from_version, line.entry.to_version) == (
        "promoted",
        None,
        1,
    )
    assert store.models() == ["digits"]  # its audit log is not listed


@pytest.fixture
def two_versions(publish: Publish, better_and_worse_seed: tuple[int, int]) -> tuple[int, int]:
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
    assert store.aliases.read("digits")["champion"] == better
    with pytest.raises(UsageError, match="--reason"):
        promote(store, "digits", worse, force=True, reason=" ")
    line = promote(store, "digits", worse, force=True, reason="a drill")
    assert "accuracy" in str(line.entry.details)
    assert store.aliases.read("digits")["champion"] == worse
    assert store.aliases.read("digits")["previous"] == better
    audit_log = store.audit_logs.read("digits")
    assert audit_log.faults(store.audit_logs.newest_line("digits")) == []
    actions = [(each.entry.action, each.entry.reason) for each in audit_log.lines]
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
    entry = promote(store, "digits", better).entry
    assert entry.action == "promoted"
    assert "gained" in str(entry.details)
    entry = roll_back(store, "digits", "looks odd").entry
    assert (entry.from_version, entry.to_version) == (better, worse)
    aliases = store.aliases.read("digits")
    assert (aliases["champion"], aliases["previous"]) == (worse, better)
    assert store.audit_logs.read("digits").lines[-1].entry.action == "rolled back"


def test_a_damaged_challenger_never_becomes_champion(
    store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    publish()
    path = artifact(registry_paths, WEIGHTS)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(PromotionRefused, match="has sha256"):
        promote(store, "digits", 1)
    assert "champion" not in store.aliases.read("digits")


@pytest.mark.slow
def test_one_of_eight_operators_who_promote_at_once_wins_each_round(
    store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    """Each loser gets an error that names the winner; audit log and aliases agree in the end."""
    for seed in range(9):
        publish(seed=seed)
    promote(store, "digits", 9)
    for number in range(1, 4):
        champion = store.audit_logs.read("digits").champion
        start = threading.Barrier(8)
        race: dict[str, Any] = {"expect_champion": champion, "force": True, "reason": "a race"}

        def try_to(
            version: int, start: threading.Barrier = start, race: dict[str, Any] = race
        ) -> int | str:
            own = ModelStore(registry_paths)
            start.wait(WAIT_TIMEOUT_S)
            try:
                return promote(own, "digits", version, **race).entry.to_version
            except PromotionConflict as error:
                return str(error)

        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(try_to, (v for v in range(1, 10) if v != champion)))
        winners = [each for each in outcomes if isinstance(each, int)]
        losers = [str(each) for each in outcomes if not isinstance(each, int)]
        assert winners == [store.audit_logs.read("digits").champion], outcomes
        assert all("came first" in each or "the champion is" in each for each in losers)
        audit_log = store.audit_logs.read("digits")
        assert len(audit_log.moves) == number + 1
        assert audit_log.faults(store.audit_logs.newest_line("digits")) == []
        aliases = store.aliases.read("digits")
        assert (aliases["champion"], aliases["previous"]) == (
            audit_log.champion,
            audit_log.previous,
        )


def test_a_promotion_that_expects_another_champion_is_refused(
    store: ModelStore, publish: Publish
) -> None:
    publish(seed=0)
    publish(seed=1)
    promote(store, "digits", 1)
    with pytest.raises(PromotionConflict, match="the champion is version 1, not 7"):
        promote(store, "digits", 2, expect_champion=7, force=True, reason="a drill")
    promote(store, "digits", 2, expect_champion=1, force=True, reason="a drill")


def test_a_champion_that_was_made_by_other_means_is_written_down(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By MLflow's own page, say; or by one who died between the ledger and the alias."""
    monkeypatch.setattr(decisions, "RECONCILE_TIMEOUT_S", 0.0)
    for seed in range(3):
        publish(seed=seed)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("digits", "champion", "2")
    promote(store, "digits", 1, force=True, reason="a drill")
    client.set_registered_model_alias("digits", "champion", "3")
    assert roll_back(store, "digits").entry.to_version == 1
    moves = [
        (each.entry.action, each.entry.to_version) for each in store.audit_logs.read("digits").moves
    ]
    assert moves == [("adopted", 2), ("promoted", 1), ("adopted", 3), ("rolled back", 1)]


def test_a_registry_without_an_audit_log_can_be_rolled_back(
    store: ModelStore, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        publish(seed=seed)
    store.aliases.set_champion("digits", champion=2, previous=1)
    assert roll_back(store, "digits").entry.to_version == 1
    assert command(["audit"]) == 0


def test_an_audit_bears_what_was_deleted(
    store: ModelStore, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        publish(seed=seed)
    promote(store, "digits", 1)
    promote(store, "digits", 2, force=True, reason="a drill")
    mlflow.MlflowClient().delete_model_version("digits", "1")
    assert command(["audit"]) == 0


def test_a_champion_that_was_deleted_is_no_obstacle(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        publish(seed=seed)
    promote(store, "digits", 1)
    mlflow.MlflowClient().delete_model_version("digits", "1")
    with monkeypatch.context() as damaging:

        def damaged(*arguments: object, **named: object) -> None:
            raise BundleInvalid("weights are damaged")

        damaging.setattr(ModelStore, "download", damaged)
        with pytest.raises(PromotionRefused, match="weights are damaged"):
            promote(store, "digits", 2)
    line = promote(store, "digits", 2)
    assert "version 1, the champion, is gone" in str(line.entry.details)
    with pytest.raises(VersionNotFound, match="no version 1"):
        roll_back(store, "digits")


def test_a_first_promotion_that_died_before_its_alias_is_carried_out(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "RECONCILE_TIMEOUT_S", 0.0)
    for seed in range(2):
        publish(seed=seed)
    with monkeypatch.context() as dying:

        def die(*arguments: object, **named: object) -> None:
            raise RegistryUnavailable("the registry did not answer")

        dying.setattr(Aliases, "set_champion", die)
        with pytest.raises(RegistryUnavailable):
            promote(store, "digits", 1)
    assert "champion" not in store.aliases.read("digits")
    with pytest.raises(PromotionRefused, match="champion already"):
        promote(store, "digits", 1)
    assert store.aliases.read("digits")["champion"] == 1  # settled before it was refused
    assert store.audit_logs.read("digits").faults(store.audit_logs.newest_line("digits")) == []


def test_an_operator_who_is_too_slow_to_move_the_alias_gets_an_error(
    store: ModelStore, publish: Publish, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator's line stood, but another one adopted what served before the alias moved."""
    monkeypatch.setattr(decisions, "RECONCILE_TIMEOUT_S", 0.0)
    for seed in range(3):
        publish(seed=seed)
    promote(store, "digits", 1)
    real, reached, go_on = Aliases.set_champion, threading.Event(), threading.Event()

    def slow(self: Aliases, name: str, **aliases: Any) -> None:
        if threading.current_thread().name.startswith("slow") and not reached.is_set():
            reached.set()
            assert go_on.wait(WAIT_TIMEOUT_S)
        real(self, name, **aliases)

    monkeypatch.setattr(Aliases, "set_champion", slow)
    options: dict[str, Any] = {"force": True, "reason": "a race"}
    with ThreadPoolExecutor(1, "slow") as pool:
        late = pool.submit(promote, ModelStore(registry_paths), "digits", 2, **options)
        assert reached.wait(WAIT_TIMEOUT_S)
        promote(store, "digits", 3, **options)
        go_on.set()
        with pytest.raises(PromotionConflict, match="another process adopted version 1"):
            late.result(30)
    moves = [
        (each.entry.action, each.entry.to_version) for each in store.audit_logs.read("digits").moves
    ]
    assert [version for _, version in moves] == [1, 2, 1, 3]
    aliases = store.aliases.read("digits")
    assert (aliases["champion"], aliases["previous"]) == (3, 1)


def test_a_line_that_was_written_twice_is_ones_own(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose answer was lost is tried again."""
    publish()
    real = AuditLogStore.append

    def twice(self: AuditLogStore, name: str, entry: Entry) -> None:
        real(self, name, entry)
        real(self, name, entry)

    monkeypatch.setattr(AuditLogStore, "append", twice)
    assert promote(store, "digits", 1).number == 1
    assert store.aliases.read("digits")["champion"] == 1
    assert [line.stands for line in store.audit_logs.read("digits").lines] == [True, False]


def test_a_champion_that_convoy_did_not_publish_can_be_left(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "RECONCILE_TIMEOUT_S", 0.0)
    publish()
    promote(store, "digits", 1)
    client = mlflow.MlflowClient()
    client.create_model_version("digits", "file:///nowhere")
    client.set_registered_model_alias("digits", "champion", "2")
    assert roll_back(store, "digits").entry.to_version == 1


def test_nothing_is_accepted_beside_a_champion_that_convoy_did_not_publish(
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(decisions, "RECONCILE_TIMEOUT_S", 0.0)
    publish(seed=0)
    promote(store, "digits", 1)
    publish(seed=1)
    mlflow.MlflowClient().delete_model_version_tag("digits", "1", model_names.DIGEST_TAG)
    why = r"cannot be compared: digits version 1 was not published by Convoy"
    with pytest.raises(PromotionRefused, match=why):
        promote(store, "digits", 2)
    known = GateRunner(store, registry_paths).known(*store.champion_and_candidate("digits", 2))
    assert known is not None
    assert not known.accepted
    assert command(["evaluate", "digits", "2", "--skip-latency"]) == 2
    assert "challenger 2, champion 1: REFUSED" in capsys.readouterr().out
    line = promote(store, "digits", 2, force=True, reason="its tag was lost")
    assert (line.entry.action, line.entry.from_version) == ("forced", 1)
    assert "was not published by Convoy" in str(line.entry.details)
    assert "is gone" not in str(line.entry.details)


def test_an_author_without_a_name_and_an_odd_reason_cause_no_traceback(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()

    def without_name() -> str:
        raise KeyError("getpwuid(): uid not found: 23456")

    monkeypatch.setattr("getpass.getuser", without_name)
    assert promote(store, "digits", 1).entry.by.startswith("uid ")
    with pytest.raises(UsageError, match="not UTF-8"):
        roll_back(store, "digits", "caf\udce9")


def test_a_canary_needs_a_champion_the_same_labels_and_a_share_or_a_shadow(
    store: ModelStore, publish: Publish
) -> None:
    publish(seed=0)
    with pytest.raises(PromotionRefused, match="no champion"):
        start_canary(store, "digits", Canary(version=1, share=0.1))
    promote(store, "digits", 1)
    publish(seed=1, change=lambda manifest: replace(manifest, labels=tuple("abcdefghij")))
    with pytest.raises(PromotionRefused, match="the labels differ"):
        start_canary(store, "digits", Canary(version=2, share=0.1))
    with pytest.raises(PromotionRefused, match="champion already"):
        start_canary(store, "digits", Canary(version=1, share=0.1))
    with pytest.raises(UsageError, match="a share of the requests, a shadow"):
        start_canary(store, "digits", Canary(version=2))
    with pytest.raises(VersionNotFound):
        start_canary(store, "digits", Canary(version=9, shadow=1.0))
    with pytest.raises(VersionNotFound, match="is a canary"):
        stop_canary(store, "digits")
    assert [line.entry.action for line in store.audit_logs.read("digits").lines] == ["promoted"]


def test_a_canary_is_a_move_that_callers_may_expect_and_a_promotion_stops_it(
    store: ModelStore, publish: Publish
) -> None:
    for seed in range(3):
        publish(seed=seed)
    promote(store, "digits", 1)
    canary = Canary(version=2, share=0.1, shadow=0.5)
    with pytest.raises(PromotionConflict):
        start_canary(store, "digits", canary, expect_champion=7)
    line = start_canary(store, "digits", canary, "to see", by="ann")
    assert (line.entry.by, line.entry.reason, line.entry.from_version) == ("ann", "to see", 1)
    assert store.aliases.read_with_canary("digits") == ({"champion": 1, "challenger": 3}, canary)
    with pytest.raises(PromotionConflict, match="the canary is version 2, not 3"):
        stop_canary(store, "digits", expect_challenger=3)
    stop_canary(store, "digits")
    assert store.aliases.read_with_canary("digits")[1] is None
    start_canary(store, "digits", canary)
    promote(store, "digits", 3, force=True, reason="test")
    assert store.aliases.read_with_canary("digits") == ({"champion": 3, "previous": 1}, None)
    assert store.audit_logs.read("digits").faults(store.audit_logs.newest_line("digits")) == []
    with pytest.raises(PromotionConflict):
        roll_back(store, "digits", expect_champion=1)
    roll_back(store, "digits", expect_champion=3, by="ann")
    assert store.aliases.read("digits")["champion"] == 1


def test_a_canary_of_a_deleted_version_can_be_stopped(store: ModelStore, publish: Publish) -> None:
    for seed in range(2):
        publish(seed=seed)
    promote(store, "digits", 1)
    start_canary(store, "digits", Canary(version=2, share=0.5))
    mlflow.MlflowClient().delete_model_version("digits", "2")
    assert stop_canary(store, "digits").entry.to_version == 2
    assert store.aliases.read_with_canary("digits")[1] is None


def test_a_version_is_challenger_though_another_made_the_alias_at_once(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = store._client.set_registered_model_alias, 0

    def lose_once(*arguments: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise IntegrityError("INSERT", None, Exception("UNIQUE constraint failed"))
        real(*arguments)

    monkeypatch.setattr(store._client, "set_registered_model_alias", lose_once)
    assert publish().aliases == ("challenger",)


def test_a_version_that_is_published_during_a_promotion_stays_the_challenger(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(seed=0)
    delete = store._client.delete_registered_model_alias

    def publish_before(name: str, alias: str) -> None:
        publish(seed=1)
        delete(name, alias)

    monkeypatch.setattr(store._client, "delete_registered_model_alias", publish_before)
    promote(store, "digits", 1)
    assert store.aliases.read("digits") == {"champion": 1, "challenger": 2}


def test_a_version_that_comes_as_the_alias_is_read_stays_the_challenger(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(seed=0)
    read = store.aliases.read

    def read_before(name: str) -> dict[str, int]:
        found = read(name)
        if found == {"champion": 1, "challenger": 1}:
            monkeypatch.setattr(store.aliases, "read", read)
            publish(seed=1)
        return found

    monkeypatch.setattr(store.aliases, "read", read_before)
    promote(store, "digits", 1)
    assert store.aliases.read("digits") == {"champion": 1, "challenger": 2}


def test_nothing_is_uploaded_under_a_name_that_has_a_log_and_no_version(
    store: ModelStore, publish: Publish, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_names, "CLAIM_TIMEOUT_S", 0.0)
    mlflow.MlflowClient().create_registered_model("digits.ledger")
    with pytest.raises(PromotionRefused, match=r"has the registered model digits\.ledger, but no"):
        publish()
    assert not list(registry_paths.artifacts.rglob(WEIGHTS))


def test_a_first_version_whose_calls_were_sent_twice_is_published(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client sends a request again when its answer was lost."""
    create = store._client.create_registered_model

    def twice(*arguments: Any) -> None:
        create(*arguments)
        create(*arguments)

    monkeypatch.setattr(store._client, "create_registered_model", twice)
    assert publish().version == 1
    assert sorted(store.aliases.read("digits")) == ["challenger"]


def test_models_of_others_are_not_convoys(store: ModelStore, publish: Publish) -> None:
    publish()
    mlflow.MlflowClient().create_registered_model("My Model v2.0")
    assert store.models() == ["digits"]


def test_a_canary_that_was_stopped_half_is_stopped_by_the_next_reader(
    store: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        publish(seed=seed)
    promote(store, "digits", 1)
    start_canary(store, "digits", Canary(version=2, share=0.5))

    def fail(*arguments: Any, **named: Any) -> None:
        raise RegistryUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(store.aliases, "set_champion", fail)
        with pytest.raises(RegistryUnavailable):
            stop_canary(store, "digits")
    assert store.aliases.read_with_canary("digits")[1] is not None
    with pytest.raises(VersionNotFound, match="is a canary"):
        stop_canary(store, "digits")
    assert store.aliases.read_with_canary("digits")[1] is None
    assert decisions.audit(store, "digits")[1] == []


def test_the_gate_runs_once_for_a_promotion_and_not_before_its_checks(
    store: ModelStore,
    publish: Publish,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result: list[int] = []
    gate_runner = GateRunner._compare_versions

    def counted(self: GateRunner, champion: Any, challenger: Any, policy: Any, folder: Any) -> Any:
        result.append(challenger.version)
        return gate_runner(self, champion, challenger, policy, folder)

    monkeypatch.setattr(GateRunner, "_compare_versions", counted)
    publish(seed=0)
    assert command(["promote", "digits", "1", "--skip-latency"]) == 0
    assert result == [1]
    publish(seed=1)
    assert command(["promote", "digits", "2", "--force"]) == 2
    assert command(["promote", "digits", "2", "--skip-latency", "--expect-champion", "7"]) == 2
    assert result == [1]
    assert "accepted" in capsys.readouterr().out
