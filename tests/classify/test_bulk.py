"""``convoy classify --output``: rows, resuming after a kill, and refusals."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import convoy_client
from convoy.classify import bulk
from convoy.classify.rows import COLUMNS, row_of
from convoy_client import client as sync_client
from convoy_client.images import encoded
from registry.model.bundle import Bundle
from service.loading.model_slot import ModelSlot
from tests.classify.conftest import Run, other_picture

SUFFIXES = pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])


def read(path: Path | str) -> list[dict[str, Any]]:
    """The rows of an answer file, in one form for all formats."""
    path = Path(path)
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row["top_k"] = [[each["label"], each["probability"]] for each in row["top_k"] or ()]
        return [{name: row[name] or None for name in COLUMNS} for row in rows]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {
                "version": int(row["version"]) if row["version"] else None,
                "probability": float(row["probability"]) if row["probability"] else None,
                "top_k": json.loads(row["top_k"]) if row["top_k"] else None,
            }
            rows.append({name: numbers.get(name, row[name] or None) for name in COLUMNS})
    return rows


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing handles it."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pictures that are sent, in the order in which they are encoded."""
    found: list[bytes] = []

    def counted(image: Any) -> bytes:
        found.append(image)
        return encoded(image)

    monkeypatch.setattr(sync_client, "encoded", counted)
    return found


@SUFFIXES
def test_each_picture_has_one_row(suffix: str, url: str, pictures: Path, run: Run) -> None:
    (pictures / "bad.png").write_text("no picture")
    (pictures / "empty.png").touch()
    output = f"answers.{suffix}"
    status, out, err = run(pictures, "--output", output, "--url", url, "--top-k", 3)
    rows = {row["uri"]: row for row in read(output)}
    assert status == 1
    assert "9 pictures: 7 answered, 2 failed (column error) by digits version 1" in out
    assert "skipped: 1 hidden, 1 not pictures by their names" in err
    assert len(rows) == 9
    good = rows["pictures/0.png"]
    assert (good["model"], good["version"], good["plan"]) == ("digits", 1, "torch-eager")
    assert len(good["sha256"]) == 64
    assert [good["label"], good["probability"]] == good["top_k"][0]
    assert len(good["top_k"]) == 3
    assert good["error"] is None
    bad, empty = rows["pictures/bad.png"], rows["pictures/empty.png"]
    assert "not a JPEG, PNG" in bad["error"]
    assert bad["version"] is bad["label"] is bad["probability"] is None
    assert empty["error"] == "the file is empty"
    assert not list(Path().glob(".*")) and not list(Path().glob("*.partial*"))  # noqa: PT018


@SUFFIXES
def test_a_run_that_was_killed_goes_on_where_it_ended(
    suffix: str,
    url: str,
    pictures: Path,
    run: Run,
    sent: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = f"answers.{suffix}"
    left = iter(range(3))

    def dying(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return row_of(*arguments)

    words = (pictures, "--output", output, "--url", url, "--concurrency", 1)
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "row_of", dying)
        with pytest.raises(Killed):
            run(*words)
    partial = Path(f"{output}.partial.jsonl" if suffix == "parquet" else output)
    with partial.open("ab") as file:
        file.write(b'{"uri": "pictures/3.png", "sha' if suffix != "csv" else b'pictures/3.png,"ab')
    sent.clear()
    status, out, _ = run(*words)
    assert status == 0
    assert "7 pictures: 4 answered, 3 answered before" in out
    assert len(sent) == 4
    assert sorted(row["uri"] for row in read(output)) == sorted(
        map(str, pictures.rglob("[0-9].png"))
    )
    assert not Path(f"{output}.partial.jsonl").exists()
    content = Path(output).read_bytes()
    assert run(*words)[0] == 0
    assert len(sent) == 4
    if suffix != "parquet":
        assert Path(output).read_bytes() == content


@SUFFIXES
def test_errors_and_changed_pictures_are_classified_again(
    suffix: str, url: str, pictures: Path, run: Run, sent: list[bytes]
) -> None:
    (pictures / "bad.png").write_text("no picture")
    words = (pictures, "--output", f"answers.{suffix}", "--url", url)
    assert run(*words)[0] == 1
    before = {row["uri"]: row for row in read(f"answers.{suffix}")}
    (pictures / "bad.png").write_bytes(other_picture())
    (pictures / "2.png").write_bytes(other_picture())
    sent.clear()
    status, out, _ = run(*words)
    rows = {row["uri"]: row for row in read(f"answers.{suffix}")}
    assert status == 0
    assert "8 pictures: 2 answered, 6 answered before" in out
    assert sent == [other_picture()] * 2
    assert len(read(f"answers.{suffix}")) == 8
    assert rows["pictures/2.png"]["sha256"] == rows["pictures/bad.png"]["sha256"]
    assert before["pictures/2.png"]["sha256"] != rows["pictures/2.png"]["sha256"]
    assert before["pictures/1.png"] == rows["pictures/1.png"]


@SUFFIXES
def test_a_picture_whose_name_is_not_utf8_has_one_row_after_two_runs(
    suffix: str, url: str, pictures: Path, run: Run
) -> None:
    for name in (b"\xff.png", b"\xfe.png"):
        (pictures / os.fsdecode(name)).write_bytes(other_picture())
    words = (pictures, "--output", f"a.{suffix}", "--url", url)
    assert run(*words)[0] == 0
    assert "9 answered before" in run(*words)[1]
    if suffix == "parquet":
        assert len({row["uri"] for row in read("a.parquet")}) == len(read("a.parquet")) == 9


def test_ctrl_c_keeps_the_rows_and_says_how_to_go_on(
    url: str, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(2))

    def dying(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return row_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "row_of", dying)
        status, out, err = run(pictures, "--output", "answers.csv", "--url", url)
    assert status == 130
    assert "2 answered" in out
    assert "interrupted; the rows of answers.csv are kept: run the same command again" in err
    assert len(read("answers.csv")) == 2


def test_a_promotion_during_the_run_is_visible_in_the_rows(
    url: str,
    pictures: Path,
    run: Run,
    slot: ModelSlot,
    deploy: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = iter(range(100))

    def dying(*arguments: Any) -> Any:
        if next(count) == 2:
            deploy(2, seed=1)
            assert slot.refresh()
        return row_of(*arguments)

    words = (pictures, "--output", "answers.csv", "--url", url, "--concurrency", 1)
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "row_of", dying)
        status, out, _ = run(*words)
    versions = [row["version"] for row in read("answers.csv")]
    assert status == 0
    assert "by digits version 1, digits version 2" in out
    assert versions == [1] * 3 + [2] * 4
    # The next run completes the answers of the version that serves now.
    assert "7 pictures: 3 answered, 4 answered before" in run(*words)[1]
    assert {row["version"] for row in read("answers.csv")} == {2}


@SUFFIXES
def test_answers_of_other_versions_are_not_mixed_with_new_ones(
    suffix: str,
    url: str,
    pictures: Path,
    run: Run,
    slot: ModelSlot,
    deploy: Callable[..., Bundle],
) -> None:
    output = f"answers.{suffix}"
    words = (pictures, "--output", output, "--url", url)
    assert run(*words)[0] == 0
    before = Path(output).read_bytes()
    deploy(2, seed=1)
    assert slot.refresh()
    status, _, err = run(*words)
    assert status == 2
    assert f"{output} has answers of digits version 1, which does not answer now" in err
    assert Path(output).read_bytes() == before
    assert [each.name for each in Path().glob("answers*")] == [output]
    assert run(*words, "--restart")[0] == 0
    assert {row["version"] for row in read(output)} == {2}


@SUFFIXES
def test_answers_for_another_top_k_are_not_mixed_with_new_ones(
    suffix: str, url: str, pictures: Path, run: Run, sent: list[bytes]
) -> None:
    output = f"answers.{suffix}"
    words = (pictures, "--output", output, "--url", url)
    assert run(*words, "--top-k", 3)[0] == 0
    before = Path(output).read_bytes()
    (pictures / "new.png").write_bytes(other_picture())
    sent.clear()
    for top_k in (1, 5):
        status, _, err = run(*words, "--top-k", top_k)
        assert status == 2
        assert f"{output} has answers for --top-k 3, not {top_k}; use --top-k 3, name" in err
        assert "--restart" in err
        assert "run the same command again" not in err
    assert (sent, Path(output).read_bytes()) == ([], before)
    assert [each.name for each in Path().glob("answers*")] == [output]
    assert run(*words, "--top-k", 5, "--restart")[0] == 0
    assert {len(row["top_k"]) for row in read(output)} == {5}


@SUFFIXES
def test_a_killed_run_is_not_continued_with_another_top_k(
    suffix: str, url: str, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(3))

    def dying(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return row_of(*arguments)

    output = f"answers.{suffix}"
    words = (pictures, "--output", output, "--url", url)
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "row_of", dying)
        with pytest.raises(Killed):
            run(*words)
    status, _, err = run(*words, "--top-k", 4)
    assert status == 2
    assert "answers for --top-k 5, not 4" in err
    assert "7 pictures: 4 answered, 3 answered before" in run(*words)[1]


def test_a_top_k_beyond_the_classes_of_the_model_is_all_of_them(
    url: str, pictures: Path, run: Run
) -> None:
    words = (pictures, "--output", "a.csv", "--url", url)
    assert run(*words, "--top-k", 10)[0] == 0
    assert "7 answered before" in run(*words, "--top-k", 50)[1]


def test_a_token_that_may_only_classify_does_not_mix_answers_either(
    secured_url: str,
    pictures: Path,
    run: Run,
    slot: ModelSlot,
    deploy: Callable[..., Bundle],
) -> None:
    words = (pictures, "--output", "a.csv", "--url", secured_url)
    assert run(*words)[0] == 0
    assert "answers for --top-k 5, not 7" in run(*words, "--top-k", 7)[2]
    deploy(2, seed=1)
    assert slot.refresh()
    status, _, err = run(*words)
    assert status == 2
    assert "answers of digits version 1, which does not answer now" in err


def test_answers_of_another_model_are_refused(url: str, pictures: Path, run: Run) -> None:
    assert run(pictures, "--output", "a.jsonl", "--url", url)[0] == 0
    path = Path("a.jsonl")
    path.write_text(path.read_text().replace('"digits"', '"fashion"'))
    status, _, err = run(pictures, "--output", "a.jsonl", "--url", url)
    assert status == 2
    assert "has answers of fashion, not digits" in err


def test_a_canary_counts_as_a_version_that_serves(
    url: str,
    pictures: Path,
    run: Run,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
) -> None:
    deploy_canary(share=0.5)
    assert slot.refresh()
    words = (pictures, "--output", "a.csv", "--url", url)
    assert run(*words)[0] == 0
    assert "7 answered before" in run(*words)[1]


def test_nothing_is_written_if_the_service_cannot_answer(
    url: str, pictures: Path, run: Run
) -> None:
    status, _, err = run(pictures, "--output", "a.csv", "--url", "http://127.0.0.1:9")
    assert status == 2
    assert "no answer from http://127.0.0.1:9" in err
    status, _, err = run(pictures, "--output", "a.csv", "--url", url, "--model", "cats")
    assert status == 2
    assert "no model 'cats'" in err
    assert not Path("a.csv").exists()


def test_a_service_that_answers_for_another_model_ends_the_run(
    url: str, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = convoy_client.Client.classify_many

    def classify_many(client: convoy_client.Client, images: Any, **options: Any) -> Any:
        for result in true(client, images, **options):
            assert isinstance(result, convoy_client.Classification)
            yield replace(result, model="cats")

    monkeypatch.setattr(convoy_client.Client, "classify_many", classify_many)
    status, _, err = run(pictures, "--output", "a.csv", "--url", url)
    assert status == 2
    assert "answered for the model 'cats', not 'digits'" in err
    assert read("a.csv") == []


def test_a_service_that_ends_during_the_run_ends_the_run(
    url: str, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, count = convoy_client.Client.classify_many, iter(range(100))

    def classify_many(client: convoy_client.Client, images: Any, **options: Any) -> Any:
        for result in true(client, images, **options):
            if next(count) == 3:
                monkeypatch.setattr(convoy_client.Client, "ready", lambda client: False)
                yield convoy_client.Failure(convoy_client.ServiceUnreachable("no answer"))
            yield result

    monkeypatch.setattr(convoy_client.Client, "classify_many", classify_many)
    status, _, err = run(pictures, "--output", "a.csv", "--url", url)
    assert status == 2
    assert "error: no answer; the rows of a.csv are kept" in err
    assert len(read("a.csv")) == 3


def test_a_picture_that_breaks_its_connection_is_a_row(
    url: str, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = convoy_client.Client.classify_many

    def classify_many(client: convoy_client.Client, images: Any, **options: Any) -> Any:
        results = true(client, images, **options)
        next(results)
        yield convoy_client.Failure(convoy_client.ServiceUnreachable("broken pipe"))
        yield from results

    monkeypatch.setattr(convoy_client.Client, "classify_many", classify_many)
    assert run(pictures, "--output", "a.csv", "--url", url)[0] == 1
    assert [row["error"] for row in read("a.csv")] == ["broken pipe"] + [None] * 6


def test_a_disk_that_is_full_ends_the_run(
    url: str, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convoy.classify.answer_file.AnswerFile.append", full)
    status, _, err = run(pictures, "--output", "a.csv", "--url", url)
    assert status == 2
    assert "a.csv cannot be written: No space left on device" in err


@SUFFIXES
def test_a_table_names_the_pictures(suffix: str, url: str, pictures: Path, run: Run) -> None:
    Path("pictures/list.csv").write_text("label,path\nx,0.png\ny,more/5.png\nz,missing.png\n")
    output = f"answers.{suffix}"
    status, _, _ = run("pictures/list.csv", "--output", output, "--url", url)
    assert status == 1
    assert [row["uri"] for row in read(output)] == ["0.png", "more/5.png", "missing.png"]
    assert read(output)[2]["error"] == "No such file or directory"
    assert run(output, "--output", "again.csv", "--url", url)[0] == 1  # an answer file is a table
    if suffix == "csv":
        status, _, err = run(output, "--output", output, "--url", url)
        assert status == 2
        assert "both an input and the output" in err


def test_one_picture_is_a_picture(url: str, picture: str, run: Run, tmp_path: Path) -> None:
    _, out, _ = run(picture, "--output", tmp_path / "a.csv", "--url", url)
    assert out.startswith("1 picture: 1 answered by digits version 1; see ")


def test_with_json_the_summary_is_json(url: str, pictures: Path, run: Run) -> None:
    status, out, _ = run(pictures, "--output", "a.csv", "--url", url, "--json")
    assert status == 0
    assert json.loads(out) == {
        "pictures": 7,
        "answered": 7,
        "answered_before": 0,
        "failed": 0,
        "versions": {"digits version 1": 7},
        "interrupted": False,
        "output": "a.csv",
    }


def test_a_token_that_may_only_classify_is_enough_and_reads_the_plan(
    secured_url: str, pictures: Path, run: Run
) -> None:
    words = (pictures, "--output", "a.csv", "--url", secured_url)
    assert run(*words)[0] == 0
    assert {row["plan"] for row in read("a.csv")} == {"torch-eager"}
    assert "7 answered before" in run(*words)[1]


def test_the_plan_is_empty_if_its_version_no_longer_serves(
    url: str,
    pictures: Path,
    run: Run,
    slot: ModelSlot,
    deploy: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = convoy_client.Client.metadata

    def metadata(client: convoy_client.Client, *names: Any, **options: Any) -> Any:
        if options["version"] == 1:
            deploy(2, seed=1)
            assert slot.refresh()
        return true(client, *names, **options)

    monkeypatch.setattr(convoy_client.Client, "metadata", metadata)
    assert run(pictures, "--output", "a.csv", "--url", url, "--concurrency", 1)[0] == 0
    assert [(row["version"], row["plan"]) for row in read("a.csv")] == [
        (1, None),
        *[(2, "torch-eager")] * 6,
    ]


def test_a_service_that_ends_before_it_says_the_plan_ends_the_run(
    url: str, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metadata(*arguments: Any, **options: Any) -> Any:
        raise convoy_client.ServiceUnreachable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(convoy_client.Client, "metadata", metadata)
        status, _, err = run(pictures, "--output", "a.csv", "--url", url)
    assert status == 2
    assert "error: no answer; the rows of a.csv are kept" in err
    assert run(pictures, "--output", "a.csv", "--url", url)[0] == 0
    assert {row["plan"] for row in read("a.csv")} == {"torch-eager"}


def test_parquet_without_pyarrow_is_refused_before_any_work(
    pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = run(pictures, "--output", "a.parquet")
    assert status == 2
    assert "install it, or use CSV" in err


def test_without_the_client_the_error_says_what_to_install(picture: str) -> None:
    script = (
        "import sys; sys.modules['convoy_client'] = None; from convoy.__main__ import main;"
        f"sys.exit(main(['classify', {picture!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "needs the package convoy_client" in done.stderr
