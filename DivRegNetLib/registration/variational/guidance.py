"""The input of a guided RegNet: the step that the variational method would make next, at two smoothnesses."""

import torch
from torch import Tensor

from DivRegNetLib.registration.variational import solver
from DivRegNetLib.registration.variational.equations import Equations
from DivRegNetLib.registration.variational.features import eroded
from DivRegNetLib.registration.variational.settings import VariationalSettings

CHANNELS = 8  # for each of two smoothnesses a step (3) and the information (1)


@torch.no_grad()
def guidance(
    fixed: Tensor, warped: Tensor, settings: VariationalSettings, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next step at the last level, and a network's input made of it.

    Args:
        fixed, warped: (N, 1, D, H, W) in [0, 1], sides multiples of ``settings.stride`` times the last level's ``shrink``.
        counted: (N, 1, D, H, W) bool, the voxels that count; None: all.
    Returns:
        (N, 3, d, h, w): the step of ``settings.last_smoothness``, in voxels of the displacement's grid.
        (N, CHANNELS, d, h, w): for the first and the last smoothness the step, and the information k mapped to
        ``k / (k + mean k)``, from 0 to 1.
        (N, CHANNELS, d, h, w): the same for the swapped pair, whose steps are the opposite.
    """
    with torch.autocast(fixed.device.type, enabled=False):
        valid = None if counted is None else eroded(counted) * 2
        normal = Equations(fixed, warped, settings, settings.levels[-1], valid)(None)
        both = settings.first_smoothness, settings.last_smoothness
        smoothed = torch.cat([solver.smoothed(normal, s, settings) for s in both])
        mean = solver.mean_information(smoothed).split(len(normal))
        weight = torch.cat([solver.total_weight(m, s, settings) for m, s in zip(mean, both, strict=True)])
        steps = solver.bounded(solver.solve(smoothed, None, weight, 0.0, settings), settings)
        # Information at each voxel, the mean over the axes, relative to the mean of the image.
        known = smoothed[:, ::5].mean(1, keepdim=True) + settings.tikhonov
        unit = (solver.mean_information(normal) + settings.information_floor).repeat(2, 1, 1, 1, 1)
        known = known / (known + unit)
    forward, backward = (torch.cat(torch.cat((s, known), 1).chunk(2), 1) for s in (steps, -steps))
    return steps.chunk(2)[1], forward, backward
