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

TINY = 1e-30  # keeps divisions by 0 finite


def step(
    normal: Tensor,
    smoothness: Smoothness,
    settings: VariationalSettings,
    displacement: Tensor | None = None,
    previous: Tensor | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """The regularized Gauss-Newton step.

    Args:
        normal: (N, 12, D, H, W), see :class:`~DivRegNetLib.registration.variational.equations.Equations`.
        displacement: (N, 3, D, H, W) before the step; None: the identity.
        previous: the step before, of which the fraction ``momentum`` is added; None: nothing is.
    Returns:
        (N, 3, D, H, W) in voxels of this grid, within ``max_step`` and ``max_gradient``.
    """
    normal = smoothed(normal, smoothness, settings)
    mean = mean_information(normal)
    weight = total_weight(mean, smoothness, settings)
    solution = solve(normal, displacement, weight, smoothness.elastic, settings, mean)
    if previous is not None and momentum:
        solution.add_(previous, alpha=momentum)
    return bounded(solution, settings)


def parts(normal: Tensor) -> tuple[Tensor, Tensor]:
    """Information (N, 3, 3, D, H, W) and force (N, 3, D, H, W) of equations (N, 12, D, H, W), views of them."""
    rows = normal.unflatten(1, (3, 4))
    return rows[:, :, :3], rows[:, :, 3]


def smoothed(normal: Tensor, smoothness: Smoothness, settings: VariationalSettings) -> Tensor:
    """(N, 12, D, H, W) equations, averaged by a Gaussian."""
    return fields.smooth(normal, smoothness.window / settings.stride)


def total_weight(mean: Tensor, smoothness: Smoothness, settings: VariationalSettings) -> Tensor:
    """``fluid * (mean information + information_floor) + elastic``, (N, 1, 1, 1, 1) as the mean."""
    constant = fields.constants(smoothness.fluid * settings.information_floor + smoothness.elastic, like=mean)
    return torch.add(constant, mean, alpha=smoothness.fluid)


def bounded(step: Tensor, settings: VariationalSettings) -> Tensor:
    """A step (N, 3, D, H, W), its vectors cut to ``max_step``, then scaled as a whole to ``max_gradient``.

    Where the largest absolute difference of neighbors along any axis, summed over the components, is below 1,
    ``x -> x + u(x)`` is one-to-one.
    """
    longest, steepest = settings.max_step, settings.max_gradient
    step = step * step.square().sum(1, keepdim=True).clamp_min_(longest**2).rsqrt_()  # in units of the longest
    differences = step.new_zeros(len(step), 3, *step.shape[1:])
    for axis, dim in enumerate((4, 3, 2)):
        inner = step.shape[dim] - 1
        out = differences[:, axis].narrow(dim, 0, inner)
        torch.sub(step.narrow(dim, 1, inner), step.narrow(dim, 0, inner), out=out)
    largest = differences.abs_().sum(2).amax((1, 2, 3, 4), keepdim=True)
    factor = fields.constants(steepest, like=step) / largest.clamp_min_(steepest / longest)
    return step.mul_(factor)


def mean_information(normal: Tensor) -> Tensor:
    """Mean of the information over voxels and axes, (N, 1, 1, 1, 1)."""
    return normal[:, ::5].mean((1, 2, 3, 4), keepdim=True)


def solve(
    normal: Tensor,
    displacement: Tensor | None,
    weight: Tensor,
    elastic: float,
    settings: VariationalSettings,
    mean: Tensor | None = None,
) -> Tensor:
    """The solution s of the linear system above, by preconditioned conjugate gradients.

    Fields are represented by their lowest cosine frequencies (free boundary: no gradient across it). There the Laplacian is
    diagonal, and so is the preconditioner, the exact inverse for an A that equals its mean everywhere.

    Args:
        normal: (N, 12, D, H, W): three rows of xx, xy, xz of A, to whose diagonal ``tikhonov`` is added, and x of b.
        displacement: u, (N, 3, D, H, W); None: 0.
        weight: (N, 1, 1, 1, 1), ``fluid + elastic`` in units of A, as is ``elastic``.
        mean: of the information, see :func:`mean_information`; None: it is computed.
    Returns:
        (N, 3, D, H, W).
    """
    n, shape, kept = len(normal), normal.shape[:1:-1], settings.frequencies
    transforms = [_cosines(side, kept, like=normal) for side in shape]
    back = [t.T for t in transforms]
    laplace = _laplace(*shape, kept, like=normal)
    # Added to the diagonal at every voxel, tikhonov is the same for every frequency.
    stiffness = torch.addcmul(fields.constants(settings.tikhonov + TINY, like=normal), laplace, weight)
    inverse = stiffness + (mean_information(normal) if mean is None else mean)  # of the preconditioner
    information, force = parts(normal)
    tiny = fields.constants(TINY, like=normal).view(1, 1, 1)

    def dot(a: Tensor, b: Tensor, plus: Tensor = tiny) -> Tensor:
        """Scalar product of each item of the batch, (N, 1, 1), plus a number, so that it can be divided by."""
        return torch.baddbmm(plus, a.reshape(n, 1, -1), b.reshape(n, -1, 1))

    def scaled(number: Tensor) -> Tensor:
        return number.view(n, 1, 1, 1, 1)

    if displacement is None:
        residual = fields.along_axes(force, *transforms)
    else:
        residual, smooth = fields.along_axes(torch.cat((force, displacement), 1), *transforms).split(3, 1)
        residual = torch.addcmul(residual, laplace, smooth, value=-elastic)
    direction = residual / inverse
    power, solution = dot(residual, direction), None
    for remaining in reversed(range(settings.cg_iterations)):
        spatial = fields.along_axes(direction, *back)
        product = (information * spatial[:, None]).sum(2)
        if remaining:
            product = fields.along_axes(product, *transforms).addcmul_(stiffness, direction)
            curvature = dot(direction, product)
        else:  # the product itself is not needed
            curvature = dot(spatial, product, dot(direction, stiffness * direction))
        length = scaled(power / curvature)
        solution = spatial * length if solution is None else solution.addcmul_(length, spatial)
        if remaining:
            residual.addcmul_(length, product, value=-1)
            preconditioned, previous = residual / inverse, power
            power = dot(residual, preconditioned)
            direction = torch.addcmul(preconditioned, scaled(power / previous), direction)
    return solution


def _laplace(width: int, height: int, depth: int, kept: float, *, like: Tensor) -> Tensor:
    """(k, k, k): minus the Laplacian of each frequency along D, H, W that is kept."""
    x, y, z = (_eigenvalues(n, kept, like=like) for n in (width, height, depth))
    return z[:, None, None] + y[:, None] + x


_laplace = fields.cached(_laplace, size=fields.CACHED_GRIDS)


@fields.cached
def _cosines(n: int, kept: float, *, like: Tensor) -> Tensor:
    """(k, n) orthonormal discrete cosine transform (DCT-II), one frequency a row, the lowest ones only. They are the
    eigenvectors of second differences."""
    at = torch.arange(n, device=like.device, dtype=torch.float64)
    rows = torch.cos(_angles(n, kept, like=like)[:, None] * (at + 0.5)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.to(like.dtype)


def _eigenvalues(n: int, kept: float, *, like: Tensor) -> Tensor:
    """(k,) of minus the second difference, for the rows of :func:`_cosines`."""
    return (2 - 2 * torch.cos(_angles(n, kept, like=like))).to(like.dtype)


def _angles(n: int, kept: float, *, like: Tensor) -> Tensor:
    """(k,) phase from one voxel to the next of each frequency that is kept, in double precision."""
    return math.pi / n * torch.arange(math.ceil(kept * n), device=like.device, dtype=torch.float64)
