"""What the package shows, and which of its modules may know of which."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_rtho

ROOT = Path(lightning_rtho.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

LAYERS = [
    "_types",
    "_numerics",
    "hyperparameters",
    "schedule",
    "dynamics",
    "linearization",
    "distributed",
    "hypergradient",
    "outer",
    "schedulers",
    "optim",
    "callbacks",
]
"""A module imports only from layers before its own."""

each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix()
)
each_public_name = pytest.mark.parametrize(
    "name", [name for name in lightning_rtho.__all__ if name != "__version__"]
)


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)


def _layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


# Names


def test_public_names_are_those_listed() -> None:
    public = {
        name
        for name, value in vars(lightning_rtho).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | {"__version__"} == set(lightning_rtho.__all__)
    assert len(set(lightning_rtho.__all__)) == len(lightning_rtho.__all__)


@each_module
def test_module_lists_the_names_it_offers(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    if path.stem in ("_types", "_numerics"):  # names for the package's own use
        return
    assert len(listed) == 1
    assert not any(name.startswith("_") for name in listed[0] if name != "__version__")


@each_public_name
def test_public_name_shows_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(vars(lightning_rtho)[name]) or "")


def test_package_ships_its_types() -> None:
    assert (ROOT / "py.typed").exists()


# Imports


def test_every_module_belongs_to_a_layer() -> None:
    assert {_layer(path) for path in MODULES} == {*LAYERS, "__init__"}


@each_module
def test_module_imports_only_from_layers_before_its_own(path: Path) -> None:
    if _layer(path) == "__init__":
        return
    rank = LAYERS.index(_layer(path))
    for imported in _imports(path):
        if imported.split(".")[0] == "lightning_rtho":
            layer = imported.split(".")[1]
            assert layer in LAYERS[: rank + 1], imported


@each_module
def test_other_layers_are_entered_by_their_front_door(path: Path) -> None:
    for imported in _imports(path):
        parts = imported.split(".")
        if parts[0] == "lightning_rtho" and len(parts) > 2:
            assert parts[1] == _layer(path), imported


def test_optimizer_knows_only_dynamics_and_hyperparameters() -> None:
    layers = {i.split(".")[1] for i in _imports(ROOT / "optim.py") if i.startswith(ROOT.name)}
    assert layers <= {"_types", "_numerics", "hyperparameters", "dynamics", "schedulers"}


@each_module
def test_lightning_is_imported_by_the_callbacks_alone(path: Path) -> None:
    roots = {imported.split(".")[0] for imported in _imports(path)}
    if _layer(path) != "callbacks":
        assert not roots & {"lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"}


@each_module
def test_graph_has_one_owner(path: Path) -> None:
    keeps_graph = [
        keyword.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "create_graph"
    ]
    # That of the loss has one, and that of an update does not outlive the call that makes it.
    owners = ("linearization/_gradient.py", "linearization/_step.py")
    assert bool(keeps_graph) == (path.relative_to(ROOT).as_posix() in owners)


@pytest.fixture(scope="module")
def imported() -> tuple[list[str], list[str]]:
    """What a process tells that imports the package, and again without what examples need.

    Of both, since an import of Lightning takes seconds.
    """
    # A module that is None in `sys.modules` cannot be imported; torchmetrics, which Lightning
    # imports, uses matplotlib where it is installed.
    program = (
        "import sys, lightning.pytorch\n"
        "before = set(sys.modules)\n"
        "import lightning_rtho\n"
        "print(*(set(sys.modules) - before))\n"
        "for name in [name for name in sys.modules if name.startswith('lightning_rtho')]:\n"
        "    del sys.modules[name]\n"
        "for name in ('matplotlib', 'sklearn', 'tensorboard', 'hypothesis', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "import lightning_rtho\n"
        "print(*lightning_rtho.__all__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert result.returncode == 0, result.stderr
    brought, names = result.stdout.splitlines()[-2:]
    return brought.split(), names.split()


def test_package_imports_without_what_only_the_examples_need(imported) -> None:
    assert imported[1] == lightning_rtho.__all__


def test_package_brings_in_nothing_heavy_that_lightning_has_not(imported) -> None:
    brought = imported[0]
    roots = {name.split(".")[0] for name in brought}
    assert roots - sys.stdlib_module_names <= {"lightning_rtho", "torch"}
    compilers = ("torch._dynamo", "torch._inductor", "torch._functorch._aot_autograd")
    assert not [name for name in brought if name.startswith(compilers)]


def test_torch_distributed_is_known_to_one_module_alone() -> None:
    ways = re.compile(r"torch\.distributed|from torch import .*\bdistributed\b")
    users = [_layer(path) for path in MODULES if ways.search(path.read_text())]
    assert users == ["distributed"]
