"""The panel on the stand-in for Slicer: parameters, choices and reasons."""

import json

import pytest
from mrml_scenes import add_segmentation

from DivRegNetLib import models


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


def test_a_model_with_a_class_network_says_so(widget):
    assert "classes" not in widget.ui.cardLabel.text
    card = models.find("other")
    told = {"classes": ["background", "liver", "spleen"], "classnet": {"classes": 3}}
    card.write_text(json.dumps(json.loads(card.read_text()) | told))
    widget._parameterNode.model = "other"
    assert "guided by 2 classes" in widget.ui.cardLabel.text
    assert "Classes: liver, spleen" in widget.ui.cardLabel.toolTip


@pytest.mark.parametrize("kind", ["label map", "same", "empty", "no transform"])
def test_what_cannot_be_registered_is_refused_with_a_reason(ready, pair, kind):
    import slicer

    p = ready._parameterNode
    if kind == "label map":
        labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
        labels.SetAndObserveImageData(pair[0].GetImageData())
        p.movingVolume, word = labels, "'labels' is a label map"
    elif kind == "same":
        p.movingVolume, word = pair[0], "'fixed' is chosen as fixed and as moving volume"
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


@pytest.mark.parametrize("there_is_a_browser", [True, False])
def test_help_opens_the_guide_or_says_where_it_is(widget, module, monkeypatch, there_is_a_browser):
    import qt

    asked = []
    monkeypatch.setattr(qt.QDesktopServices, "openUrl", lambda url: asked.append(url.toString()) or there_is_a_browser)
    widget.ui.helpButton.click()
    assert asked == [module.HELP] and (module.HELP in widget.ui.messageLabel.text) != there_is_a_browser


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
