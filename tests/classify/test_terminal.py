"""``convoy classify`` without a file: what it prints, and its exit status."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.classify.conftest import Run
from tests.conftest import Publish


def test_files_are_shown_as_a_table(url: str, picture: str, run: Run, tmp_path: Path) -> None:
    second = tmp_path / "second.png"
    second.write_bytes(Path(picture).read_bytes())
    status, out, _ = run(picture, second, "--url", url, "--top-k", "3")
    lines = out.splitlines()
    assert status == 0
    assert len(lines) == 8
    assert lines[0].startswith(f"{picture}  (digits version 1, ")
    assert lines[0].endswith(" ms)")
    assert lines[1].split()[0].endswith("%")
    assert lines[4].startswith(str(second))


def test_with_json_each_file_is_one_json_line(url: str, picture: str, run: Run) -> None:
    status, out, _ = run(picture, "--url", url, "--model", "digits", "--json")
    assert status == 0
    answer = json.loads(out)
    assert answer["file"] == picture
    assert answer["model"] == {"name": "digits", "version": 1, "alias": "champion"}
    assert len(answer["predictions"]) == 5
    assert set(answer["predictions"][0]) == {"label", "index", "probability"}
    assert answer["timings_ms"]["total"] > 0
    assert answer["request_id"]


def test_a_folder_is_shown_without_its_other_files(url: str, pictures: Path, run: Run) -> None:
    status, out, err = run(pictures, "--url", url, "--top-k", "1")
    names = [line.split()[0] for line in out.splitlines()[::2]]
    assert status == 0
    assert names == [f"pictures/{n}.png" for n in range(5)] + [
        f"pictures/more/{n}.png" for n in (5, 6)
    ]
    assert "skipped: 1 hidden, 1 not pictures by their names" in err


def test_a_folder_without_pictures_is_not_an_error_and_says_so(
    url: str, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "empty").mkdir()
    status, out, err = run(tmp_path / "empty", "--url", url)
    assert (status, out, err) == (0, "", "there is no picture to classify\n")
    status, out, err = run(tmp_path / "empty", "--url", url, "--output", tmp_path / "a.csv")
    assert (status, err) == (0, "there is no picture to classify\n")
    assert out.startswith("0 pictures: 0 answered")


@pytest.mark.parametrize("path", ["", "/", "/convoy", "/convoy/"])
def test_a_proxy_may_serve_the_service_below_a_path(path: str, picture: str, run: Run) -> None:
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer, peer.makefile("rb") as request:
                asked.append(request.readline().split()[1].decode())
                while request.readline() not in (b"\r\n", b""):
                    pass
                peer.sendall(b"HTTP/1.1 404 no\r\nContent-Length: 2\r\n\r\n{}")
                request.read()

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}{path}"
        status, _, err = run(picture, "--url", url)
        thread.join()
    assert status == 2
    assert "answered with status 404" in err
    assert asked == [f"{path.rstrip('/')}/v1/classify?top_k=5"]


@pytest.mark.parametrize(
    ("host", "address"),
    [("::", "http://[::1]:8080"), ("0.0.0.0", "http://127.0.0.1:8080"), ("", "http://127.0.0.1:")],
)
def test_the_default_address_is_that_of_this_machines_service(
    host: str,
    address: str,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONVOY_HOST", host)
    with pytest.raises(SystemExit):
        run("--help")
    assert address in "".join(capsys.readouterr().out.split())


def test_a_file_that_could_not_be_classified_is_named_and_the_status_is_1(
    url: str, picture: str, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "text.png").write_text("no image")
    files = [tmp_path / "text.png", tmp_path / "missing.png", picture]
    status, out, err = run(*files, "--url", url)
    assert status == 1
    assert "not a JPEG, PNG" in err
    assert "missing.png: No such file" in err
    assert "digits version 1" in out
    status, out, _ = run(files[0], "--url", url, "--json")
    assert status == 1
    assert "not a JPEG, PNG" in json.loads(out)["error"]


def test_an_error_that_holds_for_all_pictures_is_printed_once(
    url: str, pictures: Path, run: Run
) -> None:
    for json_too in ((), ("--json",)):
        status, out, err = run(pictures, "--url", url, "--model", "unknown", *json_too)
        assert (status, out) == (2, "")
        assert err.count("no model 'unknown'") == 1


def test_a_missing_token_is_an_error_that_says_where_it_belongs(
    secured_url: str, pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONVOY_TOKEN")
    for more in ((), ("--output", "a.csv")):
        status, out, err = run(pictures, "--url", secured_url, *more)
        assert (status, out) == (2, "")
        assert err.splitlines()[-1].startswith("error: no known token was sent")
        assert err.endswith("this command sends the token in CONVOY_TOKEN\n")


def test_a_service_that_does_not_answer_is_an_error_of_one_line(picture: str, run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        status, _, err = run(picture, "--url", address)
    assert status == 2
    assert err.startswith(f"error: no answer from {address}")
    assert err.count("\n") == 1
    for wrong in ("localhost:80", "http://localhost:abc", "ftp://localhost"):
        status, _, err = run(picture, "--url", wrong)
        assert status == 2
        assert "http://HOST:PORT" in err


def test_a_port_that_does_not_speak_http_is_an_error_of_one_line(picture: str, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):  # the socket was closed
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(b"220 mail.example ESMTP\r\n")

        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        status, _, err = run(picture, "--url", address)
    assert status == 2
    assert err.startswith((f"error: {address}", f"error: no answer from {address}"))


def test_options_that_cannot_be_used_are_refused(picture: str, run: Run, tmp_path: Path) -> None:
    for words, message in (
        (("--top-k", 0), "--top-k is 0"),
        (("--concurrency", 0), "--concurrency is 0"),
        (("--restart",), "--restart needs --output"),
        (("--local", "digits"), "write models:/NAME@ALIAS"),
        (("--output", tmp_path / "a.txt"), "must end with .csv, .jsonl, .parquet"),
        (("--output", tmp_path / "no" / "a.csv"), "does not exist; make it first"),
        (("--output", tmp_path / "folder.csv"), "not a file that can be written"),
    ):
        (tmp_path / "folder.csv").mkdir(exist_ok=True)
        status, _, err = run(picture, *words)
        assert (status, message in err) == (2, True), err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    picture: str, run: Run, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    status, _, err = run(picture, "--output", tmp_path / "a.csv")
    tmp_path.chmod(0o700)
    assert status == 2
    assert "cannot be written" in err


def test_the_token_comes_from_the_environment(
    url: str, picture: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_TOKEN", "a\nb")
    status, _, err = run(picture, "--url", url)
    assert status == 2
    assert "the token must be printable ASCII" in err


def test_the_documented_commands_run(
    url: str, pictures: Path, run: Run, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block of docs/api.md, with the test's model instead of ``fashion``."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    block = re.search(r"## From the command line\n\n```\n(.*?)```", page, re.DOTALL)
    assert block is not None
    publish(seed=0)
    monkeypatch.setenv("CONVOY_PLAN", "torch-eager")
    (pictures / "0.png").rename("picture.png")
    Path("list.csv").write_text("path\npicture.png\n")
    commands = (
        block[1].replace("fashion@champion", "digits@challenger").replace("fashion", "digits")
    )
    for command in commands.splitlines():
        words = shlex.split(command)[2:]
        assert run(*words, *(() if "--local" in words else ("--url", url)))[0] == 0, command


def test_a_reader_that_ends_early_is_not_an_error_with_a_traceback(
    url: str, pictures: Path
) -> None:
    command = f"{sys.executable} -m convoy classify pictures pictures --url {url} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "pictures/0.png" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def shell(url: str, words: str, streams: str, **environment: str) -> tuple[int, str, str]:
    """Status, output and errors of ``convoy classify WORDS`` with the shell's ``streams``."""
    command = f"{sys.executable} -m convoy classify {words} --url {url} {streams}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", ["", "--json", "--output a.csv"])
def test_an_output_that_cannot_be_written_is_an_error_of_one_line(
    url: str, pictures: Path, words: str
) -> None:
    status, _, err = shell(url, f"pictures/0.png {words}", "> /dev/full")
    assert status == 2
    assert err == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("streams", ["2> /dev/full", "2>&-", ">&- 2>&-"])
def test_a_run_does_not_need_a_place_for_its_messages(
    url: str, pictures: Path, streams: str
) -> None:
    (pictures / "bad.png").write_text("no picture")
    status, out, err = shell(url, "pictures --output a.csv", streams)
    assert (status, err) == (1, "")
    assert "skipped" not in out
    assert len(Path("a.csv").read_text().splitlines()) == 9
    assert shell(url, "pictures", streams)[0] == 1


def test_a_terminal_that_is_not_utf8_gets_other_characters(url: str, pictures: Path) -> None:
    (pictures / "0.png").rename("pictures/ä.png")
    status, out, err = shell(url, "pictures", "", PYTHONIOENCODING="ascii")
    assert (status, "Traceback" in err) == (0, False)
    assert "pictures/\\xe4.png  (digits version 1" in out
    assert "  #" in out
