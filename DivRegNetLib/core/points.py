"""Points through transforms, forward and backward, and where a transform is defined."""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, apply_matrix

TOLERANCE_MM = 0.01  # largest error of a point that is mapped backward and forward
STEPS, HALVINGS = 50, 12  # of Newton's method; of the length of one step
COARSE_NODES = 24  # voxels along each axis that are tried as starts
CONTINUOUS = 0.5  # voxels: smaller displacements at the border of a field count as zero


def map_points(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """Points (n, 3) through a transform, LPS mm."""
    return np.array([transform.TransformPoint(p) for p in np.asarray(points, float).tolist()]).reshape(-1, 3)


@dataclass(frozen=True)
class Inverted:
    """Points that were mapped backward.

    points: (n, 3) LPS mm; NaN where there is no such point.
    reasons: number of each point that could not be mapped -> why.
    """

    points: np.ndarray
    reasons: dict[int, str]


def invert_points(transform: sitk.Transform, points: np.ndarray, linear: np.ndarray | None = None) -> Inverted:
    """The points that a transform maps to the given ones, each checked by mapping it forward again.

    Newton's method starts at the inverse of ``linear`` and, where that does not succeed, at the node of the displacement
    field that is mapped nearest to the point.

    Args:
        transform: maps fixed points to moving points, LPS mm.
        points: (n, 3) moving points; NaN for undefined points, which stay undefined.
        linear: (4, 4) an approximation of the transform, such as the initial alignment; None: fitted to the field.
    """
    points = np.asarray(points, float).reshape(-1, 3)
    nodes = _nodes(transform)
    images = None if nodes is None else map_points(transform, nodes)
    if linear is None:
        linear = np.eye(4) if nodes is None else _fit(nodes, images)
    inverted, reasons = np.full_like(points, np.nan), {}
    for i, target in enumerate(points):
        if not np.isfinite(target).all():
            continue
        starts = [apply_matrix(np.linalg.inv(linear), target)]
        if images is not None:
            starts.append(nodes[np.linalg.norm(images - target, axis=1).argmin()])
        solved = False
        for start in starts:
            solution = _newton(transform, target, start)
            solved = solved or solution is not None
            if solution is not None and is_known(transform, solution[None])[0]:
                inverted[i] = solution
                break
        else:
            reasons[i] = (
                "lies outside the region that the transform covers"
                if solved or nodes is None
                else ("is not reached by the transform")
            )
    return Inverted(inverted, reasons)


def is_known(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """Whether a transform is defined at points (n, 3), LPS mm; (n,) bool.

    Outside a displacement field ITK does not move points. This continues the transform only if the displacements are zero at
    the border of the field. Any other field, such as one that includes an affine alignment, is defined on its grid only.
    """
    field = _only_field(transform)
    if field is None or _ends_in_zero(field):
        return np.ones(len(points), bool)
    index = Grid.of(field).to_index(points)
    return ((index >= -0.5 - 1e-6) & (index <= np.array(field.GetSize()) - 0.5 + 1e-6)).all(-1)


def _only_field(transform: sitk.Transform) -> sitk.Image | None:
    """The field of a transform that consists of a displacement field only; None for any other transform."""
    if transform.GetTransformEnum() == sitk.sitkComposite:
        parts = sitk.CompositeTransform(transform)
        return _only_field(parts.GetNthTransform(0)) if parts.GetNumberOfTransforms() == 1 else None
    if transform.GetTransformEnum() != sitk.sitkDisplacementField:
        return None
    return sitk.DisplacementFieldTransform(transform).GetDisplacementField()


def _ends_in_zero(field: sitk.Image) -> bool:
    array = sitk.GetArrayViewFromImage(field)
    largest = max(np.abs(np.take(array, end, axis)).max() for axis in range(3) for end in (0, -1))
    return bool(largest <= CONTINUOUS * min(field.GetSpacing()))


def _nodes(transform: sitk.Transform) -> np.ndarray | None:
    """Some voxels (n, 3) of the displacement field in a transform, LPS mm; None if there is none."""
    if transform.GetTransformEnum() == sitk.sitkComposite:
        parts = sitk.CompositeTransform(transform)
        found = (_nodes(parts.GetNthTransform(i)) for i in range(parts.GetNumberOfTransforms()))
        return next((nodes for nodes in found if nodes is not None), None)
    if transform.GetTransformEnum() != sitk.sitkDisplacementField:
        return None
    grid = Grid.of(sitk.DisplacementFieldTransform(transform).GetDisplacementField())
    axes = [np.unique(np.linspace(0, n - 1, min(n, COARSE_NODES)).round()) for n in grid.size]
    return grid.to_physical(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))


def _fit(points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The affine map (4, 4) that is nearest to ``points -> images``, both (n, 3); a translation where they do not span
    space."""
    matrix = np.eye(4)
    centered = points - points.mean(0)
    if np.linalg.matrix_rank(centered, tol=1e-6) == 3:
        matrix[:3, :3] = np.linalg.lstsq(centered, images - images.mean(0), rcond=None)[0].T
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-3:
        matrix[:3, :3] = np.eye(3)
    matrix[:3, 3] = images.mean(0) - matrix[:3, :3] @ points.mean(0)
    return matrix


def _newton(transform: sitk.Transform, target: np.ndarray, start: np.ndarray) -> np.ndarray | None:
    """The point that is mapped to the target, by Newton's method with step halving; None if it does not converge."""

    def forward(point: np.ndarray) -> np.ndarray:
        return np.array(transform.TransformPoint(point.tolist()))

    x, step = start.copy(), 0.5
    here = forward(x)
    for _ in range(STEPS):
        error = np.linalg.norm(here - target)
        if error < 0.01 * TOLERANCE_MM:
            return x
        jacobian = np.stack([forward(x + step * e) - here for e in np.eye(3)], 1) / step
        move = np.linalg.lstsq(jacobian, here - target, rcond=None)[0]
        for _ in range(HALVINGS):
            there = forward(x - move)
            if np.linalg.norm(there - target) < error:
                break
            move /= 2
        else:
            break
        x, here = x - move, there
    return x if np.linalg.norm(here - target) < TOLERANCE_MM else None
