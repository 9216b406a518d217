"""Segmentations, markups, models and volumes carried along with a transform."""

import numpy as np
import pytest
import SimpleITK as sitk

pytest.importorskip("slicer")

import slicer
import slicer.util
import vtk
from DivRegNetModule import mrml
from DivRegNetModule.mrml.geometry import matrix_to_world
from DivRegNetModule.mrml.volumes import volume_image
from mrml_scenes import (
    RAS,
    add_volume,
    array,
    ijk_to_ras,
    inside_image,
    put_registered,
    resampled_by_slicer,
    state,
    world_grid,
)

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid
from DivRegNetLib.errors import InputError


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
    matrix = matrix_to_world(own) @ Grid.of(image).ras_matrix
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
    carried = sitk.Resample(volume_image(copy), reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
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
    world = volume_image(label_map)
    for node, interpolation in zip(nodes, (sitk.sitkNearestNeighbor, sitk.sitkLinear), strict=True):
        assert world_grid(node) == world_grid(fixed)
        source = volume_image(label_map if node is nodes[0] else other)
        expected = sitk.GetArrayFromImage(
            sitk.Resample(source, world_grid(fixed).empty_image(), registered.result.transform, interpolation, 0)
        )
        inside = inside_image(registered.result.transform, world, nodes[0])
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
    inside = inside_image(registered.result.transform, volume_image(copy), fixed) & (slicers > 200)
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
