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
    """As :func:`jacobian_determinant`, in consecutive parts of ``step`` slices. Derivatives are central differences."""
    # The determinant of dq/dp, where q = p + u, is that of dq/d(i, j, k) divided by that of dp/d(i, j, k).
    axes = grid.matrix[:3, :3].astype(np.float32)
    scale = np.float32(1 / np.linalg.det(grid.matrix[:3, :3]))
    for start in range(0, len(field), step):
        at = np.arange(start, min(start + step, len(field)))
        above, below = np.minimum(at + 1, len(field) - 1), np.maximum(at - 1, 0)
        slab = np.asarray(field[at[0] : at[-1] + 1], np.float32)
        along_k = (field[above] - field[below]) / (above - below).astype(np.float32)[:, None, None, None]
        along = (np.gradient(slab, axis=2), np.gradient(slab, axis=1), along_k)  # du / d(i, j, k)
        yield scale * determinant([[du[..., x] + axes[x, n] for n, du in enumerate(along)] for x in range(3)])
