"""The registry of an MLflow server over HTTP, without importing MLflow.

Importing MLflow takes 1.6 to 3.1 s of CPU and 170 MB; a roll-back from the shell should take less
than that. The methods are those of ``mlflow.MlflowClient`` that ``ModelStore`` calls, with the same
names, arguments and results. Source: MLflow's REST API, https://mlflow.org/docs/latest/rest-api.
"""

import configparser
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import requests
from requests.auth import AuthBase, HTTPBasicAuth
from requests.utils import get_auth_from_url

from registry.store.connection.entities import (
    Page,
    RegisteredModel,
    RegisteredVersion,
    RegistryError,
)

API = "/api/2.0/mlflow"
ARTIFACTS_API = "/api/2.0/mlflow-artifacts/artifacts"
# A repeated request may succeed after these statuses. MLflow's client repeats them, too.
TRANSIENT = (408, 429, 500, 502, 503, 504)
RETRY_PAUSE_S = 1.0
MAX_PAGE = 200
# Settings that only MLflow's own client understands.
OWN_CLIENT = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")


def is_supported(uri: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this client can speak to ``uri`` with the credentials of ``environment``."""
    return uri.startswith(("http://", "https://")) and not any(map(environment.get, OWN_CLIENT))


class MlflowRest:
    """One MLflow server. Its methods raise ``RegistryError`` and ``requests.RequestException``.

    It has many methods because each call of MLflow's API that Convoy uses is one of them. They have
    the names and arguments of MLflow's own client, which takes its place for a database.
    """

    def __init__(self, uri: str, environment: Mapping[str, str] = os.environ) -> None:
        self._uri = uri.rstrip("/")
        self._timeout_s = float(environment.get("MLFLOW_HTTP_REQUEST_TIMEOUT") or 10)
        self._tries = 1 + int(environment.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES") or 1)
        self._session = requests.Session()
        self._environment = environment
        if workspace := environment.get("MLFLOW_WORKSPACE"):
            self._session.headers["X-MLFLOW-WORKSPACE"] = workspace
        is_insecure = environment.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
        # With each request: requests prefers REQUESTS_CA_BUNDLE to what a session says.
        self._verify = not is_insecure and (
            environment.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
        )
        self._session.cert = environment.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None

    def search_registered_models(
        self, *, max_results: int = MAX_PAGE, page_token: str | None = None
    ) -> Page[RegisteredModel]:
        """A page of at most ``max_results`` models.

        ``page_token`` is the ``token`` of the page before; None asks for the first page.
        """
        query = {"max_results": max_results, "page_token": page_token}
        found = self._get("registered-models/search", **query)
        rows = [_model(each) for each in found.get("registered_models", ())]
        return Page(rows, found.get("next_page_token", ""))

    def get_registered_model(self, name: str) -> RegisteredModel:
        """The model with its tags and aliases.

        Raises:
            RegistryError: ``RESOURCE_DOES_NOT_EXIST`` if the model does not exist.
        """
        return _model(_member(self._get("registered-models/get", name=name), "registered_model"))

    def create_registered_model(
        self, name: str, tags: dict[str, str], description: str | None = None
    ) -> RegisteredModel:
        """The new model, which has no version yet.

        Raises:
            RegistryError: ``RESOURCE_ALREADY_EXISTS`` if the name is taken.
        """
        body = {"name": name, "tags": _pairs(tags), "description": description}
        found = self._send("POST", "registered-models/create", body)
        return _model(_member(found, "registered_model"))

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        """Write a tag of the model; ``value`` replaces an earlier one."""
        self._send("POST", "registered-models/set-tag", {"name": name, "key": key, "value": value})

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        """Point ``alias`` at the number ``version``, also if it points at another one now."""
        body = {"name": name, "alias": alias, "version": version}
        self._send("POST", "registered-models/alias", body)

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        """Remove ``alias`` from the model; the version at which it points stays."""
        self._send("DELETE", "registered-models/alias", {"name": name, "alias": alias})

    def search_model_versions(
        self,
        filter_string: str,
        *,
        max_results: int = MAX_PAGE,
        order_by: list[str] | None = None,
        page_token: str | None = None,
    ) -> Page[RegisteredVersion]:
        """A page of at most ``max_results`` versions that match ``filter_string``.

        Args:
            filter_string: in MLflow's language, for example ``name='fashion'``.
            max_results: the size of a page.
            order_by: for example ``["version_number DESC"]``; by default, MLflow chooses.
            page_token: the ``token`` of the page before; None for the first page.
        """
        found = self._get(
            "model-versions/search",
            filter=filter_string,
            max_results=max_results,
            order_by=order_by,
            page_token=page_token,
        )
        rows = [_version(each) for each in found.get("model_versions", ())]
        return Page(rows, found.get("next_page_token", ""))

    def get_model_version(self, name: str, version: str) -> RegisteredVersion:
        """The version with the number ``version``, which MLflow's client takes as a string.

        Raises:
            RegistryError: ``RESOURCE_DOES_NOT_EXIST`` if the model or the version does not exist.
        """
        found = self._get("model-versions/get", name=name, version=version)
        return _version(_member(found, "model_version"))

    def get_model_version_download_uri(self, name: str, version: str) -> str:
        """The URI under which the version's artefacts are, such as ``mlflow-artifacts:/…``."""
        found = self._get("model-versions/get-download-uri", name=name, version=version)
        return str(_member(found, "artifact_uri"))

    def create_model_version(
        self,
        name: str,
        source: str,
        *,
        tags: dict[str, str],
        description: str | None = None,
        await_creation_for: int = 0,  # MLflow's client would wait
    ) -> RegisteredVersion:
        """The new version, with the next number; ``source`` is the URI of its artefacts.

        ``await_creation_for`` has no effect: this client does not wait.
        """
        body = {"name": name, "source": source, "tags": _pairs(tags), "description": description}
        found = self._send("POST", "model-versions/create", body)
        return _version(_member(found, "model_version"))

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        """Write a tag of one version; ``value`` replaces an earlier one."""
        body = {"name": name, "version": version, "key": key, "value": value}
        self._send("POST", "model-versions/set-tag", body)

    def open_artifact(self, path: str) -> requests.Response:
        """A stream of the artefact at ``path`` under the server's artefact root, uncompressed."""
        # A compressed answer would be counted after it was unpacked.
        plain = {"Accept-Encoding": "identity"}
        return self._request("GET", f"{ARTIFACTS_API}/{quote(path)}", stream=True, headers=plain)

    def _login(self) -> AuthBase | None:
        """The credentials of the next request, read again for each as MLflow's client does.

        Those in the URI come first, then user name and password, then the token.
        """
        if any(get_auth_from_url(self._uri)):  # requests sends these itself
            return None
        if known := _credentials(self._environment):
            return known
        token = self._environment.get("MLFLOW_TRACKING_TOKEN")
        return _Bearer(token) if token else None

    def _get(self, endpoint: str, **query: Any) -> dict[str, Any]:
        return self._ask("GET", endpoint, params=query)

    def _send(
        self, method: Literal["POST", "DELETE"], endpoint: str, body: object
    ) -> dict[str, Any]:
        return self._ask(method, endpoint, json=body)

    def _ask(self, method: str, endpoint: str, **content: Any) -> dict[str, Any]:
        """The server's JSON."""
        return _decode(self._request(method, f"{API}/{endpoint}", **content), endpoint)

    def _request(self, method: str, path: str, **content: Any) -> requests.Response:
        """The server's answer. Asks again after a lost connection, a time-out or a transient error.

        A repeated call does no harm: names have a claim, lines have a nonce, and setting a tag or
        an alias twice changes nothing.
        """
        for left in reversed(range(self._tries)):
            try:
                response = self._session.request(
                    method,
                    f"{self._uri}{path}",
                    auth=self._login(),
                    verify=self._verify,
                    timeout=self._timeout_s,
                    **content,
                )
            except (requests.ConnectionError, requests.Timeout):
                if not left:
                    raise
            else:
                if response.status_code not in TRANSIENT or not left:
                    return response
                response.close()
            time.sleep(RETRY_PAUSE_S)
        raise AssertionError("the last try returns or raises")


class _Bearer(AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _credentials(environment: Mapping[str, str]) -> AuthBase | None:
    """User name and password, from the environment or MLflow's file of them."""
    user = environment.get("MLFLOW_TRACKING_USERNAME")
    password = environment.get("MLFLOW_TRACKING_PASSWORD")
    if not (user and password):
        file = configparser.ConfigParser(interpolation=None)
        file.read(Path("~/.mlflow/credentials").expanduser())
        user = user or file.get("mlflow", "mlflow_tracking_username", fallback=None)
        password = password or file.get("mlflow", "mlflow_tracking_password", fallback=None)
    if not (user and password):
        return None
    return HTTPBasicAuth(user.encode(), password.encode())  # else requests sends Latin-1


def _decode(response: requests.Response, endpoint: str) -> dict[str, Any]:
    try:
        body = response.json()
    except requests.JSONDecodeError:
        body = None
    if response.ok and isinstance(body, dict):
        return body
    if isinstance(body, dict) and "error_code" in body:
        code = str(body["error_code"])
        raise RegistryError(f"{code}: {body.get('message', '')}", code)
    raise RegistryError(f"{endpoint}: {response.status_code} {response.reason}", "INTERNAL_ERROR")


def _member(answer: dict[str, Any], name: str) -> Any:
    if name not in answer:
        raise RegistryError(f"the answer has no {name}: this is not an MLflow server", "BAD_ANSWER")
    return answer[name]


@contextmanager
def _reading() -> Iterator[None]:
    """Turn an entity that is not as MLflow's into a ``RegistryError``."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RegistryError(f"an entity is not as MLflow's: {error!r}", "BAD_ANSWER") from error


def _pairs(tags: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


def _tags(entity: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag.get("value", "") for tag in entity.get("tags", ())}


def _model(entity: dict[str, Any]) -> RegisteredModel:
    with _reading():
        return RegisteredModel(
            name=entity["name"],
            creation_timestamp=int(entity["creation_timestamp"]),
            tags=_tags(entity),
            aliases={each["alias"]: int(each["version"]) for each in entity.get("aliases", ())},
        )


def _version(entity: dict[str, Any]) -> RegisteredVersion:
    with _reading():
        return RegisteredVersion(
            name=entity["name"],
            version=int(entity["version"]),
            creation_timestamp=int(entity["creation_timestamp"]),
            tags=_tags(entity),
            run_id=entity.get("run_id"),
        )
