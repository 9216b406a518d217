"""Masks and initial transforms from nodes; inputs and outputs that cannot be used are named."""

import numpy as np
import pytest
import SimpleITK as sitk

pytest.importorskip("slicer")

import slicer
import slicer.util
import vtk
from DivRegNetModule import mrml
from mrml_scenes import RAS, SHEARED, add_volume, array, bump, put_under, state, turned, world_grid

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid
from DivRegNetLib.errors import InputError


def test_a_label_map_and_a_segment_mask_the_same_voxels_wherever_they_are(scene, fixed, moving, grid, center):
    values = np.zeros(grid.shape, np.uint8)
    values[4:12, 6:20, 5:15] = 1
    label_map = add_volume(scene, grid.image(values), "mask", "vtkMRMLLabelMapVolumeNode")
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "parts")
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(label_map, segmentation)
    segment = segmentation.GetSegmentation().GetNthSegmentID(0)
    for node in (label_map, segmentation):
        put_under(node, SHEARED @ turned(9, center), "own")
    expected = mrml.images_from_nodes(fixed, moving, fixed_mask=label_map).options["fixed_mask"]
    assert Grid.of(expected) == world_grid(label_map)
    assert np.array_equal(sitk.GetArrayFromImage(expected), values)
    found = mrml.images_from_nodes(fixed, moving, fixed_mask=(segmentation, segment)).options["fixed_mask"]
    on_grid = sitk.Resample(found, expected, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    assert np.array_equal(sitk.GetArrayFromImage(on_grid) != 0, values != 0)


def test_a_segment_that_is_only_a_surface_makes_a_mask_and_stays_a_surface(scene, fixed, moving, center):
    sphere = vtk.vtkSphereSource()
    sphere.SetCenter(center)
    sphere.SetRadius(25)
    sphere.SetThetaResolution(32)
    sphere.SetPhiResolution(32)
    sphere.Update()
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "sphere")
    segmentation.SetSourceRepresentationToClosedSurface()
    segment = segmentation.AddSegmentFromClosedSurfaceRepresentation(sphere.GetOutput(), "ball", [1, 0, 0])
    before = state(scene)
    mask = mrml.images_from_nodes(fixed, moving, moving_mask=(segmentation, segment)).options["moving_mask"]
    assert state(scene) == before
    volume = sitk.GetArrayFromImage(mask).sum() * np.prod(mask.GetSpacing())
    assert volume == pytest.approx(4 / 3 * np.pi * 25**3, rel=0.1)
    assert np.array(
        mask.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in mask.GetSize()])
    ) == pytest.approx(center * RAS, abs=3)


def test_an_initial_transform_node_brings_the_moving_volume_near(scene, fixed, moving, register, center):
    away = turned(20, center, (30, 10, -15))
    moving.ApplyTransformMatrix(slicer.util.vtkMatrixFromArray(away))
    back = scene.AddNewNodeByClass("vtkMRMLTransformNode", "by hand")
    back.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(np.linalg.inv(away)))
    initial = register(fixed, moving, align=back).result.initial
    assert initial == pytest.approx(LPS_FROM_RAS @ away @ LPS_FROM_RAS, abs=1e-6)


def empty_volume(scene, *_):
    return scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "hollow")


def a_label_map(scene, image):
    return add_volume(scene, sitk.Cast(image > 0.5, sitk.sitkUInt8), "labels", "vtkMRMLLabelMapVolumeNode")


def a_vector_volume(scene, image):
    node = scene.AddNewNodeByClass("vtkMRMLVectorVolumeNode", "colors")
    slicer.util.updateVolumeFromArray(node, np.zeros((*image.GetSize()[::-1], 3), np.uint8))
    return node


def a_scalar_volume_of_vectors(scene, image):
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "two channels")
    voxels = vtk.vtkImageData()
    voxels.SetDimensions(image.GetSize())
    voxels.AllocateScalars(vtk.VTK_FLOAT, 2)
    node.SetAndObserveImageData(voxels)
    return node


def a_model(scene, *_):
    return scene.AddNewNodeByClass("vtkMRMLModelNode", "surface")


@pytest.mark.parametrize("role", ["fixed", "moving"])
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda *_: None, "no {role} volume; choose one"),
        (empty_volume, "'hollow' is empty"),
        (a_label_map, "'labels' is a label map"),
        (a_vector_volume, "'colors' is no scalar volume"),
        (a_scalar_volume_of_vectors, "'two channels' is no scalar volume"),
        (a_model, "'surface' is no scalar volume"),
        (lambda *_: "T1.nii", "'T1.nii'"),
        (lambda *_: slicer.vtkMRMLScalarVolumeNode(), "empty"),
    ],
    ids=["none", "empty", "label map", "vectors", "components", "model", "no node", "not in a scene"],
)
def test_an_input_that_cannot_be_registered_is_named_and_the_scene_stays(
    scene, fixed, moving, register, grid, paint, role, make, words
):
    inputs = {"fixed": fixed, "moving": moving, role: make(scene, paint(grid))}
    before = state(scene)
    with pytest.raises(InputError) as raised:
        register(inputs["fixed"], inputs["moving"])
    assert words.format(role=role) in str(raised.value)
    assert role in str(raised.value)
    assert state(scene) == before


def with_value(value):
    def change(node):
        array(node)[3, 4, 5] = value
        return node

    return change


def placed(matrix):
    def change(node):
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(np.asarray(matrix, float)))
        return node

    return change


def constant(node):
    array(node)[:] = 7
    return node


def flattened(node):
    put_under(node, np.diag([1.0, 1.0, 0.0, 1.0]), "to a plane")
    return node


@pytest.mark.parametrize("role", ["fixed", "moving"])
@pytest.mark.parametrize(
    "change, words",
    [
        (with_value(np.nan), "holds 1 voxels that are NaN or infinite; replace them"),
        (with_value(-np.inf), "holds 1 voxels that are NaN or infinite; replace them"),
        (constant, "is constant"),
        (placed(np.diag([300.0, 1, 1, 1])), "spacing of 300 mm; repair its header"),
        (placed([[1, 0, 0, 5e6], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "lies 5 km from the origin"),
        (placed(np.diag([np.nan, 1, 1, 1])), "cannot be used: .* finite"),
        (flattened, "cannot be used: .*; repair it"),
    ],
    ids=["NaN", "infinity", "constant", "huge spacing", "far away", "no place", "flattened"],
)
def test_a_volume_of_odd_content_or_place_is_refused_and_the_scene_stays(
    scene, grid, paint, register, role, change, words
):
    nodes = {name: add_volume(scene, paint(grid), name) for name in ("fixed", "moving")}
    change(nodes[role])
    before = state(scene)
    with pytest.raises(InputError, match=words) as raised:
        register(nodes["fixed"], nodes["moving"])
    assert role in str(raised.value)
    assert str(state(scene)) == str(before)  # NaN is unlike itself


@pytest.mark.parametrize(
    "kind",
    [vtk.VTK_CHAR, vtk.VTK_SIGNED_CHAR, vtk.VTK_UNSIGNED_CHAR, vtk.VTK_SHORT, vtk.VTK_UNSIGNED_SHORT, vtk.VTK_INT,
     vtk.VTK_UNSIGNED_INT, vtk.VTK_LONG, vtk.VTK_UNSIGNED_LONG, vtk.VTK_LONG_LONG, vtk.VTK_UNSIGNED_LONG_LONG,
     vtk.VTK_ID_TYPE, vtk.VTK_FLOAT, vtk.VTK_DOUBLE],
    ids=vtk.vtkImageScalarTypeNameMacro,
)  # fmt: skip
def test_a_volume_of_any_type_of_vtk_is_registered_and_keeps_it(kind, scene, fixed, moving, register):
    voxels = vtk.vtkImageData()
    voxels.SetDimensions(moving.GetImageData().GetDimensions())
    voxels.AllocateScalars(kind, 1)
    scalars = vtk.util.numpy_support.vtk_to_numpy(voxels.GetPointData().GetScalars())
    scalars[:] = (array(moving).ravel() / 12).astype(scalars.dtype)
    moving.SetAndObserveImageData(voxels)
    warped = register(fixed, moving, spacing=8.0).warped_node
    kept = {vtk.VTK_ID_TYPE: (vtk.VTK_ID_TYPE, vtk.VTK_LONG_LONG)}.get(kind, (kind,))
    assert warped.GetImageData().GetScalarType() in kept
    assert array(warped).max() > 60


def test_one_volume_cannot_be_both(scene, fixed, register):
    before = state(scene)
    with pytest.raises(InputError, match="'T1 head' is chosen as fixed and as moving"):
        register(fixed, fixed)
    assert state(scene) == before


def test_volumes_of_two_scenes_or_of_none_are_refused(scene, fixed, moving, register, grid, paint):
    elsewhere = slicer.vtkMRMLScene()
    with pytest.raises(InputError, match="'stranger' is not in the scene"):
        register(fixed, add_volume(elsewhere, paint(grid), "stranger"))
    scene.RemoveNode(moving)
    with pytest.raises(InputError, match="'T2 head' is in no scene"):
        register(fixed, moving)


@pytest.mark.parametrize(
    "outputs, words",
    [
        ({"warped_node": "moving"}, "'T2 head' is an input"),
        ({"warped_node": "labels"}, "'labels' cannot hold the warped volume"),
        ({"warped_node": "transform"}, "'transform' cannot hold the warped volume"),
        ({"transform_node": "linear"}, "'linear' cannot hold a displacement field"),
        ({"transform_node": "fixed"}, "'T1 head' cannot hold a displacement field"),
        ({"transform_node": "parent"}, "'T2 head' is under the transform 'parent'"),
        ({"inverse_node": "parent"}, "'T2 head' is under the transform 'parent'"),
        ({"transform_node": "transform", "inverse_node": "transform"}, "'transform' is chosen for the transform and"),
        ({"fixed_mask": "fixed"}, "'T1 head' cannot be a mask"),
        ({"moving_mask": ("segmentation", "no such")}, "'segmentation' has no segment 'no such'"),
        ({"align": "bent"}, "'bent' is no linear transform"),
        ({"align": "parent"}, "'T2 head' is under the transform 'parent' already"),
        ({"align": "sideways"}, "align is one of none, center, rigid, affine"),
        ({"model": "no such"}, "no model 'no such'"),
        ({"color": "red"}, "unknown option"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_an_output_or_option_that_cannot_be_used_is_named_and_the_scene_stays(
    scene, fixed, moving, register, center, outputs, words
):
    add = scene.AddNewNodeByClass
    nodes = {
        "fixed": fixed,
        "moving": moving,
        "labels": add("vtkMRMLLabelMapVolumeNode", "labels"),
        "transform": add("vtkMRMLTransformNode", "transform"),
        "linear": add("vtkMRMLLinearTransformNode", "linear"),
        "parent": put_under(moving, turned(5, center), "parent"),
        "bent": add("vtkMRMLTransformNode", "bent"),
        "segmentation": add("vtkMRMLSegmentationNode", "segmentation"),
    }
    nodes["bent"].SetAndObserveTransformToParent(bump(center, 5, 30))

    def named(value):
        return tuple(nodes.get(v, v) for v in value) if isinstance(value, tuple) else nodes.get(value, value)

    before = state(scene)
    with pytest.raises(ValueError, match=words):
        register(fixed, moving, **{key: named(value) for key, value in outputs.items()})
    assert state(scene) == before
