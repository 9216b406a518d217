"""Initial alignment from pairs of landmarks, by least squares. No torch here.

Rigid and similarity: S. Umeyama, Least-squares estimation of transformation parameters between two point patterns, IEEE
Trans. Pattern Anal. Mach. Intell. 13(4), 1991. Affine: linear least squares.
"""

import numpy as np

from DivRegNetLib.errors import InputError

KINDS = {"rigid": 3, "similarity": 3, "affine": 4}
"""Kind of transform -> how many pairs it needs."""
FLAT = (
    1e-3  # spread of points across a line or plane, as part of their spread along it, below which they count as on it
)


def align_landmarks(fixed: np.ndarray, moving: np.ndarray, kind: str = "rigid") -> np.ndarray:
    """The transform that maps fixed landmarks as near as possible to the moving ones.

    Args:
        fixed, moving: (n, 3) in mm, in the same order.
        kind: ``rigid``, ``similarity`` (rigid with one scale) or ``affine``.
    Returns:
        (4, 4) matrix that maps fixed points to moving points, in the coordinates of the points.
    Raises:
        InputError: the lists differ in length, there are too few pairs, or they lie on a line (for affine: in a plane).
    """
    if kind not in KINDS:
        raise InputError(f"landmarks are aligned by a transform that is {', '.join(KINDS)}, got {kind!r}")
    fixed, moving = (np.asarray(points, float).reshape(-1, 3) for points in (fixed, moving))
    if len(fixed) != len(moving):
        raise InputError(f"{len(fixed)} fixed landmarks but {len(moving)} moving ones: they must be pairs in one order")
    if len(fixed) < KINDS[kind]:
        raise InputError(f"{kind} alignment needs at least {KINDS[kind]} pairs of landmarks, got {len(fixed)}")
    needed, shape = (3, "in a plane") if kind == "affine" else (2, "on a line")
    for name, points in (("fixed", fixed), ("moving", moving)):
        spread = np.linalg.svd(points - points.mean(0), compute_uv=False)
        if spread[needed - 1] <= FLAT * spread[0]:
            raise InputError(f"the {name} landmarks lie {shape}; place them further apart for {kind} alignment")
    middle_fixed, middle_moving = fixed.mean(0), moving.mean(0)
    f, m = fixed - middle_fixed, moving - middle_moving
    if kind == "affine":
        linear = np.linalg.lstsq(f, m, rcond=None)[0].T
    else:
        u, singular, v = np.linalg.svd(m.T @ f)
        signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ v))])  # a rotation, no mirror image
        linear = u @ np.diag(signs) @ v
        if kind == "similarity":
            linear *= (singular * signs).sum() / (f**2).sum()
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = middle_moving - linear @ middle_fixed
    return matrix
