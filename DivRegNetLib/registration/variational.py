"""The smooth field that answers forces: the linear equations of a Gauss-Newton step under diffusion regularization.

With a symmetric positive matrix A (information) and a vector b (force) at every voxel, the step s solves

    (A - (fluid + elastic) Laplace) s = b + elastic Laplace u

that is, it makes ``s A s / 2 - b s`` small while neither the step (``fluid``) nor the whole displacement u + s (``elastic``)
has steep gradients. What is known at one place reaches as far as nothing speaks against it. Source: Modersitzki, "FAIR:
Flexible Algorithms for Image Registration", SIAM 2009, chapter 8.

Fields are (N, 3, D, H, W), their components along x, y, z, lengths in voxels of their grid (DivRegNetLib/core/fields.py).
"""

import math

import torch
from torch import Tensor

from DivRegNetLib.core import fields

PARTS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # of a symmetric matrix, in the order in which they are kept
LEAST = 1e-30
KEPT = 0.6  # share of the frequencies along each axis, the lowest, that a step is made of


def solve(normal: Tensor, whole: Tensor | None, fluid: Tensor, elastic: float, iterations: int) -> Tensor:
    """The step s of the equations above, by preconditioned conjugate gradients.

    Fields are kept as their cosine transforms (whose boundary is free: no gradient across it), of which only the lowest
    frequencies: there the Laplacian is a factor, and the preconditioner, the exact inverse for an A that is everywhere
    its mean, another.

    Args:
        normal: (N, 9, D, H, W): A's xx, yy, zz, xy, xz, yz (PARTS) and b's x, y, z.
        whole: u, (N, 3, D, H, W); None: 0.
        fluid: (N, 1, 1, 1, 1), in units of A, as is ``elastic``.
        iterations: of conjugate gradients.
    Returns:
        (N, 3, D, H, W).
    """
    matrix, force = normal[:, :6], normal[:, 6:]
    transforms = [_cosines(n, like=normal) for n in normal.shape[:1:-1]]
    back = [t.T for t in transforms]
    x, y, z = (_stiffness(n, like=normal) for n in normal.shape[:1:-1])
    laplace = z[:, None, None] + y[:, None] + x  # minus the Laplacian
    mean, stiff = matrix[:, :3].mean((1, 2, 3, 4), keepdim=True), (fluid + elastic) * laplace
    response = 1 / (mean + stiff).clamp_min(LEAST)

    residual = fields.along_axes(force, *transforms)
    if whole is not None:
        residual = residual.addcmul_(elastic * laplace, fields.along_axes(whole, *transforms), value=-1)
    step = torch.zeros_like(residual)
    direction = better = response * residual
    power = _dot(residual, better)
    for _ in range(iterations):
        pull = fields.along_axes(_times(matrix, fields.along_axes(direction, *back)), *transforms)
        pull.addcmul_(stiff, direction)
        length = power / _dot(direction, pull).clamp_min(LEAST)
        step.addcmul_(length, direction)
        residual.addcmul_(length, pull, value=-1)
        better, before = response * residual, power
        power = _dot(residual, better)
        direction = torch.addcmul(better, power / before.clamp_min(LEAST), direction)
    return fields.along_axes(step, *back)


def _times(matrix: Tensor, field: Tensor) -> Tensor:
    """A symmetric (N, 6, D, H, W) matrix at every voxel times a field."""
    xx, yy, zz, xy, xz, yz = matrix.unbind(1)
    x, y, z = field.unbind(1)
    found = torch.empty_like(field)
    for row, out in zip(((xx, xy, xz), (xy, yy, yz), (xz, yz, zz)), found.unbind(1), strict=True):
        torch.mul(row[0], x, out=out).addcmul_(row[1], y).addcmul_(row[2], z)
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product of each item, (N, 1, 1, 1, 1)."""
    return (a * b).sum((1, 2, 3, 4), keepdim=True)


@fields.kept
def _cosines(n: int, *, like: Tensor) -> Tensor:
    """(k, n) orthonormal discrete cosine transform, a frequency a row, the lowest alone: eigenvectors of second differences."""
    at = torch.arange(n, device=like.device, dtype=torch.float64)
    rows = torch.cos(_angles(n, like=like)[:, None] * (at + 0.5)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.to(like.dtype)


@fields.kept
def _stiffness(n: int, *, like: Tensor) -> Tensor:
    """(k,) the eigenvalues to :func:`_cosines`, their sign changed."""
    return (2 - 2 * torch.cos(_angles(n, like=like))).to(like.dtype)


def _angles(n: int, *, like: Tensor) -> Tensor:
    """(k,) by how much the cosines that a step is made of turn from voxel to voxel, in double precision."""
    return math.pi / n * torch.arange(math.ceil(KEPT * n), device=like.device, dtype=torch.float64)
