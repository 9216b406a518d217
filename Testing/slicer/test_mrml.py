"""The adapter on real MRML (slicer-core): what Slicer makes of the nodes is what the registration found."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

pytest.importorskip("slicer")

import slicer
import slicer.util
import vtk
from DivRegNetModule import mrml
from mrml_scenes import add_volume, bump, ijk_to_ras, put_under, save_bold_model, state, topmost, world_grid

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid
from DivRegNetLib.errors import Cancelled, InputError
from DivRegNetLib.run.worker import Worker

RAS = LPS_FROM_RAS[:3, :3].diagonal()
OPTIONS = {"model": "bold", "device": "cpu", "align": "none"}
SHEARED = np.array([[1.0, 0.15, 0.0, 5.0], [0.0, 0.95, 0.1, -4.0], [0.05, 0.0, 1.1, 3.0], [0.0, 0.0, 0.0, 1.0]])


def turned(degrees: float, center_ras, shift=(0.0, 0.0, 0.0)) -> np.ndarray:
    """(4, 4) RAS: rotation about an oblique axis through a point, then a shift."""
    transform = vtk.vtkTransform()
    transform.PostMultiply()
    transform.Translate(*(-np.asarray(center_ras)))
    transform.RotateWXYZ(degrees, 1, 2, 3)
    transform.Translate(*(np.asarray(center_ras) + shift))
    return slicer.util.arrayFromVTKMatrix(transform.GetMatrix())


@pytest.fixture
def scene():
    return slicer.vtkMRMLScene()


@pytest.fixture
def fixed(scene, grid, paint):
    return add_volume(scene, paint(grid), "T1 head")


@pytest.fixture
def moving(scene, moving_grid, paint, other_contrast):
    image = paint(moving_grid, contrast=other_contrast)
    return add_volume(scene, sitk.Cast(image * 1000 + 200, sitk.sitkInt16), "T2 head")


@pytest.fixture
def center(grid):
    """Middle of the fixed volume, RAS mm."""
    return grid.center * RAS


@pytest.fixture
def register(tiny_model):
    """``register_nodes`` with a tiny model that moves things by several mm, no initial alignment."""
    save_bold_model(tiny_model, "bold")
    return lambda fixed, moving, **options: mrml.register_nodes(fixed, moving, **(OPTIONS | options))


def array(node):
    return slicer.util.arrayFromVolume(node)


def put_registered(node, transform_node):
    """Puts a node, with all of its parents, under the transform of a registration, as the adapter says to."""
    topmost(node).SetAndObserveTransformNodeID(transform_node.GetID())


def resampled_by_slicer(node, reference) -> np.ndarray:
    """A volume, where its transforms put it, on the grid of another without transforms, by Slicer's Volumes logic."""
    return array(slicer.vtkSlicerVolumesLogic.ResampleVolumeToReferenceVolume(node, reference)).astype(float)


def seen(transform, image: sitk.Image, warped) -> np.ndarray:
    """Voxels of the warped volume that come from inside an image."""
    ones = sitk.Image(image.GetSize(), sitk.sitkFloat32) + 1
    ones.CopyInformation(image)
    ones = sitk.ConstantPad(ones[1:-1, 1:-1, 1:-1], [1] * 3, [1] * 3, 0.0)
    reference = world_grid(warped).empty_image()
    return sitk.GetArrayFromImage(sitk.Resample(ones, reference, transform, sitk.sitkLinear, 0.0)) == 1


# --- the warped volume and the transform


@pytest.mark.parametrize(
    "fixed_parent, moving_parent",
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["no parents", "moving under a transform", "fixed under a transform", "both under transforms"],
)
def test_the_warped_node_is_the_moving_node_resampled_by_slicer(
    fixed, moving, register, center, fixed_parent, moving_parent
):
    if fixed_parent:
        put_under(fixed, SHEARED @ turned(10, center), "fixed's own")
    if moving_parent:
        put_under(moving, turned(-14, center, (2, 1, -3)), "moving's own")
        put_under(moving, SHEARED, "and that one's")
    moving_image = mrml.images_from_nodes(fixed, moving).moving
    found = register(fixed, moving)
    assert found.warped_node.GetParentTransformNode() is None
    assert found.transform_node.GetParentTransformNode() is None
    assert world_grid(found.warped_node) == world_grid(fixed)
    assert array(found.warped_node).dtype == array(moving).dtype == np.int16
    inside = seen(found.result.transform, moving_image, found.warped_node)
    before = resampled_by_slicer(moving, found.warped_node)
    put_registered(moving, found.transform_node)
    slicers = resampled_by_slicer(moving, found.warped_node)
    assert inside.mean() > 0.3
    assert np.abs(slicers - array(found.warped_node))[inside].max() <= 1  # both round to whole numbers
    assert np.abs(slicers - before)[inside].max() > 50


def test_a_moving_volume_under_a_non_linear_transform_is_registered_where_it_is_seen(fixed, moving, register, center):
    put_under(moving, bump(center + np.array([10, 5, -8]), 12, 45), "bent")
    found = register(fixed, moving)
    inside = seen(found.result.transform, mrml.images_from_nodes(fixed, moving).moving, found.warped_node)
    put_registered(moving, found.transform_node)
    difference = np.abs(resampled_by_slicer(moving, found.warped_node) - array(found.warped_node))
    # Ours was interpolated twice, on a grid as coarse as the structures.
    contrast = array(moving).std()
    assert difference[inside].mean() < 0.05 * contrast


def test_a_fixed_volume_under_a_non_linear_transform_gives_a_warped_volume_where_it_is_seen(
    scene, fixed, moving, register, center, grid, paint
):
    bent = put_under(fixed, bump(center, 12, 45), "bent")
    inputs = mrml.images_from_nodes(fixed, moving)
    # The hardened image, at a bent point, is what the volume has at the point it came from.
    forward = vtk.vtkGeneralTransform()
    bent.GetTransformToWorld(forward)
    for offset in ((0, 0, 0), (15, -10, 8), (-20, 12, -6)):
        local = center + offset
        world = np.array(forward.TransformPoint(local)) * RAS
        index = inputs.fixed.TransformPhysicalPointToContinuousIndex(world.tolist())
        bent_value = inputs.fixed.EvaluateAtContinuousIndex(index)
        straight = paint(grid)
        index = straight.TransformPhysicalPointToContinuousIndex((local * RAS).tolist())
        assert bent_value == pytest.approx(straight.EvaluateAtContinuousIndex(index), abs=0.06)
    found = register(fixed, moving)
    assert world_grid(found.warped_node) == Grid.of(inputs.fixed)


def test_the_transform_node_holds_the_displacement_on_the_fixed_grid_in_ras(fixed, moving, register):
    found = register(fixed, moving)
    assert found.transform_node.GetClassName() == "vtkMRMLTransformNode"
    grid_transform = found.transform_node.GetTransformFromParentAs("vtkOrientedGridTransform", True, True)
    image = grid_transform.GetDisplacementGrid()
    assert image.GetDimensions() == fixed.GetImageData().GetDimensions()
    assert image.GetOrigin() == pytest.approx(fixed.GetOrigin(), abs=1e-6)
    field = sitk.GetArrayFromImage(found.result.transform.GetDisplacementField())
    held = slicer.util.arrayFromGridTransform(found.transform_node)
    assert held == pytest.approx(field * RAS, abs=1e-4)
    assert np.abs(field).max() > 3
    points = world_grid(fixed)
    for index in ((3, 4, 5), (10, 20, 9), (17, 2, 16)):
        point = points.to_physical(index)
        moved = np.array(grid_transform.TransformPoint(point * RAS)) * RAS
        assert moved == pytest.approx(found.result.transform.TransformPoint(point.tolist()), abs=1e-3)


def test_landmarks_of_the_moving_image_go_where_the_inverse_says(scene, fixed, moving, register, landmarks, center):
    own = put_under(moving, turned(6, center, (1, 2, 0)), "own")
    found = register(fixed, moving, inverse_node=True)
    markups = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "landmarks")
    slicer.util.updateMarkupsControlPointsFromArray(markups, landmarks * RAS)
    markups.SetAndObserveTransformNodeID(own.GetID())
    moving_world = slicer.util.arrayFromMarkupsControlPoints(markups, world=True) * RAS
    put_registered(moving, found.transform_node)
    told = np.array([found.result.inverse.TransformPoint(p) for p in moving_world.tolist()])
    seen_at = slicer.util.arrayFromMarkupsControlPoints(markups, world=True) * RAS
    assert np.linalg.norm(told - moving_world, axis=1).mean() > 2
    # Slicer inverts the field, ours was inverted on another grid of several mm.
    assert np.linalg.norm(seen_at - told, axis=1).max() < 0.5
    by_node = [found.inverse_node.GetTransformFromParent().TransformPoint(p) for p in (moving_world * RAS).tolist()]
    assert np.linalg.norm(by_node * RAS - told, axis=1).max() < 0.5
    there_and_back = [found.result.transform.TransformPoint(p) for p in seen_at.tolist()]
    assert np.linalg.norm(there_and_back - moving_world, axis=1).max() < 0.5


def test_the_inverse_node_brings_the_fixed_volume_to_the_moving_one(fixed, moving, register):
    found = register(fixed, moving, inverse_node=True)
    assert found.inverse_node.GetNodeReferenceID("spatialRegistrationFixed") == moving.GetID()
    assert found.inverse_node.GetNodeReferenceID("spatialRegistrationMoving") == fixed.GetID()
    inverse = found.result.inverse
    images = mrml.images_from_nodes(fixed, moving)
    ours = sitk.GetArrayFromImage(sitk.Resample(images.fixed, images.moving, inverse, sitk.sitkLinear, 0.0))
    inside = seen(inverse, images.fixed, moving)
    put_registered(fixed, found.inverse_node)
    assert inside.mean() > 0.2
    assert resampled_by_slicer(fixed, moving)[inside] == pytest.approx(ours[inside], abs=1e-3)


def test_without_being_asked_there_is_no_inverse_node(scene, fixed, moving, register):
    found = register(fixed, moving)
    assert found.inverse_node is None
    assert scene.GetNumberOfNodesByClass("vtkMRMLTransformNode") == 1


def test_the_transform_node_tells_where_it_comes_from(fixed, moving, register):
    found = register(fixed, moving, refine=0, spacing=8.0)
    node = found.transform_node
    assert node.GetNodeReference(node.GetFixedNodeReferenceRole()) is fixed
    assert node.GetNodeReference(node.GetMovingNodeReferenceRole()) is moving
    assert node.GetAttribute("DivRegNet.Model") == "bold"
    assert node.GetAttribute("DivRegNet.ModelVersion") == "1.0"
    assert json.loads(node.GetAttribute("DivRegNet.Settings"))["spacing"] == 8.0
    assert json.loads(node.GetAttribute("DivRegNet.Quality")) == found.quality
    assert node.GetName() == "T2 head to T1 head"
    assert found.warped_node.GetName() == "T2 head warped to T1 head"


def test_the_warped_node_looks_like_the_moving_node(scene, fixed, moving, register):
    colors = scene.AddNewNodeByClass("vtkMRMLColorTableNode", "hot")
    display = moving.GetDisplayNode()
    display.SetAndObserveColorNodeID(colors.GetID())
    display.AutoWindowLevelOff()
    display.SetWindowLevel(700, 350)
    shown = register(fixed, moving).warped_node.GetDisplayNode()
    assert shown is not display
    assert (shown.GetWindow(), shown.GetLevel()) == (700, 350)
    assert shown.GetColorNode() is colors


def test_given_nodes_are_filled_and_keep_their_names(scene, fixed, moving, register, center):
    outputs = {
        "warped_node": scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "my warped_node"),
        "transform_node": scene.AddNewNodeByClass("vtkMRMLTransformNode", "my transform_node"),
        "inverse_node": scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "my inverse_node"),
    }
    for node in outputs.values():
        put_under(node, turned(5, center), "left over")
    count = scene.GetNumberOfNodesByClass("vtkMRMLTransformNode")
    found = register(fixed, moving, **outputs)
    for name, node in outputs.items():
        assert getattr(found, name) is node
        assert node.GetName() == f"my {name}"
        assert node.GetParentTransformNode() is None
    assert scene.GetNumberOfNodesByClass("vtkMRMLTransformNode") == count
    assert outputs["warped_node"].GetDisplayNode() is not None
    first = array(found.warped_node).copy()
    again = register(fixed, moving, **outputs, spacing=12.0)
    assert again.warped_node is outputs["warped_node"]
    assert np.abs(array(again.warped_node) - first).max() > 20


def test_through_a_worker_the_nodes_are_the_same(scene, fixed, moving, register, center):
    put_under(moving, SHEARED @ turned(6, center), "own")
    expected = register(fixed, moving, inverse_node=True)
    inputs = mrml.images_from_nodes(fixed, moving, **OPTIONS)
    with Worker(inputs.fixed, inputs.moving, **inputs.options) as worker:
        result = worker.start().result(timeout=120)
    found = mrml.nodes_from_result(result, fixed, moving, inverse_node=True)
    assert found.quality == expected.quality
    assert np.array_equal(array(found.warped_node), array(expected.warped_node))
    for name in ("transform_node", "inverse_node"):
        ours, theirs = (slicer.util.arrayFromGridTransform(getattr(r, name)) for r in (found, expected))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert getattr(found, name).GetAttribute("DivRegNet.Settings") == getattr(expected, name).GetAttribute(
            "DivRegNet.Settings"
        )


def test_the_inputs_are_not_touched(fixed, moving, register):
    before = [(node.GetMTime(), node.GetImageData().GetMTime(), array(node).copy()) for node in (fixed, moving)]
    register(fixed, moving, inverse_node=True)
    for node, (mtime, image_mtime, values) in zip((fixed, moving), before, strict=True):
        assert (node.GetMTime(), node.GetImageData().GetMTime()) == (mtime, image_mtime)
        assert np.array_equal(array(node), values)


# --- options that are nodes


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


# --- what cannot be registered


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
        ({"fixed_mask": "fixed"}, "'T1 head' cannot be the fixed mask"),
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


def test_cancelling_leaves_the_scene_as_it_was(scene, fixed, moving, register):
    before = state(scene)
    with pytest.raises(Cancelled):
        register(fixed, moving, progress=lambda stage, fraction: fraction < 0.5)
    assert state(scene) == before


def test_a_failure_while_nodes_are_filled_leaves_the_scene_as_it_was(
    scene, fixed, moving, register, center, monkeypatch
):
    found = register(fixed, moving)
    put_under(found.warped_node, turned(5, center), "own")
    warped, transform = found.warped_node, found.transform_node
    kept = (warped.GetImageData(), warped.GetParentTransformNode(), ijk_to_ras(warped).copy())
    held = transform.GetTransformFromParent()
    attributes = {name: transform.GetAttribute(name) for name in transform.GetAttributeNames()}
    names = {node[0] for node in state(scene).values()}
    fill, calls = mrml._fill_transform, []

    def fail_at_the_second(*arguments):
        fill(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(mrml, "_fill_transform", fail_at_the_second)
    with pytest.raises(MemoryError):
        register(moving, fixed, warped_node=warped, transform_node=transform, inverse_node=True)
    assert {node[0] for node in state(scene).values()} == names
    assert (warped.GetImageData(), warped.GetParentTransformNode()) == kept[:2]
    assert np.array_equal(ijk_to_ras(warped), kept[2])
    assert transform.GetTransformFromParent() is held
    assert {name: transform.GetAttribute(name) for name in transform.GetAttributeNames()} == attributes
    assert transform.GetNodeReference("spatialRegistrationFixed") is fixed


# --- carrying along


@pytest.fixture
def registered(fixed, moving, register, center):
    """A registration of a moving volume that is under a transform of its own."""
    put_under(moving, turned(8, center, (2, -1, 1)), "own")
    return register(fixed, moving, inverse_node=True)


def test_markups_and_models_are_carried_to_where_slicer_shows_them(scene, fixed, moving, registered, landmarks):
    own = moving.GetParentTransformNode()
    markups = scene.AddNewNodeByClass("vtkMRMLMarkupsCurveNode", "sulcus")
    slicer.util.updateMarkupsControlPointsFromArray(markups, landmarks * RAS)
    markups.SetNthControlPointLabel(3, "here")
    sphere = vtk.vtkSphereSource()
    sphere.SetCenter(landmarks[13] * RAS)
    sphere.SetRadius(20)
    sphere.Update()
    model = scene.AddNewNodeByClass("vtkMRMLModelNode", "ball")
    model.SetAndObservePolyData(sphere.GetOutput())
    model.CreateDefaultDisplayNodes()
    model.GetDisplayNode().SetColor(0.2, 0.4, 0.6)
    for node in (markups, model):
        node.SetAndObserveTransformNodeID(own.GetID())
    curve, ball = mrml.apply_to(registered.transform_node, [markups, model])
    for node in (markups, model):
        assert node.GetParentTransformNode() is own
    assert slicer.util.arrayFromMarkupsControlPoints(markups) == pytest.approx(landmarks * RAS, abs=1e-6)
    assert model.GetPolyData() is sphere.GetOutput()
    assert model.GetMesh().GetBounds() == sphere.GetOutput().GetBounds()
    assert (curve.GetName(), ball.GetName()) == ("sulcus warped to T1 head", "ball warped to T1 head")
    assert curve.GetParentTransformNode() is None and ball.GetParentTransformNode() is None
    assert curve.GetNthControlPointLabel(3) == "here"
    assert ball.GetDisplayNode().GetColor() == (0.2, 0.4, 0.6)
    own.SetAndObserveTransformNodeID(registered.transform_node.GetID())
    expected = slicer.util.arrayFromMarkupsControlPoints(markups, world=True)
    moved = slicer.util.arrayFromMarkupsControlPoints(curve)
    assert moved == pytest.approx(expected, abs=1e-3)
    assert np.linalg.norm(moved - landmarks * RAS, axis=1).mean() > 2
    points = slicer.util.arrayFromModelPoints(ball)
    to_world = vtk.vtkGeneralTransform()
    own.GetTransformToWorld(to_world)
    expected = [to_world.TransformPoint(p) for p in slicer.util.arrayFromModelPoints(model).tolist()]
    assert points == pytest.approx(np.array(expected), abs=1e-3)


def labels_like(node) -> sitk.Image:
    """Eight labels, in all corners of a volume's grid, up to its border."""
    grid = Grid(node.GetImageData().GetDimensions(), LPS_FROM_RAS @ ijk_to_ras(node))
    halves = [np.arange(n) >= n // 2 for n in grid.shape]
    k, j, i = np.meshgrid(*halves, indexing="ij")
    return grid.image((1 + k + 2 * j + 4 * i).astype(np.uint8))


@pytest.mark.parametrize("kind", ["label map", "segmentation"])
def test_labels_are_carried_whole_by_nearest_neighbor(scene, fixed, moving, registered, kind):
    own = moving.GetParentTransformNode()
    image = labels_like(moving)
    label_map = add_volume(scene, image, "parts", "vtkMRMLLabelMapVolumeNode")
    node = label_map
    if kind == "segmentation":
        node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "parts")
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(label_map, node)
        node.GetSegmentation().GetNthSegment(2).SetName("liver")
        node.CreateClosedSurfaceRepresentation()
    node.SetAndObserveTransformNodeID(own.GetID())
    world = sitk.Image(image)
    matrix = mrml._matrix_to_world(own) @ Grid.of(image).ras_matrix
    Grid(image.GetSize(), LPS_FROM_RAS @ matrix).stamp(world)
    (copy,) = mrml.apply_to(registered.transform_node, [node])
    assert copy.GetParentTransformNode() is None
    assert node.GetParentTransformNode() is own
    reference = world_grid(fixed).empty_image()
    if kind == "segmentation":
        assert [s.GetName() for s in segments(copy)] == [s.GetName() for s in segments(node)]
        assert [s.GetColor() for s in segments(copy)] == [s.GetColor() for s in segments(node)]
        assert copy.GetSegmentation().ContainsRepresentation("Closed surface")
        exported = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "exported")
        slicer.vtkSlicerSegmentationsModuleLogic.ExportAllSegmentsToLabelmapNode(copy, exported, 0)
        copy = exported
    carried = sitk.Resample(mrml._volume_image(copy), reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    expected = sitk.Resample(world, reference, registered.result.transform, sitk.sitkNearestNeighbor, 0)
    carried, expected = sitk.GetArrayFromImage(carried), sitk.GetArrayFromImage(expected)
    assert set(np.unique(carried)) == set(range(9))
    # Nearest neighbor twice instead of once: all but the voxels next to a border of labels agree.
    for label in range(1, 9):
        a, b = carried == label, expected == label
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85
    assert (carried != 0).sum() == pytest.approx((expected != 0).sum(), rel=0.03)


def segments(node) -> list:
    segmentation = node.GetSegmentation()
    return [segmentation.GetNthSegment(i) for i in range(segmentation.GetNumberOfSegments())]


def test_on_a_reference_grid_volumes_and_label_maps_are_sampled_once(scene, fixed, moving, registered):
    own = moving.GetParentTransformNode()
    label_map = add_volume(scene, labels_like(moving), "parts", "vtkMRMLLabelMapVolumeNode")
    other = add_volume(scene, sitk.Cast(labels_like(moving), sitk.sitkFloat32) * 10, "further")
    for node in (label_map, other):
        node.SetAndObserveTransformNodeID(own.GetID())
    nodes = mrml.apply_to(registered.transform_node, [label_map, other], reference_node=fixed)
    world = mrml._volume_image(label_map)
    for node, interpolation in zip(nodes, (sitk.sitkNearestNeighbor, sitk.sitkLinear), strict=True):
        assert world_grid(node) == world_grid(fixed)
        source = mrml._volume_image(label_map if node is nodes[0] else other)
        expected = sitk.GetArrayFromImage(
            sitk.Resample(source, world_grid(fixed).empty_image(), registered.result.transform, interpolation, 0)
        )
        inside = seen(registered.result.transform, world, nodes[0])
        agree = np.isclose(array(node)[inside], expected[inside], atol=0.01)
        assert agree.mean() > 0.995
    assert nodes[0].GetClassName() == "vtkMRMLLabelMapVolumeNode"
    assert array(nodes[0]).dtype == np.uint8


def test_carried_volumes_agree_with_slicers_own_hardening(scene, fixed, moving, registered):
    (copy,) = mrml.apply_to(registered.transform_node, [moving])
    ours = resampled_by_slicer(copy, fixed)
    put_registered(moving, registered.transform_node)
    moving.HardenTransform()
    slicers = resampled_by_slicer(moving, fixed)
    inside = seen(registered.result.transform, mrml._volume_image(copy), fixed) & (slicers > 200)
    assert inside.any()
    # Hardened on grids of the same axes, maybe shifted by a part of a voxel.
    assert np.abs(ours - slicers)[inside].mean() < 0.1 * slicers[inside].std()


def test_copies_may_stay_under_the_transform(scene, moving, registered, landmarks):
    markups = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    slicer.util.updateMarkupsControlPointsFromArray(markups, landmarks * RAS)
    markups.SetAndObserveTransformNodeID(moving.GetTransformNodeID())
    hard, soft = (mrml.apply_to(registered.transform_node, [markups], harden=h)[0] for h in (True, False))
    assert soft.GetParentTransformNode() is registered.transform_node
    assert slicer.util.arrayFromMarkupsControlPoints(soft, world=True) == pytest.approx(
        slicer.util.arrayFromMarkupsControlPoints(hard), abs=1e-6
    )


def test_what_cannot_be_carried_is_named_and_nothing_is_carried(scene, moving, registered, landmarks):
    markups = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    hollow = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "hollow")
    table = scene.AddNewNodeByClass("vtkMRMLTableNode", "numbers")
    under = scene.AddNewNodeByClass("vtkMRMLModelNode", "there already")
    under.SetAndObserveTransformNodeID(registered.transform_node.GetID())
    before = state(scene)
    for node, words in ((hollow, "'hollow' is empty"), (table, "'numbers' cannot be carried"), (under, "already")):
        with pytest.raises(InputError, match=words):
            mrml.apply_to(registered.transform_node, [markups, node])
    with pytest.raises(InputError, match="None cannot be carried"):
        mrml.apply_to(registered.transform_node, [None])
    with pytest.raises(InputError, match="'points' is no transform"):
        mrml.apply_to(markups, [moving])
    assert state(scene) == before


# --- saved and loaded


@pytest.mark.parametrize("kind", ["mrml", "mrb"])
def test_a_saved_scene_comes_back_whole(scene, fixed, moving, registered, tmp_path, kind, landmarks):
    transform = registered.transform_node
    if kind == "mrb":
        file = str(tmp_path / "scene.mrb")
        assert scene.WriteToMRB(file, None)
        loaded = slicer.vtkMRMLScene()
        cache, manager = slicer.vtkCacheManager(), slicer.vtkDataIOManager()
        cache.SetRemoteCacheDirectory(str(tmp_path / "cache"))
        manager.SetCacheManager(cache)
        loaded.SetDataIOManager(manager)
        assert loaded.ReadFromMRB(file, True)
    else:
        for i in range(scene.GetNumberOfNodes()):
            node = scene.GetNthNode(i)
            if node.IsA("vtkMRMLStorableNode") and node.AddDefaultStorageNode():
                storage = node.GetStorageNode()
                extension = storage.GetDefaultWriteFileExtension()
                storage.SetFileName(str(tmp_path / f"{node.GetID()}.{extension}"))
                assert storage.WriteData(node)
        scene.SetRootDirectory(str(tmp_path))
        scene.SetURL(str(tmp_path / "scene.mrml"))
        assert scene.Commit()
        loaded = slicer.vtkMRMLScene()
        loaded.SetURL(str(tmp_path / "scene.mrml"))
        assert loaded.Connect()
    again = loaded.GetFirstNodeByName(transform.GetName())
    assert again.GetClassName() == "vtkMRMLTransformNode"
    for name in ("Model", "ModelVersion", "Settings", "Quality"):
        assert again.GetAttribute(f"DivRegNet.{name}") == transform.GetAttribute(f"DivRegNet.{name}")
    assert again.GetNodeReference(again.GetFixedNodeReferenceRole()).GetName() == "T1 head"
    assert again.GetNodeReference(again.GetMovingNodeReferenceRole()).GetName() == "T2 head"
    for point in (landmarks * RAS).tolist():
        for direction in ("GetTransformFromParent", "GetTransformToParent"):
            before, after = (getattr(node, direction)().TransformPoint(point) for node in (transform, again))
            assert after == pytest.approx(before, abs=0.02 if "To" in direction else 1e-4)
    warped, read = registered.warped_node, loaded.GetFirstNodeByName(registered.warped_node.GetName())
    assert np.array_equal(array(read), array(warped))
    assert array(read).dtype == array(warped).dtype
    assert world_grid(read) == world_grid(warped)
    moved = loaded.GetFirstNodeByName("T2 head")
    put_registered(moved, again)
    inside = seen(registered.result.transform, mrml.images_from_nodes(fixed, moving).moving, warped)
    assert np.abs(resampled_by_slicer(moved, read) - array(read))[inside].max() <= 1
