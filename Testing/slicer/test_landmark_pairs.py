"""The landmarks of two markups nodes, paired as the panel does it."""

import numpy as np
import pytest

POINTS = np.array([[10.0, 20, 30], [-40, 5, 12], [33, -60, 7], [0, 0, 55], [-20, 44, -31]])


@pytest.fixture
def marks(scene):
    """``(points, labels, unplaced) -> node``; points in RAS."""

    def add(points, labels, unplaced=()):
        node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "marks")
        for i, (point, label) in enumerate(zip(points, labels, strict=True)):
            node.AddControlPoint(*point)
            node.SetNthControlPointLabel(i, label)
        for i in unplaced:
            node.UnsetNthControlPointPosition(i)
        return node

    return add


def paired(fixed, moving):
    from DivRegNetModule.mrml.markups import pairs

    return pairs(fixed, moving)


def test_points_that_are_not_placed_leave_both_lists_and_are_named(marks):
    found = paired(marks(POINTS, "abcde", [0]), marks(POINTS + 2, "abcde", [3]))
    assert found.labels == ("b", "c", "e")
    np.testing.assert_allclose(found.moving - found.fixed, [[-2, -2, 2]] * 3)  # RAS to LPS
    assert len(found.notes) == 1 and found.notes[0].endswith("a, d.")


def test_a_deleted_point_does_not_shift_the_others(marks):
    found = paired(marks(POINTS[[0, 2, 3, 4]], "acde"), marks(POINTS[[0, 1, 2, 4]] + 2, "abce"))
    assert found.labels == ("a", "c", "e")
    np.testing.assert_allclose(found.moving - found.fixed, [[-2, -2, 2]] * 3)
    assert len(found.notes) == 1 and found.notes[0].endswith("d, b.")


def test_lists_of_different_lengths_without_common_labels_are_not_paired(marks):
    found = paired(marks(POINTS, "abcde"), marks(POINTS[1:], "vwxy"))
    assert found.labels == () and found.fixed.shape == (0, 3)
    assert "has 5 points and" in found.notes[0]


def test_other_labels_of_one_length_are_paired_in_their_order(marks):
    found = paired(marks(POINTS, "abcde"), marks(POINTS + 2, "vwxyz"))
    np.testing.assert_allclose(found.moving - found.fixed, [[-2, -2, 2]] * 5)
    assert found.notes == ()
