"""Where voxels and points are: matrices and grids of nodes, world coordinates, LPS and RAS, resampling in the scene.

Matrices are (4, 4). MRML is RAS, the library and SimpleITK are LPS; all lengths are in mm.
"""

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk
from vtk.util import numpy_support

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid, apply_matrix
from DivRegNetLib.errors import InputError
from DivRegNetModule import _
from DivRegNetModule.mrml.scene import name_of
from DivRegNetModule.steps import Steps, finish, slabs

FLIP = LPS_FROM_RAS[:3, :3].diagonal()
"""Times RAS points, (n, 3), are LPS points, and the other way round."""
RESLICE_BYTES = 100  # that a voxel counts as, since each takes a displacement from a cubic interpolation
EXTENT_SAMPLES = 12  # points along each axis, from which the extent of a moved image is taken


def ijk_to_ras(node) -> np.ndarray:
    """Index to RAS of a volume node, without its parent transforms."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def local_grid(node) -> Grid:
    """The grid of a volume node (LPS), without its parent transforms."""
    return Grid(node.GetImageData().GetDimensions(), LPS_FROM_RAS @ ijk_to_ras(node))


def matrix_to_world(transform_node) -> np.ndarray:
    """What a linear transform node and its parents do, to world (RAS)."""
    matrix = vtk.vtkMatrix4x4()
    transform_node.GetMatrixTransformToWorld(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def transform_to_world(transform_node) -> vtk.vtkGeneralTransform:
    """What a transform node and its parents do, to world (RAS)."""
    transform = vtk.vtkGeneralTransform()
    transform_node.GetTransformToWorld(transform)
    return transform


def is_empty(image: vtk.vtkImageData | None) -> bool:
    """Whether an image has no voxels."""
    return image is None or min(image.GetDimensions()) < 1 or image.GetPointData().GetScalars() is None


def world_image(image: vtk.vtkImageData, matrix: np.ndarray, node, *, linear: bool) -> sitk.Image:
    """As :func:`world_image_steps`, at once."""
    return finish(world_image_steps(image, matrix, node, linear=linear))


def world_image_steps(image: vtk.vtkImageData, matrix: np.ndarray, node, *, linear: bool) -> Steps[sitk.Image]:
    """An image with its index-to-RAS matrix, under the parents of a node, on its world grid (LPS).

    Args:
        linear: interpolation under a parent that is not linear; otherwise nearest neighbor.
    Raises:
        InputError: the grid has no inverse, or is not finite.
    """
    parent = node.GetParentTransformNode()
    if parent is not None and parent.IsTransformToWorldLinear():
        matrix = matrix_to_world(parent) @ matrix
    elif parent is not None:
        image, matrix = yield from reslice_steps(image, matrix, transform_to_world(parent), linear=linear)
    size, matrix = image.GetDimensions(), matrix.copy()
    matrix[:3, 3] = apply_matrix(matrix, image.GetExtent()[::2])
    try:
        grid = Grid(size, LPS_FROM_RAS @ matrix)
    except ValueError as error:
        text = _("the geometry of {name} cannot be used: {error}; repair it")
        raise InputError(text.format(name=name_of(node), error=error)) from error
    array = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(size[::-1])
    yield
    return grid.image(array.view(array.dtype.str))  # plain int64 for VTK's long long, which SimpleITK does not know


def vtk_image_steps(array: np.ndarray, scalar_type: int) -> Steps[vtk.vtkImageData]:
    """Voxels, (D, H, W) or (D, H, W, components), as an image without geometry."""
    copy = vtk.vtkImageData()
    copy.SetDimensions(array.shape[2::-1])
    copy.AllocateScalars(scalar_type, 1 if array.ndim == 3 else array.shape[3])
    voxels = numpy_support.vtk_to_numpy(copy.GetPointData().GetScalars()).reshape(array.shape)
    for start, end in slabs(len(array), voxels[:1].nbytes):
        voxels[start:end] = array[start:end]
        yield
    return copy


def reslice_steps(
    image: vtk.vtkImageData,
    matrix: np.ndarray,
    to_world: vtk.vtkAbstractTransform,
    *,
    linear: bool,
    background=(0.0, 0.0, 0.0, 0.0),
    grid: Grid | None = None,
) -> Steps[tuple[vtk.vtkImageData, np.ndarray]]:
    """An image moved by a transform, resampled.

    Args:
        image: of any extent and number of components; its own geometry is ignored.
        matrix: index to RAS before the transform.
        to_world: RAS before to RAS after.
        linear: interpolation; otherwise nearest neighbor.
        grid: to sample on (LPS); None: the axes of ``matrix``, and all of the moved image.
    Returns:
        the image and its index-to-RAS matrix; without ``grid`` the extent need not start at 0.
    """
    if grid is not None:
        target, extent = grid.ras_matrix, [bound for n in grid.size for bound in (0, n - 1)]
    else:
        target, extent = matrix.copy(), _moved_extent(image, matrix, to_world)
    to_index = vtk.vtkGeneralTransform()  # of the output -> of the input
    to_index.PostMultiply()
    to_index.Concatenate(slicer.util.vtkMatrixFromArray(target))
    to_index.Concatenate(to_world.GetInverse())
    to_index.Concatenate(slicer.util.vtkMatrixFromArray(np.linalg.inv(matrix)))
    flat = vtk.vtkImageData()
    flat.ShallowCopy(image)
    flat.SetOrigin(0, 0, 0)
    flat.SetSpacing(1, 1, 1)
    flat.SetDirectionMatrix(1, 0, 0, 0, 1, 0, 0, 0, 1)
    output = vtk.vtkImageData()
    output.SetExtent(extent)
    output.AllocateScalars(image.GetScalarType(), image.GetNumberOfScalarComponents())
    filter_ = vtk.vtkImageReslice()
    filter_.SetInputData(flat)
    filter_.SetResliceTransform(to_index)
    filter_.SetInterpolationMode(vtk.VTK_RESLICE_LINEAR if linear else vtk.VTK_RESLICE_NEAREST)
    filter_.SetBackgroundColor(background)
    filter_.SetOutputDimensionality(3)
    filter_.SetOutputOrigin(0, 0, 0)
    filter_.SetOutputSpacing(1, 1, 1)
    filter_.TransformInputSamplingOff()
    depth = extent[5] - extent[4] + 1
    slice_voxels = (extent[1] - extent[0] + 1) * (extent[3] - extent[2] + 1)
    for start, end in slabs(depth, RESLICE_BYTES * slice_voxels):
        filter_.SetOutputExtent([*extent[:4], extent[4] + start, extent[4] + end - 1])
        filter_.Update()
        output.CopyAndCastFrom(filter_.GetOutput(), filter_.GetOutput().GetExtent())
        yield
    return output, target


def _moved_extent(image: vtk.vtkImageData, matrix: np.ndarray, to_world: vtk.vtkAbstractTransform) -> list[int]:
    """The voxels, along an image's own axes, that hold all of it after a transform (from a lattice of its points)."""
    extent = np.reshape(image.GetExtent(), (3, 2))
    axes = [np.linspace(first - 0.5, last + 0.5, EXTENT_SAMPLES) for first, last in extent]
    points = apply_matrix(matrix, np.stack(np.meshgrid(*axes), -1).reshape(-1, 3))
    moved = np.array([to_world.TransformPoint(point) for point in points])
    index = apply_matrix(np.linalg.inv(matrix), moved)
    low, high = np.floor(index.min(0) + 1e-3), np.ceil(index.max(0) - 1e-3)
    return [int(bound) for pair in zip(low, high, strict=True) for bound in pair]
