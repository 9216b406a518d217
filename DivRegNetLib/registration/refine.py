"""Refinement: further steps for one pair, for as long as its similarity rises.

Source: arXiv 1908.08767, Eq. 8: the deformation of a single pair maximizes S less its roughness, with the discriminant fitted
to that very pair; here in closed form, see :mod:`DivRegNetLib.registration.newton`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.registration import newton

SMOOTHNESS = newton.Smoothness(2.8, 1.0, 0.4)
PARZEN = 0.8  # sharper than before: intensities, like voxels, are told apart coarse to fine
LEAST_GAIN = 1e-4  # nats by which a round of steps must raise what is maximized


@torch.no_grad()
def refine(
    fixed: Tensor,
    moving: Tensor,
    displacement: Tensor,
    *,
    steps: int,
    valid: newton.Valid | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """A displacement at least as good as the one given, by S less its elastic energy, which the steps maximize.

    S is the mean pointwise mutual information in histograms of overlapping neighborhoods, fitted anew at every step. Steps
    come in rounds that look at all voxels, each step at others (see :class:`DivRegNetLib.registration.newton.Images`); before and after a
    round the same ones are looked at, so that S can be compared.

    Args:
        fixed, moving: (1, 1, D, H, W) normalized, on the working grid.
        displacement: (1, 3, D, H, W) voxels, start.
        steps: at most this many; they end after a round that did not help.
        valid: where the images have been measured; None: everywhere.
        progress: called with a fraction; may raise to cancel.
    Returns:
        (1, 3, D, H, W).
    """
    shape = fixed.shape[2:]
    stride = 1 if any(n % 2 for n in shape) else 2
    images = newton.Images(fixed, moving, stride, valid, parzen=PARZEN)

    def score(u: Tensor) -> float:
        elastic = SMOOTHNESS.elastic / 2 * 3 * fields.diffusion(u).item()  # which is a mean over the components
        return images.equations(u)[1].item() - elastic

    best = further = fields.resize(displacement, tuple(n // stride for n in shape))
    start = best_score = score(best)
    step = None
    for i in range(steps):
        further, step = images.step(further, SMOOTHNESS, i, step)
        progress((i + 1) / steps)
        if i + 1 == steps or (i + 1) % len(images.turns) == 0:
            if (reached := score(further)) <= best_score + LEAST_GAIN:
                break
            best, best_score = further, reached
    progress(1.0)
    return fields.resize(best, shape) if best_score > start else displacement
