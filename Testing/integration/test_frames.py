"""A moving 4D file is registered frame by frame."""

import csv

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.io.images import read_image, write_image
from DivRegNetLib.run.cli import main
from DivRegNetLib.run.cohort import frames

QUICK = ["--device", "cpu", "--align", "none", "--spacing", "8"]


@pytest.fixture
def files(tmp_path, grid_about, paint, rigid):
    """A fixed volume, and a moving file of three frames, each shifted further; NIfTI needs right angles."""
    grid = grid_about((31.0, -47.0, 112.0), (24, 28, 22), (5.0, 4.5, 5.5), (10, -5, 15))
    series = [sitk.Cast(paint(grid, rigid((0, 0, 0), (3.0 * i, 0, 0))) * 1000, sitk.sitkInt16) for i in range(3)]
    write_image(paint(grid), tmp_path / "fixed.nii.gz")
    moving = sitk.JoinSeries(series)
    moving.SetSpacing((*moving.GetSpacing()[:3], 0.5))
    write_image(moving, tmp_path / "moving.nii.gz")
    return tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"


def test_each_frame_has_its_folder_and_row_and_the_warped_frames_are_one_file(files, tmp_path):
    output = tmp_path / "out"
    assert main(["register", *map(str, files), *QUICK, "--output", str(output), "--json"]) == 0
    with (output / "results.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["name"] for row in rows] == ["0000", "0001", "0002"] and {row["status"] for row in rows} == {"ok"}
    warped = read_image(output / "warped.nii.gz")
    assert warped.GetSize() == (24, 28, 22, 3)
    for i in range(3):
        one = sitk.GetArrayFromImage(read_image(output / f"000{i}" / "warped.nii.gz"))
        assert np.array_equal(sitk.GetArrayFromImage(warped)[i], one)
        assert (output / f"000{i}" / "transform.h5").exists()
    assert main(["report", str(output / "0001")]) == 0


def test_only_a_file_with_several_volumes_is_4d(files, tmp_path):
    assert [frames.is_4d(file) for file in files] == [False, True]
    assert not frames.is_4d(tmp_path / "no such file.nii.gz")
    single = tmp_path / "single.nii.gz"
    sitk.WriteImage(sitk.JoinSeries([read_image(files[0])]), str(single))
    assert not frames.is_4d(single)
