"""Grids of voxels in physical space, and everything between voxels, millimeters, LPS and RAS.

Conventions: points and sizes are in x, y, z (i, j, k) order; arrays are indexed [k, j, i], that is D, H, W. Physical
space is LPS in millimeters, as in SimpleITK and ITK files; MRML and 3D Slicer use RAS.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""4x4 matrix that takes RAS to LPS; its own inverse, so it takes LPS to RAS as well."""

LARGEST_WORKING_VOXELS = 8_000_000


@dataclass(frozen=True)
class Grid:
    """A regular grid of voxels in LPS space.

    size: voxels along i, j, k.
    matrix: (4, 4), voxel index (i, j, k, 1) -> LPS point (mm). Any invertible matrix: rotated, flipped, anisotropic,
        sheared.
    """

    size: tuple[int, int, int]
    matrix: np.ndarray = field(compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        object.__setattr__(self, "matrix", np.array(self.matrix, dtype=float))
        if self.matrix.shape != (4, 4) or not np.isfinite(self.matrix).all():
            raise ValueError(f"a grid's index-to-LPS matrix is 4x4 and finite, got {self.matrix.tolist()}")
        if len(self.size) != 3 or min(self.size) < 1:
            raise ValueError(f"a grid has three positive side lengths, got {self.size}")
        if abs(np.linalg.det(self.matrix[:3, :3])) < 1e-12:
            raise ValueError("a grid's axes must span space, but its index-to-LPS matrix is singular")

    def __eq__(self, other: object) -> bool:
        """Whether the sizes are equal and all corners agree to a thousandth of a voxel."""
        if not isinstance(other, Grid) or self.size != other.size:
            return NotImplemented if not isinstance(other, Grid) else False
        shift = self.corners() - other.corners()
        return bool(np.abs(shift).max() <= 1e-3 * min(self.spacing))

    @classmethod
    def of(cls, image: sitk.Image) -> "Grid":
        """The grid of a 3D SimpleITK image."""
        return cls.build(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @classmethod
    def build(cls, size, spacing, origin=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)) -> "Grid":
        """From ITK's parts: size (i, j, k), spacing (mm), origin (LPS, mm) and a row-major 3x3 direction."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing, float)
        matrix[:3, 3] = origin
        return cls(tuple(size), matrix)

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Array shape (D, H, W)."""
        return self.size[::-1]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimeters between neighbors along i, j, k."""
        return tuple(np.linalg.norm(self.matrix[:3, :3], axis=0).tolist())

    @property
    def origin(self) -> tuple[float, float, float]:
        """LPS position of voxel (0, 0, 0), mm."""
        return tuple(self.matrix[:3, 3].tolist())

    @property
    def direction(self) -> tuple[float, ...]:
        """Unit vectors of the axes as ITK's row-major 3x3 matrix."""
        return tuple((self.matrix[:3, :3] / self.spacing).ravel().tolist())

    @property
    def inverse_matrix(self) -> np.ndarray:
        """(4, 4), LPS point -> voxel index."""
        return np.linalg.inv(self.matrix)

    @property
    def ras_matrix(self) -> np.ndarray:
        """(4, 4), voxel index -> RAS point (mm): what MRML calls IJKToRAS."""
        return LPS_FROM_RAS @ self.matrix

    @property
    def center(self) -> np.ndarray:
        """LPS position of the middle of the grid, mm."""
        return self.to_physical((np.array(self.size) - 1) / 2)

    def to_physical(self, index) -> np.ndarray:
        """Voxel indices (..., 3) as i, j, k -> LPS points (..., 3) in mm."""
        return apply_matrix(self.matrix, index)

    def to_index(self, point) -> np.ndarray:
        """LPS points (..., 3) in mm -> continuous voxel indices (..., 3) as i, j, k."""
        return apply_matrix(self.inverse_matrix, point)

    def contains(self, point) -> np.ndarray:
        """Whether LPS points (..., 3) lie in a voxel of the grid; (...) bool."""
        index = self.to_index(point)
        return ((index >= -0.5) & (index <= np.array(self.size) - 0.5)).all(-1)

    def corners(self) -> np.ndarray:
        """LPS positions of the outer corners, half a voxel beyond the outermost centers, (8, 3) in mm."""
        unit = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(8, 3)
        return self.to_physical(unit * np.array(self.size) - 0.5)

    def overlaps(self, other: "Grid") -> bool:
        """Whether two grids, each with the half voxel around its outermost centers, share any point.

        Two boxes with flat sides are apart if, and only if, they are so along the normal of a side of one of them or
        along a direction perpendicular to an edge of each (separating axes).
        """
        edges = [(grid.matrix[:3, :3] / grid.spacing).T for grid in (self, other)]
        pairs = [(a, b) for own in edges for a, b in zip(own, np.roll(own, 1, 0), strict=True)]
        pairs += [(a, b) for a in edges[0] for b in edges[1]]
        axes = np.cross(*np.swapaxes(pairs, 0, 1))
        axes = axes[np.linalg.norm(axes, axis=1) > 1e-6]  # parallel edges have no common perpendicular
        here, there = ((grid.corners() - self.center) @ axes.T for grid in (self, other))
        return bool(((here.max(0) >= there.min(0)) & (there.max(0) >= here.min(0))).all())

    def axis_aligned(self, spacing: float, *, multiple: int = 1) -> "Grid":
        """The isotropic grid along the LPS axes that covers this one and is centered on it.

        Along axes on which this grid is no thicker than a voxel, it is centered on a voxel, not between two.

        Args:
            spacing: mm.
            multiple: the side lengths are multiples of this number of voxels.
        """
        corners = self.corners()
        extent = corners.max(0) - corners.min(0)
        size = np.maximum(np.ceil(extent / (spacing * multiple) - 1e-6), 1).astype(int) * multiple
        middle = np.where(extent <= spacing, size // 2, (size - 1) / 2)
        return Grid.build(size, [spacing] * 3, self.center - middle * spacing)

    def working_grid(self, spacing: float, *, multiple: int = 1) -> "Grid":
        """The :meth:`axis_aligned` grid on which a pair is registered.

        It is coarser than ``spacing`` only where it would have more than LARGEST_WORKING_VOXELS voxels. It is shifted by less
        than a voxel, so that a border between voxels coincides with the lower border of this grid: if this grid lies along
        the LPS axes and has the same spacing, its voxels are then voxels of the new grid, and resampling does not blur. Along
        axes on which this grid is no thicker than a voxel, it is not shifted.
        """
        while True:
            grid = self.axis_aligned(spacing, multiple=multiple)
            if grid.voxels <= LARGEST_WORKING_VOXELS:
                break
            spacing *= max((grid.voxels / LARGEST_WORKING_VOXELS) ** (1 / 3), 1.02)
        corners = self.corners()
        before = (corners.min(0) - grid.corners().min(0)) / spacing
        move = np.where(np.ptp(corners, 0) <= spacing, 0, before - np.ceil(before - 0.5 - 1e-6))
        return Grid.build(grid.size, grid.spacing, grid.origin + move * spacing)

    def thinned(self, spacing: float) -> "Grid":
        """Every n-th voxel along each axis, with the largest n whose spacing is at most ``spacing`` (mm); covers this grid's
        voxel centers."""
        every = np.maximum(np.floor(spacing / np.array(self.spacing) + 1e-6), 1).astype(int)
        size = np.ceil((np.array(self.size) - 1) / every).astype(int) + 1
        return Grid(tuple(size), self.matrix @ np.diag([*every, 1]))

    def empty_image(self, pixel: int = sitk.sitkFloat32) -> sitk.Image:
        """A SimpleITK image of zeros on this grid (sheared axes are kept where SimpleITK can hold them)."""
        image = sitk.Image(list(self.size), pixel)
        return self.stamp(image)

    def stamp(self, image: sitk.Image) -> sitk.Image:
        """Gives an image of the same size this grid's spacing, origin and direction, and returns it."""
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image

    def image(self, array: np.ndarray) -> sitk.Image:
        """An array (D, H, W), or (D, H, W, C) of vectors, as a SimpleITK image on this grid."""
        return self.stamp(sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=array.ndim == 4))


def apply_matrix(matrix: np.ndarray, points) -> np.ndarray:
    """Points (..., 3) through a (4, 4) homogeneous matrix."""
    return np.asarray(points, float) @ matrix[:3, :3].T + matrix[:3, 3]


def affine_matrix(transform: sitk.Transform) -> np.ndarray:
    """The (4, 4) LPS matrix of a linear transform.

    Raises:
        ValueError: the transform is not linear.
    """
    if not transform.IsLinear():
        raise ValueError(f"a linear transform is needed here, got {transform.GetName()}")
    matrix = np.eye(4)
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    for axis in range(3):
        matrix[:3, axis] = np.array(transform.TransformPoint(np.eye(3)[axis].tolist())) - matrix[:3, 3]
    return matrix


def affine_transform(matrix: np.ndarray) -> sitk.AffineTransform:
    """A (4, 4) LPS matrix as a SimpleITK transform."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform
