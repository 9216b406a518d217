"""Segmentations: which segments there are, and one of them as an image."""

import SimpleITK as sitk
import slicer
import slicer.util
import vtk

from DivRegNetLib.errors import InputError
from DivRegNetModule.mrml.geometry import is_empty, world_image
from DivRegNetModule.mrml.scene import is_a, name_of


def segments(node) -> list[tuple[str, str]]:
    """(name, id) of the segments of a segmentation node, in its order; empty for anything else."""
    if not is_a(node, "vtkMRMLSegmentationNode"):
        return []
    segmentation = node.GetSegmentation()
    ids = [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())]
    return [(segmentation.GetSegment(i).GetName(), i) for i in ids]


def segment_image(node, segment_id: str) -> sitk.Image:
    """One segment of a segmentation node as an image of 0 and 1 on its world grid (LPS); the node is only read.

    Raises:
        InputError: there is no such segment, or it is empty.
    """
    segmentation = node.GetSegmentation()
    segment = segmentation.GetSegment(segment_id) if segmentation else None
    if segment is None:
        raise InputError(f"the segmentation {name_of(node)} has no segment {segment_id!r}; choose one that it has")
    register_representations()
    binary = slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName()
    source = node
    if not segmentation.ContainsRepresentation(binary):
        copy = slicer.vtkSegmentation()
        copy.DeepCopy(segmentation)
        copy.CreateRepresentation(binary)
        source = slicer.vtkMRMLSegmentationNode()
        source.SetAndObserveSegmentation(copy)
    image = slicer.vtkOrientedImageData()
    if not source.GetBinaryLabelmapRepresentation(segment_id, image) or is_empty(image):
        raise InputError(
            f"the segment {segment.GetName()!r} of {name_of(node)} is empty; draw it or leave the mask out"
        )
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    return world_image(image, slicer.util.arrayFromVTKMatrix(matrix), node, linear=False)


def register_representations() -> None:
    """On plain slicer-core, no segment can be copied before this; in Slicer the Segmentations module does it at start."""
    factory = slicer.vtkSegmentationConverterFactory.GetInstance()
    if factory.ConstructRepresentationObjectByClass("vtkOrientedImageData") is None:
        slicer.vtkSlicerSegmentationsModuleLogic().SetMRMLScene(slicer.vtkMRMLScene())
