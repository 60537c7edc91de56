"""Rows survive CSV, JSON lines and Parquet, and a tear of the file at any byte."""

import fcntl
import resource
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convoy.classify import answer_file
from convoy.classify.answer_file import AnswerFile, NotComparable
from convoy.classify.rows import (
    Csv,
    Format,
    JsonLines,
    Row,
    from_arrow,
    import_pyarrow,
    row_of,
    to_arrow,
)
from registry.core.errors import UsageError

TEXT = st.text(min_size=1, max_size=8)
SHARE = st.floats(0, 1)
ROWS = st.builds(
    Row,
    uri=TEXT,
    sha256=TEXT,
    model=st.text(max_size=4),
    version=st.none() | st.integers(1, 9),
    plan=st.just("torch-eager"),
    label=st.text(max_size=4),
    probability=st.none() | SHARE,
    top_k=st.lists(st.tuples(TEXT, SHARE), max_size=3).map(tuple),
    error=st.text(max_size=4),
)
FORMATS = pytest.mark.parametrize("form", [Csv(), JsonLines()], ids=["csv", "jsonl"])


@FORMATS
@given(rows=st.lists(ROWS, max_size=4))
@settings(deadline=None)
def test_rows_are_read_as_they_were_written(form: Format, rows: list[Row]) -> None:
    content = form.head.encode() + b"".join(map(form.encode, rows))
    found = list(form.records(BytesIO(content)))
    assert [row for _, row in found] == rows
    assert [end for end, _ in found][-1:] == [len(content)][: len(rows)]


@FORMATS
@given(rows=st.lists(ROWS, min_size=1, max_size=3), data=st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_torn_anywhere_keeps_its_complete_rows(
    form: Format, rows: list[Row], data: st.DataObject, tmp_path: Path
) -> None:
    parts = [form.head.encode(), *map(form.encode, rows)]
    content = b"".join(parts)
    torn = data.draw(st.integers(0, len(content)))
    path = tmp_path / ("answers.csv" if isinstance(form, Csv) else "answers.jsonl")
    path.write_bytes(content[:torn])
    complete = max(n for n in range(len(parts) + 1) if len(b"".join(parts[:n])) <= torn)
    with AnswerFile(path) as file:
        file.append(Row(uri="new", sha256="1"))
    whole = b"".join(parts[: max(1, complete)]) + form.encode(Row(uri="new", sha256="1"))
    assert path.read_bytes() == whole


def test_parquet_keeps_rows_and_has_a_list_for_the_classes() -> None:
    arrow = import_pyarrow()
    top_k = (("x", 0.5), ("y", 0.25))
    answered = {"plan": "p", "label": "x", "probability": 0.5, "top_k": top_k}
    rows = [
        Row(uri="a", sha256="1", model="m", version=2, **answered),  # type: ignore[arg-type]
        row_of("b", "", "it is\nbroken"),
    ]
    table = to_arrow(rows, arrow)
    assert str(table.schema.field("top_k").type).startswith("list<")
    assert table["error"].to_pylist() == [None, "it is\\x0abroken"]
    assert [from_arrow(record) for record in table.to_pylist()] == rows


def test_the_name_of_a_file_that_is_not_utf8_is_kept() -> None:
    row = Row(uri="a\udcff.png", sha256="1", label="ä")
    for form in (Csv(), JsonLines()):
        content = form.head.encode() + form.encode(row)
        assert [found for _, found in form.records(BytesIO(content))] == [row]
    table = to_arrow([row], import_pyarrow())
    assert table["uri"].to_pylist() == ["a\\udcff.png"]
    assert from_arrow(table.to_pylist()[0]) == row


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "name,label\na,b\n"),
        ("a.csv", "hello"),
        ("a.jsonl", '{"name": "a"}\n'),
        ("a.jsonl", "[1]\n"),
        ("a.jsonl", "hello\n"),
        ("a.jsonl", "hello"),
        ("a.csv", Csv.head + "a,b\n" + "c,d\n"),
        ("a.csv", Csv.head + "a,1,m,two,p,l,0.5,[],\n"),
        ("a.csv", Csv.head + 'a,1,m,2,p,l,0.5,"[1]",\n'),
        ("a.csv", Csv.head + 'a,"1"x,m,2,p,l,0.5,,\n' * 3),
        ("a.parquet", "hello"),
    ],
)
def test_a_file_of_another_program_is_refused_and_kept(
    name: str, content: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=r"cannot be continued.*--restart"), AnswerFile(path):
        pass
    assert path.read_text() == content
    assert [each.name for each in tmp_path.iterdir()] == [name]
    with AnswerFile(path, restart=True) as file:
        assert len(file.known) == 0


def test_one_process_at_a_time_writes_a_file(tmp_path: Path) -> None:
    with (
        AnswerFile(tmp_path / "a.csv"),
        pytest.raises(UsageError, match="another convoy classify"),
        AnswerFile(tmp_path / "a.csv"),
    ):
        pass


def test_no_process_comes_between_while_a_parquet_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    with AnswerFile(path) as file:
        file.append(row_of("one.png", "1", "bad"))
        file.finish()
    copy = answer_file._copy_parquet

    def interrupted(source: Path, target: Path) -> None:
        with pytest.raises(UsageError, match="another convoy classify"):
            AnswerFile(path).__enter__()
        copy(source, target)

    monkeypatch.setattr(answer_file, "_copy_parquet", interrupted)
    with AnswerFile(path) as file:
        with pytest.raises(UsageError, match="another convoy classify"):
            AnswerFile(path).__enter__()
        file.append(row_of("two.png", "2", "bad"))
        file.finish()
    assert pq.read_table(path)["uri"].to_pylist() == ["one.png", "two.png"]
    assert [each.name for each in tmp_path.iterdir()] == ["a.parquet"]


def test_a_file_that_is_replaced_before_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.touch()
    lock, replaced = fcntl.flock, list[Path]()

    def replace_first(file: Any, operation: int) -> None:
        if not replaced:
            replaced.append(path)
            path.unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", replace_first)
    with AnswerFile(path) as file:
        file.append(row_of("one.png", "1", "bad"))
    assert path.read_text().count("one.png") == 1


GOOD: dict[str, Any] = {"model": "m", "version": 2, "label": "x", "top_k": (("x", 1.0),)}


def answers_now(*versions: int) -> Callable[[str, int], int | None]:
    """The ``class_count`` of a source where these versions, of one class, answer."""
    return lambda model, version: 1 if version in versions else None


def test_the_last_row_of_a_picture_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with AnswerFile(path) as file:
        file.append(Row(uri="a", sha256="1", **GOOD))
        file.append(Row(uri="a", sha256="1", error="overloaded"))
        file.append(Row(uri="b", sha256="1", **GOOD))
        file.known.check_comparable("m", 1, answers_now(2))
        assert not file.known.is_answered("a", "1")
        file.append(Row(uri="a", sha256="1", **GOOD))
        for uri, sha256, answered in (("a", "1", True), ("a", "2", False), ("c", "1", False)):
            assert file.known.is_answered(uri, sha256) == answered
        file.finish()
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["uri", "b", "a"]


def test_only_answers_of_versions_that_answer_now_count(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.csv") as file:
        file.append(Row(uri="a", sha256="1", **GOOD))
        file.append(Row(uri="b", sha256="1", **{**GOOD, "version": 3}))
        file.known.check_comparable(None, 1, answers_now(3))
        assert not file.known.is_answered("a", "1")
        assert file.known.is_answered("b", "1")
        with pytest.raises(NotComparable, match="m version 2 or 3, which does not answer now"):
            file.known.check_comparable("m", 1, answers_now(4))


def test_another_number_of_classes_is_refused_unless_the_model_has_no_more(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.csv") as file:
        file.append(Row(uri="a", sha256="1", **GOOD))
        file.known.check_comparable("m", 5, answers_now(2))
        with pytest.raises(NotComparable, match=r"for --top-k 1, not 5; use --top-k 1, name"):
            file.known.check_comparable("m", 5, lambda model, version: 10)


def test_a_row_of_another_model_is_refused(tmp_path: Path) -> None:
    """The default model of a service changes when it starts again with other settings."""
    with AnswerFile(tmp_path / "a.csv") as file:
        file.append(Row(uri="a", sha256="1", **GOOD))
        with pytest.raises(NotComparable, match="has answers of m, not n; name another file"):
            file.append(Row(uri="b", sha256="1", **{**GOOD, "model": "n"}))
        file.append(Row(uri="b", sha256="1", error="overloaded"))
        assert len(file.known) == 2


def test_a_row_that_does_not_fit_the_disk_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerFile(path) as file:
        file.append(Row(uri="a", sha256="1"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(OSError, match="File too large"), AnswerFile(path) as file:
            file.append(Row(uri="b" * 1_000_000, sha256="1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with AnswerFile(path) as file:
        assert len(file.known) == 1
    assert path.read_bytes() == (Csv.head + "a,1,,,,,,,\n").encode()


def test_parquet_rows_that_do_not_fit_the_disk_do_not_make_the_file_unusable(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.parquet"
    with AnswerFile(path) as file:
        file.append(Row(uri="a" * 1_000_000, sha256="1"))
        file.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        with pytest.raises(OSError, match="File too large"), AnswerFile(path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each.name for each in tmp_path.iterdir()] == ["a.parquet"]
    with AnswerFile(path) as file:
        assert len(file.known) == 1


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with AnswerFile(path) as file:
        for number in range(100):
            file.append(Row(uri=str(number), sha256="1"))
        file.finish()
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be continued.*--restart"), AnswerFile(path):
        pass


def test_a_link_and_the_mode_of_a_file_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "a.csv", tmp_path / "link.csv"
    link.symlink_to(path)
    path.touch()
    path.chmod(0o640)
    with AnswerFile(link) as file:
        for sha256 in ("1", "2"):
            file.append(Row(uri="a", sha256=sha256))
        file.finish()
    assert link.is_symlink()
    assert path.read_text().splitlines()[1:] == ["a,2,,,,,,,"]
    assert path.stat().st_mode & 0o777 == 0o640
