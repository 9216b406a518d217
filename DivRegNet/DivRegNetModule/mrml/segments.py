"""Segmentations: which segments there are, one of them as an image, all of them as label maps."""

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk

from DivRegNetLib.errors import InputError
from DivRegNetLib.quality.references import Segments
from DivRegNetModule import _
from DivRegNetModule.mrml.geometry import is_empty, world_image_steps
from DivRegNetModule.mrml.scene import is_a, name_of
from DivRegNetModule.steps import Steps, finish


def segments(node) -> list[tuple[str, str]]:
    """(name, id) of the segments of a segmentation node, in its order; empty for anything else."""
    if not is_a(node, "vtkMRMLSegmentationNode"):
        return []
    segmentation = node.GetSegmentation()
    ids = [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())]
    return [(segmentation.GetSegment(i).GetName(), i) for i in ids]


def segment_image(node, segment_id: str) -> sitk.Image:
    """As :func:`segment_image_steps`, at once."""
    return finish(segment_image_steps(node, segment_id))


def segment_image_steps(node, segment_id: str) -> Steps[sitk.Image]:
    """One segment of a segmentation node as an image of 0 and 1 on its world grid (LPS); the node is only read.

    Raises:
        InputError: there is no such segment, or it is empty.
    """
    segmentation = node.GetSegmentation()
    segment = segmentation.GetSegment(segment_id) if segmentation else None
    if segment is None:
        text = _("the segmentation {name} has no segment {segment}; choose one that it has")
        raise InputError(text.format(name=name_of(node), segment=repr(segment_id)))
    layer, value = yield from _label_map(segmentation, segment_id)
    if is_empty(layer):
        raise InputError(_empty(node, segment))
    image = yield from world_image_steps(layer, _geometry(layer), node, linear=False)
    inside = image == value
    if not sitk.GetArrayViewFromImage(inside).any():
        raise InputError(_empty(node, segment))
    return inside


def _empty(node, segment) -> str:
    text = _("the segment {segment} of {name} is empty; draw it or leave the mask out")
    return text.format(segment=repr(segment.GetName()), name=name_of(node))


def segments_steps(node) -> Steps[Segments]:
    """All segments of a segmentation node as label maps on their world grids (LPS); the node is only read.

    Segments that do not overlap share a label map in Slicer already, so that there are few.
    """
    segmentation, layers, values = node.GetSegmentation(), {}, {}
    images = []
    for name, segment_id in segments(node):
        layer, value = yield from _label_map(segmentation, segment_id)
        if is_empty(layer):
            continue
        address = layer.GetAddressAsString("")
        if address not in layers:
            layers[address] = len(images), layer  # kept, so that no other object gets its address
            images.append((yield from world_image_steps(layer, _geometry(layer), node, linear=False)))
        values.setdefault(name, (layers[address][0], value))
    return Segments(tuple(images), values)


def _label_map(segmentation, segment_id: str) -> Steps[tuple["slicer.vtkOrientedImageData | None", int]]:
    """The binary label map that holds a segment, and its value there; made of the surface where there is none."""
    register_representations()
    binary = slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName()
    segment = segmentation.GetSegment(segment_id)
    if not segmentation.ContainsRepresentation(binary):
        alone = slicer.vtkSegmentation()  # converted by itself: a step of the work, and nothing in the scene changes
        alone.SetSourceRepresentationName(segmentation.GetSourceRepresentationName())
        copy = slicer.vtkSegment()
        copy.DeepCopy(segment)
        alone.AddSegment(copy, segment_id)
        yield
        alone.CreateRepresentation(binary)
        segment = alone.GetSegment(segment_id)
    yield
    return segment.GetRepresentation(binary), segment.GetLabelValue()


def _geometry(layer: "slicer.vtkOrientedImageData") -> np.ndarray:
    """(4, 4) index to RAS."""
    matrix = vtk.vtkMatrix4x4()
    layer.GetImageToWorldMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def register_representations() -> None:
    """On plain slicer-core, no segment can be copied before this; in Slicer the Segmentations module does it at start."""
    factory = slicer.vtkSegmentationConverterFactory.GetInstance()
    if factory.ConstructRepresentationObjectByClass("vtkOrientedImageData") is None:
        slicer.vtkSlicerSegmentationsModuleLogic().SetMRMLScene(slicer.vtkMRMLScene())
