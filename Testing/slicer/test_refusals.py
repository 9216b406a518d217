"""What will be refused is not offered, or said before the run; a finished registration is never thrown away."""

import numpy as np
import pytest
from mrml_scenes import add_segmentation, bump, put_under
from panel import add_blob, alive, census, wait, worker_pid


def offered(selector) -> list[str]:
    return [selector.nodeFromIndex(i).GetName() for i in range(selector.nodeCount())]


@pytest.fixture
def odd(ready):
    """Nodes that cannot be registered, carried or used."""
    import slicer

    add = slicer.mrmlScene.AddNewNodeByClass
    nodes = {
        "labels": add("vtkMRMLLabelMapVolumeNode", "labels"),
        "colors": add("vtkMRMLVectorVolumeNode", "colors"),
        "hollow": add("vtkMRMLScalarVolumeNode", "hollow"),
        "slice": add("vtkMRMLScalarVolumeNode", "slice"),
        "bent": add("vtkMRMLTransformNode", "bent"),
        "straight": add("vtkMRMLTransformNode", "straight"),
    }
    slicer.util.updateVolumeFromArray(nodes["labels"], np.ones((4, 5, 6), np.uint8))
    slicer.util.updateVolumeFromArray(nodes["colors"], np.zeros((4, 5, 6, 3), np.uint8))
    slicer.util.updateVolumeFromArray(nodes["slice"], np.arange(30, dtype=np.int16).reshape(1, 5, 6))
    nodes["bent"].SetAndObserveTransformToParent(bump((0, 0, 0), 5, 30))
    ready._refresh()
    return nodes


def test_what_cannot_be_used_is_not_offered(ready, odd, pair):
    """Fault 9."""
    ui, p = ready.ui, ready._parameterNode
    for selector in (ui.fixedSelector, ui.movingSelector):
        assert offered(selector) == ["fixed", "moving"]
    assert offered(ui.initialTransformSelector) == ["straight"]
    assert "fixed" not in offered(ui.warpedSelector)
    assert {"fixed", "hollow"}.isdisjoint(offered(ui.alsoApplyToSelector))
    assert {"moving", "labels"} <= set(offered(ui.alsoApplyToSelector))
    p.warpedVolume = add_blob("target", (5, 6, 7), 0.0)
    assert "target" not in offered(ui.alsoApplyToSelector)
    pair[1].SetAndObserveTransformNodeID(odd["straight"].GetID())
    ready._refresh()
    assert "straight" not in offered(ui.transformSelector)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p, odd: setattr(p, "movingVolume", odd["slice"]), "'slice' has a single slice"),
        (lambda p, odd: setattr(p, "fixedVolume", odd["labels"]), "'labels' is a label map"),
        (lambda p, odd: setattr(p, "fixedVolume", odd["colors"]), "'colors' is no scalar volume"),
        (lambda p, odd: setattr(p, "alsoApplyTo", [odd["hollow"]]), "'hollow' is empty"),
        (lambda p, odd: setattr(p, "alsoApplyTo", [p.fixedVolume]), "'fixed' is the fixed volume or the output itself"),
        (lambda p, odd: setattr(p, "warpedVolume", p.movingVolume), "'moving' is an input and would be overwritten"),
    ],
    ids=["single slice", "label map", "colors", "empty", "fixed carried", "overwritten"],
)
def test_what_is_chosen_all_the_same_is_said_in_the_panel_before_the_run(ready, odd, change, words):
    """Faults 9 and 17: by a script, or from an older scene; in the panel, not in a tooltip alone."""
    change(ready._parameterNode, odd)
    assert words in ready.ui.problemLabel.text and ready.ui.problemLabel.visible
    assert not ready.ui.registerButton.enabled
    assert ready.ui.problemLabel.text[0] in "'ACT" and ready.ui.problemLabel.text.endswith(".")


def test_a_non_linear_initial_transform_and_landmarks_too_few_are_said(ready, odd):
    import slicer

    p = ready._parameterNode
    p.alignment, p.initialTransform = type(p.alignment).TRANSFORM, odd["bent"]
    assert "'bent' is no linear transform" in ready.ui.problemLabel.text
    p.alignment = type(p.alignment).LANDMARKS_RIGID
    assert "Choose the fixed and the moving landmarks" in ready.ui.problemLabel.text
    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "two")
    for x in (0, 10):
        points.AddControlPoint(x, 0, 0)
    p.fixedLandmarks = p.movingLandmarks = points
    assert "at least 3 pairs of landmarks" in ready.ui.problemLabel.text


def test_a_node_under_the_output_transform_is_refused_before_the_run(ready):
    import slicer

    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "marks")
    points.AddControlPoint(1, 2, 3)
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "out")
    points.SetAndObserveTransformNodeID(transform.GetID())
    p = ready._parameterNode
    p.transform, p.alsoApplyTo = transform, [points]
    assert "'marks' is under the transform 'out' already" in ready.ui.problemLabel.text
    assert not ready.ui.registerButton.enabled


def test_a_node_that_cannot_follow_is_named_and_the_registration_is_kept(ready, pair):
    """Fault 9: the node becomes unfit during the run."""
    import slicer

    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "marks")
    points.AddControlPoint(1, 2, 3)
    volume = add_blob("further", (8, 9, 10), 0.0)
    ready._parameterNode.alsoApplyTo = [points, volume]
    ready.onRegister()
    worker_pid(ready)
    volume.SetAndObserveImageData(None)
    wait(ready)
    outcome = ready._outcome
    assert outcome is not None and [n.GetName() for n in outcome.carried] == ["marks warped to fixed"]
    assert "'further' was not carried along" in ready.ui.messageLabel.text


def test_an_output_that_became_unfit_is_replaced_by_a_new_node_and_named(ready, pair):
    import slicer

    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "out")
    ready._parameterNode.transform = transform
    ready.onRegister()
    worker_pid(ready)
    pair[1].SetAndObserveTransformNodeID(transform.GetID())  # someone puts the moving volume under it
    wait(ready)
    outcome = ready._outcome
    assert outcome is not None and outcome.registration.transform_node is not transform
    assert "A new node was made for an output" in ready.ui.messageLabel.text and "'out'" in ready.ui.messageLabel.text


@pytest.mark.parametrize("what", ["edited", "moved"])
def test_a_volume_that_changes_during_the_run_is_said(ready, pair, what):
    """Fault 21."""
    import slicer

    ready.onRegister()
    worker_pid(ready)
    if what == "edited":
        slicer.util.arrayFromVolume(pair[1])[:] += 1
        slicer.util.arrayFromVolumeModified(pair[1])
    else:
        put_under(pair[1], np.diag([1.0, 1.0, 1.0, 1.0]) + np.eye(4)[:, [3, 0, 1, 2]] * 0, "same place")
        matrix = np.eye(4)
        matrix[0, 3] = 12
        pair[1].GetParentTransformNode().SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    wait(ready)
    assert ready._outcome is not None
    assert f"'moving' was {what} during the registration" in ready.ui.messageLabel.text


def test_an_unexpected_error_is_shown_in_the_panel_in_a_dialog_and_in_the_log(ready, app, monkeypatch):
    """Fault 7: PythonQt prints an exception of a slot, and the panel stays empty."""
    from DivRegNetModule import inputs

    def broken(parameters):
        raise RuntimeError("no such luck")

    before = census()
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "request", broken)
        ready.ui.registerButton.click()
    assert "RuntimeError: no such luck" in ready.ui.messageLabel.text
    assert any("no such luck" in text for text in app.shown)
    assert "Traceback" in ready.ui.logText.toPlainText() and census() == before and ready._run is None


def test_every_slot_and_observer_of_the_widget_is_guarded(module):
    """Each name that begins with ``on`` and is connected or observed: ``guarded`` wraps it."""
    kind = module.DivRegNetWidget
    slots = [name for name in vars(kind) if name.startswith("on") and name != "onReload"]
    assert len(slots) > 25
    assert [name for name in slots if not hasattr(getattr(kind, name), "__wrapped__")] == []


def test_a_killed_launcher_is_told_as_lack_of_memory_and_the_cpu_is_not_offered_where_it_computed(
    ready, monkeypatch, tmp_path
):
    """Fault 4: PythonSlicer returns 1 when its child is killed; "Again, on the CPU" was offered though it ran there."""
    import sys

    from DivRegNetLib.run.worker import parent

    launcher = tmp_path / "PythonSlicer"
    launcher.write_text(f"#!{sys.executable}\nimport sys\nsys.exit(1)\n")
    launcher.chmod(0o755)
    surroundings = parent.surroundings
    monkeypatch.setattr(parent, "surroundings", lambda python, environment: surroundings(launcher, environment))
    ready._parameterNode.device = "auto"
    ready.onRegister()
    wait(ready)
    text = ready.ui.messageLabel.text
    assert "memory runs out" in text and "coarser" in text
    assert ready.ui.retryCoarserButton.visible and not ready.ui.retryCpuButton.visible


def test_a_cancelled_preparation_leaves_no_process_and_no_folder(ready, tmp_path_factory, monkeypatch):
    tmp_path = tmp_path_factory.mktemp("jobs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ready.onRegister()
    ready.ui.cancelButton.click()
    assert ready._run is None and list(tmp_path.iterdir()) == []
    ready.onRegister()
    pid = worker_pid(ready)
    ready.ui.cancelButton.click()
    assert not alive(pid) and list(tmp_path.iterdir()) == []


def test_an_roi_is_a_mask(ready, pair):
    import slicer
    from DivRegNetModule.mrml.volumes import roi_image

    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "box")
    roi.SetCenter(4, -6, 3)
    roi.SetSize(40, 30, 36)
    put_under(roi, np.array([[0, -1.0, 0, 5], [1, 0, 0, 0], [0, 0, 1, -2], [0, 0, 0, 1]]), "turned")
    image = roi_image(roi)
    volume = np.prod(image.GetSize()) * np.prod(image.GetSpacing())
    assert volume == pytest.approx(40 * 30 * 36)
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    assert np.array(middle) * (-1, -1, 1) == pytest.approx((6 + 5, 4, 1))
    ready._parameterNode.fixedMask = roi
    assert not ready.ui.fixedSegmentComboBox.visible and ready.ui.registerButton.enabled
    ready.onRegister()
    wait(ready)
    assert ready._outcome is not None, ready.ui.messageLabel.text


def test_an_empty_mask_is_said_before_the_run(ready, pair):
    ready._parameterNode.fixedMask = add_segmentation(pair[0], {})
    assert "has no segment" in ready.ui.problemLabel.text
