"""The client and the server's command line, in this process."""

import json
import socket
import threading
from pathlib import Path

import pytest

from service.__main__ import main


@pytest.fixture
def picture(tmp_path: Path, png: bytes) -> str:
    path = tmp_path / "picture.png"
    path.write_bytes(png)
    return str(path)


def test_files_are_shown_as_a_table(
    url: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", picture, picture, "--url", url, "--top-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "digits version 1" in lines[0]
    assert lines[1].split()[0].endswith("%")


def test_with_json_each_file_is_one_json_line(
    url: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", picture, "--url", url, "--model", "digits", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"] == picture
    assert len(answer["predictions"]) == 5


@pytest.mark.parametrize("path", ["", "/", "/convoy", "/convoy/"])
def test_a_proxy_may_serve_the_service_below_a_path(
    path: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
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
        assert main(["classify", picture, "--url", url]) == 1
        thread.join()
    assert asked == [f"{path.rstrip('/')}/v1/classify?top_k=5"]


@pytest.mark.parametrize(
    ("host", "address"),
    [("::", "http://[::1]:8080"), ("0.0.0.0", "http://127.0.0.1:8080"), ("", "http://127.0.0.1:")],
)
def test_the_default_address_is_that_of_this_machines_service(
    host: str, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_HOST", host)
    with pytest.raises(SystemExit):
        main(["classify", "--help"])
    assert address in "".join(capsys.readouterr().out.split())


def test_a_file_that_could_not_be_classified_is_named_and_the_status_is_1(
    url: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    files = [str(tmp_path / "text.png"), str(tmp_path / "missing.png"), picture]
    assert main(["classify", *files, "--url", url]) == 1
    captured = capsys.readouterr()
    assert "not a JPEG, PNG" in captured.err
    assert "missing.png: No such file" in captured.err
    assert "digits version 1" in captured.out
    assert main(["classify", picture, "--url", url, "--model", "unknown"]) == 1
    assert "no model 'unknown'" in capsys.readouterr().err


def test_a_service_that_does_not_answer_is_an_error_of_one_line(
    picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert main(["classify", picture, "--url", address]) == 2
    assert f"no answer from {address}" in capsys.readouterr().err
    for wrong in ("localhost:80", "http://localhost:abc", "ftp://localhost"):
        assert main(["classify", picture, "--url", wrong]) == 2
        assert "http://HOST:PORT" in capsys.readouterr().err


def test_a_port_that_does_not_speak_http_is_an_error_of_one_line(
    picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            peer.sendall(b"220 mail.example ESMTP\r\n")
            peer.close()

        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert main(["classify", picture, "--url", address]) == 2
    assert capsys.readouterr().err.startswith(("error: " + address, "error: no answer"))


def test_a_port_that_cannot_be_used_is_an_error_before_any_process_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("CONVOY_PORT", str(taken.getsockname()[1]))
        assert main([]) == 2
    error = capsys.readouterr().err
    assert "Address already in use" in error
    assert "CONVOY_PORT" in error
    monkeypatch.setenv("CONVOY_HOST", "203.0.113.1")  # reserved for documentation
    assert main(["serve", "--no-pull"]) == 2
    assert "is CONVOY_HOST right?" in capsys.readouterr().err


def test_a_setting_that_is_not_allowed_stops_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_WORKERS", "many")
    assert main(["serve"]) == 2
    assert "CONVOY_WORKERS" in capsys.readouterr().err
