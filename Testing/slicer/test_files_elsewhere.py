"""Files that the library writes, read by 3D Slicer's own code and by ANTs."""

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.composites import composite, displacement_on
from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid, apply_matrix
from DivRegNetLib.core.points import map_points
from DivRegNetLib.io.landmarks import Landmarks, read_landmarks, write_landmarks
from DivRegNetLib.io.segmentations import write_segmentation
from DivRegNetLib.io.transforms import read_transform, write_transform

slicer = pytest.importorskip("slicer")
import vtk  # noqa: E402
from vtk.util import numpy_support  # noqa: E402


def read(node_class: str, storage, path):
    """A node that Slicer has read from a file."""
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass(node_class, "node")
    storage.SetFileName(str(path))
    assert storage.ReadData(node)
    return scene, node


@pytest.fixture
def registration(grid, rigid) -> sitk.Transform:
    """As a registration gives it: a rotation and shift, and a field that fades out around the grid."""
    import torch

    from DivRegNetLib.core.physical_fields import forward_transform

    working = grid.axis_aligned(8.0)
    k, j, i = np.indices(working.shape)
    waves = np.stack([np.sin(j / 3), np.cos(k / 4), np.sin(i / 3 + 1)])[None]
    return forward_transform(
        torch.from_numpy(waves.astype(np.float32)), working, rigid((10, 20, -30), (4, 5, 260)), grid
    )


def test_slicer_reads_a_transform_as_one_node_that_is_right_inside_and_outside(registration, grid, tmp_path):
    write_transform(registration, tmp_path / "transform.h5")
    scene, node = read("vtkMRMLTransformNode", slicer.vtkMRMLTransformStorageNode(), tmp_path / "transform.h5")
    assert scene.GetNumberOfNodesByClass("vtkMRMLTransformNode") == 1
    index = np.random.default_rng(0).uniform(1, np.array(grid.size) - 2, (50, 3))
    inside, outside = grid.to_physical(index.round()), grid.to_physical(index * 20 - 200)
    from_parent = vtk.vtkGeneralTransform()
    node.GetTransformFromWorld(from_parent)
    for points, tolerance in ((inside, 1e-3), (outside, 1e-3)):
        ras = apply_matrix(LPS_FROM_RAS, points)
        by_slicer = apply_matrix(LPS_FROM_RAS, np.array([from_parent.TransformPoint(p) for p in ras.tolist()]))
        np.testing.assert_allclose(by_slicer, map_points(registration, points), atol=tolerance)


def test_simpleitk_reads_the_transform_it_was(registration, grid, tmp_path):
    write_transform(registration, tmp_path / "transform.h5")
    back = read_transform(tmp_path / "transform.h5")
    larger = Grid(tuple(3 * n for n in grid.size), grid.matrix)
    one, other = (sitk.GetArrayFromImage(displacement_on(t, larger)) for t in (registration, back))
    np.testing.assert_allclose(one, other, atol=1e-9)
    identity = composite(np.eye(4), grid.image(np.zeros((*grid.shape, 3))))
    write_transform(identity, tmp_path / "identity.h5")
    assert read_transform(tmp_path / "identity.h5").TransformPoint((1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)


def test_ants_reads_a_transform_that_is_right_inside_and_outside(registration, grid, tmp_path):
    ants = pytest.importorskip("ants", reason="needs antspyx")
    write_transform(registration, tmp_path / "transform.h5")
    transform = ants.read_transform(str(tmp_path / "transform.h5"))
    index = np.random.default_rng(0).uniform(1, np.array(grid.size) - 2, (50, 3))
    for points in (grid.to_physical(index), grid.to_physical(index * 20 - 200)):
        by_ants = np.array([transform.apply_to_point(p) for p in points.tolist()])
        np.testing.assert_allclose(by_ants, map_points(registration, points), atol=1e-3)


@pytest.mark.parametrize("layers", [1, 2])
def test_slicer_reads_the_segments_with_names_colors_and_terminology(layers, grid, tmp_path):
    from DivRegNetModule.mrml.segments import register_representations

    register_representations()
    values = np.zeros((*grid.shape, 2), np.uint8)
    values[2:9, 3:9, 4:12, 0], values[5:12, 5:14, 3:9, 1] = 1, 1
    if layers == 1:
        values = np.where(values[..., 0] == 1, 1, 2 * values[..., 1]).astype(np.uint8)
    terms = "TerminologyEntry:Category~SCT^1^Anatomy~SCT^2^Brain~^^~list~^^~^^||"
    about = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for n, name in enumerate(("Brain", "Lesion")):
        about |= {
            f"Segment{n}_ID": f"S{n}", f"Segment{n}_Name": name, f"Segment{n}_Color": f"{n} 0.5 0",
            f"Segment{n}_LabelValue": str(1 if layers == 2 else n + 1), f"Segment{n}_Layer": str(n if layers == 2 else 0),
            f"Segment{n}_Tags": terms, f"Segment{n}_Extent": "0 0 0 0 0 0",
        }  # fmt: skip
    write_segmentation(grid.image(values), about, tmp_path / "s.seg.nrrd")
    _, node = read("vtkMRMLSegmentationNode", slicer.vtkMRMLSegmentationStorageNode(), tmp_path / "s.seg.nrrd")
    segmentation = node.GetSegmentation()
    assert segmentation.GetNumberOfLayers() == layers
    for n, name in enumerate(("Brain", "Lesion")):
        segment, tag = segmentation.GetSegment(f"S{n}"), vtk.reference("")
        assert segment.GetName() == name and segment.GetColor() == (n, 0.5, 0)
        assert segment.GetTag("TerminologyEntry", tag) and "Brain" in str(tag)
        image = segment.GetRepresentation("Binary labelmap")
        inside = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()) == segment.GetLabelValue()
        expected = values[..., n] == 1 if layers == 2 else values == n + 1
        assert inside.sum() == expected.sum()


def test_slicer_keeps_undefined_points_undefined(tmp_path):
    points = np.array([[1.0, 2, 3], [np.nan] * 3, [7, 8, 9]])
    write_landmarks(Landmarks(points, ("a", "b", "c")), tmp_path / "p.mrk.json")
    storage = slicer.vtkMRMLMarkupsJsonStorageNode()
    _, node = read("vtkMRMLMarkupsFiducialNode", storage, tmp_path / "p.mrk.json")
    defined = [node.GetNthControlPointPositionStatus(i) == node.PositionDefined for i in range(3)]
    assert defined == [True, False, True]
    assert node.GetNthControlPointPosition(2) == pytest.approx((-7, -8, 9))
    storage.SetFileName(str(tmp_path / "back.mrk.json"))
    assert storage.WriteData(node)
    back = read_landmarks(tmp_path / "back.mrk.json")
    assert back.labels == ("a", "b", "c")
    np.testing.assert_allclose(back.points, points)
