"""Landmark lists of 3D Slicer: undefined points, coordinate systems, pairs."""

import json

import numpy as np
import pytest

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.landmarks import Landmarks, pair_landmarks, read_landmarks, write_landmarks

POINTS = np.array([[10.0, 20, 30], [-40, 5, 12], [33, -60, 7], [0, 0, 55], [-20, 44, -31]])
LABELS = tuple(f"F-{i}" for i in range(1, 6))


def markups(path, points, undefined=(), status="undefined", labels=LABELS, **more):
    """A file as Slicer writes it."""
    control_points = [
        {"id": str(i), "label": label, "position": [0.0] * 3 if i in undefined else p,
         "positionStatus": status if i in undefined else "defined"}
        for i, (label, p) in enumerate(zip(labels, points.tolist(), strict=True))
    ]  # fmt: skip
    about = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm"} | more
    path.write_text(json.dumps({"markups": [about | {"controlPoints": control_points}]}))
    return path


@pytest.mark.parametrize("status", ["undefined", "missing", "preview"])
def test_points_without_a_position_leave_both_lists(status, tmp_path):
    fixed = read_landmarks(markups(tmp_path / "f.mrk.json", POINTS, [1], status))
    moving = read_landmarks(markups(tmp_path / "m.mrk.json", POINTS + np.array((2, 0, 0)), [3], status))
    pairs = pair_landmarks(fixed, moving)
    assert pairs.labels == ("F-1", "F-3", "F-5")
    np.testing.assert_allclose(pairs.moving - pairs.fixed, [[2, 0, 0]] * 3)
    assert pairs.notes == ("landmarks left out because they are undefined in one list or both: F-2, F-4",)


def test_slicers_table_marks_undefined_points_with_0(tmp_path):
    header = "label,l,p,s,defined,selected,visible,locked,description\n"
    (tmp_path / "t.csv").write_text(header + "F-1,1,2,3,1,1,1,0,\nF-2,0,0,0,0,1,1,0,\n")
    landmarks = read_landmarks(tmp_path / "t.csv")
    assert landmarks.defined.tolist() == [True, False]
    assert landmarks.points[0].tolist() == [1, 2, 3]


def test_lists_in_different_orders_are_paired_by_their_labels():
    order = [3, 0, 4, 1, 2]
    moving = Landmarks(POINTS[order] + 1, tuple(LABELS[i] for i in order))
    pairs = pair_landmarks(Landmarks(POINTS, LABELS), moving)
    np.testing.assert_allclose(pairs.moving - pairs.fixed, 1)
    assert "paired by their labels" in pairs.notes[0]


def test_lists_with_other_labels_are_paired_in_their_order():
    pairs = pair_landmarks(Landmarks(POINTS, LABELS), Landmarks(POINTS + 1, ("",) * 5))
    np.testing.assert_allclose(pairs.moving - pairs.fixed, 1)
    assert pairs.notes == ()


def test_a_point_that_one_list_lacks_does_not_shift_the_others():
    """A reader deleted F-2 in one list and F-4 in the other: four points each, of which three belong together."""
    kept = [0, 2, 3, 4], [0, 1, 2, 4]
    fixed, moving = (Landmarks(POINTS[k] + 2 * i, tuple(LABELS[n] for n in k)) for i, k in enumerate(kept))
    pairs = pair_landmarks(fixed, moving)
    assert pairs.labels == ("F-1", "F-3", "F-5")
    np.testing.assert_allclose(pairs.moving - pairs.fixed, 2)
    assert pairs.notes == (
        "fixed landmarks left out because no other has their label: F-4",
        "moving landmarks left out because no other has their label: F-2",
    )
    pairs = pair_landmarks(Landmarks(POINTS, LABELS), Landmarks(POINTS[1:] + 1, LABELS[1:]))
    np.testing.assert_allclose(pairs.moving - pairs.fixed, 1)
    assert pairs.notes == ("fixed landmarks left out because no other has their label: F-1",)


def test_numbers_of_lines_are_no_labels(tmp_path):
    """Without a column of labels the third line of one table is not the third of another that lacks a line."""
    rows = [f"{x},{y},{z}\n" for x, y, z in POINTS]
    (tmp_path / "f.csv").write_text("x,y,z\n" + "".join(rows))
    (tmp_path / "m.csv").write_text("x,y,z\n" + "".join(rows[1:]))
    fixed, moving = (read_landmarks(tmp_path / f"{name}.csv") for name in "fm")
    assert fixed.labels == ("1", "2", "3", "4", "5")
    with pytest.raises(InputError, match="5 fixed landmarks but 4 moving ones"):
        pair_landmarks(fixed, moving)
    named = Landmarks(POINTS + 1, ("2", "1", "3", "4", "5"))
    np.testing.assert_allclose(pair_landmarks(fixed, named).moving - POINTS, 1)


def test_labels_are_compared_without_case_and_blanks():
    fixed = Landmarks(POINTS[:2], ("Left eye", "nose"))
    pairs = pair_landmarks(fixed, Landmarks(POINTS[1::-1] + 1, (" Nose", "left Eye")))
    np.testing.assert_allclose(pairs.moving - pairs.fixed, 1)


def test_lists_without_a_common_pair_are_refused():
    with pytest.raises(InputError, match="5 fixed landmarks but 4 moving ones"):
        pair_landmarks(Landmarks(POINTS, LABELS), Landmarks(POINTS[:4], ("a", "b", "c", "d")))
    nothing = np.full((5, 3), np.nan)
    with pytest.raises(InputError, match="no landmark is defined in both lists"):
        pair_landmarks(Landmarks(POINTS, LABELS), Landmarks(nothing, LABELS))


@pytest.mark.parametrize(
    "system, message", [("IJK", "'IJK'; save it in RAS or LPS"), ("2", "'2'; save it"), ("LAS", "'LAS'")]
)
def test_coordinates_that_are_no_millimeters_in_space_are_refused(system, message, tmp_path):
    (tmp_path / "a.fcsv").write_text(f"# CoordinateSystem = {system}\nid,1,2,3,0,0,0,1,1,1,0,F-1,,\n")
    markups(tmp_path / "a.mrk.json", POINTS, coordinateSystem=system)
    for name in ("a.fcsv", "a.mrk.json"):
        with pytest.raises(InputError, match=message):
            read_landmarks(tmp_path / name)


def test_coordinates_in_other_units_are_refused(tmp_path):
    with pytest.raises(InputError, match="in um; save them in mm"):
        read_landmarks(markups(tmp_path / "a.mrk.json", POINTS, coordinateUnits="um"))


@pytest.mark.parametrize("name", ["a.mrk.json", "a.csv"])
def test_undefined_points_stay_in_their_place_when_they_are_written(name, tmp_path):
    points = POINTS.copy()
    points[2] = np.nan
    write_landmarks(Landmarks(points, LABELS), tmp_path / name)
    back = read_landmarks(tmp_path / name)
    assert back.labels == LABELS
    np.testing.assert_allclose(back.points, points)
