"""The benchmark of the initial alignment: misplaced pairs of known truth, methods in processes of their own, the table."""

import sys

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, apply_matrix
from training.benchmarks import alignment, misalignments
from training.benchmarks.misalignments import KINDS, Case, Scene


@pytest.fixture(scope="module")
def scene(grid_about, paint, rigid):
    """The phantom on two unlike grids, the moving one in a frame of its own."""
    truth = rigid((5, -3, 8), (4.0, -2.0, 3.0))
    fixed = paint(grid_about((33, -48, 113), (40, 44, 36), (3.0, 3.0, 3.5), (10, -5, 20)))
    moving = paint(grid_about((36, -50, 114), (42, 38, 40), (3.0, 3.5, 3.0), (-10, 15, 5)), np.linalg.inv(truth))
    return Scene(fixed, moving, truth, 5.0)


def values(image: sitk.Image, points: np.ndarray) -> np.ndarray:
    return np.array([image.EvaluateAtPhysicalPoint(p.tolist(), sitk.sitkLinear) for p in points])


@pytest.mark.parametrize("kind", KINDS)
def test_a_misplaced_image_shows_at_the_true_places_what_the_fixed_one_shows(kind, scene):
    case = Case("phantom", "one", kind, "fitted", lambda data: scene, KINDS[kind])
    fixed, moving, truth, points, limit = case.make(None)
    there = apply_matrix(truth, points)
    assert len(points) > 30
    assert Grid.of(moving).contains(there).all()
    inner = np.abs(values(fixed, points) - values(moving, there))
    assert np.median(inner) < (0.06 if kind == "thick slices" else 0.02)
    assert limit == pytest.approx(5.0) or kind == "small"
    again = case.make(None)
    np.testing.assert_array_equal(again[2], truth)
    np.testing.assert_array_equal(again[3], points)


def test_no_subject_is_both_fitted_and_held_out():
    scenes = {}
    for case in misalignments.cases():
        scenes.setdefault((case.family, case.scene), set()).add(case.split)
    assert all(len(splits) == 1 for splits in scenes.values())
    assert {split for splits in scenes.values() for split in splits} == {"fitted", "held out"}


def test_rows_are_measured_in_processes_of_their_own_and_kept(scene, tmp_path):
    kinds = ("as it is", "turned 120-180")
    cases = [Case("phantom", "one", kind, "held out", lambda data: scene, KINDS[kind]) for kind in kinds]
    methods, said = ["as the images lie", alignment.OURS], []
    rows = alignment.run(cases, methods, tmp_path, tmp_path / "out", {}, say=said.append)
    by = {(r["method"], r["kind"]): r for r in rows}
    assert by[alignment.OURS, "turned 120-180"]["error mm"] < 1
    assert by[alignment.OURS, "turned 120-180"]["right"]
    assert not by["as the images lie", "turned 120-180"]["right"]
    assert by["as the images lie", "as it is"]["error mm"] > 3
    assert len(said) == 4
    assert len(alignment.run(cases, methods, tmp_path, tmp_path / "out", {}, say=said.append)) == 4
    assert len(said) == 4
    (row,) = [r for r in alignment.table(rows, ("split", "family"))]
    assert row["cases"] == 2
    assert row[alignment.OURS] == "2/2"
    assert alignment.seconds(rows)[0][alignment.OURS] > 0


def test_a_method_that_fails_on_a_pair_has_failed_on_this_pair_only(scene, tmp_path, monkeypatch):
    worker = alignment.Worker("as the images lie", tmp_path)
    monkeypatch.setattr(worker, "command", [sys.executable, "-c", "import sys; sys.stdin.readline()"])
    try:
        assert "failed" in worker.ask(tmp_path)
    finally:
        worker.close()
    row = alignment.score({"failed": "no", "seconds": None}, np.eye(4), np.zeros((3, 3)), 5.0)
    assert row["failed"] == "no"
    assert not row["right"]
