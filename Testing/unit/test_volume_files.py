"""Which files hold a volume."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.images import read_image
from DivRegNetLib.io.volume_files import files_of
from DivRegNetLib.run.cohort.origin import digest


@pytest.fixture
def image():
    made = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    made.SetSpacing((1.5, 2, 2.5))
    return made


def names(path: Path) -> list[str]:
    return [file.name for file in files_of(path)]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.nii.gz", ["a.nii.gz"]), ("a.nrrd", ["a.nrrd"]), ("a.mha", ["a.mha"]), ("a.mhd", ["a.mhd", "a.raw"]),
        ("a.nhdr", ["a.nhdr", "a.raw"]), ("a.hdr", ["a.hdr", "a.img"]), ("a.img", ["a.hdr", "a.img"]),
    ],
)  # fmt: skip
def test_voxels_beside_a_header_belong_to_it(name, expected, image, tmp_path):
    sitk.WriteImage(image, str(tmp_path / name))
    assert names(tmp_path / name) == expected
    before = digest(tmp_path / name)
    voxels = tmp_path / expected[-1]
    content = bytearray(voxels.read_bytes())
    content[-1] ^= 1
    voxels.write_bytes(content)
    assert digest(tmp_path / name) != before


LISTS = {
    "a.mhd": ("ElementDataFile = LIST\nx 1.raw\ny.raw\n", ["a.mhd", "x 1.raw", "y.raw"]),
    "b.mhd": ("ElementDataFile = s%02d.raw 1 5 2\n", ["b.mhd", "s01.raw", "s03.raw", "s05.raw"]),
    "c.mha": ("ElementDataFile = LOCAL\nElementDataFile = no.raw", ["c.mha"]),
    "a.nhdr": ("NRRD0004\ndata file: LIST\nx.raw\ny.raw\n", ["a.nhdr", "x.raw", "y.raw"]),
    "b.nhdr": ("NRRD0004\nspacings: 1 1 1\ndatafile: s%d.raw 1 3 1 2\n", ["b.nhdr", "s1.raw", "s2.raw", "s3.raw"]),
    "c.nrrd": ("NRRD0004\ntype: short\n\ndata file: no.raw\n", ["c.nrrd"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_and_patterns_of_voxel_files_are_followed(name, tmp_path):
    text, expected = LISTS[name]
    (tmp_path / name).write_text(text)
    assert names(tmp_path / name) == expected


def test_all_files_of_a_folder_belong_to_a_series(tmp_path):
    for name in "ba":
        (tmp_path / name).write_text(name)
    assert names(tmp_path) == ["a", "b"]


def test_voxels_that_are_exchanged_while_they_are_read_are_named(image, tmp_path, monkeypatch):
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    read = sitk.ReadImage

    def exchanged(*arguments):
        found = read(*arguments)
        os.replace(tmp_path / "b.raw", tmp_path / "a.raw")
        return found

    (tmp_path / "b.raw").write_bytes(bytes(120))
    monkeypatch.setattr(sitk, "ReadImage", exchanged)
    with pytest.raises(InputError, match=r"a\.raw: was changed while it was read"):
        read_image(tmp_path / "a.mhd")
