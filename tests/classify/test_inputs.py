"""Which pictures a command line names."""

import csv
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.classify.inputs import Picture, list_pictures, read_picture
from registry.core.errors import UsageError
from registry.model.image.limits import MAX_FILE_BYTES


def uris(*arguments: str) -> list[str]:
    return [picture.uri for picture in list_pictures(arguments).pictures]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/.d.png", ".git/e.png", "notes.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "in"


def test_a_folder_is_listed_in_order_with_its_sub_folders(folder: Path) -> None:
    listing = list_pictures(["in"])
    assert [each.uri for each in listing.pictures] == ["in/a.png", "in/b.JPG", "in/sub/c.webp"]
    assert listing.skipped == {"hidden": 2, "not pictures by their names": 1}


def test_a_folder_that_links_reach_again_is_listed_once(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "twin").symlink_to(folder / "sub")
    (folder / "broken.png").symlink_to("nowhere")
    listing = list_pictures(["in"])
    assert "in/sub/c.webp" in uris("in")
    assert listing.skipped["folders that a link reaches again"] == 2
    broken = next(each for each in listing.pictures if each.uri == "in/broken.png")
    assert read_picture(broken).problem == "No such file or directory"


def test_a_pipe_in_a_folder_is_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    listing = list_pictures(["in"])
    assert "in/pipe.png" not in [each.uri for each in listing.pictures]
    assert listing.skipped["pipes, sockets or devices"] == 1


def test_a_pattern_is_expanded_and_one_without_a_match_is_refused(folder: Path) -> None:
    assert uris("in/*.png") == ["in/a.png"]
    assert uris("in/**/*.webp") == ["in/sub/c.webp"]
    (folder / "[x].png").write_bytes(b"x")
    assert uris("in/[x].png") == ["in/[x].png"]
    with pytest.raises(UsageError, match="finds no file"):
        uris("in/*.gif")


def test_a_picture_is_listed_once(folder: Path) -> None:
    listing = list_pictures(["in/a.png", "in", "in/*.png"])
    assert len(listing.pictures) == 3
    assert listing.skipped["named twice"] == 2


def test_a_csv_file_names_pictures_relative_to_itself(folder: Path) -> None:
    with (folder / "list.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["path", "label"], ["a.png", "x"], ["", "y"], ["sub/c.webp", "a,b"]])
        writer.writerow([(folder / "b.JPG").as_uri(), "z"])
        writer.writerow(["s3://bucket/d.png", "z"])
    listing = list_pictures(["in/list.csv"])
    assert listing.skipped == {"rows without a path": 1}
    first, second, third, fourth = listing.pictures
    assert first == Picture("a.png", "in/a.png")
    assert read_picture(second).content == b"sub/c.webp"
    assert read_picture(third).content == b"b.JPG"
    assert "only files can be read, and not s3://" in read_picture(fourth).problem


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_a_parquet_file_names_pictures_too(folder: Path, kind: pa.DataType) -> None:
    column = pa.array(["a.png", None, "b.JPG"], pa.string()).cast(kind)
    pq.write_table(pa.table({"image": column, "n": [1, 2, 3]}), folder / "list.parquet")
    assert uris("in/list.parquet") == ["a.png", "b.JPG"]


def test_the_column_uri_comes_first(folder: Path) -> None:
    (folder / "list.csv").write_text("image,uri,path\n1,a.png,3\n")
    assert uris("in/list.csv") == ["a.png"]


def test_a_table_that_cannot_be_used_is_refused(folder: Path) -> None:
    (folder / "none.csv").write_text("name,label\na,b\n")
    (folder / "empty.csv").touch()
    (folder / "text.parquet").write_text("not parquet")
    pq.write_table(pa.table({"image": [1, 2]}), folder / "numbers.parquet")
    for name, message in (
        ("none.csv", "its columns are: name, label"),
        ("empty.csv", "its columns are: none"),
        ("text.parquet", "cannot be read as a table"),
        ("numbers.parquet", "holds int64, and not paths"),
        ("missing.csv", "cannot be read as a table"),
    ):
        with pytest.raises(UsageError, match=message):
            list_pictures([f"in/{name}"])


def test_two_tables_may_not_give_one_name_to_two_files(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "list.csv").write_text("path\na.png\n")
        (folder / name / "a.png").write_bytes(name.encode())
    with pytest.raises(UsageError, match="names two files"):
        list_pictures(["in/one/list.csv", "in/two/list.csv"])


def test_a_table_may_name_anything(folder: Path) -> None:
    names = ["file://[x", "a\0b", "a\0b", "file:///dev/null"]
    pq.write_table(pa.table({"path": names}), folder / "odd.parquet")
    listed = list_pictures(["in/odd.parquet"])
    found = [read_picture(each) for each in listed.pictures]
    assert [each.uri for each in found] == ["file://[x", "a\0b", "file:///dev/null"]
    assert listed.skipped == {"named twice": 1}
    for each, problem in zip(found, ("not a file:// URI", "null byte", "a device"), strict=True):
        assert problem in each.problem


def test_a_file_that_cannot_be_read_says_why(folder: Path) -> None:
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    for path, problem in (
        ("in/empty.png", "the file is empty"),
        ("in/missing.png", "No such file or directory"),
        ("in", "Is a directory"),
        ("in/pipe.png", "it is a pipe, a socket or a device"),
        ("a\0b", "embedded null byte"),
    ):
        found = read_picture(Picture(path, path))
        assert (found.problem, found.content, found.sha256) == (problem, b"", "")


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    path = folder / "film.png"
    path.touch()
    os.truncate(path, MAX_FILE_BYTES + 1)
    tracemalloc.start()
    found = read_picture(Picture("film.png", str(path)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == ("film.png", "", b"", "the file has over 500,000,000 bytes")
    assert peak_bytes < 1_000_000
