"""The benchmark of the initial alignment: misplaced pairs of known truth, methods in processes of their own, the table."""

import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, apply_matrix
from training import benchmark
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
    (row,) = alignment.table(rows, alignment.BY_FAMILY)
    assert row == {"pair": alignment.ONE, "family": "phantom", "as the images lie": "0/2", alignment.OURS: "2/2"}
    assert alignment.seconds(rows)[0][alignment.OURS] > 0


def row(method: str, family: str, kind: str, right: bool) -> dict:
    case = f"{family}/one/{kind}"
    return {"method": method, "case": case, "family": family, "scene": "one", "kind": kind, "split": "held out",
            "limit mm": 5.0, "seconds": 1.0, "error mm": 1.0 if right else 40.0, "right": right}  # fmt: skip


def test_every_kind_has_one_group_and_a_color():
    kinds = [kind for group in alignment.GROUPS.values() for kind in group]
    assert sorted(kinds) == sorted({*KINDS, *misalignments.SUBJECT_KINDS})
    assert alignment.plot([row(m, "heads", "far", True) for m in alignment.METHODS]).axes


def test_the_report_compares_methods_on_the_cases_that_all_of_them_have_had(tmp_path, monkeypatch):
    cases = [Case("heads", "one", kind, "held out", None, None) for kind in ("far", "turned 180")]
    cases.append(Case("two heads", "one", "turned 90", "held out", None, None))
    rows = [row("SimpleITK", "heads", "turned 180", False), row(alignment.OURS, "heads", "turned 180", True),
            row(alignment.OURS, "heads", "far", False), row(alignment.OURS, "two heads", "turned 90", True)]  # fmt: skip
    (tmp_path / alignment.ROWS).write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(misalignments, "cases", lambda: cases)
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", "--alignment", "--data", str(tmp_path), "--output", str(tmp_path), "--methods"]
    )
    assert benchmark.main() == 0
    text = (tmp_path / "alignment.md").read_text()
    assert "| one subject | turned by 60 to 180 degrees | 1/1 | 0/1 |" in text
    assert "The same 1 cases" in text
    same, rest = text.split("## All that was measured")
    assert "far away" not in same
    assert "| one subject | far away | 0/1 |" in rest
    assert "- DivRegNet: heads/one/far: 40 mm" in text
    assert (tmp_path / "alignment.png").stat().st_size > 1000


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
