"""Random free-form deformations: cubic B-splines with control points that are moved at random.

Source: Rueckert et al., IEEE TMI 1999. The phantoms of arXiv 1908.08767 have control points 20 mm apart that are moved by
N(0, 6 mm) along each axis.

There are two forms of the same deformation. Training draws thousands of them on its own device and grid, as tensors
(:func:`ffd`); the benchmark and the sample pair need points anywhere in space, as a SimpleITK transform
(:func:`ffd_transform`).
"""

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core import fields
from training.data.randomness import Random

CONTROL_MM, SD_MM = 20.0, 6.0


def ffd(shape: tuple[int, int, int], spacing: float, sd: float, random: Random) -> Tensor:
    """A displacement whose control points are ``spacing`` voxels apart and moved by N(0, ``sd`` voxels).

    Args:
        shape: (D, H, W).
    Returns:
        (1, 3, D, H, W) in voxels.
    """
    bases = [bspline_basis(n, spacing, random.device) for n in shape]
    return evaluate(random.normal(3, *(b.shape[1] for b in bases)) * sd, bases)


def evaluate(control: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """The displacement (1, 3, D, H, W) of control points.

    Args:
        control: (3, K, J, I) displacements of the control points along x, y and z.
        bases: the :func:`bspline_basis` of each axis, in the order D, H, W.
    """
    for basis in reversed(bases):  # last axis first; each turn moves the finished axis to the front of the three
        control = torch.einsum("cijk,nk->cnij", control, basis)
    return control[None]


def bspline_basis(n: int, spacing: float, device: torch.device) -> Tensor:
    """(n, controls): the weight of each control point at each of ``n`` voxels.

    Control point i lies at (i - 1) * ``spacing`` voxels. The result must not be written to.
    """
    return _basis(n, spacing, like=torch.empty(0, device=device))


@fields.cached
def _basis(n: int, spacing: float, *, like: Tensor) -> Tensor:
    x = torch.arange(n, device=like.device) / spacing
    t, first = x.frac(), x.floor().long()
    weights = torch.stack(
        ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6), 1
    )
    basis = torch.zeros(n, int(first.max()) + 4, device=like.device)
    return basis.scatter_(1, first[:, None] + torch.arange(4, device=like.device), weights)


def ffd_transform(image: sitk.Image, seed: int, sd_mm: float = SD_MM) -> sitk.BSplineTransform:
    """The deformation of the paper's phantoms over the extent of an image (LPS, mm); that of another ``sd_mm`` is larger or
    smaller by that factor."""
    mesh = [max(int(n * s / CONTROL_MM), 1) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    made = sitk.BSplineTransformInitializer(image, mesh, 3)
    made.SetParameters(np.random.default_rng(seed).normal(0, sd_mm, len(made.GetParameters())).tolist())
    return made
