"""Sources, panel description, CMake and the description for the extensions index agree with each other."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "DivRegNet"
UI = ET.parse(MODULE / "Resources" / "UI" / "DivRegNet.ui").getroot()
SOURCES = [MODULE / "DivRegNet.py", *sorted((MODULE / "DivRegNetModule").rglob("*.py"))]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(MODULE).as_posix())
def test_nothing_that_slicer_lacks_is_imported_at_file_scope(source):
    """Slicer reads DivRegNet.py at start; the files beside it are imported before anything may be installed."""
    imported = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset == 0:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            imported |= {name.split(".")[0] for name in names}
    bundled = {"numpy", "SimpleITK", "vtk", "qt", "ctk", "slicer", "DivRegNetLib", "DivRegNetModule"}
    assert imported <= bundled | set(sys.stdlib_module_names)


def test_every_control_that_the_sources_use_is_in_the_ui_file():
    names = {widget.get("name") for widget in UI.iter("widget")}
    used = set(re.findall(r"self\.ui\.(\w+)", (MODULE / "DivRegNet.py").read_text(encoding="utf-8")))
    assert used and used <= names


def parameters() -> dict[str, ast.expr]:
    """Name -> annotation of the parameters, read from the source."""
    tree = ast.parse((MODULE / "DivRegNet.py").read_text(encoding="utf-8"))
    kind = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DivRegNetParameterNode")
    return {n.target.id: n.annotation for n in kind.body if isinstance(n, ast.AnnAssign)}


def test_parameters_and_controls_are_one_to_one():
    names = ("SlicerParameterName", "DivRegNetParameterName")
    bound = [p.findtext("string") for p in UI.iter("property") if p.get("name") in names]
    assert sorted(bound) == sorted(parameters())


def controls() -> list[ET.Element]:
    skip = ("QLabel", "QWidget", "QFrame", "qMRMLWidget")
    return [w for w in UI.iter("widget") if w.get("class") not in skip]


def test_every_control_has_a_tooltip():
    assert [w.get("name") for w in controls() if not w.findtext("property[@name='toolTip']/string")] == []


def test_the_tab_order_is_that_of_the_panel():
    order = [stop.text for stop in UI.find("tabstops")]
    reached = [w.get("name") for w in controls() if w.get("class") not in ("ctkCollapsibleButton", "QProgressBar")]
    assert order == reached


def test_every_field_of_a_form_has_a_label_that_is_its_buddy():
    names = {w.get("name") for w in UI.iter("widget")}
    buddies = [p.findtext("cstring") for p in UI.iter("property") if p.get("name") == "buddy"]
    assert buddies and set(buddies) <= names


def test_every_node_selector_is_given_the_scene():
    selectors = {w.get("name") for w in UI.iter("widget") if "NodeComboBox" in w.get("class")}
    connected = {
        c.findtext("receiver") for c in UI.iter("connection") if c.findtext("slot") == "setMRMLScene(vtkMRMLScene*)"
    }
    assert connected == selectors


def test_slicers_own_widget_classes_are_declared():
    declared = {c.findtext("class") for c in UI.iter("customwidget")}
    assert {w.get("class") for w in UI.iter("widget") if not w.get("class").startswith("Q")} == declared


def test_cmake_lists_every_file_of_the_module():
    text = (MODULE / "CMakeLists.txt").read_text(encoding="utf-8").replace("${MODULE_NAME}", "DivRegNet")
    there = [p.relative_to(MODULE).as_posix() for p in MODULE.rglob("*") if p.suffix in (".py", ".ui", ".svg", ".png")]
    assert [p for p in there if not re.search(rf"^\s*{re.escape(p)}$", text, re.MULTILINE)] == []
    assert "slicer_add_python_unittest(SCRIPT DivRegNet.py)" in text


STAND_IN_CMAKE = """
function(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(MY "WITH_GENERIC_TESTS;WITH_SUBDIR" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  if(MY_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "unknown keywords ${MY_UNPARSED_ARGUMENTS}")
  endif()
  foreach(file ${MY_SCRIPTS} ${MY_RESOURCES})
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/${file} ${CMAKE_BINARY_DIR}/lib/qt-scripted-modules/${file} COPYONLY)
  endforeach()
endfunction()
function(slicer_add_python_unittest)
endfunction()
"""


def test_an_installed_extension_finds_its_library_its_models_and_its_samples(tmp_path):
    """CMake with stand-ins for Slicer's macros, that put files where Slicer's do."""
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    slicer_dir, build = tmp_path / "slicer", tmp_path / "build"
    slicer_dir.mkdir()
    (slicer_dir / "UseSlicer.cmake").write_text(STAND_IN_CMAKE)
    (slicer_dir / "Empty.cmake").write_text("")
    (slicer_dir / "SlicerConfig.cmake").write_text(
        f'set(Slicer_USE_FILE "{slicer_dir}/UseSlicer.cmake")\n'
        f'set(Slicer_EXTENSION_GENERATE_CONFIG "{slicer_dir}/Empty.cmake")\n'
        f'set(Slicer_EXTENSION_CPACK "{slicer_dir}/Empty.cmake")\nset(BUILD_TESTING ON)\n'
    )
    command = ["cmake", "-S", ROOT, "-B", build, f"-DSlicer_DIR={slicer_dir}", "-Wno-dev"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 0, done.stdout + done.stderr
    installed = build / "lib" / "qt-scripted-modules"
    code = (
        "from DivRegNetLib import models; from DivRegNetLib.run import worker;"
        "print(models.__file__); print(models.bundled_folder());"
        "from pathlib import Path; from DivRegNetModule import samples;"
        f"print(samples.folder(Path({str(installed)!r})))"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    library, found, samples = map(Path, run.stdout.split())
    assert library.is_relative_to(installed) and samples == installed / "Resources" / "SampleData"
    if any((ROOT / "Resources" / "Models").glob("*.json")):
        assert found == installed / "Resources" / "Models" and any(found.glob("*.safetensors"))


def test_the_description_for_the_extensions_index_is_of_this_extension():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    description = json.loads((MODULE / "DivRegNet.json").read_text(encoding="utf-8"))
    assert f"project({MODULE.name})" in text and 'set(EXTENSION_DEPENDS "PyTorch")' in text
    assert description["category"] == "Registration" and description["build_dependencies"] == ["PyTorch"]
    home = re.search(r'EXTENSION_HOMEPAGE "([^"]+)"', text).group(1)
    assert description["scm_url"].removesuffix(".git") == home


def test_what_the_extensions_index_checks_of_a_description_holds():
    """scripts/check_description_files.py and the schema of github.com/Slicer/ExtensionsIndex, less what needs a network."""
    content = (MODULE / "DivRegNet.json").read_bytes()
    description = json.loads(content)
    assert content.endswith(b"\n") and not any(mark in content for mark in (b"\r", b"\t"))
    assert "slicer-extension-catalog-entry-schema-v1" in description["$schema"]
    assert {"$schema", "category", "scm_url"} <= set(description)
    assert set(description) <= {
        *("$schema", "category", "scm_url", "scm_revision", "scm_type"),
        *("build_dependencies", "build_subdirectory", "enabled", "tier"),
    }
    assert type(description["tier"]) is int and 1 <= description["tier"] <= 5
    assert description["scm_url"].startswith(("https://", "git://"))
    assert not MODULE.name.lower().startswith("slicer") and (ROOT / "LICENSE").is_file()


def test_the_pictures_for_the_extensions_index_are_in_the_repository():
    """Its checks read these lines with expressions like the following, and load each picture."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    (icon,) = re.findall(r'set\s*\(EXTENSION_ICONURL\s*"([^"]+)"[ ]*\)', text)
    (screenshots,) = re.findall(r'set\s*\(EXTENSION_SCREENSHOTURLS\s*"([^"]+)"\)', text)
    start = "https://raw.githubusercontent.com/DivRegNet/DivRegNet/main/"
    for url in (icon, *screenshots.split()):
        assert url.startswith(start)  # the data, not the page that shows it
        assert (ROOT / url.removeprefix(start)).read_bytes().startswith(b"\x89PNG\r\n")


def test_the_home_page_says_what_the_extensions_index_asks_for():
    """Name, description, a picture, the modules, the publication and the license: its pull request template, tier 1."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# DivRegNet\n") and re.search(r"!\[[^]]+\]\(Resources/Screenshots/\w+\.png\)", text)
    assert (
        "3D Slicer" in text and "Apache License" in text and re.search(r"https://doi\.org/|arXiv|CITATION\.cff", text)
    )
