"""The smooth field that answers forces: the linear equations of a Gauss-Newton step under diffusion regularisation.

With a symmetric positive matrix A (information) and a vector b (force) at every voxel, the step s solves

    (A - (fluid + elastic) Laplace) s = b + elastic Laplace u

that is, it makes ``s A s / 2 - b s`` small while neither the step (``fluid``) nor the whole displacement u + s (``elastic``)
has steep gradients. What is known at one place reaches as far as nothing speaks against it. Source: Modersitzki, "FAIR:
Flexible Algorithms for Image Registration", SIAM 2009, chapter 8.

Fields are (N, 3, D, H, W), their components along x, y, z, lengths in voxels of their grid (DivRegNetLib/fields.py).
"""

import math

import torch
from torch import Tensor

LEAST = 1e-30


def solve(normal: Tensor, whole: Tensor | None, fluid: Tensor, elastic: Tensor, iterations: int) -> Tensor:
    """The step s of the equations above, by preconditioned conjugate gradients.

    The preconditioner is the exact inverse for an A that is everywhere its mean (by cosine transforms, whose boundary
    is free: no gradient across it).

    Args:
        normal: (N, 9, D, H, W): A's xx, xy, xz, yy, yz, zz and b's x, y, z.
        whole: u, (N, 3, D, H, W); None: 0.
        fluid, elastic: (N, 1, 1, 1, 1), in units of A.
        iterations: of conjugate gradients.
    Returns:
        (N, 3, D, H, W).
    """
    matrix, residual = normal[:, :6], normal[:, 6:]
    if whole is not None:
        residual = residual - elastic * laplacian(whole)
    mean = matrix[:, [0, 3, 5]].mean((1, 2, 3, 4), keepdim=True)
    stiffness = fluid + elastic
    transforms = [_cosines(n, like=normal) for n in normal.shape[2:]]
    z, y, x = (2 - 2 * torch.cos(torch.arange(n, device=normal.device) * (math.pi / n)) for n in normal.shape[2:])
    response = 1 / (mean + stiffness * (z[:, None, None] + y[:, None] + x).to(normal.dtype)).clamp_min(LEAST)

    def precondition(field: Tensor) -> Tensor:
        return _transformed(response * _transformed(field, transforms), [t.T for t in transforms])

    step = torch.zeros_like(residual)
    direction = better = precondition(residual)
    power = _dot(residual, better)
    for _ in range(iterations):
        pull = _times(matrix, direction).addcmul_(stiffness, laplacian(direction))
        length = power / _dot(direction, pull).clamp_min(LEAST)
        step, residual = torch.addcmul(step, length, direction), torch.addcmul(residual, length, pull, value=-1)
        better, before = precondition(residual), power
        power = _dot(residual, better)
        direction = torch.addcmul(better, power / before.clamp_min(LEAST), direction)
    return step


def laplacian(field: Tensor) -> Tensor:
    """Minus the Laplacian of (N, C, D, H, W) by second differences, nothing flowing across the border."""
    found = torch.zeros_like(field)
    for dim in (2, 3, 4):
        slope, inner = field.diff(dim=dim), field.shape[dim] - 1
        found.narrow(dim, 0, inner).sub_(slope)
        found.narrow(dim, 1, inner).add_(slope)
    return found


def _times(matrix: Tensor, field: Tensor) -> Tensor:
    """A symmetric (N, 6, D, H, W) matrix at every voxel times a field."""
    xx, xy, xz, yy, yz, zz = matrix.unbind(1)
    x, y, z = field.unbind(1)
    rows = ((xx, xy, xz), (xy, yy, yz), (xz, yz, zz))
    return torch.stack([(a * x).addcmul_(b, y).addcmul_(c, z) for a, b, c in rows], 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3, 4), keepdim=True)


def _cosines(n: int, *, like: Tensor) -> Tensor:
    """(n, n) orthonormal discrete cosine transform, a frequency a row: the eigenvectors of second differences."""
    at = torch.arange(n, device=like.device, dtype=torch.float64)
    rows = torch.cos(math.pi / n * at[:, None] * (at + 0.5)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.to(like.dtype)


def _transformed(field: Tensor, transforms: list[Tensor]) -> Tensor:
    z, y, x = transforms
    return (z @ (y @ (field @ x.T)).flatten(3)).view(field.shape)
