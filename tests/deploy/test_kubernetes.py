"""Renders the Helm chart, and checks it with the schemas of several Kubernetes versions."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import VARIABLES

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "convoy"
VERSIONS = ("1.27.0", "1.30.0", "1.33.0", "1.37.0")
# Custom resources: no package has their schemas, so only the assertions of this file check them.
CUSTOM = ("ServiceMonitor", "InferenceService")

VALUES = {
    "default": "",
    "everything": """
        service:
          settings: {CONVOY_RATE_LIMIT: "100"}
          tokensSecret: tokens
          keySecret: key
          trustedKeysConfigMap: trusted
          autoscaling: {enabled: true, queueDepth: 16}
          ingress: {enabled: true, className: nginx, host: convoy.example, tlsSecret: tls}
        trainer: {enabled: true}
        networkPolicy: {serviceFrom: [{namespaceSelector: {}}], controlFrom: [{podSelector: {}}]}
        serviceMonitor: {enabled: true, tokenSecret: metrics}
        imagePullSecrets: [{name: pull}]
        """,
    "gpu, registry elsewhere": """
        service: {gpu: {enabled: true, count: 1, nodeSelector: {pool: gpu}}}
        registry: {trackingUri: "https://mlflow.example"}
        control: {enabled: false}
        trainer: {enabled: true, gpu: true}
        """,
    "artefacts in S3": """
        registry:
          mlflow: {artifacts: {s3: {bucket: b, endpointUrl: "https://s3.example", secret: s}}}
        """,
}


def template(values: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "values.yaml").write_text(values)
    helm = str(Path(sys.executable).with_name("helm"))
    command = [helm, "template", "prod", str(CHART), "--values", str(folder / "values.yaml")]
    return subprocess.run(command, capture_output=True, text=True)


def render(name: str, folder: Path) -> list[dict[str, Any]]:
    ended = template(VALUES[name], folder)
    assert ended.returncode == 0, ended.stderr
    return [each for each in yaml.safe_load_all(ended.stdout) if each]


@pytest.fixture(params=VALUES)
def documents(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict[str, Any]]:
    return render(request.param, tmp_path)


def pods(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pod specifications, by the name of their Deployment or Job."""
    return {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]
        for each in documents
        if each["kind"] in ("Deployment", "Job")
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_valid_by_the_published_schemas(
    documents: list[dict[str, Any]], version: str
) -> None:
    checked = 0
    for each in documents:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)
            checked += 1
    assert checked >= 5


def test_a_schema_refuses_a_wrong_document() -> None:
    broken = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_no_container_runs_as_root_or_writes_to_its_image(documents: list[dict[str, Any]]) -> None:
    for spec in pods(documents).values():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False  # it would set CONVOY_CONTROL_PORT=tcp://…
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_only_one_container_writes_the_choices_of_plans(
    documents: list[dict[str, Any]],
) -> None:
    spec = next(spec for name, spec in pods(documents).items() if name.endswith("-service"))
    assert {"name": "plans", "emptyDir": {}} in spec["volumes"]
    mounted = [each["name"] for one in spec["containers"] for each in one["volumeMounts"]]
    assert mounted.count("plans") == 1


def test_the_service_may_reach_the_collector_of_its_traces(tmp_path: Path) -> None:
    values = """
        networkPolicy: {enabled: true}
        service: {settings: {OTEL_EXPORTER_OTLP_ENDPOINT: "http://otel:4318"}}
    """
    ended = template(values, tmp_path)
    assert ended.returncode == 0, ended.stderr
    (policy,) = [
        each
        for each in yaml.safe_load_all(ended.stdout)
        if each
        and each["kind"] == "NetworkPolicy"
        and each["metadata"]["name"].endswith("-service")
    ]
    assert {"ports": [{"protocol": "TCP", "port": 4318}]} in policy["spec"]["egress"]


def test_every_mount_selector_and_claim_names_something_that_exists(
    documents: list[dict[str, Any]],
) -> None:
    for spec in pods(documents).values():
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounted = {each["name"] for one in spec["containers"] for each in one["volumeMounts"]}
        assert mounted == volumes
    labels = [
        each["spec"]["template"]["metadata"]["labels"].items()
        for each in documents
        if each["kind"] in ("Deployment", "Job")
    ]
    claims = {each["metadata"]["name"] for each in documents if "Claim" in each["kind"]}
    for each in documents:
        if each["kind"] == "Service":
            assert any(each["spec"]["selector"].items() <= found for found in labels)
        if each["kind"] == "NetworkPolicy":
            wanted = each["spec"]["podSelector"]["matchLabels"].items()
            assert any(wanted <= found for found in labels)
    for spec in pods(documents).values():
        for volume in spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims


def test_pods_of_the_service_have_time_to_drain_and_no_access_to_mlflow(tmp_path: Path) -> None:
    spec = pods(render("default", tmp_path))["prod-service"]
    service, puller = spec["containers"]
    environment = {each["name"]: each.get("value") for each in service["env"]}
    sleep = int(service["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > sleep + int(
        environment["CONVOY_GRACEFUL_TIMEOUT_S"]
    )
    assert service["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert service["livenessProbe"]["httpGet"]["path"] == "/livez"  # a pod may wait for a model
    assert service["startupProbe"]["httpGet"]["path"] == "/livez"
    assert not [each for each in service["env"] if "MLFLOW" in each["name"]]
    secrets = {
        each["valueFrom"]["secretKeyRef"]["name"] for each in puller["env"] if "valueFrom" in each
    }
    assert secrets == {"convoy-mlflow-reader"}


def test_the_service_can_reach_only_dns_and_the_registry(tmp_path: Path) -> None:
    policies = {
        each["metadata"]["name"]: each["spec"]
        for each in render("default", tmp_path)
        if each["kind"] == "NetworkPolicy"
    }
    ports = [port["port"] for rule in policies["prod-service"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 5000]
    names, registry = policies["prod-service"]["egress"]
    system = {"kubernetes.io/metadata.name": "kube-system"}
    assert names["to"] == [
        {
            "namespaceSelector": {"matchLabels": system},
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        }
    ]
    assert registry["to"]
    elsewhere = render("gpu, registry elsewhere", tmp_path)
    (policy,) = [each["spec"] for each in elsewhere if each["kind"] == "NetworkPolicy"]
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [53, 53, 443]


def test_the_network_policy_opens_the_port_of_the_tracking_uri(tmp_path: Path) -> None:
    everything = render("everything", tmp_path)
    policies = [each for each in everything if each["kind"] == "NetworkPolicy"]
    (service,) = [each for each in policies if each["metadata"]["name"] == "prod-service"]
    ports = [port["port"] for rule in service["spec"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 5000]
    plain = template('registry: {trackingUri: "http://mlflow.ml.svc"}', tmp_path)
    assert plain.returncode == 0
    assert "port: 80}" in plain.stdout


def test_the_number_of_workers_is_the_number_of_requested_cores(tmp_path: Path) -> None:
    """A pod without a CPU limit sees all cores of its node."""
    service = pods(render("default", tmp_path))["prod-service"]["containers"][0]
    (workers,) = [each for each in service["env"] if each["name"] == "CONVOY_WORKERS"]
    assert workers["valueFrom"]["resourceFieldRef"]["resource"] == "requests.cpu"


def test_gpu_values_request_a_gpu_and_the_nodes_that_have_one(tmp_path: Path) -> None:
    found = pods(render("gpu, registry elsewhere", tmp_path))
    assert set(found) == {"prod-service", "prod-trainer-1"}
    spec = found["prod-service"]
    assert spec["containers"][0]["image"] == "convoy-service-torch:latest"
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_grpc_has_a_port_in_pods_services_and_the_network_policy(tmp_path: Path) -> None:
    done = template("service: {grpc: {enabled: true}}", tmp_path)
    assert done.returncode == 0, done.stderr
    documents = [each for each in yaml.safe_load_all(done.stdout) if each]
    container = pods(documents)["prod-service"]["containers"][0]
    assert {"name": "CONVOY_GRPC_PORT", "value": "8001"} in container["env"]
    assert {"name": "grpc", "containerPort": 8001} in container["ports"]
    for each in documents:
        if each["metadata"]["name"] in ("prod-service", "prod-replicas"):
            if each["kind"] == "Service":
                assert [port["port"] for port in each["spec"]["ports"]][1] == 8001
            if each["kind"] == "NetworkPolicy":
                assert {"protocol": "TCP", "port": 8001} in each["spec"]["ingress"][0]["ports"]
    assert "8001" not in template("", tmp_path).stdout


def test_scaling_follows_the_load_of_the_service_container(tmp_path: Path) -> None:
    documents = render("everything", tmp_path)
    (scaler,) = [each for each in documents if each["kind"] == "HorizontalPodAutoscaler"]
    cpu, queue = scaler["spec"]["metrics"]
    assert cpu["containerResource"]["container"] == "service"
    assert queue["pods"]["metric"]["name"] == "convoy_queue_depth"
    (deployment,) = [each for each in documents if each["metadata"]["name"] == "prod-service"
                     and each["kind"] == "Deployment"]  # fmt: skip
    assert "replicas" not in deployment["spec"]  # an upgrade would undo the scaler's choice


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("service: {replicas: many}", "replicas"),
        ("service: {settings: {PATH: /}}", "PATH"),
        ("servce: {}", "servce"),
        ("service: {ingress: {enabled: true}}", "service.ingress.host"),
        ("service: {tokensSecret: tokens}", "tokensSecret is set, so set service.keySecret"),
    ],
)
def test_invalid_values_are_refused(values: str, reason: str, tmp_path: Path) -> None:
    ended = template(values, tmp_path)
    assert ended.returncode != 0
    assert reason in ended.stderr


def test_every_image_and_setting_of_the_chart_exists(documents: list[dict[str, Any]]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.M))
    registry = (ROOT / "docs" / "operations.md").read_text()
    kserve = yaml.safe_load((ROOT / "deploy" / "kserve" / "inference-service.yaml").read_text())
    for spec in (*pods(documents).values(), kserve["spec"]["predictor"]):
        for container in spec["containers"]:
            name = container["image"].removeprefix("convoy-").partition(":")[0]
            assert name in targets
            for each in container["env"]:
                if each["name"].startswith("CONVOY_"):
                    assert each["name"] in VARIABLES or f"`{each['name']}`" in registry


def test_the_kserve_example_has_the_same_probes_and_security_as_the_chart(tmp_path: Path) -> None:
    kserve = yaml.safe_load((ROOT / "deploy" / "kserve" / "inference-service.yaml").read_text())
    example = kserve["spec"]["predictor"]
    chart = pods(render("default", tmp_path))["prod-service"]
    for in_example, in_chart in zip(example["containers"], chart["containers"], strict=True):
        assert in_example["securityContext"] == in_chart["securityContext"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in in_chart:
                assert in_example[probe]["httpGet"]["path"] == in_chart[probe]["httpGet"]["path"]
    assert example["volumes"] == chart["volumes"]
    assert {"name": "PROTOCOL", "value": "v2"} in example["containers"][0]["env"]
