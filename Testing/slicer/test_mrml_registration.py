"""Registration of MRML nodes: Slicer itself makes of them what the registration computed."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

pytest.importorskip("slicer")

import slicer
import slicer.util
import vtk
from DivRegNetModule import mrml
from DivRegNetModule.mrml import transforms
from mrml_scenes import (
    RAS,
    SHEARED,
    array,
    bump,
    ijk_to_ras,
    inside_image,
    put_registered,
    put_under,
    resampled_by_slicer,
    state,
    turned,
    world_grid,
)

from DivRegNetLib.core.composites import displacement_on
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import Cancelled
from DivRegNetLib.run.worker import Worker


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
    inside = inside_image(found.result.transform, moving_image, found.warped_node)
    before = resampled_by_slicer(moving, found.warped_node)
    put_registered(moving, found.transform_node)
    slicers = resampled_by_slicer(moving, found.warped_node)
    assert inside.mean() > 0.3
    assert np.abs(slicers - array(found.warped_node))[inside].max() <= 1  # both round to whole numbers
    assert np.abs(slicers - before)[inside].max() > 50


def test_a_moving_volume_under_a_non_linear_transform_is_registered_where_it_is_seen(fixed, moving, register, center):
    put_under(moving, bump(center + np.array([10, 5, -8]), 12, 45), "bent")
    found = register(fixed, moving)
    inside = inside_image(found.result.transform, mrml.images_from_nodes(fixed, moving).moving, found.warped_node)
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
    field = sitk.GetArrayFromImage(displacement_on(found.result.transform, Grid.of(found.result.warped)))
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
    inside = inside_image(inverse, images.fixed, moving)
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
    inputs = mrml.images_from_nodes(fixed, moving, model="bold", device="cpu", align="none")
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
    fill, calls = transforms.fill_transform, []

    def fail_at_the_second(*arguments):
        fill(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(transforms, "fill_transform", fail_at_the_second)
    with pytest.raises(MemoryError):
        register(moving, fixed, warped_node=warped, transform_node=transform, inverse_node=True)
    assert {node[0] for node in state(scene).values()} == names
    assert (warped.GetImageData(), warped.GetParentTransformNode()) == kept[:2]
    assert np.array_equal(ijk_to_ras(warped), kept[2])
    assert transform.GetTransformFromParent() is held
    assert {name: transform.GetAttribute(name) for name in transform.GetAttributeNames()} == attributes
    assert transform.GetNodeReference("spatialRegistrationFixed") is fixed
