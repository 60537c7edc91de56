"""The server's command line, in this process."""

import socket

import pytest

from service.__main__ import main


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
