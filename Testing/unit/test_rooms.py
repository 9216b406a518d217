"""The rooms of docs/architecture.md: which package imports which, no circles, and no PyTorch where Slicer loads the module."""

import ast
import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest
from documents import ROOT, document

LIBRARY, MODULE, TRAINING = "DivRegNetLib", "DivRegNetModule", "training"
PLACES = {LIBRARY: ROOT, MODULE: ROOT / "DivRegNet", TRAINING: ROOT}
EVERYWHERE = {"errors", "words"}  # what every package of the library may import
WITHOUT_TORCH = (
    "DivRegNetLib", "DivRegNetLib.options", "DivRegNetLib.result", "DivRegNetLib.core.grid", "DivRegNetLib.io.images",
    "DivRegNetLib.io.landmarks", "DivRegNetLib.io.transforms", "DivRegNetLib.models", "DivRegNetLib.quality.metrics",
    "DivRegNetLib.quality.preview", "DivRegNetLib.quality.verdict", "DivRegNetLib.registration.memory",
    "DivRegNetLib.run.worker", "DivRegNetLib.run.cohort", "DivRegNetLib.run.cli",
    "DivRegNetLib.run.cohort.register_files",  # which imports it while it reads the files
)  # fmt: skip


@functools.cache
def modules() -> dict[str, str]:
    """Name of a module -> its source."""
    found = {}
    for package, place in PLACES.items():
        for file in (place / package).rglob("*.py"):
            name = ".".join(file.relative_to(place).with_suffix("").parts).removesuffix(".__init__")
            found[name] = file.read_text(encoding="utf-8")
    return found


@functools.cache
def imports(name: str, *, at_file_scope: bool = False) -> frozenset[str]:
    """The modules of this repository that a module imports, anywhere or at file scope; not those for type checkers alone."""
    tree = ast.parse(modules()[name])
    return frozenset(itertools.chain.from_iterable(_imported(node) for node in _statements(tree, at_file_scope)))


def _statements(node: ast.AST, at_file_scope: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if at_file_scope and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from _statements(child, at_file_scope)


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        while name and name not in modules():
            name = name.rpartition(".")[0]
        if name:
            yield name


def room(module: str) -> str:
    """The package of the library that a module is in; else the first part of its name."""
    first, *rest = module.split(".")
    return rest[0] if first == LIBRARY and rest else first


def test_packages_import_what_the_architecture_says():
    rows = document("docs/architecture.md").table("Rooms")
    described = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    found: dict[str, set[str]] = {name: set() for name in described}
    for module in modules():
        if module.startswith(f"{LIBRARY}.") and room(module) not in EVERYWHERE:
            found.setdefault(room(module), set()).update(
                room(other) for other in imports(module) if other != LIBRARY and other.startswith(LIBRARY)
            )
    assert {name: others - EVERYWHERE - {name} for name, others in found.items()} == described


def test_the_library_imports_neither_training_nor_the_module_and_training_not_the_module():
    for module in modules():
        if not module.startswith(MODULE):
            assert not [other for other in imports(module) if other.startswith(MODULE)], module
        if module.startswith(LIBRARY):
            assert not [other for other in imports(module) if other.startswith(TRAINING)], module


@pytest.mark.parametrize("package", PLACES)
def test_modules_do_not_import_each_other_in_a_circle(package):
    graph = {m: imports(m, at_file_scope=True) - {m} for m in modules() if room(m) == package or m.startswith(package)}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_slicer_imports_does_not_import_torch():
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; print(sorted({{'torch', 'dask', 'PIL'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_only_one_module_knows_dask():
    knows = {m for m, source in modules().items() if re.search(r"^\s*(import|from) (dask|distributed)\b", source, re.M)}
    assert knows == {"DivRegNetLib.run.cohort.dask"}
