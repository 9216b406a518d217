"""Real MRML nodes for tests, made with Slicer's own means, and what Slicer makes of them."""

from dataclasses import replace

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import torch
import vtk
from vtk.util.numpy_support import numpy_to_vtk

from DivRegNetLib import models
from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid

RAS = LPS_FROM_RAS[:3, :3].diagonal()
SHEARED = np.array([[1.0, 0.15, 0.0, 5.0], [0.0, 0.95, 0.1, -4.0], [0.05, 0.0, 1.1, 3.0], [0.0, 0.0, 0.0, 1.0]])


def add_volume(scene, image: sitk.Image, name: str, kind: str = "vtkMRMLScalarVolumeNode"):
    """An image as a node, with a display node."""
    node = scene.AddNewNodeByClass(kind, name)
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(Grid.of(image).ras_matrix))
    slicer.util.updateVolumeFromArray(node, sitk.GetArrayFromImage(image))
    node.CreateDefaultDisplayNodes()
    return node


def put_under(node, matrix_or_transform, name: str):
    """Puts a node under a new transform node: a (4, 4) RAS matrix or a VTK transform, to parent. Returns that node."""
    parent = node.GetScene().AddNewNodeByClass("vtkMRMLTransformNode", name)
    if isinstance(matrix_or_transform, np.ndarray):
        parent.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix_or_transform))
    else:
        parent.SetAndObserveTransformToParent(matrix_or_transform)
    topmost(node).SetAndObserveTransformNodeID(parent.GetID())
    return parent


def topmost(node):
    """The last of a node's parent transforms; the node itself if it has none."""
    while node.GetParentTransformNode() is not None:
        node = node.GetParentTransformNode()
    return node


def bump(center_ras, height_mm: float, width_mm: float) -> vtk.vtkThinPlateSplineTransform:
    """A smooth non-linear transform that moves what is around a point and leaves points ``width_mm`` away."""
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    for axis in range(3):
        for side in (-width_mm, width_mm):
            point = np.array(center_ras, float)
            point[axis] += side
            source.InsertNextPoint(point)
            target.InsertNextPoint(point)
    source.InsertNextPoint(center_ras)
    target.InsertNextPoint(np.asarray(center_ras) + height_mm * np.array([1, -1 / 2, 1 / 3]))
    spline = vtk.vtkThinPlateSplineTransform()
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    spline.SetBasisToR()
    return spline


def ijk_to_ras(node) -> np.ndarray:
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def world_grid(node) -> Grid:
    """The world grid (LPS) of a volume with linear parents, worked out by Slicer's own point transforms."""
    matrix = np.eye(4)
    local = ijk_to_ras(node)
    corners = []
    for index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        world = [0.0, 0.0, 0.0]
        node.TransformPointToWorld((local @ [*index, 1])[:3].tolist(), world)
        corners.append(np.array(world))
    matrix[:3, 3] = corners[0]
    matrix[:3, :3] = np.stack([c - corners[0] for c in corners[1:]], 1)
    return Grid(node.GetImageData().GetDimensions(), LPS_FROM_RAS @ matrix)


def state(scene) -> dict:
    """All that should not change: nodes, when they and their images were last modified, who is under whom."""
    found = {}
    for i in range(scene.GetNumberOfNodes()):
        node = scene.GetNthNode(i)
        image = node.GetImageData() if node.IsA("vtkMRMLVolumeNode") else None
        found[node.GetID()] = (node.GetName(), node.GetMTime(), None if image is None else image.GetMTime())
    return found


def save_bold_model(name: str, bold: str) -> str:
    """Saves, beside a model, one that moves things by several mm, each place its own way; returns its name."""
    card, model = models.find(name), models.load(name)
    with torch.no_grad():
        model.regnet.head.weight *= 40
        model.regnet.head.bias += torch.tensor([0.3, -0.2, 0.25])
    models.save(card.parent, replace(model.card, name=bold), model.regnet, model.kldivnet)
    return bold


def turned(degrees: float, center_ras, shift=(0.0, 0.0, 0.0)) -> np.ndarray:
    """(4, 4) RAS: rotation about an oblique axis through a point, then a shift."""
    transform = vtk.vtkTransform()
    transform.PostMultiply()
    transform.Translate(*(-np.asarray(center_ras)))
    transform.RotateWXYZ(degrees, 1, 2, 3)
    transform.Translate(*(np.asarray(center_ras) + shift))
    return slicer.util.arrayFromVTKMatrix(transform.GetMatrix())


def array(node):
    """The voxels of a volume node, (D, H, W)."""
    return slicer.util.arrayFromVolume(node)


def put_registered(node, transform_node):
    """Puts a node, with all of its parents, under the transform of a registration, as the adapter says to."""
    topmost(node).SetAndObserveTransformNodeID(transform_node.GetID())


def resampled_by_slicer(node, reference) -> np.ndarray:
    """A volume, where its transforms put it, on the grid of another without transforms, by Slicer's Volumes logic."""
    return array(slicer.vtkSlicerVolumesLogic.ResampleVolumeToReferenceVolume(node, reference)).astype(float)


def inside_image(transform, image: sitk.Image, warped) -> np.ndarray:
    """Voxels of the warped volume that come from inside an image, (D, H, W) bool."""
    ones = sitk.Image(image.GetSize(), sitk.sitkFloat32) + 1
    ones.CopyInformation(image)
    ones = sitk.ConstantPad(ones[1:-1, 1:-1, 1:-1], [1] * 3, [1] * 3, 0.0)
    reference = world_grid(warped).empty_image()
    return sitk.GetArrayFromImage(sitk.Resample(ones, reference, transform, sitk.sitkLinear, 0.0)) == 1


def add_segmentation(volume_node, segments: dict):
    """A segmentation in the scene; segments are arrays (D, H, W) on the grid of a volume node, by name."""
    matrix = vtk.vtkMatrix4x4()
    volume_node.GetIJKToRASMatrix(matrix)
    node = volume_node.GetScene().AddNewNodeByClass("vtkMRMLSegmentationNode", f"{volume_node.GetName()} segments")
    for name, array in segments.items():
        image = slicer.vtkOrientedImageData()
        image.SetDimensions(array.shape[::-1])
        image.GetPointData().SetScalars(numpy_to_vtk(array.astype(np.uint8).ravel(), deep=1))
        image.SetGeometryFromImageToWorldMatrix(matrix)
        segment = slicer.vtkSegment()
        segment.SetName(name)
        segment.AddRepresentation(slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName(), image)
        node.GetSegmentation().AddSegment(segment)
    return node
