from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.errors import BundleInvalid, UsageError
from registry.model.bundle import Bundle
from registry.model.manifest import (
    LaterEvaluation,
    OnnxNetwork,
    PreprocessSpec,
    manifest_from_json,
)
from registry.model.refs import ModelRef, parse_model_ref
from tests.conftest import MakeBundle


@pytest.fixture
def manifest_json(make_bundle: MakeBundle) -> bytes:
    bundle: Bundle = make_bundle()
    return (bundle.folder / "manifest.json").read_bytes()


def test_a_manifest_comes_back_from_json_unchanged(manifest_json: bytes) -> None:
    manifest = manifest_from_json(manifest_json)
    assert manifest.to_json() == manifest_json
    assert manifest.labels == tuple("0123456789")


def changed(data: bytes, **changes: object) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(data), **changes})


def test_the_error_for_a_manifest_of_another_schema_names_both_versions(
    manifest_json: bytes,
) -> None:
    with pytest.raises(BundleInvalid, match="schema_version 3; this Convoy reads 4"):
        manifest_from_json(changed(manifest_json, schema_version=3, novelty=True))


def test_a_manifest_mentions_only_the_sections_that_its_version_has(manifest_json: bytes) -> None:
    fields = msgspec.json.decode(manifest_json)
    assert not {"scored_champion", "plan_accuracy"} & set(fields)
    assert manifest_from_json(manifest_json).scored_champion is None


def test_a_network_is_one_of_the_list_or_an_onnx_graph(manifest_json: bytes) -> None:
    assert msgspec.json.decode(manifest_json)["network"]["kind"] == "listed"
    graph = manifest_from_json(changed(manifest_json, network={"kind": "onnx"}))
    assert graph.network == OnnxNetwork()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"novelty": True}, "novelty"),
        ({"network": {"kind": "torchscript"}}, "torchscript"),
        ({"network": {"name": "dense"}}, "kind"),
        ({"labels": ["only one"]}, "length >= 2"),
        ({"labels": ["same", "same"]}, "differ"),
        ({"model": "no/slash"}, "not a model name"),
        ({"tolerances": {"fp32": 0}}, "> 0"),
        ({"files": {"weights.safetensors": {"sha256": "zz", "size_bytes": 1}}}, "sha256"),
    ],
)
def test_a_manifest_with_an_impossible_value_is_refused(
    manifest_json: bytes, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(BundleInvalid, match=reason):
        manifest_from_json(changed(manifest_json, **changes))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_bundle_invalid(data: bytes) -> None:
    with pytest.raises(BundleInvalid):
        manifest_from_json(data)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(BundleInvalid):
        manifest_from_json(b"[" * 100_000)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("models:/fashion@champion", ModelRef("fashion", alias="champion")),
        (" models:/fashion/12 ", ModelRef("fashion", version=12)),
    ],
)
def test_model_references_are_parsed_and_printed(text: str, ref: ModelRef) -> None:
    assert parse_model_ref(text) == ref
    assert str(ref) == text.strip()


@pytest.mark.parametrize(
    "text",
    ["", "fashion", "models:/fashion", "models:/fashion/0", "models:/a b@c", "models:/a@b/1"],
)
def test_other_references_are_refused_and_the_error_shows_the_right_form(text: str) -> None:
    with pytest.raises(UsageError, match=r"models:/NAME@ALIAS|model name"):
        parse_model_ref(text)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mean": (0.5, 0.5)}, "1 values"),
        ({"std": (0.0,)}, "above 0"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"resize_shorter_px": 4}, "at least"),
    ],
)
def test_an_impossible_preprocessing_is_refused(changes: dict[str, object], reason: str) -> None:
    values = {"mode": "L", "width_px": 8, "height_px": 8, "mean": (0.5,), "std": (0.5,)}
    with pytest.raises(ValueError, match=reason):
        PreprocessSpec(**{**values, **changes})  # type: ignore[arg-type]


DIGEST = "0" * 64
FILE = {"sha256": DIGEST, "size_bytes": 9}
EVALUATION: dict[str, Any] = {
    "manifest_sha256": DIGEST,
    "data": {"name": "labelled", "sha256": DIGEST, "counts": {"validation": 4}},
    "metrics": {"validation_accuracy": 0.5},
    "files": {"heldout.npz": FILE},
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"metrics": {}}, "needs validation_accuracy"),
        ({"files": {}}, "needs the files heldout.npz"),
        ({"scored_champion": DIGEST}, "needs the files champion.npz, heldout.npz"),
        ({"files": {"heldout.npz": {**FILE, "size_bytes": 1 << 40}}}, "more than"),
        ({"files": {"heldout.npz": FILE, "exports/network.onnx": FILE}}, "needs the files heldout"),
    ],
)
def test_an_evaluation_must_be_complete_and_replace_records_only(
    change: dict[str, object], text: str
) -> None:
    assert msgspec.convert(EVALUATION, LaterEvaluation).metrics == {"validation_accuracy": 0.5}
    with pytest.raises(msgspec.ValidationError, match=text):
        msgspec.convert({**EVALUATION, **change}, LaterEvaluation)
