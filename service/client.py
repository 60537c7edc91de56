"""The client behind ``convoy classify``: files in, a table or JSON lines out."""

import contextlib
import http.client
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from registry.core.errors import UsageError

TIMEOUT_S = 30.0
BAR_WIDTH = 24


def classify_files(
    files: list[str],
    url: str,
    model: str | None,
    top_k: int,
    as_json: bool,
    token: str | None = None,
) -> int:
    """Classify each file over one connection and print the answers.

    Args:
        files: paths of the images.
        url: address of the service.
        model: its name; None for the service's default model.
        top_k: how many classes to show for each image.
        as_json: print one JSON object a line, not a table.
        token: needed where the service requires one.

    Returns:
        0, or 1 when a file got no prediction.

    Raises:
        UsageError: the service cannot be reached.
    """
    try:
        address = urlsplit(url)
        port = address.port
    except ValueError as error:
        raise UsageError(f"{url!r} is not an address ({error}); write http://HOST:PORT") from error
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UsageError(f"{url!r} is not an address; write http://HOST:PORT")
    connect = (
        http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    )
    connection = connect(address.hostname, port, timeout=TIMEOUT_S)
    path = f"/v1/models/{quote(model, safe='')}/classify" if model else "/v1/classify"
    path = quote(address.path.rstrip("/"), safe="/%") + path  # a proxy may serve it below a path
    failures = 0
    with contextlib.closing(connection):
        for name in files:
            try:
                answer = _ask(connection, f"{path}?top_k={top_k}", Path(name).read_bytes(), token)
            except http.client.HTTPException as error:
                raise UsageError(f"{url} does not speak HTTP: {error!r}") from error
            except OSError as error:
                if error.filename is None:
                    raise UsageError(f"no answer from {url}: {error}") from error
                answer = {"error": f"{error.strerror}"}
            failures += "predictions" not in answer
            if as_json:
                print(json.dumps({"file": name, **answer}))
            else:
                _print(name, answer)
    return 1 if failures else 0


def _ask(
    connection: http.client.HTTPConnection, path: str, image: bytes, token: str | None
) -> dict[str, Any]:
    headers = {"Content-Type": "application/octet-stream"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection.request("POST", path, body=image, headers=headers)
    response = connection.getresponse()
    body = response.read()
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"error": f"status {response.status}: not JSON"}


def _print(name: str, answer: dict[str, Any]) -> None:
    if "predictions" not in answer:
        print(f"{name}: {answer.get('error')}", file=sys.stderr)
        return
    model = answer["model"]
    took = answer["timings_ms"]["total"]
    print(f"{name}  ({model['name']} version {model['version']}, {took:.1f} ms)")
    for line in answer["predictions"]:
        bar = "█" * round(line["probability"] * BAR_WIDTH)
        print(f"  {line['probability']:7.2%}  {bar:<{BAR_WIDTH}}  {line['label']}")
