"""Rules about imports, about modules that stay light, and about sizes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLIENTS = ROOT / "clients" / "python"
PACKAGES = {
    "convoy": ROOT,
    "registry": ROOT,
    "training": ROOT,
    "service": ROOT,
    "convoy_client": CLIENTS,
}
# Folder → the other folders that it may import, or single modules if only these are permitted.
CORE, MODEL, STORE = "registry.core", "registry.model", "registry.store"
OFFERED_TO_SERVICE = {
    CORE,
    "registry.auth",
    MODEL,
    "registry.delivery.deployment",
    "registry.delivery.signing",
    "registry.canary.traffic_stats",
}
SETTINGS = "service.settings"
INFERENCE, OBSERVABILITY = "service.inference", "service.observability"
MAY_IMPORT = {
    CORE: set(),
    "registry.auth": {CORE},
    MODEL: {CORE},
    STORE: {CORE, MODEL},
    "registry.delivery": {CORE, MODEL, STORE},
    "registry.promotion": {CORE, MODEL, STORE},
    "registry.canary": {CORE, MODEL, STORE, "registry.promotion"},
    "registry.control": {
        *(CORE, MODEL, STORE),
        *("registry.auth", "registry.delivery", "registry.promotion", "registry.canary"),
    },
    "registry.cli": {"registry"},
    "service.server": set(),
    "service.access": {SETTINGS, *OFFERED_TO_SERVICE},
    INFERENCE: {
        *(SETTINGS, "service.memory", "service.server.protocol", "service.shadow.client"),
        *OFFERED_TO_SERVICE,
    },
    OBSERVABILITY: {INFERENCE, *OFFERED_TO_SERVICE},
    "service.loading": {
        *(SETTINGS, INFERENCE, OBSERVABILITY, "service.memory", "service.running_time"),
        *OFFERED_TO_SERVICE,
    },
    "service.shadow": {SETTINGS, "service.loading", OBSERVABILITY, *OFFERED_TO_SERVICE},
    # Probes and the list of models report which versions are loading.
    "service.http": {
        *(SETTINGS, "service.state", "service.server.protocol", INFERENCE, OBSERVABILITY),
        *("service.loading.model_slot", *OFFERED_TO_SERVICE),
    },
    "service.protocols": {
        *(SETTINGS, "service.http", "service.state", "service.server.protocol", INFERENCE),
        *(OBSERVABILITY, "service.loading.model_slot", *OFFERED_TO_SERVICE),
        *("service.server.sockets.graceful_close", "service.memory"),
    },
    "service": {"service", *OFFERED_TO_SERVICE},
    "convoy": {"registry", "training", "service", "convoy_client"},
    "convoy_client": set(),
    "training.data": {CORE, MODEL},
    "training.fitting": {CORE, MODEL, "training.data"},
    "training.publishing": {CORE, MODEL, STORE, "training.data", "training.fitting"},
    "training.importing": {CORE, MODEL, STORE, "training.data", "training.publishing"},
    "training": {"training", CORE, MODEL, STORE},
}


def sources() -> dict[str, Path]:
    """Every module of the packages: name → file."""
    found = {}
    for package, root in PACKAGES.items():
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Names that a file imports anywhere. ``from a import b`` gives both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


def imports_of_ours(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Each of ``modules`` → those of ``modules`` that it imports."""
    return {
        name: {found for found in imported(path) if found in modules and found != name}
        for name, path in modules.items()
    }


def test_imports_point_in_one_direction() -> None:
    modules = sources()
    offenders = []
    for name, targets in imports_of_ours(modules).items():
        folder = max((each for each in MAY_IMPORT if is_in(name, each)), key=len, default=None)
        if folder is None:  # a package's __init__.py or __main__.py
            folder = "registry.cli"
        allowed = {folder, *MAY_IMPORT[folder]}
        offenders += [
            f"{name} imports {target}"
            for target in targets
            if "." in target
            and not any(is_in(target, each) for each in allowed)
            # `from registry.core import errors` also gives the folder's name
            and target not in {each.rpartition(".")[0] for each in allowed}
        ]
    assert not offenders


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imports_of_ours(sources())
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the modules' names


def test_no_package_imports_tests_benchmarks_or_tools() -> None:
    for path in sources().values():
        packages = {name.partition(".")[0] for name in imported(path)}
        assert not packages & {"tests", "benchmarks", "deploy"}, path


def test_the_client_needs_httpx_only() -> None:
    """It is a separate distribution; numpy comes with a caller's array."""
    modules = {name: path for name, path in sources().items() if is_in(name, "convoy_client")}
    packages = {each.partition(".")[0] for path in modules.values() for each in imported(path)}
    assert packages - sys.stdlib_module_names == {"convoy_client", "httpx", "numpy"}


def test_a_folder_holds_at_most_nine_modules() -> None:
    for package, root in PACKAGES.items():
        for folder in {path.parent for path in (root / package).rglob("*.py")}:
            modules = [each for each in folder.glob("*.py") if each.name != "__init__.py"]
            assert len(modules) <= 9, folder


def test_a_module_has_at_most_400_lines() -> None:
    for name, path in sources().items():
        assert len(path.read_text().splitlines()) <= 400, name


def test_a_class_is_small_or_its_docstring_says_why_not() -> None:
    """At most twelve methods and ten attributes, or a sentence "It has many … because …"."""
    offenders = []
    for name, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                docstring = " ".join((ast.get_docstring(node) or "").split())
                is_explained = re.search(r"It has many [\w ]+ because ", docstring)
                methods, attributes = members(node)
                if (len(methods) > 12 or len(attributes) > 10) and not is_explained:
                    offenders.append((name, node.name, len(methods), len(attributes)))
    assert not offenders


def members(node: ast.ClassDef) -> tuple[list[str], set[str]]:
    """The names of a class's methods, and of its fields and the attributes that it assigns."""
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    fields = {
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    assigned = {
        each.attr
        for method in methods
        for each in ast.walk(method)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }
    return [each.name for each in methods], fields | assigned


def test_only_the_store_and_the_tracking_of_runs_import_mlflow() -> None:
    importers = {
        name
        for name, path in sources().items()
        if "mlflow" in {each.partition(".")[0] for each in imported(path)}
    }
    offenders = {name for name in importers if not is_in(name, "registry.store")}
    assert offenders == {"training.publishing.tracking"}


def test_serving_never_loads_files_that_can_run_code() -> None:
    banned = ("torch.load(", "torch.export.load(", "load_model(", "pickle", "allow_pickle=True")
    offenders = [
        (name, word)
        for name, path in sources().items()
        if not is_in(name, "training") and name != "registry.model.bundle"
        for word in banned
        if word in path.read_text().replace("mlflow.pyfunc.load_model(", "")
    ]
    assert not offenders
    assert "allow_pickle=False" in (ROOT / "registry/model/bundle.py").read_text()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("registry.model.manifest", {"torch", "mlflow", "PIL", "numpy"}),
        ("registry.delivery.deployment", {"torch", "mlflow", "PIL", "numpy"}),
        ("registry.model.bundle", {"torch", "mlflow", "PIL"}),
        ("registry.model.image.decode", {"torch", "mlflow"}),
        ("registry.model.classifier", {"mlflow"}),
        ("registry.canary.traffic_stats", {"torch", "mlflow", "PIL", "numpy", "flask"}),
        ("registry.__main__", {"torch", "mlflow", "PIL"}),
        ("training.__main__", {"torch", "mlflow", "PIL"}),
        ("training.fitting.loop", {"mlflow"}),
        ("service.__main__", {"torch", "mlflow", "PIL", "flask"}),
        ("convoy.classify.command", {"torch", "mlflow", "PIL", "numpy", "httpx", "pyarrow"}),
        ("convoy.classify.http_source", {"torch", "mlflow", "PIL", "numpy", "pyarrow"}),
        ("service.server.gunicorn_worker", {"torch", "mlflow", "PIL", "numpy", "flask"}),
        ("service.inference.batcher", {"torch", "mlflow", "flask"}),
        ("service.loading.model_slot", {"torch", "mlflow", "flask"}),
        ("service.protocols.v1", {"torch", "mlflow"}),
    ],
)
def test_light_modules_stay_light(module: str, absent: set[str]) -> None:
    """Each module is imported in a fresh interpreter, because this one has loaded everything."""
    code = f"import sys, {module}; print(' '.join(sorted({absent!r} & set(sys.modules))))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert loaded == []


def test_a_serving_app_loads_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys; from service import create_app; create_app(); "
        "print('torch' in sys.modules, 'mlflow' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert printed.split() == ["False", "False"]
