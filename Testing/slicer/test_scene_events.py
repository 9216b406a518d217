"""Scenes that are saved, opened and closed, and nodes that come and go, while the panel is shown."""

from pathlib import Path

import numpy as np
import pytest
from mrml_scenes import add_segmentation
from panel import add_blob, census, wait, wait_for


def save(folder) -> str:
    """Saves the scene with all data, as Slicer does."""
    import slicer

    for i in range(slicer.mrmlScene.GetNumberOfNodes()):
        node = slicer.mrmlScene.GetNthNode(i)
        if node.IsA("vtkMRMLStorableNode") and node.GetSaveWithScene() and node.AddDefaultStorageNode():
            storage = node.GetStorageNode()
            storage.SetFileName(str(folder / f"{node.GetID()}.{storage.GetDefaultWriteFileExtension()}"))
            storage.WriteData(node)
    slicer.mrmlScene.SetRootDirectory(str(folder))
    slicer.mrmlScene.SetURL(str(folder / "scene.mrml"))
    assert slicer.mrmlScene.Commit()
    return str(folder / "scene.mrml")


def load(file: str) -> None:
    import slicer

    slicer.mrmlScene.SetURL(file)
    slicer.mrmlScene.Import()


@pytest.fixture
def furnished(ready, pair):
    """The panel with every node parameter chosen."""
    import slicer

    array = slicer.util.arrayFromVolume(pair[0])
    segmentation = add_segmentation(pair[0], {"first": array > 300, "second": array > 500})
    points = [slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", n) for n in ("pf", "pm")]
    for node in points:
        node.AddControlPoint(1, 2, 3)
    p = ready._parameterNode
    p.fixedMask = segmentation
    p.fixedSegment = segmentation.GetSegmentation().GetNthSegmentID(1)
    p.fixedLandmarks, p.movingLandmarks = points
    p.alsoApplyTo = [points[1], segmentation]
    p.refineSteps = 7
    return ready


def chosen(p) -> dict:
    """What the parameters say, by names of nodes."""
    from DivRegNetModule import inputs

    names = {name: getattr(p.getValue(name), "GetName", lambda: None)() for name in inputs.NODES}
    also = sorted(node.GetName() for node in p.alsoApplyTo)
    return names | {"also": also, "segment": p.fixedSegment, "refine": p.refineSteps, "alignment": p.alignment}


@pytest.mark.parametrize("first", ["close", "add"])
def test_opening_a_saved_scene_changes_none_of_its_parameters(furnished, tmp_path, first):
    """Fault 1: selectors lose their selection at the end of an import (qMRMLSceneModel::updateScene) and wrote it back."""
    import slicer

    before = chosen(furnished._parameterNode)
    assert all(
        before[name] for name in ("fixedVolume", "movingVolume", "fixedMask", "fixedLandmarks", "also", "segment")
    )
    file = save(tmp_path)
    if first == "close":
        slicer.mrmlScene.Clear(0)
        assert furnished._parameterNode.fixedVolume is None
    load(file)
    p = furnished._parameterNode
    assert chosen(p) == before
    ui = furnished.ui
    assert (
        ui.fixedSelector.currentNode() is p.fixedVolume and ui.fixedLandmarksSelector.currentNode() is p.fixedLandmarks
    )
    assert ui.fixedMaskSelector.currentNode() is p.fixedMask
    assert ui.fixedSegmentComboBox.currentText == "second"
    assert ui.alsoApplyToSelector.names().count(",") == 1


def test_nothing_is_written_during_a_batch(furnished):
    import slicer

    before = chosen(furnished._parameterNode)
    scene = slicer.mrmlScene
    scene.StartState(scene.BatchProcessState)
    assert furnished._parameterNode is None
    furnished.ui.refineSpinBox.setValue(99)
    furnished.ui.fixedLandmarksSelector.setCurrentNode(None)
    scene.EndState(scene.BatchProcessState)
    assert chosen(furnished._parameterNode) == before
    assert furnished.ui.refineSpinBox.value == 7


def test_a_scene_saved_while_it_is_compared_opens_with_the_fixed_volume_and_without_grid(ready, pair, tmp_path):
    """Fault 6: black views, the grid on and its button off. Slicer has no event before it saves."""
    import slicer

    ready.onRegister()
    wait(ready)
    ready.ui.checkerboardButton.click()
    wait_for(lambda: not ready._comparison.busy)
    ready.ui.gridButton.click()
    file = save(tmp_path)
    slicer.mrmlScene.Clear(0)
    load(file)
    names = {n.GetName() for n in slicer.util.getNodesByClass("vtkMRMLVolumeNode")}
    assert names == {"fixed", "moving", "moving warped to fixed"}
    assert not slicer.util.getNodesByClass("vtkMRMLTransformDisplayNode")
    assert not [n for n in slicer.util.getNodesByClass("vtkMRMLProceduralColorNode") if "grid" in n.GetName()]
    (fixed,) = [n for n in slicer.util.getNodesByClass("vtkMRMLVolumeNode") if n.GetName() == "fixed"]
    for view in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        assert view.GetBackgroundVolumeID() == fixed.GetID()
        over = slicer.mrmlScene.GetNodeByID(view.GetForegroundVolumeID() or "")
        assert over is None or over.GetName() == "moving warped to fixed"


@pytest.mark.parametrize("compared", [True, False])
def test_the_result_comes_back_with_its_scene_and_is_compared_if_it_was(ready, pair, tmp_path, compared):
    """A scene that was saved while its result was compared opened with the fixed volume alone, and without the verdict."""
    import slicer
    from panel import layers

    points = []
    for name, shift in (("pf", 0.0), ("pm", 3.0)):
        points.append(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", name))
        points[-1].AddControlPoint(1 + shift, 2, 3, "nose")
    ready._parameterNode.fixedLandmarks, ready._parameterNode.movingLandmarks = points
    ready.onRegister()
    wait(ready)
    ui = ready.ui
    verdict, initial = ui.verdictLabel.text, ready._outcome.initial
    if not compared:
        ui.restoreViewsButton.click()
    file = save(tmp_path)
    slicer.mrmlScene.Clear(0)
    assert not ui.resultCollapsibleButton.visible
    load(file)
    assert ui.resultCollapsibleButton.visible and ui.verdictLabel.text == verdict
    assert ui.pairLabel.text == "moving to fixed" and ui.landmarksTable.item(0, 0).text() == "nose"
    assert not ui.undoButton.enabled  # what the nodes held before is not in the scene
    assert np.array_equal(ready._outcome.initial, initial)
    over = {slicer.mrmlScene.GetNodeByID(foreground or "") for _background, foreground, *_ in layers()}
    if compared:
        assert {node.GetName() for node in over} == {"moving warped to fixed"}
    else:
        assert over == {None}
    ui.beforeButton.click()
    assert all(slicer.mrmlScene.GetNodeByID(foreground).GetName() == "moving" for _b, foreground, *_ in layers())
    ready._parameterNode.movingVolume = None  # what is shown next is no registration of the two
    ready._forgetOutcome()
    ready.enter()
    assert not ui.resultCollapsibleButton.visible


@pytest.mark.parametrize(("saved_as", "expected"), [("CENTRE", "center"), ("BANANA", "affine")])
def test_a_scene_of_another_version_is_opened_all_the_same(ready, pair, tmp_path, saved_as, expected):
    """Slicer saves the name of an enumeration's member, and raises at a name it does not find. Version 0.1 had "CENTRE", and
    up to 1000 steps of refinement."""
    import slicer

    ready._parameterNode.alignment = type(ready._parameterNode.alignment).CENTER
    file = Path(save(tmp_path))
    text = file.read_text()
    assert "CENTER" in text and "refineSteps 0" in text
    slicer.mrmlScene.Clear(0)
    file.write_text(text.replace("CENTER", saved_as).replace("refineSteps 0", "refineSteps 700"))
    load(str(file))
    p = ready._parameterNode
    assert (p.alignment.value, p.refineSteps, p.fixedVolume.GetName()) == (expected, 200, "fixed")
    assert ready.ui.alignmentComboBox.currentText == p.alignment.label() and ready.ui.refineSpinBox.value == 200
    assert "wrong" not in ready.ui.messageLabel.text


def test_closing_the_scene_during_a_run_is_said(ready, app):
    """Fault 15."""
    import slicer

    ready.onRegister()
    slicer.mrmlScene.Clear(0)
    app.processEvents()
    assert ready._run is None and "scene was closed" in ready.ui.messageLabel.text


def test_volumes_that_are_loaded_while_the_panel_is_open_are_chosen_if_none_is(widget, app):
    """Fault 18."""
    p = widget._parameterNode
    one = add_blob("one", (30, 26, 22), 0.0)
    app.processEvents()
    assert p.fixedVolume is None and p.movingVolume is None
    two = add_blob("two", (24, 30, 26), 3.0)
    app.processEvents()
    assert (p.fixedVolume, p.movingVolume) == (one, two)
    add_blob("three", (24, 30, 26), 3.0)
    app.processEvents()
    assert (p.fixedVolume, p.movingVolume) == (one, two)


def test_a_deleted_node_leaves_its_parameter_empty_and_no_other_is_chosen_instead(furnished, pair):
    """QComboBox shows the row after the one that is removed: it would become the mask, or be overwritten as an output."""
    import slicer

    p = furnished._parameterNode
    target, other = add_blob("target", (5, 6, 7), 0.0), add_blob("other", (5, 6, 7), 0.0)
    p.warpedVolume = target
    slicer.mrmlScene.RemoveNode(target)
    assert p.warpedVolume is None and furnished.ui.warpedSelector.currentNode() is None
    slicer.mrmlScene.RemoveNode(p.fixedLandmarks)
    assert p.fixedLandmarks is None
    carried = p.alsoApplyTo[0]
    slicer.mrmlScene.RemoveNode(carried)
    assert len(p.alsoApplyTo) == 1 and slicer.mrmlScene.IsNodePresent(other)


def test_undo_after_a_run_chooses_no_other_output(ready, pair):
    add_blob("other", (5, 6, 7), 0.0)
    before = census()
    ready.onRegister()
    wait(ready)
    p = ready._parameterNode
    assert p.warpedVolume.GetName() == "moving warped to fixed"
    ready.onUndo()
    assert p.warpedVolume is None and p.transform is None and census() == before


def test_also_apply_to_is_painted_again_after_a_program_has_changed_it(furnished, app):
    """Fault 20: ctkCheckableComboBox does not repaint by itself."""
    from DivRegNetModule.connectors import boxes_in

    furnished.ui.outputsCollapsibleButton.collapsed = False
    for _ in range(5):
        app.processEvents()
    (box,) = boxes_in(furnished.ui.alsoApplyToSelector)
    assert box.painted.count(",") == 1
    furnished._parameterNode.alsoApplyTo = []
    for _ in range(5):
        app.processEvents()
    assert box.painted == "None"


def test_a_message_goes_when_its_cause_has_gone(ready, pair):
    """Fault 16."""
    ready._parameterNode.device = "cuda:99"
    ready.onRegister()
    wait(ready)
    assert "cuda:99" in ready.ui.messageLabel.text
    ready._parameterNode.device = "cpu"
    assert ready.ui.messageLabel.text == "" and not ready.ui.retryCpuButton.visible


def test_values_survive_a_round_trip_through_a_file(furnished, tmp_path):
    import slicer

    content = slicer.util.arrayFromVolume(furnished._parameterNode.fixedVolume).copy()
    file = save(tmp_path)
    slicer.mrmlScene.Clear(0)
    load(file)
    assert np.array_equal(slicer.util.arrayFromVolume(furnished._parameterNode.fixedVolume), content)
