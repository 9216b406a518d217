"""Points through transforms, forward and backward."""

import numpy as np
import SimpleITK as sitk


def map_points(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """Points (n, 3) through a transform, LPS mm."""
    return np.array([transform.TransformPoint(p) for p in np.asarray(points, float).tolist()]).reshape(-1, 3)


def invert_points(transform: sitk.Transform, points: np.ndarray, iterations: int = 30) -> np.ndarray:
    """The points that a transform maps to the given ones, both (n, 3) LPS mm, by Newton's method."""
    inverted = []
    for target in np.asarray(points, float):
        x = target.copy()
        for _ in range(iterations):
            here = np.array(transform.TransformPoint(x.tolist()))
            if np.linalg.norm(here - target) < 1e-4:
                break
            step = 0.5
            jacobian = [np.array(transform.TransformPoint((x + step * e).tolist())) - here for e in np.eye(3)]
            x -= np.linalg.lstsq(np.stack(jacobian, 1) / step, here - target, rcond=None)[0]
        inverted.append(x)
    return np.array(inverted).reshape(-1, 3)
