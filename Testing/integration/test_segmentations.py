"""Segmentation files of 3D Slicer: names, colors, terminology and layers go where the voxels go."""

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import InputError
from DivRegNetLib.io.images import read_image, read_labels, write_image
from DivRegNetLib.io.segmentations import (
    match_names,
    metadata_of,
    read_mask,
    relabel,
    relabel_metadata,
    segments,
    write_segmentation,
)
from DivRegNetLib.run.cli import main

TERMS = "TerminologyEntry:Segmentation category~SCT^123037004^Anatomical Structure~SCT^12738006^Brain~^^~list~^^~^^||"


def metadata(*parts: tuple[str, int, int]) -> dict[str, str]:
    """What Slicer writes of segments: (name, label value, layer)."""
    about = {"Segmentation_ContainedRepresentationNames": "Binary labelmap|"}
    about |= {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "7 7 7",
    }
    for n, (name, value, layer) in enumerate(parts):
        about |= {
            f"Segment{n}_ID": f"Segment_{n + 1}", f"Segment{n}_Name": name, f"Segment{n}_Color": f"0.{n} 1 0",
            f"Segment{n}_LabelValue": str(value), f"Segment{n}_Layer": str(layer), f"Segment{n}_Tags": TERMS,
            f"Segment{n}_Extent": "0 1 0 1 0 1",
        }  # fmt: skip
    return about


@pytest.fixture
def grid() -> Grid:
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]) * (2.0, 3.0, 4.0)
    return Grid((12, 10, 8), matrix)


@pytest.fixture
def boxes(grid):
    """Two overlapping boxes (D, H, W), bool."""
    one, two = np.zeros((2, *grid.shape), bool)
    one[2:6, 3:8, 2:9], two[4:7, 5:9, 1:5] = True, True
    return one, two


@pytest.fixture
def flat(grid, boxes, tmp_path):
    """A file with two segments in one layer."""
    array = np.where(boxes[0], 5, np.where(boxes[1], 7, 0)).astype(np.uint8)
    path = tmp_path / "flat.seg.nrrd"
    write_segmentation(grid.image(array), metadata(("Left, größer", 5, 0), ("Right", 7, 0)), path)
    return path


@pytest.fixture
def layered(grid, boxes, tmp_path):
    """A file with two segments that overlap."""
    image = grid.image(np.stack(boxes, -1).astype(np.uint8))
    write_segmentation(image, metadata(("Brain", 1, 0), ("Lesion", 1, 1)), tmp_path / "layers.seg.nrrd")
    return tmp_path / "layers.seg.nrrd"


@pytest.fixture
def shift(grid, tmp_path):
    """A transform file that moves by one voxel along i."""
    path = tmp_path / "shift.tfm"
    step = grid.matrix[:3, 0].tolist()
    sitk.WriteTransform(sitk.TranslationTransform(3, step), str(path))
    return path


@pytest.mark.parametrize("name", ["flat", "layered"])
def test_apply_keeps_names_colors_terminology_and_layers(name, request, grid, shift, tmp_path):
    path, output = request.getfixturevalue(name), tmp_path / "out.seg.nrrd"
    reference = tmp_path / "reference.nii.gz"
    write_image(grid.image(np.zeros(grid.shape, np.float32)), reference)
    assert main(["apply", str(shift), str(path), "--reference", str(reference), "--output", str(output)]) == 0
    before, after = read_image(path), read_image(output)
    expected = np.roll(sitk.GetArrayFromImage(before), -1, axis=2)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(after), expected)
    kept = [{k: v for k, v in metadata_of(i).items() if "Extent" not in k} for i in (before, after)]
    assert kept[0] == kept[1]
    assert segments(metadata_of(after)) == segments(metadata_of(before))
    inside = np.argwhere(expected[..., 0] == 1 if name == "layered" else expected == 5)[:, ::-1]
    box = " ".join(f"{low} {high}" for low, high in zip(inside.min(0), inside.max(0), strict=True))
    assert after.GetMetaData("Segment0_Extent") == box
    assert after.GetMetaData("Segmentation_ReferenceImageExtentOffset") == "0 0 0"
    kinds = b"kinds: list domain domain domain" if name == "layered" else b"kinds: domain domain domain"
    assert kinds in output.read_bytes()[:2000]


def test_a_format_without_names_is_said_and_one_without_layers_refused(flat, layered, shift, grid, tmp_path, capsys):
    reference = tmp_path / "reference.nii.gz"
    write_image(grid.image(np.zeros(grid.shape, np.float32)), reference)
    apply = ["--reference", str(reference), "--output", str(tmp_path / "out.nii.gz")]
    assert main(["apply", str(shift), str(flat), *apply]) == 0
    assert "no names and colors of segments; a file that ends in .seg.nrrd has" in capsys.readouterr().err
    assert main(["apply", str(shift), str(layered), *apply, "--overwrite"]) == 2
    assert "segments that overlap can be written to .seg.nrrd only" in capsys.readouterr().err


def test_a_mask_is_the_union_of_all_segments(layered, flat, boxes):
    for path in (layered, flat):
        mask = sitk.GetArrayFromImage(read_mask(path)) != 0
        np.testing.assert_array_equal(mask, boxes[0] | boxes[1])


def test_overlapping_segments_are_no_label_map(layered):
    with pytest.raises(
        InputError, match=r"overlap, in 2 layers, .* export it to a label map, or each segment to a file"
    ):
        read_labels(layered)


def test_segments_are_compared_by_their_names(grid, boxes, tmp_path, capsys):
    """The same anatomy, drawn in another order: the label values are exchanged, the names are not."""
    paths = [tmp_path / f"{n}.seg.nrrd" for n in "ab"]
    for path, values in zip(paths, ((1, 2), (2, 1)), strict=True):
        array = np.where(boxes[0], values[0], np.where(boxes[1], values[1], 0)).astype(np.uint8)
        write_segmentation(grid.image(array), metadata(("Liver", values[0], 0), ("Kidney", values[1], 0)), path)
    assert main(["evaluate", "--fixed-labels", str(paths[0]), "--moving-labels", str(paths[1])]) == 0
    out = capsys.readouterr().out
    assert "dice 1.000" in out and "compared by their names" in out


def test_labels_without_a_partner_keep_out_of_each_others_way(flat, grid, boxes):
    moving = grid.image(np.where(boxes[0], 7, np.where(boxes[1], 5, 0)).astype(np.uint8))
    about = metadata(("Left, größer", 7, 0), ("Spleen", 5, 0))
    for key, value in about.items():
        moving.SetMetaData(key, value)
    values = match_names(read_image(flat), moving)
    assert values[7] == 5 and values[5] not in (0, 5, 7)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(relabel(moving, values)) == 5, boxes[0])
    assert segments(relabel_metadata(about, values)) == {"Left, größer": (0, 5), "Spleen": (0, values[5])}
