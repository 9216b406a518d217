"""Copies, outputs that are used again, and what Undo leaves."""

import numpy as np
import pytest
from mrml_scenes import add_segmentation
from panel import add_blob, census, wait


def run(widget):
    widget.onRegister()
    wait(widget)
    assert widget._outcome is not None, widget.ui.messageLabel.text
    return widget._outcome


def saved() -> set[str]:
    """The ids of all nodes but those that are drawn for looking."""
    import slicer

    return {name for name in census() if slicer.mrmlScene.GetNodeByID(name).GetSaveWithScene()}


@pytest.mark.parametrize("visible", [True, False])
def test_copies_are_shown_or_hidden_like_what_they_are_copies_of_and_have_one_display(ready, pair, visible):
    """Fault 10: the Markups module gives a new list a display of its own, which is shown."""
    import slicer

    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.AddControlPoint(1, 2, 3)
    segmentation = add_segmentation(pair[1], {"core": slicer.util.arrayFromVolume(pair[1]) > 300})
    segmentation.CreateDefaultDisplayNodes()
    active = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "active")
    assert points.GetNumberOfDisplayNodes() == 1  # as in Slicer
    for node in (points, segmentation):
        node.GetDisplayNode().SetVisibility(visible)
    ready._parameterNode.alsoApplyTo = [points, segmentation]
    outcome = run(ready)
    assert len(outcome.carried) == 2
    for copy in outcome.carried:
        assert copy.GetNumberOfDisplayNodes() == 1
        assert bool(copy.GetDisplayNode().GetVisibility()) == visible
    selection = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSelectionNode")
    assert selection.GetActivePlaceNodeID() == active.GetID()  # the next point is placed where the user meant it to be


def test_a_second_run_overwrites_what_the_first_one_made_and_undo_gives_that_back(ready, pair):
    """Fault 19: reruns added ``_1``."""
    import slicer

    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.AddControlPoint(1, 2, 3)
    ready._parameterNode.alsoApplyTo, ready._parameterNode.giveInverse = [points], True
    before = census()
    first = run(ready)
    nodes = saved()
    content = slicer.util.arrayFromGridTransform(first.registration.transform_node).copy()
    ready._parameterNode.alignment = type(ready._parameterNode.alignment).CENTER
    second = run(ready)
    assert saved() == nodes
    assert second.registration.transform_node is first.registration.transform_node
    assert second.carried == first.carried and ready._parameterNode.warpedVolume is first.registration.warped_node
    changed = slicer.util.arrayFromGridTransform(second.registration.transform_node)
    assert np.abs(changed - content).max() > 0.5
    ready.onUndo()
    assert saved() == nodes
    assert np.array_equal(slicer.util.arrayFromGridTransform(first.registration.transform_node), content)
    first.undo()
    assert census() == before


def test_outputs_of_other_volumes_are_not_overwritten(ready, pair):
    first = run(ready)
    other = add_blob("other", (26, 28, 24), 2.0)
    ready._parameterNode.movingVolume = other
    assert ready._parameterNode.warpedVolume is None and ready._parameterNode.transform is None
    second = run(ready)
    assert second.registration.warped_node is not first.registration.warped_node
    assert second.registration.warped_node.GetName() == "other warped to fixed"


def test_the_user_may_ask_for_new_outputs(ready, pair):
    first = run(ready)
    ready.ui.warpedSelector.setCurrentNode(None)
    ready.ui.transformSelector.setCurrentNode(None)
    second = run(ready)
    assert second.registration.warped_node is not first.registration.warped_node
    assert second.registration.warped_node.GetName() == "moving warped to fixed_1"


def test_a_volume_the_user_chose_as_output_is_kept_in_the_selector(ready, pair):
    target = add_blob("target", (5, 6, 7), 0.0)
    ready._parameterNode.warpedVolume = target
    run(ready)
    assert ready._parameterNode.warpedVolume is target
    ready.onUndo()
    assert ready._parameterNode.warpedVolume is target


def test_undo_leaves_no_color_node_of_the_grid(ready, pair):
    """Fault 19: "Displacement to color" remained."""
    import slicer

    before = {n.GetID() for n in slicer.util.getNodesByClass("vtkMRMLColorNode")}
    run(ready)
    ready.ui.gridButton.click()
    display = ready._outcome.registration.transform_node.GetDisplayNode()
    display.GetColorMap()  # what draws it asks for that; without a color node, MRML makes one
    ready.onUndo()
    assert {n.GetID() for n in slicer.util.getNodesByClass("vtkMRMLColorNode")} == before


def test_swap_exchanges_the_volumes_with_all_that_belongs_to_them(ready, pair):
    import slicer

    p = ready._parameterNode
    array = slicer.util.arrayFromVolume(pair[0])
    p.fixedMask = mask = add_segmentation(pair[0], {"a": array > 300, "b": array > 500})
    p.fixedSegment = segment = mask.GetSegmentation().GetNthSegmentID(1)
    p.movingLandmarks = points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    ready.ui.swapButton.click()
    assert (p.fixedVolume, p.movingVolume) == pair[::-1]
    assert (p.movingMask, p.movingSegment, p.fixedMask, p.fixedSegment) == (mask, segment, None, "")
    assert (p.fixedLandmarks, p.movingLandmarks) == (points, None)


def test_presets_set_options_and_show_which_one_is_chosen(ready):
    from DivRegNetLib.presets import PRESETS

    p, combo = ready._parameterNode, ready.ui.presetComboBox
    assert [combo.itemData(i) for i in range(combo.count)] == [*PRESETS, ""]
    combo.setCurrentIndex(combo.findData("align-only"))
    combo.activated.emit(combo.currentIndex)
    assert (p.alignment.value, p.method.value, p.refineSteps) == ("rigid", "none", 0)
    p.refineSteps = 5
    assert combo.currentText == "Custom"
    p.alignment, p.method, p.refineSteps = type(p.alignment).AFFINE, type(p.method).AUTO, 16
    assert combo.itemData(combo.currentIndex) == "brains"


def test_only_aligning_moves_rigidly(ready, pair):
    combo = ready.ui.presetComboBox
    combo.setCurrentIndex(combo.findData("align-only"))
    combo.activated.emit(combo.currentIndex)
    outcome = run(ready)
    assert outcome.quality["largest_displacement_mm"] == 0


def test_landmarks_align_are_listed_with_their_errors_and_are_jumped_to(ready, pair):
    import slicer

    shift = np.array([12.0, -5.0, 4.0])
    lists = []
    for name, offset in (("pf", 0), ("pm", shift)):
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", name)
        for i, point in enumerate(((0, 0, 0), (20, 0, 5), (0, 25, -5), (-10, 8, 15))):
            node.AddControlPoint(*(np.array(point) + offset), f"L{i}")
        lists.append(node)
    lists[1].SetNthControlPointPosition(3, 30, 30, 30)
    lists[1].UnsetNthControlPointPosition(2)
    p = ready._parameterNode
    p.fixedLandmarks, p.movingLandmarks = lists
    p.alignment, p.method = type(p.alignment).LANDMARKS_RIGID, type(p.method).NONE
    outcome = run(ready)
    assert "not placed in both lists: L2." in ready.ui.messageLabel.text
    table = ready.ui.landmarksTable
    assert table.visible and table.rowCount == 3
    rows = [[table.item(i, j).text() for j in range(3)] for i in range(3)]
    errors = {row["label"]: row["after"] for row in outcome.quality["landmarks"]}
    assert rows[0][0] == max(errors, key=errors.get) and set(errors) == {"L0", "L1", "L3"}
    assert [float(row[2]) for row in rows] == sorted((float(row[2]) for row in rows), reverse=True)
    index = [row[0] for row in rows].index("L1")
    table.cellClicked.emit(index, 0)
    for view in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
        normal = slicer.util.arrayFromVTKMatrix(view.GetSliceToRAS())
        assert abs(normal[:3, 2] @ (np.array([20, 0, 5]) - normal[:3, 3])) < 1e-6


def test_the_report_is_saved_from_the_panel(ready, pair, tmp_path, monkeypatch):
    import qt
    from panel import wait_for

    file = tmp_path / "report.html"
    run(ready)
    monkeypatch.setattr(qt.QFileDialog, "getSaveFileName", staticmethod(lambda *arguments: (str(file), "")))
    ready.ui.reportButton.click()
    wait_for(lambda: not ready._task.running)
    page = file.read_text(encoding="utf-8")
    assert "Registration of moving to fixed" in page and page.count("data:image/png") == 18
    assert "The report was saved" in ready.ui.messageLabel.text


def test_the_log_is_kept_and_copied(ready, app):
    run(ready)
    text = ready.ui.logText.toPlainText()
    assert "Registration started." in text and "Computing the deformation" in text and "nmi" in text
    ready.ui.copyLogButton.click()
    assert app.clipboard().text() == text


def test_elapsed_and_remaining_time_are_told(module):
    assert module.timeText(1, 0.5) == "1 s elapsed"
    assert module.timeText(30, 0.75) == "30 s elapsed, about 10 s left"
