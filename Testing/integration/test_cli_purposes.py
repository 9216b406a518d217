"""``divregnet register`` for a purpose: presets, and alignment by landmarks."""

import json

import numpy as np
import pytest

from DivRegNetLib import register
from DivRegNetLib.core.grid import apply_matrix
from DivRegNetLib.errors import InputError
from DivRegNetLib.io.images import read_image
from DivRegNetLib.io.landmarks import read_landmarks
from DivRegNetLib.run.cli import main


@pytest.fixture
def pair(sample_data):
    return [str(sample_data / name) for name in ("fixed_T1.nii.gz", "moving_T2.nii.gz")]


@pytest.fixture
def landmarks(sample_data):
    files = [str(sample_data / name) for name in ("fixed_T1.mrk.json", "moving_T2.mrk.json")]
    return ["--fixed-landmarks", files[0], "--moving-landmarks", files[1]]


def settings(output) -> dict:
    return json.loads((output / "quality.json").read_text())


def test_a_preset_sets_options_and_those_given_beside_it_come_first(pair, tmp_path):
    quick = ["--device", "cpu", "--spacing", "6"]
    assert main(["register", *pair, *quick, "--preset", "ct-mr", "--refine", "1", "--output", str(tmp_path)]) == 0
    found = settings(tmp_path)["settings"]
    assert (found["align"], found["refine"], found["spacing"] >= 6) == ("rigid", 1, True)


def test_only_aligning_moves_nothing_beyond_the_alignment(pair, tmp_path):
    command = ["register", *pair, "--device", "cpu", "--spacing", "6", "--preset", "align-only"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    report = settings(tmp_path)
    assert report["quality"]["largest_displacement_mm"] == 0
    assert report["quality"]["nmi"]["after"] == report["quality"]["nmi"]["aligned"] > report["quality"]["nmi"]["before"]


@pytest.mark.parametrize("align", ["landmarks", "landmarks-similarity", "landmarks-affine"])
def test_landmarks_align(pair, landmarks, tmp_path, align):
    command = ["register", *pair, *landmarks, "--device", "cpu", "--spacing", "6", "--method", "none", "--align", align]
    assert main([*command, "--output", str(tmp_path)]) == 0
    report = settings(tmp_path)
    matrix = np.array(report["initial_alignment_lps"])
    fixed, moving = (read_landmarks(path).points for path in (landmarks[1], landmarks[3]))
    error = np.linalg.norm(apply_matrix(matrix, fixed) - moving, axis=1).mean()
    assert error < 5 and report["quality"]["landmarks_mm"]["after"]["mean"] == pytest.approx(error, abs=0.05)


def test_landmarks_align_each_pair_of_a_cohort_and_a_pair_without_landmarks_fails_alone(sample_data, tmp_path, capsys):
    images, marks = ("fixed_T1.nii.gz", "moving_T2.nii.gz"), ("fixed_T1.mrk.json", "moving_T2.mrk.json")
    with_landmarks, without = (",".join(str(sample_data / f) for f in files) for files in ((*images, *marks), images))
    table = tmp_path / "pairs.csv"
    table.write_text(f"name,fixed,moving,fixed_landmarks,moving_landmarks\na,{with_landmarks}\nb,{without},,\n")
    quick = ["--device", "cpu", "--spacing", "6", "--method", "none", "--align", "landmarks-affine"]
    assert main(["register", "--pairs", str(table), *quick, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "1 of 2 pairs failed" in message and "--align landmarks-affine needs" in message
    report = settings(tmp_path / "out" / "a")
    fixed, moving = (read_landmarks(sample_data / name).points for name in marks)
    error = np.linalg.norm(apply_matrix(np.array(report["initial_alignment_lps"]), fixed) - moving, axis=1).mean()
    assert error < 5 and report["origin"]["options"]["align"] == "landmarks-affine"


def test_the_library_says_that_it_has_no_landmarks(pair):
    fixed, moving = (read_image(path) for path in pair)
    with pytest.raises(InputError, match="'landmarks' needs landmarks"):
        register(fixed, moving, align="landmarks", device="cpu")


def test_landmark_alignment_without_landmarks_says_what_it_needs(pair, tmp_path, capsys):
    assert main(["register", *pair, "--align", "landmarks", "--output", str(tmp_path / "out")]) == 2
    assert "--align landmarks needs --fixed-landmarks and --moving-landmarks" in capsys.readouterr().err
