"""The Slicer module: panel, widget, logic, packaging. What the stand-in for Slicer cannot show is said in its docstring."""

import ast
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from DivRegNetLib import models
from DivRegNetLib.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "DivRegNet"
UI = ET.parse(MODULE / "Resources" / "UI" / "DivRegNet.ui").getroot()
SOURCES = [MODULE / "DivRegNet.py", *sorted((MODULE / "DivRegNetModule").glob("*.py"))]
LAZY = ("torch", "safetensors")

GOOD = {
    "nmi": {"before": 1.05, "aligned": 1.10, "after": 1.15},
    "similarity": {"before": 0.2, "aligned": 0.4, "after": 0.6},
    "folded_percent": 0.0,
    "log_jacobian_sd": 0.1,
    "largest_displacement_mm": 8.0,
    "mean_displacement_mm": 2.0,
    "inverse_consistency_mm": {"mean": 0.05, "largest": 1.0},
}


# --- without Slicer and Qt


def card(**changes) -> models.Card:
    values = {
        "name": "test", "version": "1", "summary": "a test", "modalities": ["T1", "T2"], "anatomy": "head",
        "skull": "either", "spacing_mm": 2.0, "normalization": "robust",
        "methods": ["regnet"], "variational": {}, "refinement": {},
        "regnet": {"channels": [2, 2, 2, 2], "stride": 2}, "kldivnet": None, "training": {"data": "noise"}, "scores": {},
        "license": "Apache-2.0", "sha256": "",
    }  # fmt: skip
    return models.Card(**(values | changes))


def volume(**changes):
    from DivRegNetModule.fit import VolumeFacts

    values = {"name": "v", "size": (180, 220, 180), "spacing": (1.0, 1.0, 1.0), "low": 0.0, "high": 800.0}
    return VolumeFacts(**(values | changes))


def complaints(of_card=None, **changes) -> str:
    from DivRegNetModule.fit import complaints

    return " ".join(complaints(of_card or card(), volume(), volume(**{"name": "moving"} | changes)))


def test_a_head_mr_fits_a_model_for_head_mr():
    assert complaints() == ""
    assert complaints(modality="MR") == ""


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"low": -1024.0, "high": 2000.0}, "CT"),
        ({"modality": "CT"}, "CT"),
        ({"modality": "US"}, "US"),
        ({"size": (256, 256, 20), "spacing": (0.9, 0.9, 7.0)}, "7 mm apart"),
        ({"size": (200, 200, 20)}, "20 mm thick"),
        ({"size": (500, 500, 500)}, "500 x 500 x 500 mm"),
    ],
)
def test_what_does_not_fit_the_card_is_said_of_the_volume_it_is_true_of(changes, word):
    text = complaints(**changes)
    assert word in text and "'moving'" in text and "'v'" not in text


def test_a_ct_fits_a_model_for_ct_and_mr():
    both = card(modalities=["CT", "MR"], anatomy="liver")
    assert complaints(both, low=-1024.0, high=2000.0, size=(400, 400, 300)) == ""


def test_the_limits_of_a_model_are_told_when_something_does_not_fit_and_only_then():
    limited = card(limits="Nothing but heads.")
    assert complaints(limited) == ""
    assert complaints(limited, modality="US").endswith("Nothing but heads.")


def test_an_offset_ct_is_not_taken_for_a_misfit_of_a_ct_model():
    assert "looks like" not in complaints(card(modalities=["CT"]), low=0.0, high=4095.0)


@pytest.mark.parametrize(
    ("changes", "color", "word"),
    [
        ({}, "green", "more than before"),
        ({"nmi": {"before": 1.10, "aligned": 1.08, "after": 1.05}}, "red", "less than before"),
        ({"nmi": {"before": 1.05, "aligned": 1.15, "after": 1.10}}, "red", "worse"),
        ({"nmi": {"before": 1.1, "aligned": 1.1, "after": 1.1}}, "amber", "no more than before"),
        (
            {"nmi": {"before": 1.1, "aligned": 1.1, "after": 1.1}, "mean_displacement_mm": 0.1},
            "green",
            "aligned already",
        ),
        ({"folded_percent": 0.5}, "amber", "0.5 %"),
        ({"folded_percent": 3.0}, "red", "3 %"),
        ({"log_jacobian_sd": 0.9}, "amber", "0.90"),
        ({"largest_displacement_mm": 60.0}, "amber", "60 mm"),
        ({"inverse_consistency_mm": {"mean": 0.9}}, "amber", "0.90 mm"),
        ({"inverse_consistency_mm": {"mean": 9.0}}, "red", "9.00 mm"),
        ({"dice": {"before": 0.8, "after": 0.6}}, "red", "overlap less"),
        ({"dice": {"before": 0.6, "after": 0.8}}, "green", "overlap more"),
        ({"landmark_error_mm": {"before": 3.0, "after": 5.0}}, "red", "further apart"),
        ({"landmark_error_mm": {"before": 5.0, "after": 3.0}}, "green", "closer"),
    ],
)
def test_the_verdict_has_the_gravest_color_and_says_why(changes, color, word):
    from DivRegNetModule.verdict import as_html, judge

    found = judge(GOOD | changes)
    assert found.color == color
    assert word in " ".join(found.reasons)
    assert color == "green" or word in found.reasons[0]
    assert color.upper() in as_html(found)


def test_an_empty_quality_card_is_no_green():
    from DivRegNetModule.verdict import judge

    assert judge({}).color == "amber"
    assert judge(dict.fromkeys(GOOD)).color == "amber"


def test_the_table_shows_every_number_of_the_card_and_leaves_out_what_is_none():
    from DivRegNetModule.verdict import rows, table

    known = rows(GOOD | {"dice": {"before": 0.7, "after": 0.9}}, 3.21, "cpu")
    assert len(known) == 9
    assert dict(known)["Dice"] == "0.700 → 0.900"
    assert not any(what == "Similarity S (nats)" for what, _ in rows(GOOD | {"similarity": None}))
    assert "&lt;script&gt;" in table([("a", "<script>")])


def test_graphics_cards_are_read_from_the_drivers_tool():
    from DivRegNetModule.devices import parse

    assert parse("0, NVIDIA RTX A4000, 15012\n1, Odd, name, 7\n") == [
        (0, "NVIDIA RTX A4000", 15012.0),
        (1, "Odd, name", 7),
    ]
    assert parse("") == []
    with pytest.raises(ValueError):
        parse("no devices were found")


# --- sources and packaging


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
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
    if not shutil_which("cmake"):
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


def shutil_which(name: str) -> str | None:
    import shutil

    return shutil.which(name)


def test_the_description_for_the_extensions_index_is_of_this_extension():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    description = json.loads((MODULE / "DivRegNet.json").read_text(encoding="utf-8"))
    assert f"project({MODULE.name})" in text and 'set(EXTENSION_DEPENDS "PyTorch")' in text
    assert description["category"] == "Registration" and description["build_dependencies"] == ["PyTorch"]
    home = re.search(r'EXTENSION_HOMEPAGE "([^"]+)"', text).group(1)
    assert description["scm_url"].removesuffix(".git") == home


# --- the widget, on a stand-in for Slicer


def stand_in():
    try:
        from slicer_stand_in import running
        from slicer_stand_in import widgets as _widgets  # noqa: F401 -- needs PySide6 and its system libraries
    except ImportError as error:
        pytest.skip(f"PySide6, slicer-core or a system library that they need is not there: {error}")
    return running()


@pytest.fixture
def app():
    with stand_in() as application:
        yield application


@pytest.fixture
def module(app, tmp_path, monkeypatch):
    """The module file, as Slicer loads it; with a tiny model of random weights as the only one."""
    import torch
    from render_panel import load_module

    from DivRegNetLib.registration.regnet import RegNet, RegNetConfig

    torch.manual_seed(0)
    config = RegNetConfig(channels=(2, 2, 2, 2))
    folder = tmp_path / "models"
    for name in (models.DEFAULT, "other"):
        models.save(folder, card(name=name, regnet=config.as_dict(), spacing_mm=4.0), RegNet(config), None)
    monkeypatch.setenv(models.ENVIRONMENT, str(folder))
    return load_module(app)


@pytest.fixture
def widget(module):
    from render_panel import make_widget

    made = make_widget(module)
    yield made
    made.cleanup()
    gc.freeze()  # Qt's objects hold each other and end the process where they are collected in another order


@pytest.fixture
def pair(app):
    """Two blobs on unlike oblique grids, in the scene."""
    return add_blob("fixed", (30, 26, 22), 0.0), add_blob("moving", (24, 30, 26), 3.0)


def add_blob(name: str, size, shift: float):
    import slicer

    k, j, i = np.indices(size[::-1])
    middle = (np.array(size) - 1) / 2
    r = np.sqrt((3 * (i - middle[0] - shift / 3)) ** 2 + (3 * (j - middle[1])) ** 2 + (3.5 * (k - middle[2])) ** 2)
    array = (600 / (1 + np.exp((r - 25) / 3)) + 200 / (1 + np.exp((r - 12) / 3))).astype(np.int16)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    slicer.util.updateVolumeFromArray(node, array)
    matrix = np.eye(4)
    angle = 0.2
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, :3] = matrix[:3, :3] @ np.diag([3.0, 3.0, 3.5])
    matrix[:3, 3] = -matrix[:3, :3] @ middle
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrix))
    node.CreateDefaultDisplayNodes()
    return node


def add_segmentation(volume_node, segments: dict):
    """A segmentation in the scene; segments are arrays (D, H, W) on the grid of a volume node, by name."""
    import slicer
    import vtk
    from vtk.util.numpy_support import numpy_to_vtk

    matrix = vtk.vtkMatrix4x4()
    volume_node.GetIJKToRASMatrix(matrix)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{volume_node.GetName()} segments")
    for name, array in segments.items():
        image = slicer.vtkOrientedImageData()
        image.SetDimensions(array.shape[::-1])
        image.GetPointData().SetScalars(numpy_to_vtk(array.astype(np.uint8).ravel(), deep=1))
        image.SetGeometryFromImageToWorldMatrix(matrix)
        segment = slicer.vtkSegment()
        segment.SetName(name)
        segment.AddRepresentation(slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName(), image)
        node.GetSegmentation().AddSegment(segment)
    return node


@pytest.fixture
def ready(widget, pair):
    """The widget with two volumes chosen, no initial alignment (the fastest), on the CPU."""
    p = widget._parameterNode
    p.fixedVolume, p.movingVolume = pair
    p.alignment = type(p.alignment).NONE
    p.device = "cpu"
    return widget


def wait(widget, seconds: float = 120.0, until=lambda: False) -> None:
    """Turns the event loop, which the widget's own timer polls the worker from, until the run is over."""
    import slicer

    end = time.monotonic() + seconds
    while widget._run is not None and not until():
        assert time.monotonic() < end, "the run does not end"
        slicer.app.processEvents()
        time.sleep(0.01)


def census() -> set[str]:
    import slicer

    return {slicer.mrmlScene.GetNthNode(i).GetID() for i in range(slicer.mrmlScene.GetNumberOfNodes())}


def test_the_panel_loads_and_shows_the_models_and_devices(widget):
    models_ = widget.ui.modelComboBox
    assert [models_.itemData(i) for i in range(models_.count)] == [models.DEFAULT, "other"]
    assert "For T1, T2 of the head" in widget.ui.cardLabel.text and "Trained on noise" in widget.ui.cardLabel.text
    assert [widget.ui.deviceComboBox.itemData(i) for i in range(2)] == ["auto", "cpu"]
    assert widget.ui.alignmentComboBox.currentText == "Affine"


def test_register_waits_for_two_volumes_and_says_so(widget, pair):
    assert not widget.ui.registerButton.enabled
    assert "Choose a fixed and a moving volume" in widget.ui.registerButton.toolTip
    widget._parameterNode.fixedVolume, widget._parameterNode.movingVolume = pair
    assert widget.ui.registerButton.enabled and not widget.ui.cancelButton.enabled


def test_choices_in_the_panel_reach_the_parameters_and_back(widget, pair):
    p = widget._parameterNode
    widget.ui.fixedSelector.setCurrentNode(pair[1])
    widget.ui.refineSpinBox.setValue(7)
    widget.ui.modelComboBox.setCurrentIndex(1)
    widget.ui.inverseCheckBox.setChecked(True)
    widget.ui.alsoApplyToSelector.check(pair[0])
    assert (p.fixedVolume.GetName(), p.refineSteps, p.model, p.giveInverse) == ("moving", 7, "other", True)
    assert [node.GetName() for node in p.alsoApplyTo] == ["fixed"]
    p.workingSpacing, p.device = 2.5, "cpu"
    assert widget.ui.spacingSpinBox.value == 2.5
    assert widget.ui.deviceComboBox.itemData(widget.ui.deviceComboBox.currentIndex) == "cpu"


def test_the_first_two_volumes_are_chosen_when_the_module_is_opened(widget, pair):
    widget.enter()
    assert (widget._parameterNode.fixedVolume, widget._parameterNode.movingVolume) == pair


def test_a_model_of_another_computer_is_kept_and_shown_as_missing(widget):
    widget._parameterNode.model = "elsewhere"
    assert "elsewhere (not found)" in widget.ui.modelComboBox.currentText
    assert "no model 'elsewhere'" in widget.ui.cardLabel.text
    widget.enter()
    assert widget._parameterNode.model == "elsewhere"


@pytest.mark.parametrize("kind", ["label map", "same", "empty", "no transform"])
def test_what_cannot_be_registered_is_refused_with_a_reason(ready, pair, kind):
    import slicer

    p = ready._parameterNode
    if kind == "label map":
        labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
        labels.SetAndObserveImageData(pair[0].GetImageData())
        p.movingVolume, word = labels, "'labels' is a label map"
    elif kind == "same":
        p.movingVolume, word = pair[0], "are the same"
    elif kind == "empty":
        p.movingVolume, word = (
            slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "nothing"),
            "'nothing' is empty",
        )
    else:
        p.alignment, word = type(p.alignment).TRANSFORM, "initial transform"
    assert not ready.ui.registerButton.enabled
    assert word in ready.ui.registerButton.toolTip


def test_a_misfit_is_told_before_register_and_does_not_block(ready, pair):
    import slicer

    assert "looks like CT" not in ready.ui.fitLabel.text
    array = slicer.util.arrayFromVolume(pair[1])
    array[:] = array * 3 - 1000
    slicer.util.arrayFromVolumeModified(pair[1])
    ready._refresh()
    assert "'moving' looks like CT" in ready.ui.fitLabel.text and ready.ui.fitLabel.visible
    assert ready.ui.registerButton.enabled


def test_memory_follows_the_working_resolution(ready):
    before = ready.ui.memoryLabel.text
    ready._parameterNode.workingSpacing = 1.0
    assert "voxels" in before and ready.ui.memoryLabel.text != before


def test_segments_are_offered_where_the_mask_is_a_segmentation(ready, pair):
    import slicer

    array = slicer.util.arrayFromVolume(pair[0])
    segmentation = add_segmentation(pair[0], {"liver": array > 300, "spleen": array > 500})
    ids = [segmentation.GetSegmentation().GetNthSegmentID(i) for i in range(2)]
    p = ready._parameterNode
    assert not ready.ui.fixedSegmentComboBox.enabled
    p.fixedMask = segmentation
    assert ready.ui.fixedSegmentComboBox.enabled and p.fixedSegment == ids[0]
    ready.ui.fixedSegmentComboBox.setCurrentIndex(1)
    assert p.fixedSegment == ids[1]
    from DivRegNetModule import inputs

    assert inputs.request(p).options["fixed_mask"] == (segmentation, ids[1])
    p.fixedMask = None
    assert p.fixedSegment == "" and inputs.request(p).options["fixed_mask"] is None


def test_a_registration_runs_in_another_process_and_its_result_can_be_looked_at_and_taken_back(ready, pair, app):
    import slicer
    from DivRegNetModule import comparison

    view = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode", "Red")
    view.SetBackgroundVolumeID(pair[1].GetID())
    ready._parameterNode.giveInverse = True
    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.AddControlPoint(1, 2, 3)
    ready._parameterNode.alsoApplyTo = [points]
    ready._parameterNode.fixedLandmarks = ready._parameterNode.movingLandmarks = points
    before = census()
    ready.ui.registerButton.click()
    assert ready._run is not None, ready.ui.messageLabel.text
    assert not ready.ui.registerButton.enabled and ready.ui.cancelButton.enabled and ready.ui.progressBar.visible
    told = []
    ready.ui.progressBar.valueChanged.connect(told.append)
    wait(ready)
    assert len(told) > 1 and told == sorted(told)
    outcome = ready._outcome
    assert outcome is not None, ready.ui.messageLabel.text
    assert ready.ui.resultCollapsibleButton.visible
    assert "NMI" in ready.ui.qualityLabel.text and "Landmark error" in ready.ui.qualityLabel.text
    assert any(word in ready.ui.verdictLabel.text for word in ("GREEN", "AMBER", "RED"))
    assert ready.ui.registerButton.enabled and not ready.ui.cancelButton.enabled and not ready.ui.progressBar.visible
    registration = outcome.registration
    assert registration.warped_node.GetImageData().GetDimensions() == pair[0].GetImageData().GetDimensions()
    assert registration.inverse_node is not None and len(outcome.carried) == 1
    assert view.GetBackgroundVolumeID() == pair[0].GetID()
    assert view.GetForegroundVolumeID() == registration.warped_node.GetID() and view.GetForegroundOpacity() == 0.5

    ready._comparison._timer.setInterval(5)
    ready.ui.flickerButton.click()
    seen = set()
    for _ in range(40):
        app.processEvents()
        time.sleep(0.005)
        seen.add(view.GetForegroundOpacity())
    assert {0.0, 1.0} <= seen
    ready.ui.checkerboardButton.click()  # ends the flicker
    assert not ready.ui.flickerButton.checked
    board = slicer.mrmlScene.GetNodeByID(view.GetBackgroundVolumeID())
    assert not board.GetSaveWithScene()
    fixed, warped = (slicer.util.arrayFromVolume(n) for n in (pair[0], registration.warped_node))
    assert np.array_equal(slicer.util.arrayFromVolume(board), comparison.checkerboard(fixed, warped))
    ready.ui.checkerboardButton.click()
    assert slicer.mrmlScene.GetNodeByID(board.GetID() or "") is None
    assert view.GetBackgroundVolumeID() == pair[0].GetID()
    ready.ui.gridButton.click()
    display = registration.transform_node.GetDisplayNode()
    assert display.GetVisibility() and display.GetVisibility2D()
    assert display.GetVisualizationMode() == display.VIS_MODE_GRID
    ready.ui.gridButton.click()
    assert not display.GetVisibility()

    ready.ui.undoButton.click()
    assert census() == before
    assert view.GetBackgroundVolumeID() == pair[1].GetID()
    assert not ready.ui.resultCollapsibleButton.visible


def test_undo_gives_an_overwritten_volume_its_content_back(ready, pair):
    import slicer

    target = add_blob("target", (5, 6, 7), 0.0)
    content = slicer.util.arrayFromVolume(target).copy()
    ready._parameterNode.warpedVolume = target
    before = census()
    ready.onRegister()
    wait(ready)
    assert ready._outcome.registration.warped_node is target
    assert target.GetImageData().GetDimensions() == pair[0].GetImageData().GetDimensions()
    ready.onUndo()
    assert np.array_equal(slicer.util.arrayFromVolume(target), content)
    assert census() == before


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def test_cancel_ends_the_process_and_leaves_the_scene_as_it_was(ready):
    before = census()
    ready.onRegister()
    pid = ready._run._worker.pid
    assert alive(pid)
    ready.ui.cancelButton.click()
    assert not alive(pid)
    assert census() == before
    assert "Cancelled" in ready.ui.messageLabel.text
    assert ready.ui.registerButton.enabled and not ready.ui.cancelButton.enabled


def test_a_killed_worker_becomes_a_message_that_offers_a_way_out(ready):
    before = census()
    ready.onRegister()
    os.kill(ready._run._worker.pid, 9)
    wait(ready)
    assert census() == before and ready._outcome is None
    assert "signal 9" in ready.ui.messageLabel.text
    assert ready.ui.retryCoarserButton.visible and not ready.ui.retryCpuButton.visible  # it is the CPU already
    ready.ui.retryCoarserButton.click()
    assert ready._parameterNode.workingSpacing == 6.0
    assert not ready.ui.retryCoarserButton.visible
    wait(ready)
    assert ready._outcome is not None, ready.ui.messageLabel.text


def test_a_device_that_is_not_there_becomes_a_message_that_offers_the_cpu(ready):
    ready._parameterNode.device = "cuda:99"
    ready.onRegister()
    wait(ready)
    assert "cuda:99" in ready.ui.messageLabel.text and ready.ui.retryCpuButton.visible
    ready.ui.retryCpuButton.click()
    wait(ready)
    assert ready._parameterNode.device == "cpu" and ready._outcome is not None


def test_a_failure_while_another_module_is_shown_is_told_in_a_dialog(ready, app):
    ready._parameterNode.device = "cuda:99"
    ready.onRegister()
    ready.exit()
    ready.parent.isEntered = False
    wait(ready)
    assert any("cuda:99" in text for text in app.shown)
    ready.parent.isEntered = True


def test_closing_the_scene_during_a_run_ends_it(ready, app):
    import slicer

    ready.onRegister()
    pid = ready._run._worker.pid
    slicer.mrmlScene.Clear(0)
    app.processEvents()
    assert ready._run is None and not alive(pid)
    assert ready._parameterNode is not None and ready._parameterNode.fixedVolume is None
    assert not ready.ui.registerButton.enabled and not ready.ui.resultCollapsibleButton.visible


@pytest.mark.parametrize("which", ["fixedVolume", "movingVolume", "warpedVolume"])
def test_deleting_a_node_of_the_run_ends_it(ready, which):
    import slicer

    ready._parameterNode.warpedVolume = add_blob("target", (5, 6, 7), 0.0)
    ready.onRegister()
    pid = ready._run._worker.pid
    slicer.mrmlScene.RemoveNode(getattr(ready._parameterNode, which))
    assert ready._run is None and not alive(pid)
    assert "was deleted" in ready.ui.messageLabel.text


def test_deleting_a_node_that_was_to_be_carried_along_is_survived(ready):
    import slicer

    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.AddControlPoint(1, 2, 3)
    ready._parameterNode.alsoApplyTo = [points]
    ready.onRegister()
    slicer.mrmlScene.RemoveNode(points)
    wait(ready)
    assert ready._outcome is not None and ready._outcome.carried == []


def test_leaving_the_module_during_a_run_lets_it_finish(ready):
    ready.onRegister()
    ready.exit()
    wait(ready)
    assert ready._outcome is not None
    ready.enter()
    assert ready.ui.registerButton.enabled and ready.ui.resultCollapsibleButton.visible


def test_deleting_the_fixed_volume_ends_the_comparison(ready, pair):
    import slicer

    ready.onRegister()
    wait(ready)
    ready.ui.flickerButton.click()
    slicer.mrmlScene.RemoveNode(pair[0])
    assert ready._comparison is None and not ready.ui.flickerButton.checked


def test_unloading_the_module_leaves_no_process(module, pair):
    from render_panel import make_widget

    widget = make_widget(module)
    widget._parameterNode.fixedVolume, widget._parameterNode.movingVolume = pair
    widget.onRegister()
    pid = widget._run._worker.pid
    widget.cleanup()
    assert not alive(pid) and widget.Observations == []


def test_the_settings_are_saved_with_the_scene(ready, pair, tmp_path):
    import slicer

    p = ready._parameterNode
    p.refineSteps, p.model, p.interpolation = 12, "other", type(p.interpolation).BSPLINE
    scene = tmp_path / "scene.mrml"
    slicer.mrmlScene.SetURL(str(scene))
    assert slicer.mrmlScene.Commit()
    slicer.mrmlScene.Clear(0)
    assert ready._parameterNode.refineSteps == 0
    slicer.mrmlScene.SetURL(str(scene))
    slicer.mrmlScene.Import()
    ready.initializeParameterNode()
    p = ready._parameterNode
    assert (p.refineSteps, p.model, p.interpolation.value) == (12, "other", "bspline")
    assert p.fixedVolume.GetName() == "fixed" and p.alignment.value == "none"


# --- logic


def test_the_logic_registers_nodes_without_a_panel(module, pair):
    stages = []
    outcome = module.DivRegNetLogic().process(
        *pair, align="none", device="cpu", inverse=True, progress=lambda stage, fraction: stages.append(stage)
    )
    assert outcome.registration.inverse_node is not None and outcome.quality["nmi"]["after"] > 1
    assert stages[0] == "check" and stages[-1] == "outputs"


def test_the_logic_measures_segmentations_and_landmarks(module, pair):
    import slicer

    segmentations, landmarks = [], []
    for node in pair:
        segmentations.append(add_segmentation(node, {"core": slicer.util.arrayFromVolume(node) > 300}))
        points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", f"{node.GetName()} p")
        points.AddControlPoint(len(landmarks) * 3.0, 0, 0)
        landmarks.append(points)
    outcome = module.DivRegNetLogic().process(
        *pair, align="none", device="cpu", segmentations=segmentations, landmarks=landmarks
    )
    assert outcome.quality["landmark_error_mm"]["before"] == pytest.approx(3.0)
    u = outcome.registration.result.transform.TransformPoint((0.0, 0.0, 0.0))
    expected = np.linalg.norm(np.array(u) - (-3.0, 0.0, 0.0))
    assert outcome.quality["landmark_error_mm"]["after"] == pytest.approx(expected, abs=1e-4)
    assert 0.5 < outcome.quality["dice"]["before"] < 1
    assert outcome.notes == []
    extra = landmarks[1]
    extra.AddControlPoint(0, 0, 0)
    outcome = module.DivRegNetLogic().process(*pair, align="none", device="cpu", landmarks=landmarks)
    assert "landmark_error_mm" not in outcome.quality and "landmarks" in outcome.notes[0]


def test_the_logic_refuses_in_words_and_leaves_the_scene_as_it_was(module, pair):
    before = census()
    process = module.DivRegNetLogic().process
    for volumes, options, word in (
        ((None, pair[1]), {}, "fixed"),
        ((pair[0], pair[0]), {}, "two different"),
        (pair, {"refine": -1}, "refine"),
        (pair, {"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises(InputError, match=word):
            process(*volumes, **options)
    assert census() == before


def test_a_failure_after_the_volumes_were_made_takes_them_back(module, pair, monkeypatch):
    import slicer

    target = add_blob("target", (5, 6, 7), 0.0)
    content = slicer.util.arrayFromVolume(target).copy()
    empty = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty")  # cannot be carried along
    before = census()
    with pytest.raises(InputError, match="empty"):
        module.DivRegNetLogic().process(*pair, align="none", device="cpu", warpedVolume=target, alsoApplyTo=[empty])
    assert census() == before
    assert np.array_equal(slicer.util.arrayFromVolume(target), content)


def test_the_logic_can_be_cancelled(module, pair):
    from DivRegNetLib.errors import Cancelled

    before = census()
    with pytest.raises(Cancelled):
        module.DivRegNetLogic().process(*pair, align="none", device="cpu", progress=lambda stage, fraction: False)
    assert census() == before


# --- first use


@pytest.fixture
def without_torch(monkeypatch, module):
    from DivRegNetModule import first_use

    there = {"version": ""}
    monkeypatch.setattr(first_use, "torch_version", lambda: there["version"])
    return there


def test_without_torch_the_module_opens_and_register_asks_before_it_installs(without_torch, ready, app, monkeypatch):
    asked = []

    class Logic:
        def installTorch(self, askConfirmation, torchVersionRequirement):
            asked.append((askConfirmation, torchVersionRequirement))
            without_torch["version"] = "2.5.1+cpu"
            return object()

    monkeypatch.setitem(sys.modules, "PyTorchUtils", type(sys)("PyTorchUtils"))
    sys.modules["PyTorchUtils"].PyTorchUtilsLogic = Logic
    app.answers = [False]
    ready.onRegister()
    assert asked == [] and ready._run is None and "PyTorch" in app.shown[0]
    assert "needs PyTorch" in ready.ui.messageLabel.text and ready.ui.registerButton.enabled
    ready.onRegister()  # agrees this time
    assert asked == [(True, ">=2.5")] and ready._run is not None


def test_without_the_pytorch_extension_it_is_offered_and_a_restart_asked_for(without_torch, ready, app, monkeypatch):
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    installed = []
    app.extensionsManagerModel = lambda: type(
        "M", (), {"installExtensionFromServer": lambda s, n: installed.append(n) or True}
    )()
    ready.onRegister()
    assert installed == ["PyTorch"] and "Restart Slicer" in ready.ui.messageLabel.text
    app.extensionsManagerModel = lambda: type("M", (), {"installExtensionFromServer": lambda s, n: False})()
    ready.onRegister()
    assert "offline" in ready.ui.messageLabel.text and "Install from file" in ready.ui.messageLabel.text


def test_an_installation_that_fails_says_what_to_do_offline(without_torch, ready, monkeypatch):
    class Logic:
        def installTorch(self, **_):
            raise RuntimeError("no route to host")

    monkeypatch.setitem(sys.modules, "PyTorchUtils", type(sys)("PyTorchUtils"))
    sys.modules["PyTorchUtils"].PyTorchUtilsLogic = Logic
    ready.onRegister()
    text = ready.ui.messageLabel.text
    assert "no route to host" in text and "pip download" in text and "--find-links" in text


def test_nothing_is_installed_in_testing_mode(without_torch, ready, app):
    app.testing = True
    ready.onRegister()
    assert "Not installed: torch>=2.5" in ready.ui.messageLabel.text and app.shown == []


def test_scripts_are_told_that_torch_is_missing(without_torch, module, pair):
    from DivRegNetModule.first_use import NotReady

    before = census()
    with pytest.raises(NotReady, match="torch"):
        module.DivRegNetLogic().process(*pair)
    assert census() == before


@pytest.mark.parametrize(
    ("version", "fits"), [("2.5.0", True), ("2.13.0+cu128", True), ("2.4.1", False), ("1.13.1", False)]
)
def test_an_old_torch_is_not_enough(without_torch, version, fits):
    from DivRegNetModule import first_use

    without_torch["version"] = version
    assert (not [need for need in first_use.missing() if need.startswith("torch")]) == fits


def test_loading_the_module_and_opening_the_panel_imports_no_torch():
    folders = [str(ROOT / "Testing" / name) for name in ("helpers", "tools")]
    code = (
        f"import sys; sys.path[:0] = {folders!r}\n"
        "from slicer_stand_in import running\n"
        "with running() as app:\n"
        "    from render_panel import load_module, make_widget\n"
        "    make_widget(load_module(app)).cleanup()\n"
        "    import DivRegNetLib\n"
        "    print(DivRegNetLib.__file__)\n"
        f"    print([name for name in {LAZY!r} if name in sys.modules])\n"
    )
    with stand_in():
        pass
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    library, imported = done.stdout.strip().splitlines()
    assert Path(library).parent.parent == ROOT  # found from the module's folder alone
    assert imported == "[]"


def test_the_pairs_that_are_shipped_are_offered_in_sample_data(module, monkeypatch):
    from DivRegNetModule import samples

    registered = []

    class Logic:
        @staticmethod
        def registerCustomSampleDataSource(**source):
            registered.append(source)

    monkeypatch.setitem(sys.modules, "SampleData", type(sys)("SampleData"))
    sys.modules["SampleData"].SampleDataLogic = Logic
    module.registerSampleData()
    assert [source["sampleName"] for source in registered] == list(samples.PAIRS)
    assert all((samples.folder(MODULE) / file).is_file() for source in registered for file in source["fileNames"])
    assert all(Path(source["thumbnailFileName"]).is_file() for source in registered)


def test_the_self_tests_are_complete_and_are_found_by_unittest(module):
    import unittest

    names = unittest.TestLoader().getTestCaseNames(module.DivRegNetTest)
    assert len(names) >= 7 and any("WithoutTorch" in name for name in names)


def test_slice_views_are_rendered_and_differ_between_fixed_on_moving_and_fixed_on_warped(tmp_path):
    import ctypes.util

    import SimpleITK as sitk

    if sys.platform != "linux" or not (os.environ.get("DISPLAY") or ctypes.util.find_library("OSMesa")):
        pytest.skip("there is neither a display nor OSMesa to render with")
    k, j, i = np.indices((20, 24, 28))
    for name, shift in (("fixed", 0), ("moving", 6)):
        array = 100.0 * ((i - 14 - shift) ** 2 + (j - 12) ** 2 + (k - 10) ** 2 < 50)
        sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.float32)), tmp_path / f"{name}.nii.gz")
    sitk.WriteTransform(sitk.TranslationTransform(3, (6.0, 0.0, 0.0)), tmp_path / "t.h5")
    files = [str(tmp_path / name) for name in ("fixed.nii.gz", "moving.nii.gz", "fixed.nii.gz", "out.png")]
    script = [sys.executable, str(ROOT / "Testing" / "tools" / "render_slices.py")]
    done = subprocess.run([*script, *files, "--transform", str(tmp_path / "t.h5")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picture = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "out.png")).astype(int)
    assert picture.shape == (1200, 1200, 3)
    before, after, grid = picture[:400, :400], picture[:400, 400:800], picture[:400, 800:]
    assert len(np.unique(after)) > 1 and np.abs(before - after).max() > 50
    colored = [(np.ptp(view, axis=-1) > 60).sum() for view in (after, grid)]
    assert colored[0] == 0 and colored[1] > 500  # the lines of the grid are colored by displacement


def test_the_panel_is_rendered(tmp_path, monkeypatch):
    stages = {"before": 1.0, "aligned": 1.1, "after": 1.2}
    quality = {
        "nmi": stages,
        "labels": {s: {"mean": {"dice": 0.5}} for s in stages},
        "landmarks_mm": {s: {"mean": 2.0} for s in stages},
    }
    report = {"quality": quality, "seconds": {"predict": 1.5}, "settings": {"device": "cpu"}}
    (tmp_path / "quality.json").write_text(json.dumps(report))
    with stand_in():
        pass
    spec = importlib.util.find_spec("render_panel")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path, tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 20_000
