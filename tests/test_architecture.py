"""The rules that keep the walk short: who may import whom, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("registry", "training", "service")
ALLOWED = {
    "registry": {"registry"},
    "training": {"training", "registry"},
    "service": {"service", "registry"},
}
MLFLOW_MODULES = {"registry/mlflow_connection.py", "registry/store.py", "training/tracking.py"}


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module.partition(".")[0])
    return found


def sources() -> list[tuple[str, Path]]:
    return [(package, path) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_to_the_registry(package: str) -> None:
    forbidden = (set(PACKAGES) | {"tests", "benchmarks", "deploy"}) - ALLOWED[package]
    offenders = {
        str(path.relative_to(ROOT)): sorted(imports(path) & forbidden)
        for owner, path in sources()
        if owner == package and imports(path) & forbidden
    }
    assert not offenders


def test_mlflow_is_imported_at_its_two_doors_only() -> None:
    importers = {str(path.relative_to(ROOT)) for _, path in sources() if "mlflow" in imports(path)}
    assert importers == MLFLOW_MODULES


def test_serving_never_loads_what_can_run_code() -> None:
    banned = ("torch.load(", "torch.export.load(", "load_model(", "pickle", "allow_pickle=True")
    offenders = [
        (str(path.relative_to(ROOT)), word)
        for package, path in sources()
        if package != "training"
        for word in banned
        if word in path.read_text().replace("mlflow.pyfunc.load_model(", "")
        and path.name != "bundle.py"
    ]
    assert not offenders
    assert "allow_pickle=False" in (ROOT / "registry/bundle.py").read_text()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("registry.contract", {"torch", "mlflow", "PIL", "numpy"}),
        ("registry.releases", {"torch", "mlflow", "PIL", "numpy"}),
        ("registry.bundle", {"torch", "mlflow", "PIL"}),
        ("registry.preprocess", {"torch", "mlflow"}),
        ("registry.classifier", {"mlflow"}),
        ("registry.live", {"torch", "mlflow", "PIL", "numpy", "flask"}),
        ("registry.__main__", {"torch", "mlflow", "PIL"}),
        ("training.__main__", {"torch", "mlflow", "PIL"}),
        ("training.loop", {"mlflow"}),
        ("service.__main__", {"torch", "mlflow", "PIL", "flask"}),
        ("service.client", {"torch", "mlflow", "PIL", "numpy"}),
        ("service.batcher", {"torch", "mlflow", "flask"}),
        ("service.model_slot", {"torch", "mlflow", "flask"}),
        ("service.api.classify", {"torch", "mlflow"}),
    ],
)
def test_light_modules_stay_light(module: str, absent: set[str]) -> None:
    """In a fresh interpreter, because this one has loaded everything."""
    code = f"import sys, {module}; print(' '.join(sorted({absent!r} & set(sys.modules))))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert loaded == []


def test_a_serving_app_loads_no_mlflow() -> None:
    code = (
        "import sys; from service import create_app; create_app(); "
        "print('torch' in sys.modules, 'mlflow' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert printed.split() == ["False", "False"]
