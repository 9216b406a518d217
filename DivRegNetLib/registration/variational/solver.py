"""The linear system of a Gauss-Newton step under diffusion regularization, and the step that solves it.

With a symmetric positive semidefinite matrix A (information) and a vector b (force) at every voxel, the step s solves

    (A - (fluid + elastic) Laplace) s = b + elastic Laplace u,

that is, it minimizes ``s A s / 2 - b s`` plus the squared gradients of the step (weight ``fluid / 2``) and of the whole
displacement u + s (weight ``elastic / 2``). Regularization carries well-determined displacements into regions with little
information. Source: Modersitzki, "FAIR: Flexible Algorithms for Image Registration", SIAM 2009, chapter 8.

Fields are (N, 3, D, H, W), their components along x, y, z, lengths in voxels of their grid (DivRegNetLib/core/fields.py).
"""

import math

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.settings import Smoothness, VariationalSettings

COMPONENTS = (
    (0, 0),
    (1, 1),
    (2, 2),
    (0, 1),
    (0, 2),
    (1, 2),
)  # of a symmetric matrix, in the order in which they are kept
TINY = 1e-30  # keeps divisions by 0 finite


def step(
    normal: Tensor, smoothness: Smoothness, settings: VariationalSettings, displacement: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The regularized Gauss-Newton step.

    Args:
        normal: (N, 9, D, H, W), see :class:`~DivRegNetLib.registration.variational.equations.Equations`.
        displacement: (N, 3, D, H, W) before the step; None: the identity.
    Returns:
        (N, 3, D, H, W) in voxels of this grid, within ``max_step`` and ``max_gradient``; and (N, 1, D, H, W), the smoothed
        information that it is based on, averaged over the axes.
    """
    unit = mean_information(normal, settings)
    normal = fields.smooth(normal, smoothness.window / settings.stride) if smoothness.window else normal.clone()
    normal[:, :3] += settings.tikhonov
    solution = solve(
        normal, displacement, smoothness.fluid * unit, smoothness.elastic, settings.cg_iterations, settings.frequencies
    )
    return bounded(solution, settings), information(normal)


def bounded(step: Tensor, settings: VariationalSettings) -> Tensor:
    """A step (N, 3, D, H, W), its vectors cut to ``max_step``, then scaled as a whole to ``max_gradient``."""
    step = step / (fields.length(step) / settings.max_step).clamp_min(1)
    return step.div_((_largest_gradient(step) / settings.max_gradient).clamp_min(1))


def _largest_gradient(field: Tensor) -> Tensor:
    """Largest absolute difference of neighbors along any axis, summed over the components, (N, 1, 1, 1, 1). Where it is
    below 1, ``x -> x + u(x)`` is one-to-one."""
    along = [slope.abs_().sum(1).flatten(1).amax(1) for slope in fields.gradients(field)]
    return torch.stack(along).amax(0).view(-1, 1, 1, 1, 1)


def mean_information(normal: Tensor, settings: VariationalSettings) -> Tensor:
    """Mean of the information over voxels and axes plus ``information_floor``, (N, 1, 1, 1, 1)."""
    return information(normal).mean((1, 2, 3, 4), keepdim=True) + settings.information_floor


def information(normal: Tensor) -> Tensor:
    """(N, 1, D, H, W): the information of (N, 9, D, H, W) equations, averaged over the axes."""
    return normal[:, :3].mean(1, keepdim=True)


def solve(
    normal: Tensor, displacement: Tensor | None, fluid: Tensor, elastic: float, iterations: int, frequencies: float
) -> Tensor:
    """The solution s of the linear system above, by preconditioned conjugate gradients.

    Fields are represented by their lowest cosine frequencies (free boundary: no gradient across it). There the Laplacian is
    diagonal, and so is the preconditioner, the exact inverse for an A that equals its mean everywhere.

    Args:
        normal: (N, 9, D, H, W): xx, yy, zz, xy, xz, yz of A and x, y, z of b.
        displacement: u, (N, 3, D, H, W); None: 0.
        fluid: (N, 1, 1, 1, 1), in units of A, as is ``elastic``.
        iterations: of conjugate gradients.
        frequencies: fraction of the cosine frequencies along each axis that are kept.
    Returns:
        (N, 3, D, H, W).
    """
    matrix, force = normal[:, :6], normal[:, 6:]
    transforms = [_cosines(n, frequencies, like=normal) for n in normal.shape[:1:-1]]
    back = [t.T for t in transforms]
    x, y, z = (_eigenvalues(n, frequencies, like=normal) for n in normal.shape[:1:-1])
    laplace = z[:, None, None] + y[:, None] + x  # minus the Laplacian
    mean, stiffness = matrix[:, :3].mean((1, 2, 3, 4), keepdim=True), (fluid + elastic) * laplace
    preconditioner = 1 / (mean + stiffness).clamp_min(TINY)

    residual = fields.along_axes(force, *transforms)
    if displacement is not None:
        residual = residual.addcmul_(elastic * laplace, fields.along_axes(displacement, *transforms), value=-1)
    solution = torch.zeros_like(residual)
    direction = preconditioned = preconditioner * residual
    power = _dot(residual, preconditioned)
    for _ in range(iterations):
        product = fields.along_axes(_times(matrix, fields.along_axes(direction, *back)), *transforms)
        product.addcmul_(stiffness, direction)
        length = power / _dot(direction, product).clamp_min(TINY)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        preconditioned, previous = preconditioner * residual, power
        power = _dot(residual, preconditioned)
        direction = torch.addcmul(preconditioned, power / previous.clamp_min(TINY), direction)
    return fields.along_axes(solution, *back)


def _times(matrix: Tensor, field: Tensor) -> Tensor:
    """A symmetric (N, 6, D, H, W) matrix at every voxel times a field."""
    xx, yy, zz, xy, xz, yz = matrix.unbind(1)
    x, y, z = field.unbind(1)
    product = torch.empty_like(field)
    for row, out in zip(((xx, xy, xz), (xy, yy, yz), (xz, yz, zz)), product.unbind(1), strict=True):
        torch.mul(row[0], x, out=out).addcmul_(row[1], y).addcmul_(row[2], z)
    return product


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product of each item of the batch, (N, 1, 1, 1, 1)."""
    return (a * b).sum((1, 2, 3, 4), keepdim=True)


@fields.cached
def _cosines(n: int, kept: float, *, like: Tensor) -> Tensor:
    """(k, n) orthonormal discrete cosine transform (DCT-II), one frequency a row, the lowest ones only. They are the
    eigenvectors of second differences."""
    at = torch.arange(n, device=like.device, dtype=torch.float64)
    rows = torch.cos(_angles(n, kept, like=like)[:, None] * (at + 0.5)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.to(like.dtype)


@fields.cached
def _eigenvalues(n: int, kept: float, *, like: Tensor) -> Tensor:
    """(k,) of minus the second difference, for the rows of :func:`_cosines`."""
    return (2 - 2 * torch.cos(_angles(n, kept, like=like))).to(like.dtype)


def _angles(n: int, kept: float, *, like: Tensor) -> Tensor:
    """(k,) phase from one voxel to the next of each frequency that is kept, in double precision."""
    return math.pi / n * torch.arange(math.ceil(kept * n), device=like.device, dtype=torch.float64)
