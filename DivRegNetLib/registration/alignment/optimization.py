"""Quasi-Newton ascent on linear maps, many at once."""

import torch
from torch import Tensor

from DivRegNetLib.registration.alignment import transforms
from DivRegNetLib.registration.alignment.settings import AlignmentSettings
from DivRegNetLib.registration.alignment.similarity import Level


def optimize(
    level: Level, maps: Tensor, mode: str, steps: int, reach: float, settings: AlignmentSettings,
    references: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best maps near some, none worse than it was: BFGS in a trust region, in small steps of the group of maps.

    Args:
        maps: (K, 4, 4) float64, normalized fixed -> normalized moving coordinates.
        mode: what may change, see :func:`~DivRegNetLib.registration.alignment.transforms.generators`.
        reach: longest first step, normalized.
        references: (K,) scales from which stretch is penalized; None: 1.
    Returns:
        maps, and their similarities less the penalty, (K,).
    """
    basis = torch.tensor(transforms.generators(mode), dtype=maps.dtype)
    references = maps.new_ones(len(maps)) if references is None else references
    stretches = mode in ("similarity", "affine")

    def value(at: Tensor) -> tuple[Tensor, Tensor]:
        score, gradient = level.evaluate(at)
        if stretches:
            log = transforms.log_stretch(at[:, :3, :3], references)
            score = score - settings.stretch_penalty / 4 * log.square().sum((1, 2))
            gradient = torch.cat((gradient[:, :, :3] - settings.stretch_penalty * log, gradient[:, :, 3:]), 2)
        return score, torch.einsum("kij,pij->kp", gradient, basis)

    score, slope = value(maps)
    identity = torch.eye(len(basis), dtype=maps.dtype)
    inverse_hessian = identity.repeat(len(maps), 1, 1)
    fresh = torch.ones(len(maps), dtype=torch.bool)  # nothing is known of the curvature
    trust = maps.new_full((len(maps),), reach)
    for _ in range(steps):
        step = (inverse_hessian @ slope[:, :, None])[:, :, 0]
        ascends = (step * slope).sum(1) > 0
        step = torch.where((fresh | ~ascends)[:, None], slope, step)
        length = step.norm(dim=1).clamp_min(1e-30)
        # A gradient alone knows no length: the first step goes as far as is trusted.
        factor = torch.where(fresh, trust / length, (trust / length).clamp_max(1.0))
        step, length = step * factor[:, None], length * factor
        there = maps @ transforms.exponential(torch.einsum("kp,pij->kij", step, basis))
        new_score, new_slope = value(there)
        better = new_score > score + 1e-4 * (step * slope).sum(1)
        change = slope - new_slope
        along = (step * change).sum(1)
        usable = (along > 1e-12 * length * change.norm(dim=1)) & (new_score > -0.5)
        rho = torch.where(usable, 1 / along.clamp_min(1e-30), along.new_zeros(()))[:, None, None]
        scale = torch.where(usable & fresh, along / change.square().sum(1).clamp_min(1e-30), along.new_ones(()))
        inverse_hessian = torch.where(fresh[:, None, None], identity * scale[:, None, None], inverse_hessian)
        left = identity - rho * step[:, :, None] * change[:, None, :]
        updated = left @ inverse_hessian @ left.transpose(1, 2) + rho * step[:, :, None] * step[:, None, :]
        inverse_hessian = torch.where(usable[:, None, None], updated, inverse_hessian)
        fresh = fresh & ~usable
        trust = torch.where(better, torch.maximum(trust, 2 * length).clamp_max(2 * reach), 0.35 * length)
        maps = torch.where(better[:, None, None], there, maps)
        score, slope = torch.where(better, new_score, score), torch.where(better[:, None], new_slope, slope)
        if ((trust < settings.tolerance) | (length < settings.tolerance)).all():
            break
    return maps, score
