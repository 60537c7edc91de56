"""Other servers' protocols through the proxy: Open Inference Protocol V2 and MLflow's scoring."""

import base64
import json
import re
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from registry.core.names import convoy_version
from service.protocols.grpc_v2 import inference_pb2 as pb
from tests.containers.grpc_load import grpc_load, infer_request, label_of
from tests.containers.stack import ROOT, Stack, say
from tests.service.protocols.grpc_caller import Caller

pytestmark = pytest.mark.containers

CALLS = 24


@pytest.fixture
def caller(up: Stack) -> Iterator[Caller]:
    """A gRPC client with one connection to the proxy."""
    made = Caller(up.grpc_port)
    yield made
    made.close()


@pytest.fixture(scope="module")
def token(up: Stack) -> str:
    """A token of role ``classify``."""
    return up.registry("token", "add", "camera", "--role", "classify").strip()


@pytest.fixture(scope="module")
def counts(up: Stack, picture: bytes, token: str, second_version: None) -> Iterator[Counter[str]]:
    """The counts by status of gRPC calls, which went on while versions and replicas changed.

    The new replicas require tokens; the old ones did not.
    """
    with grpc_load(up.grpc_port, picture, token) as found:
        up.registry("promote", "fashion", "2", "--force", "--reason", "a test")
        say(f"version 2 after {up.wait_for_version(2):.1f} s")
        up.registry("roll-back", "fashion", "--reason", "a test")
        say(f"version 1 again after {up.wait_for_version(1):.1f} s")
        up.environment["CONVOY_AUTH"] = "required"
        subprocess.run(["deploy/update.sh"], cwd=ROOT, env=up.environment, check=True)
    say(f"gRPC calls by status: {dict(found)}")
    yield found
    del up.environment["CONVOY_AUTH"]


def answers_by_replica(stack: Stack) -> Counter[str]:
    """How many gRPC calls each replica has answered, by HAProxy's name for the replica."""
    read = (
        "import urllib.request as r; print(r.urlopen('http://proxy:8404/metrics').read().decode())"
    )
    text = stack.compose("exec", "-T", "control", "python", "-c", read)
    name = r'haproxy_server_http_responses_total\{proxy="grpc_replicas",server="(\w+)",code="2xx"\}'
    return Counter({replica: int(number) for replica, number in re.findall(rf"{name} (\d+)", text)})


def post(stack: Stack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{stack.url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def test_the_calls_of_one_grpc_connection_reach_every_replica(
    up: Stack, caller: Caller, picture: bytes
) -> None:
    before = answers_by_replica(up)
    for _ in range(CALLS):
        answer = caller.infer(infer_request(picture))
        assert (answer.model_version, label_of(answer)) == ("1", "Ankle boot")
    answered = answers_by_replica(up) - before
    say(f"gRPC calls by replica: {dict(answered)}")
    assert answered.total() == CALLS
    assert min(answered.values()) == CALLS // len(up.replicas())


def test_the_image_knows_its_version(caller: Caller) -> None:
    answer, _ = caller.call("ServerMetadata", pb.ServerMetadataRequest())
    assert answer.version == convoy_version()


def test_v2_and_mlflow_scoring_over_http_answer_as_v1_does(up: Stack, picture: bytes) -> None:
    expected = up.classify(picture)["predictions"][0]
    text = base64.b64encode(picture).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    wanted = {"inputs": [tensor], "outputs": [{"name": "labels", "parameters": {"top_k": 1}}]}
    v2 = post(up, "/v2/models/fashion/infer", wanted)
    assert (v2["model_version"], v2["outputs"][0]["data"][0]) == ("1", expected["label"])
    table = {"dataframe_split": {"columns": ["image"], "data": [[text]]}}
    (row,) = post(up, "/invocations", table)["predictions"]
    assert row["label"] == expected["label"]


def test_no_grpc_call_fails_while_versions_and_replicas_change(counts: Counter[str]) -> None:
    assert set(counts) == {"OK"}


@pytest.mark.usefixtures("counts")
def test_a_grpc_call_without_a_token_is_refused(caller: Caller, picture: bytes, token: str) -> None:
    message = infer_request(picture)
    assert caller.refusal("ModelInfer", message)[0] == "UNAUTHENTICATED"
    assert label_of(caller.infer(message, authorization=f"Bearer {token}")) == "Ankle boot"
