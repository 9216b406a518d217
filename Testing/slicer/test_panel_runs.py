"""Registrations from the panel: run, result, undo, cancel, failures, closing and deleting meanwhile."""

import os
import time

import numpy as np
import pytest
from panel import add_blob, alive, census, wait, wait_for, worker_pid


def test_a_registration_runs_in_another_process_and_its_result_can_be_looked_at_and_taken_back(ready, pair, app):
    import slicer
    from DivRegNetModule import comparison

    view = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")[0]
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
    assert view.GetBackgroundVolumeID() == pair[0].GetID() and view.GetForegroundOpacity() == 0.5
    over = slicer.mrmlScene.GetNodeByID(view.GetForegroundVolumeID())
    assert over.GetImageData() is registration.warped_node.GetImageData()
    assert over.GetDisplayNode().GetColorNodeID() == comparison.TINT  # not two grays

    ready.ui.beforeButton.click()
    over = slicer.mrmlScene.GetNodeByID(view.GetForegroundVolumeID())
    assert over.GetImageData() is pair[1].GetImageData()
    ready._comparison._timer.setInterval(5)
    ready.ui.flickerButton.click()  # ends the view of before
    assert not ready.ui.beforeButton.checked
    opacities = set()
    for _ in range(40):
        app.processEvents()
        time.sleep(0.005)
        opacities.add(view.GetForegroundOpacity())
    assert {0.0, 1.0} <= opacities
    ready.ui.checkerboardButton.click()  # ends the flicker
    assert not ready.ui.flickerButton.checked
    wait_for(lambda: not ready._comparison.busy)
    board = slicer.mrmlScene.GetNodeByID(view.GetForegroundVolumeID())
    assert not board.GetSaveWithScene() and board.GetHideFromEditors() and view.GetForegroundOpacity() == 1
    fixed, warped = (slicer.util.arrayFromVolume(n) for n in (pair[0], registration.warped_node))
    stretched = (comparison.stretch(a, comparison.percentile_window(a, 1, 99)) for a in (fixed, warped))
    expected = 255 * comparison.checkerboard(*stretched)
    assert np.array_equal(slicer.util.arrayFromVolume(board), expected.astype(np.uint8))
    name = board.GetID()
    ready.ui.checkerboardButton.click()
    assert slicer.mrmlScene.GetNodeByID(name) is None
    assert view.GetBackgroundVolumeID() == pair[0].GetID()
    ready.ui.gridButton.click()
    display = registration.transform_node.GetDisplayNode()
    assert display.GetVisibility() and display.GetVisibility2D()
    assert display.GetVisualizationMode() == display.VIS_MODE_GRID
    ready.ui.gridButton.click()
    assert registration.transform_node.GetDisplayNode() is None

    ready.ui.undoButton.click()
    assert census() == before
    assert view.GetBackgroundVolumeID() == pair[1].GetID()
    assert not ready.ui.resultCollapsibleButton.visible


def test_the_next_click_and_a_script_use_the_process_of_the_first(ready, pair, module):
    from DivRegNetModule.run import STANDBY

    ready.onRegister()
    pid = worker_pid(ready)
    wait(ready)
    assert ready._outcome is not None and STANDBY.pid == pid
    ready.onRegister()
    assert worker_pid(ready) == pid and STANDBY.pid is None
    wait(ready)
    module.DivRegNetLogic().process(*pair, align="none", device="cpu")
    assert STANDBY.pid == pid
    ready.cleanup()
    assert not alive(pid)


def test_a_process_is_asked_for_once_the_panel_is_open_and_two_volumes_are_chosen(widget, pair, prepared, monkeypatch):
    widget.parent.isEntered = False
    p = widget._parameterNode
    p.fixedVolume, p.movingVolume = pair
    assert prepared == []
    widget.parent.isEntered = True
    p.device = "cpu"
    assert prepared[-1] == {"model": p.model, "device": "cpu"}
    prepared.clear()
    p.movingVolume = None
    assert prepared == []
    widget.enter()
    assert prepared  # it chooses a volume


def test_no_process_is_asked_for_without_torch(widget, pair, prepared, without_torch):
    prepared.clear()
    widget._parameterNode.fixedVolume, widget._parameterNode.movingVolume = pair
    assert prepared == []


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


def test_cancel_ends_the_process_and_leaves_the_scene_as_it_was(ready):
    before = census()
    ready.onRegister()
    pid = worker_pid(ready)
    assert alive(pid)
    ready.ui.cancelButton.click()
    assert not alive(pid)
    assert census() == before
    assert "Cancelled" in ready.ui.messageLabel.text
    assert ready.ui.registerButton.enabled and not ready.ui.cancelButton.enabled


def test_a_killed_worker_becomes_a_message_that_offers_a_way_out(ready):
    before = census()
    ready.onRegister()
    os.kill(worker_pid(ready), 9)
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
    pid = worker_pid(ready)
    slicer.mrmlScene.Clear(0)
    app.processEvents()
    assert ready._run is None and not alive(pid)
    assert ready._parameterNode is not None and ready._parameterNode.fixedVolume is None
    assert not ready.ui.registerButton.enabled and not ready.ui.resultCollapsibleButton.visible


@pytest.mark.parametrize("which", ["fixedVolume", "movingVolume"])
def test_deleting_a_volume_of_the_run_ends_it(ready, which):
    import slicer

    ready._parameterNode.warpedVolume = add_blob("target", (5, 6, 7), 0.0)
    ready.onRegister()
    pid = worker_pid(ready)
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
    pid = worker_pid(widget)
    widget.cleanup()
    assert not alive(pid) and widget.Observations == []
