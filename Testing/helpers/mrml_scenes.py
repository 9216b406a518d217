"""Real MRML nodes for the tests of the adapter, made with Slicer's own means."""

from dataclasses import replace

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import torch
import vtk

from DivRegNetLib import models
from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid


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
