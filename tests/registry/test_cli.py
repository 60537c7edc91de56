import json
from datetime import UTC, datetime

import mlflow
import pytest

from registry.cli.main import main
from registry.core.paths import Paths
from registry.delivery.deployment import read_deployment
from registry.model.refs import ModelRef
from registry.promotion.promotion import promote
from registry.store.mlflow_store import ModelStore
from tests.conftest import Publish


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_an_empty_registry_says_how_to_fill_it(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "list")
    assert (status, out) == (
        0,
        "there are no versions yet; publish one with convoy train or convoy import\n",
    )


def test_a_version_is_listed_shown_promoted_rolled_back_and_pulled(
    publish: Publish,
    better_and_worse_seed: tuple[int, int],
    registry_paths: Paths,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in better_and_worse_seed:
        publish(seed=seed)
    status, out, _ = run(capsys, "promote", "digits", "1")
    assert (status, out.splitlines()[-1]) == (0, "digits version 1 is the champion now (promoted)")
    forced = ("--skip-latency", "--force", "--reason", "drill")
    status, out, _ = run(capsys, "promote", "digits", "challenger", *forced)
    assert "challenger 2, champion 1: REFUSED" in out
    assert (status, out.splitlines()[-1]) == (0, "digits version 2 is the champion now (forced)")

    _, out, _ = run(capsys, "list")
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["digits", "2", "champion"],
        ["digits", "1", "previous"],
    ]
    _, out, _ = run(capsys, "list", "digits", "--json")
    assert [row["aliases"] for row in json.loads(out)] == [["champion"], ["previous"]]

    _, out, _ = run(capsys, "show", "digits")
    assert "digits version 2 (champion)" in out
    assert "drill" in out
    _, out, _ = run(capsys, "show", "digits", "1", "--json")
    shown = json.loads(out)
    assert shown["manifest"]["source"]["seed"] == better_and_worse_seed[0]
    assert [each["entry"]["action"] for each in shown["decisions"]] == ["promoted", "forced"]

    status, _, error = run(capsys, "promote", "digits", "1", "--expect-champion", "1")
    assert (status, "the champion is version 2, not 1" in error) == (2, True)
    status, out, _ = run(capsys, "roll-back", "digits", "--reason", "drill is over")
    assert (status, "version 1 is the champion again" in out) == (0, True)
    _, out, _ = run(capsys, "history", "digits")
    assert [line.split()[4] for line in out.splitlines()] == ["promoted", "forced", "rolled"]
    today = datetime.now(UTC).date().isoformat()
    _, out, _ = run(capsys, "history", "digits", "--at", today)
    assert out.startswith(f"digits on {today}: version 1, then 2, then 1\n")
    _, out, _ = run(capsys, "history", "digits", "--at", "2020-02-29T12:00", "--json")
    assert json.loads(out) == []
    status, _, error = run(capsys, "history", "digits", "--at", "last Tuesday")
    assert (status, "write 2026-11-17" in error) == (2, True)

    assert run(capsys, "audit")[:2] == (0, "digits: 3 lines, all in order\n")
    client = mlflow.MlflowClient()
    client.set_model_version_tag("digits.ledger", "2", "convoy.entry", "{}")
    client.set_registered_model_alias("digits", "champion", "2")
    status, out, _ = run(capsys, "audit", "digits")
    assert status == 1
    assert "line 2 cannot be read" in out
    assert "the alias champion is at version 2, the audit log says" in out
    client.set_registered_model_alias("digits", "champion", "1")

    assert run(capsys, "pull", "models:/digits@champion")[0] == 0
    deployment = read_deployment(registry_paths.models, ModelRef("digits", alias="champion"))
    assert deployment is not None
    assert deployment.versions[0].version == 1


def test_pull_without_a_reference_takes_it_from_the_setting(
    publish: Publish,
    store: ModelStore,
    registry_paths: Paths,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish()
    promote(store, "digits", 1)
    monkeypatch.setenv("CONVOY_MODEL", "models:/digits/1")
    assert run(capsys, "pull")[0] == 0
    assert read_deployment(registry_paths.models, ModelRef("digits", version=1)) is not None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("promote", "absent", "1"), "no model 'absent'"),
        (("show", "absent"), "no model 'absent'"),
        (("roll-back", "absent"), "no model 'absent'"),
        (("pull", "absent"), "models:/NAME@ALIAS"),
        (("pull", "models:/a@b", "--interval", "0"), "above 0 seconds"),
        (("promote", "bad name", "1"), "not a model name"),
    ],
)
def test_a_usage_error_is_printed_on_one_line(
    registry_paths: Paths,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert reason in err
    assert err.count("\n") == 1


def test_a_pull_that_fails_has_exit_status_2(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "pull", "models:/absent@champion")[0] == 2


def test_plan_prints_the_plans_of_a_version(
    publish: Publish,
    store: ModelStore,
    registry_paths: Paths,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First from the registry, then from the puller's folder."""
    publish()
    promote(store, "digits", 1)
    monkeypatch.setenv("CONVOY_PLAN", "torch-fp32")
    status, table, _ = run(capsys, "plan", "digits@champion", "--threads", "1")
    assert status == 0
    heading, names, row = table.splitlines()
    assert heading == "digits on cpu, 1 thread(s) a forward pass"
    assert names.split()[0] == "plan"
    assert (row.split()[0], row.split()[-1]) == ("torch-fp32", "chosen")

    assert run(capsys, "pull", "models:/digits@champion")[0] == 0
    monkeypatch.setattr("registry.cli.serving.open_store", None)  # the registry is not needed now
    _, out, _ = run(capsys, "plan", "digits/1", "--threads", "1", "--json")
    found = json.loads(out)
    assert found["chosen"] == "torch-fp32"
    assert set(found["results"][0]["batch_ms"]) == {"1", "8", "32"}


FORGED = "fine\n   2  2026-11-30  ann  promoted version 7\x1b[2J\x1b[31m\u202e"


def test_a_text_in_the_registry_cannot_forge_a_line_or_move_the_cursor(
    publish: Publish, store: ModelStore, registry_paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    publish()
    promote(store, "digits", 1, reason=FORGED, by=FORGED)
    mlflow.MlflowClient().set_model_version_tag("digits", "1", "convoy.recipe", FORGED)
    for command in (("history", "digits"), ("show", "digits", "1"), ("list",)):
        _, out, _ = run(capsys, *command)
        assert r"fine\x0a" in out, command
        assert not set("\x1b\u202e") & set(out), command
        assert not any(line.lstrip().startswith("2  2026") for line in out.splitlines()), command


def test_a_name_from_the_environment_is_marked_as_unverified(
    publish: Publish,
    store: ModelStore,
    registry_paths: Paths,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGNAME", "ann")  # every user can
    publish()
    assert run(capsys, "promote", "digits", "1", "--skip-latency")[0] == 0
    assert "  ann (unverified)  promoted" in run(capsys, "history", "digits")[1]
