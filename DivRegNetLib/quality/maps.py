"""Maps of a displacement field: its length, and its Jacobian determinant. Needs only numpy."""

from collections.abc import Iterator

import numpy as np

from DivRegNetLib.core.determinants import determinant
from DivRegNetLib.core.grid import Grid


def displacement_length(field: np.ndarray) -> np.ndarray:
    """Length of the displacement, (D, H, W), in the unit of the field.

    Args:
        field: (D, H, W, 3).
    """
    return np.sqrt(np.einsum("...c,...c->...", field, field))


def jacobian_determinant(field: np.ndarray, grid: Grid) -> np.ndarray:
    """Determinant of the Jacobian of ``p -> p + u(p)`` by central differences, (D, H, W): below 1 where the map shrinks
    volumes, above 1 where it enlarges them, not positive where the map folds.

    Args:
        field: u, (D, H, W, 3) in mm, in the axes of the grid's physical space; each side at least 2.
        grid: of the field.
    """
    (determinant,) = jacobian_determinant_slabs(field, grid, len(field))
    return determinant


def jacobian_determinant_slabs(field: np.ndarray, grid: Grid, step: int) -> Iterator[np.ndarray]:
    """As :func:`jacobian_determinant`, in consecutive parts of ``step`` slices."""
    to_index = np.linalg.inv(grid.matrix[:3, :3])  # mm -> voxels along x, y, z
    for start in range(0, len(field), step):
        end = min(start + step, len(field))
        first, last = max(start - 1, 0), min(end + 1, len(field))
        slab = np.asarray(field[first:last], np.float32)
        along = np.gradient(slab, axis=(2, 1, 0))  # du / d(i, j, k)
        # d u_a / d p_b = sum over indices n of (d u_a / d n) (d n / d p_b)
        jacobian = sum(d[..., :, None] * to_index[n].astype(np.float32) for n, d in enumerate(along))
        jacobian = jacobian[start - first : end - first]
        jacobian[..., [0, 1, 2], [0, 1, 2]] += 1
        yield determinant(np.moveaxis(jacobian, (-2, -1), (0, 1)))
