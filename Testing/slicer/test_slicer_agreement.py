"""What Slicer makes of the files on disk is what DivRegNet wrote: real MRML from slicer-core, no stand-in."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from DivRegNetLib.core.composites import field_of
from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid
from DivRegNetLib.io import landmarks, transforms
from DivRegNetLib.run.cli import main

slicer = pytest.importorskip("slicer")


@pytest.fixture(scope="module")
def registered(sample_data, tmp_path_factory):
    """Folder of the command line's results for the bundled pair."""
    output = tmp_path_factory.mktemp("registered")
    pair = [str(sample_data / f"{name}.nii.gz") for name in ("fixed_T1", "moving_T2")]
    assert main(["register", *pair, "--output", str(output), "--device", "cpu", "--json"]) == 0
    return output


def read_node(scene, kind, storage, path):
    node = scene.AddNewNodeByClass(f"vtkMRML{kind}Node")
    reader = scene.AddNewNodeByClass(f"vtkMRML{storage}StorageNode")
    reader.SetFileName(str(path))
    assert reader.ReadData(node) == 1
    return node


def ijk_to_ras(node):
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return matrix


@pytest.fixture(scope="module")
def scene(registered, sample_data):
    """Fixed, moving and warped volumes and the transform, as Slicer reads them; moving put under the transform."""
    scene = slicer.vtkMRMLScene()
    nodes = {
        "fixed": read_node(scene, "ScalarVolume", "VolumeArchetype", sample_data / "fixed_T1.nii.gz"),
        "moving": read_node(scene, "ScalarVolume", "VolumeArchetype", sample_data / "moving_T2.nii.gz"),
        "warped": read_node(scene, "ScalarVolume", "VolumeArchetype", registered / "warped.nii.gz"),
        "transform": read_node(scene, "Transform", "Transform", registered / "transform.h5"),
        "inverse": read_node(scene, "Transform", "Transform", registered / "inverse.h5"),
    }
    nodes["moving"].SetAndObserveTransformNodeID(nodes["transform"].GetID())
    nodes["scene"] = scene
    return nodes


def test_slicers_resampling_under_the_transform_file_equals_the_warped_file(scene):
    fixed, moving = scene["fixed"], scene["moving"]
    # Voxels of fixed -> world -> through Slicer's transform -> voxels of moving: what hardening and resampling does.
    chain = vtk.vtkGeneralTransform()
    chain.PostMultiply()
    chain.Concatenate(ijk_to_ras(fixed))
    from_world = vtk.vtkGeneralTransform()
    moving.GetParentTransformNode().GetTransformFromWorld(from_world)
    chain.Concatenate(from_world)
    back = ijk_to_ras(moving)
    back.Invert()
    chain.Concatenate(back)
    reslice = vtk.vtkImageReslice()
    reslice.SetInputData(moving.GetImageData())
    reslice.SetResliceTransform(chain)
    reslice.SetInterpolationModeToLinear()
    reslice.SetOutputExtent(fixed.GetImageData().GetExtent())
    reslice.SetOutputOrigin(0, 0, 0)
    reslice.SetOutputSpacing(1, 1, 1)
    reslice.SetBackgroundLevel(0)
    reslice.Update()
    slicers = vtk_to_numpy(reslice.GetOutput().GetPointData().GetScalars()).astype(float)
    ours = vtk_to_numpy(scene["warped"].GetImageData().GetPointData().GetScalars()).astype(float)
    difference = np.abs(slicers - ours)
    # Integers are rounded once on either side; the outermost voxels of the moving volume are cut off differently.
    assert (difference <= 1).mean() > 0.995
    inside = (slicers > 0) & (ours > 0)
    assert (difference[inside] <= 1).mean() > 0.999
    assert difference[inside].mean() < 0.2


def test_landmarks_go_in_slicer_where_the_transform_takes_them(scene, registered, sample_data):
    fixed = landmarks.read_landmarks(sample_data / "fixed_T1.mrk.json").points
    ours = transforms.read_transform(registered / "transform.h5")
    inverse = transforms.read_transform(registered / "inverse.h5")
    for node, transform in ((scene["transform"], ours), (scene["inverse"], inverse)):
        grid, from_parent = (
            Grid.of(field_of(transform)),
            node.GetTransformFromParent(),
        )
        for point in fixed:
            # Slicer interpolates displacements cubically, ITK linearly: between voxels they differ a little.
            center = grid.to_physical(np.round(grid.to_index(point)))
            for at, tolerance in ((center, 1e-3), (point, 0.1)):
                found = LPS_FROM_RAS[:3, :3] @ from_parent.TransformPoint((LPS_FROM_RAS[:3, :3] @ at).tolist())
                assert found == pytest.approx(transform.TransformPoint(at.tolist()), abs=tolerance)


def test_the_displacement_volume_is_the_transform(registered):
    field = sitk.ReadImage(str(registered / "displacement.nii.gz"))
    transform = transforms.read_transform(registered / "transform.h5")
    from_volume = transforms.read_transform(registered / "displacement.nii.gz")
    grid = Grid.of(field)
    for index in ((3, 4, 5), (60, 70, 40), (100, 20, 90)):
        point = grid.to_physical(index).tolist()
        assert from_volume.TransformPoint(point) == pytest.approx(transform.TransformPoint(point), abs=1e-3)


def test_the_folder_holds_what_quality_json_lists(registered):
    report = json.loads((registered / "quality.json").read_text())
    assert sorted(p.name for p in registered.iterdir()) == report["files"]
    assert {"warped.nii.gz", "transform.h5", "inverse.h5", "displacement.nii.gz", "preview.png"} < set(report["files"])
