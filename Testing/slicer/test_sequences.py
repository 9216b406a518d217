"""A sequence is registered frame by frame: one click, cancel, one table of verdicts."""

import numpy as np
import pytest
from panel import add_blob, alive, census, layers, wait


@pytest.fixture
def sequence(ready, pair):
    """Three frames of a moving blob, as Slicer has them after loading a 4D file: a sequence and its browser."""
    import slicer

    sequence = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "heart")
    sequence.SetIndexName("time")
    sequence.SetIndexUnit("s")
    for i in range(3):
        frame = add_blob(f"frame {i}", (22, 24, 20), 2.0 * i)
        sequence.SetDataNodeAtValue(frame, str(i))
        slicer.mrmlScene.RemoveNode(frame)
    browser = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "browser")
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    ready._parameterNode.movingSequence = sequence
    return sequence


def worker_pid(widget) -> int:
    wait(widget, until=lambda: widget._sequenceRun._worker is not None and widget._sequenceRun._worker.pid is not None)
    return widget._sequenceRun._worker.pid


def test_every_frame_is_registered_and_has_a_verdict(ready, sequence, pair, monkeypatch):
    import DivRegNetModule
    import slicer

    from DivRegNetLib.run.worker import Worker

    monkeypatch.setattr(DivRegNetModule, "translate", lambda context, text: f"translated: {text}")
    pids, closing = [], Worker.closing
    monkeypatch.setattr(Worker, "closing", lambda self: pids.append(self.pid) or closing(self))
    before = census()
    ready.ui.registerSequenceButton.click()
    assert ready._sequenceRun is not None, ready.ui.messageLabel.text
    assert ready.ui.cancelButton.enabled and not ready.ui.registerButton.enabled
    wait(ready)
    outcome = ready._sequenceOutcome
    assert outcome is not None, ready.ui.messageLabel.text
    assert len(pids) == 3 and len(set(pids)) == 1  # one process for all frames
    table = ready.ui.sequenceTable
    assert table.visible and table.rowCount == 3
    assert [table.item(i, 0).text() for i in range(3)] == ["0", "1", "2"]
    assert {table.item(i, 1).text() for i in range(3)} <= {"GREEN", "AMBER", "RED"}
    errors = [table.item(i, 2).text() for i in range(3)]
    assert errors == [f"translated: {frame.verdict.error}" for frame in outcome.frames]
    assert all(table.item(i, 3).text().startswith("translated: The ") for i in range(3))
    assert outcome.warped.GetNumberOfDataNodes() == outcome.transforms.GetNumberOfDataNodes() == 3
    assert (outcome.warped.GetName(), outcome.warped.GetIndexUnit()) == ("heart warped to fixed", "s")
    frames = [outcome.warped.GetNthDataNode(i) for i in range(3)]
    assert all(f.GetImageData().GetDimensions() == pair[0].GetImageData().GetDimensions() for f in frames)
    arrays = [slicer.util.arrayFromVolume(frame) for frame in frames]
    assert np.abs(arrays[0].astype(float) - arrays[2]).max() > 50  # each its own
    transform = outcome.transforms.GetNthDataNode(1)
    assert transform.GetAttribute("DivRegNet.Model") and slicer.util.arrayFromGridTransform(transform).shape[-1] == 3
    assert outcome.browser.GetName() == "browser" and outcome.browser.IsSynchronizedSequenceNode(outcome.warped, True)
    table.cellClicked.emit(2, 0)
    assert outcome.browser.GetSelectedItemNumber() == 2
    from DivRegNetModule.comparison import TINT

    (layer,) = {(background, foreground) for background, foreground, *_ in layers()}
    shown = slicer.mrmlScene.GetNodeByID(layer[1])
    assert layer[0] == pair[0].GetID() and np.array_equal(slicer.util.arrayFromVolume(shown), arrays[2])
    assert shown.GetDisplayNode().GetColorNodeID() == TINT
    table.cellActivated.emit(1, 0)  # by the keyboard
    assert outcome.browser.GetSelectedItemNumber() == 1
    assert ready.ui.undoButton.enabled
    ready.ui.undoButton.click()
    assert census() >= before and not slicer.mrmlScene.IsNodePresent(outcome.warped)
    assert not table.visible and not ready.ui.undoButton.enabled


def test_cancel_ends_the_process_and_leaves_the_scene_as_it_was(ready, sequence):
    before = census()
    ready.ui.registerSequenceButton.click()
    pid = worker_pid(ready)
    ready.ui.cancelButton.click()
    assert not alive(pid) and census() == before and ready._sequenceRun is None


def test_a_frame_that_fails_is_a_row_and_the_others_are_registered(ready, sequence):
    import slicer

    broken = sequence.GetNthDataNode(1)
    slicer.util.arrayFromVolume(broken)[:] = 5
    slicer.util.arrayFromVolumeModified(broken)
    ready.ui.registerSequenceButton.click()
    wait(ready)
    table = ready.ui.sequenceTable
    assert [table.item(i, 1).text() == "FAILED" for i in range(3)] == [False, True, False]
    assert table.item(1, 2).text() == ""
    assert "constant" in table.item(1, 3).text() and "2 frames were registered, 1 failed" in ready.ui.messageLabel.text
    assert ready._sequenceOutcome.warped.GetNumberOfDataNodes() == 2


def test_what_is_no_sequence_of_volumes_is_refused_before(ready, pair):
    import slicer

    button = ready.ui.registerSequenceButton
    assert not button.enabled and "moving sequence" in button.toolTip
    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "points")
    points.SetDataNodeAtValue(slicer.vtkMRMLMarkupsFiducialNode(), "0")
    ready._parameterNode.movingSequence = points
    assert not button.enabled and "'points' is no sequence of scalar volumes" in button.toolTip


def test_deleting_the_sequence_ends_the_run(ready, sequence):
    import slicer

    ready.ui.registerSequenceButton.click()
    pid = worker_pid(ready)
    slicer.mrmlScene.RemoveNode(sequence)
    assert ready._sequenceRun is None and not alive(pid) and "was deleted" in ready.ui.messageLabel.text


def test_a_sequence_without_a_browser_gets_one_that_undo_takes_away(ready, sequence):
    import slicer

    slicer.mrmlScene.RemoveNode(slicer.util.getNode("browser"))
    before = census()
    ready.ui.registerSequenceButton.click()
    wait(ready)
    outcome = ready._sequenceOutcome
    assert outcome is not None, ready.ui.messageLabel.text
    assert outcome.browser.GetName() == "heart browser" and outcome.browser.GetMasterSequenceNode() is sequence
    assert outcome.browser.IsSynchronizedSequenceNode(outcome.warped, True)
    outcome.undo()
    assert not slicer.mrmlScene.IsNodePresent(outcome.browser) and census() >= before
