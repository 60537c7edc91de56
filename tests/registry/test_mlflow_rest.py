"""Our client for an MLflow server gives what MLflow's own client gives, without its import."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from registry.core.errors import BundleInvalid, RegistryUnavailable, VersionNotFound
from registry.core.paths import Paths
from registry.model.refs import ModelRef
from registry.promotion.decisions import audit
from registry.promotion.promotion import promote, roll_back
from registry.store.connection import mlflow_rest
from registry.store.connection.entities import RegistryError
from registry.store.connection.mlflow_rest import MlflowRest, is_supported
from registry.store.mlflow_store import ModelStore
from tests.conftest import MakeBundle
from tests.mlflow_servers import PASSWORDS, mlflow_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server"), workspaces=False) as address:
        yield address


@pytest.fixture
def store(server: str, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["admin"])
    return ModelStore(paths)


@pytest.mark.e2e
def test_versions_are_published_promoted_downloaded_and_rolled_back_over_http(
    store: ModelStore, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from training.publishing.tracking import start_run

    assert isinstance(store._client, MlflowRest)
    for seed in (0, 1):
        with start_run(store, "convoy", "run"):
            store.publish(make_bundle(seed=seed), {"convoy.recipe": "tiny"})
    promote(store, "digits", 1)
    promote(store, "digits", 2, force=True, reason="to see")
    assert roll_back(store, "digits").entry.to_version == 1
    assert store.aliases.read("digits") == {"champion": 1, "previous": 2}
    assert audit(store, "digits") == (3, [])
    found = store.resolve(ModelRef("digits", alias="champion"))
    bundle = store.download(found, tmp_path / "bundle")
    bundle.verify()
    assert bundle.manifest_sha256 == found.manifest_sha256

    # MLflow's own client reads the same.
    theirs, ours = mlflow.MlflowClient(store.connection.uri), store._client
    model = theirs.get_registered_model("digits")
    same = ours.get_registered_model("digits")
    assert (same.name, same.tags, same.creation_timestamp) == (
        model.name,
        model.tags,
        model.creation_timestamp,
    )
    assert same.aliases == {alias: int(version) for alias, version in model.aliases.items()}
    for query in ("name = 'digits'", "name = 'digits.ledger'"):
        theirs_found = theirs.search_model_versions(query)
        ours_found = ours.search_model_versions(query)
        assert [(each.version, each.tags, each.run_id) for each in ours_found] == [
            (int(each.version), each.tags, each.run_id) for each in theirs_found
        ]
    with pytest.raises(VersionNotFound):
        store.resolve(ModelRef("digits", 77))
    with pytest.raises(VersionNotFound):
        store.aliases.read("nothing")
    place = theirs.get_model_version_download_uri("digits", "1")
    with pytest.raises(BundleInvalid, match="is missing from the artefacts"):
        store._artifacts.fetch(place, "data/bundle/no-such-file", tmp_path, 1000)

    # The verbs that operators wait for import none of the slow packages.
    for command in (["list"], ["show", "digits"], ["roll-back", "digits"], ["audit"]):
        script = (
            "import sys; from registry.cli.main import main; status = main(sys.argv[1:]);"
            "print(status, sorted({'mlflow', 'pandas', 'torch'} & set(sys.modules)))"
        )
        printed = subprocess.run(
            [sys.executable, "-c", script, *command], capture_output=True, text=True, check=True
        ).stdout
        assert printed.splitlines()[-1] == "0 []", printed
    assert store.aliases.read("digits") == {"champion": 2, "previous": 1}

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(RegistryUnavailable):
        store.models()


class Answers(BaseHTTPRequestHandler):
    """Answers with what the test has put into ``planned``: status and body."""

    planned: list[tuple[int, bytes]]
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        status, body = self.planned.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Answers], str]]:
    handler = type("Planned", (Answers,), {"planned": [], "seen": []})
    monkeypatch.setattr(mlflow_rest, "RETRY_PAUSE_S", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


MODEL = json.dumps(
    {"registered_model": {"name": "digits", "creation_timestamp": "5"}}  # int64 as text
).encode()


def test_a_transient_error_is_asked_about_once_more(answers: tuple[type[Answers], str]) -> None:
    handler, uri = answers
    handler.planned += [(503, b"busy"), (200, MODEL)]
    assert MlflowRest(uri, {}).get_registered_model("digits").creation_timestamp == 5
    handler.planned += [(503, b"busy"), (503, b"busy")]
    with pytest.raises(RegistryError, match="503"):
        MlflowRest(uri, {}).get_registered_model("digits")


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"error_code": "X", "message": "no"}'])
def test_an_answer_that_is_not_a_result_is_an_error(
    answers: tuple[type[Answers], str], body: bytes
) -> None:
    handler, uri = answers
    handler.planned.append((404, body))
    with pytest.raises(RegistryError):
        MlflowRest(uri, {}).get_registered_model("digits")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"registered_model": {}},
        {"registered_model": {"name": "x", "creation_timestamp": "soon"}},
        {"registered_model": {"name": "x", "creation_timestamp": 1, "tags": [1]}},
    ],
)
def test_the_answer_of_another_server_is_an_error(
    answers: tuple[type[Answers], str], body: dict[str, object]
) -> None:
    handler, uri = answers
    handler.planned.append((200, json.dumps(body).encode()))
    with pytest.raises(RegistryError, match="MLflow"):
        MlflowRest(uri, {}).get_registered_model("digits")


def test_a_call_that_times_out_is_made_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def request(*arguments: object, **named: object) -> None:
        calls.append(arguments)
        raise requests.ReadTimeout("10 s")

    client = MlflowRest("http://127.0.0.1:9", {})
    monkeypatch.setattr(mlflow_rest, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(client._session, "request", request)
    with pytest.raises(requests.ReadTimeout):
        client.set_registered_model_tag("digits", "key", "value")
    assert len(calls) == 2


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("environment", "sent"),
    [
        ({}, ""),
        ({"MLFLOW_TRACKING_TOKEN": "abc"}, "Bearer abc"),
        (
            {"MLFLOW_TRACKING_USERNAME": "a", "MLFLOW_TRACKING_PASSWORD": "b"},
            basic("a", "b"),
        ),
        (
            {
                "MLFLOW_TRACKING_USERNAME": "ü",
                "MLFLOW_TRACKING_PASSWORD": "p€",  # pragma: allowlist secret
                "MLFLOW_TRACKING_TOKEN": "abc",
            },
            basic("ü", "p€"),
        ),
    ],
)
def test_credentials_come_from_mlflows_variables(
    answers: tuple[type[Answers], str],
    environment: dict[str, str],
    sent: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    handler, uri = answers
    handler.planned.append((200, MODEL))
    MlflowRest(uri, environment).get_registered_model("digits")
    assert handler.seen == [sent]


def test_a_server_with_a_plug_in_for_credentials_is_left_to_mlflows_client() -> None:
    assert is_supported("https://host", {})
    assert not is_supported("https://host", {"MLFLOW_TRACKING_AUTH": "kerberos"})
    assert not is_supported("sqlite:///x.db", {})


def test_a_server_that_is_away_is_an_unavailable_registry(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_rest, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(RegistryUnavailable, match="cannot be used"):
        ModelStore(paths).models()
