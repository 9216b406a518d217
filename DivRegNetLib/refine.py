"""Refinement: further steps for one pair, at full resolution, for as long as its similarity rises.

Source: arXiv 1908.08767, Eq. 8: the deformation of a single pair maximises S less its roughness, with the discriminant fitted
to that very pair; here in closed form, see :mod:`DivRegNetLib.newton`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from DivRegNetLib import fields, newton

SMOOTHNESS = 0.1  # nats that a mean squared gradient of the displacement of 1 costs
WINDOWS = (3.0, 2.0)  # standard deviation in voxels, at the first and the last step
LEAST_GAIN = 1e-4  # nats by which a step must raise what is maximised
PATIENCE = 3  # steps in a row that may fail to


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
    """A displacement at least as good as the one given, by ``S - SMOOTHNESS * diffusion``.

    S is the mean pointwise mutual information in histograms of overlapping neighbourhoods, fitted anew at every step.

    Args:
        fixed, moving: (1, 1, D, H, W) normalised, on the working grid.
        displacement: (1, 3, D, H, W) voxels, start.
        steps: at most this many; they end early where they no longer help.
        valid: where the images have been measured; None: everywhere.
        progress: called with a fraction; may raise to cancel.
    Returns:
        (1, 3, D, H, W).
    """
    images = newton.Images(fixed, moving, 1, valid)
    best, best_score, failed = displacement, -torch.inf, 0
    for i in range(steps + 1):  # a step tells how good its start was
        window = WINDOWS[0] + (WINDOWS[1] - WINDOWS[0]) * min(i / max(steps - 1, 1), 1)
        further, similarity = images.step(displacement, window)
        score = similarity.item() - SMOOTHNESS * fields.diffusion(displacement).item()
        failed = 0 if score > best_score + LEAST_GAIN else failed + 1
        if score > best_score:
            best, best_score = displacement, score
        if failed == PATIENCE:
            break
        displacement = further
        progress(min((i + 1) / steps, 1))
    return best
