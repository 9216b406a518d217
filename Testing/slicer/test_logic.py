"""Registration by the module's logic, without a panel."""

import unittest

import numpy as np
import pytest
from mrml_scenes import add_segmentation
from panel import add_blob, census

from DivRegNetLib.errors import InputError


def test_the_logic_registers_nodes_without_a_panel(module, pair):
    stages = []
    outcome = module.DivRegNetLogic().process(
        *pair, align="none", device="cpu", inverse=True, progress=lambda stage, fraction: stages.append(stage)
    )
    assert outcome.registration.inverse_node is not None and outcome.quality["nmi"]["after"] > 1
    assert stages[0] == "prepare" and "outputs" in stages and stages[-1] == "carry"


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
    u = outcome.registration.transform_node.GetTransformFromParent().TransformPoint((0.0, 0.0, 0.0))
    expected = np.linalg.norm(np.array(u) - (3.0, 0.0, 0.0))
    assert outcome.quality["landmark_error_mm"]["after"] == pytest.approx(expected, abs=1e-3)
    assert 0.5 < outcome.quality["dice"]["before"] < 1
    assert outcome.notes == []
    extra = landmarks[1]
    extra.AddControlPoint(0, 0, 0)
    outcome = module.DivRegNetLogic().process(*pair, align="none", device="cpu", landmarks=landmarks)
    assert "landmarks" not in outcome.quality and "has 1 points" in outcome.notes[0]
    for node in landmarks:
        node.SetNthControlPointLabel(0, "nose")
    outcome = module.DivRegNetLogic().process(*pair, align="none", device="cpu", landmarks=landmarks)
    assert (
        outcome.quality["landmark_error_mm"]["before"] == pytest.approx(3.0) and "has their label" in outcome.notes[0]
    )
    landmarks[0].RemoveAllControlPoints()
    outcome = module.DivRegNetLogic().process(*pair, align="none", device="cpu", landmarks=landmarks)
    assert "landmark_error_mm" not in outcome.quality and "no landmark error was measured" in str(outcome.notes)


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


def test_scripts_are_told_that_torch_is_missing(without_torch, module, pair):
    from DivRegNetModule.first_use import NotReady

    before = census()
    with pytest.raises(NotReady, match="torch"):
        module.DivRegNetLogic().process(*pair)
    assert census() == before


def test_the_self_tests_are_complete_and_are_found_by_unittest(module):

    names = unittest.TestLoader().getTestCaseNames(module.DivRegNetTest)
    assert len(names) >= 7 and any("WithoutTorch" in name for name in names)
