"""``convoy classify --local``: a version of the registry answers as the service does."""

import json
from pathlib import Path

import pytest

from convoy.classify import local_source
from convoy.classify.inputs import ReadPicture
from convoy.classify.local_source import BATCH
from registry.core.paths import Paths
from registry.delivery.puller import Puller
from registry.model.plans.planner import Planner
from registry.model.refs import ModelRef
from registry.store.mlflow_store import ModelStore
from tests.classify.conftest import Run
from tests.classify.test_bulk import read
from tests.conftest import Publish


@pytest.fixture(autouse=True)
def plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarking all plans takes a minute."""
    monkeypatch.setenv("CONVOY_PLAN", "torch-eager")
    monkeypatch.setenv("CONVOY_DEVICE", "cpu")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_local_rows_are_those_of_the_service(
    suffix: str, publish: Publish, url: str, pictures: Path, run: Run
) -> None:
    publish(seed=0)
    (pictures / "bad.png").write_text("no picture")
    here, there = f"local.{suffix}", f"http.{suffix}"
    assert run(pictures, "--output", there, "--url", url)[0] == 1
    assert run(pictures, "--output", here, "--local", "models:/digits@challenger")[0] == 1
    for local, remote in zip(read(here), read(there), strict=True):
        numbers = [row.pop("probability") for row in (local, remote)]
        tops = [row.pop("top_k") or [] for row in (local, remote)]
        assert local == remote
        assert numbers[0] == pytest.approx(numbers[1])
        assert [label for label, _ in tops[0]] == [label for label, _ in tops[1]]
        assert [p for _, p in tops[0]] == pytest.approx([p for _, p in tops[1]])


def test_a_number_names_a_version_and_the_terminal_shows_it(
    publish: Publish, pictures: Path, run: Run
) -> None:
    publish(seed=0)
    status, out, _ = run(pictures / "0.png", "--local", "models:/digits/1", "--top-k", 2)
    assert status == 0
    assert out.startswith("pictures/0.png  (digits version 1, ")
    assert len(out.splitlines()) == 3
    status, out, _ = run(pictures / "0.png", "--local", "models:/digits@challenger", "--json")
    assert json.loads(out)["model"] == {"name": "digits", "version": 1, "alias": "challenger"}


def test_many_pictures_are_classified_in_batches_and_in_order(
    publish: Publish, pictures: Path, run: Run
) -> None:
    publish(seed=0)
    content = (pictures / "0.png").read_bytes()
    for number in range(2 * BATCH + 3):
        is_bad = number in (0, BATCH, 2 * BATCH + 2)
        (pictures / f"x{number:03}.png").write_bytes(b"bad" if is_bad else content)
    status, _, _ = run("pictures/x*.png", "--output", "a.csv", "--local", "models:/digits/1")
    rows = read("a.csv")
    assert status == 1
    assert [row["uri"] for row in rows] == sorted(row["uri"] for row in rows)
    failed = [number for number, row in enumerate(rows) if row["error"]]
    assert failed == [0, BATCH, 2 * BATCH + 2]
    status, out, _ = run("pictures/x*.png", "--output", "a.csv", "--local", "models:/digits/1")
    assert status == 1
    assert f"{2 * BATCH} answered before, 3 failed" in out


def test_large_files_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_source, "BATCH_BYTES", 100)
    sizes = [*[1] * (BATCH + 1), 99, 1, 300, 40, 59, 60, 0]
    pictures = [ReadPicture(str(n), "", b"x" * size, "") for n, size in enumerate(sizes)]
    found = list(local_source.batches(iter(pictures)))
    assert [[len(each.content) for each in batch] for batch in found] == [
        [1] * BATCH,
        [1, 99],
        [1, 300],
        [40, 59, 60],
        [0],
    ]
    assert [each for batch in found for each in batch] == pictures


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_local_answers_of_another_version_or_top_k_are_not_mixed(
    suffix: str, publish: Publish, pictures: Path, run: Run
) -> None:
    publish(seed=0)
    publish(seed=1)
    words = (pictures, "--output", f"a.{suffix}", "--local")
    assert run(*words, "models:/digits/1")[0] == 0
    before = Path(f"a.{suffix}").read_bytes()
    for more, message in (
        (("models:/digits/2",), "answers of digits version 1, which does not answer now"),
        (("models:/digits/1", "--top-k", 2), "answers for --top-k 5, not 2"),
    ):
        status, _, err = run(*words, *more)
        assert status == 2
        assert message in err
    assert Path(f"a.{suffix}").read_bytes() == before
    assert [each.name for each in Path().glob("a.*")] == [f"a.{suffix}"]
    assert "7 answered before" in run(*words, "models:/digits/1")[1]


def test_a_version_that_was_pulled_is_not_downloaded_again(
    store: ModelStore,
    publish: Publish,
    paths: Paths,
    pictures: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(seed=0)
    Puller(lambda: store, paths, (ModelRef("digits", 1),)).pull_all()
    monkeypatch.delattr(ModelStore, "download")
    assert run(pictures / "0.png", "--local", "models:/digits/1")[0] == 0


def test_an_unknown_version_is_an_error_of_one_line(
    publish: Publish, pictures: Path, run: Run
) -> None:
    publish(seed=0)
    for ref, message in (("digits@champion", "no alias 'champion'"), ("cats/1", "cats")):
        status, _, err = run(pictures, "--output", "a.csv", "--local", f"models:/{ref}")
        assert status == 2
        assert message in err
    assert not Path("a.csv").exists()


def test_a_version_without_a_signature_is_refused_where_one_is_required(
    publish: Publish,
    pictures: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from registry.delivery.signing import make_key

    publish(seed=0)
    keys = tmp_path / "keys.txt"
    keys.write_text(make_key(tmp_path / "key"))
    monkeypatch.setenv("CONVOY_TRUSTED_KEYS", str(keys))
    status, _, err = run(pictures, "--local", "models:/digits/1")
    assert status == 2
    assert "is not signed" in err


def test_the_plan_is_chosen_once_if_none_is_remembered(
    publish: Publish, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.core.errors import PlanUndecided

    publish(seed=0)
    true = Planner.load
    chosen: list[object] = []

    def load(planner: Planner, *arguments: object) -> object:
        if not chosen:
            raise PlanUndecided("no plan was chosen yet")
        return true(planner, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Planner, "load", load)
    monkeypatch.setattr(Planner, "choose", lambda planner, bundle: chosen.append(bundle))
    assert run(pictures / "0.png", "--local", "models:/digits/1")[0] == 0
    assert len(chosen) == 1
