"""Whether volumes look like what a model is meant for."""

import pytest
from panel import card


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


class _VolumeNode:
    """What the estimate reads of a volume node; a real one of this size would fill the memory."""

    def __init__(self, image, matrix) -> None:
        self._image, self._matrix = image, matrix

    def GetImageData(self):
        return self._image

    def GetIJKToRASMatrix(self, matrix) -> None:
        matrix.DeepCopy(self._matrix)


@pytest.mark.parametrize(
    ("size", "spacing", "start"),
    [
        ((64, 64, 64), 0.0, "About"),
        ((64, 64, 64), 2.0, "About"),
        ((1500, 1500, 1500), 0.2, "0.2 mm is too fine"),
        ((1500, 1500, 1500), 0.0, "2 mm is too fine"),
        ((40, 40, 40), 0.01, "0.01 mm is too fine"),
    ],
)
def test_the_memory_line_says_where_the_working_grid_is_coarser_than_asked_for(app, size, spacing, start):
    """Fault 20."""
    import vtk
    from DivRegNetModule import fit

    image, matrix = vtk.vtkImageData(), vtk.vtkMatrix4x4()
    image.SetDimensions(size)
    node = _VolumeNode(image, matrix)
    text = fit.memory_text(card(spacing_mm=2.0), node, node, spacing, 0)
    assert (start if start == "About" else "in main memory. " + start) in text
    assert ("too fine" in text) == (start != "About") and "voxels" in text
