"""Refinement: optimise the deformation of one pair on S itself, with KLDivNet fitted to the pair.

Source: arXiv 1908.08767, Eq. 8, where theta and the deformation are optimised together, here for a single pair.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from DivRegNetLib import fields
from DivRegNetLib.similarity import KLDivNet

SMOOTHNESS = 2.5  # weight of the diffusion of the displacement; less over-warps
LEVELS = (4, 2)  # voxels of the working grid between the values of the correction, coarse to fine
PATIENCE = 10


def refine(
    fixed: Tensor,
    moving: Tensor,
    displacement: Tensor,
    kldivnet: KLDivNet | None,
    *,
    steps: int,
    mask: Tensor | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """A displacement at least as good as the one given, by ``S - smoothness``.

    A stationary velocity correction is optimised coarse to fine, integrated and composed with what is there; KLDivNet
    follows it. Steps end early where they no longer help, and the start is returned where they never did.

    Args:
        fixed, moving: (1, 1, D, H, W) normalised, on the working grid.
        displacement: (1, 3, D, H, W) voxels, start.
        kldivnet: similarity to start from; None starts from an untrained one.
        steps: at most this many, over all levels.
        mask: (1, 1, D, H, W) bool: where similarity counts.
        progress: called with a fraction; may raise to cancel.
    Returns:
        (1, 3, D, H, W).
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theta = (KLDivNet().to(fixed.device) if kldivnet is None else copy.deepcopy(kldivnet)).requires_grad_(True)
        generator = torch.Generator().manual_seed(0)
        _fit(theta, fixed, fields.warp(moving, displacement), mask, 30 if kldivnet is not None else 150, generator)
        current, done = displacement, 0
        for level, every in enumerate(LEVELS):
            share = steps // len(LEVELS) if level + 1 < len(LEVELS) else steps - done
            current = _optimise(
                fixed, moving, current, theta, every, share, mask, generator,
                lambda f, done=done, share=share: progress((done + f * share) / max(steps, 1)),
            )  # fmt: skip
            done += share
        # The judge: one D, one choice of patches, both deformations.
        with torch.no_grad():
            scores = [_objective(fixed, moving, u, theta, mask, torch.Generator().manual_seed(1), samples=65536)
                      for u in (displacement, current)]  # fmt: skip
    return current if scores[1] > scores[0] else displacement


def _objective(fixed, moving, displacement, theta, mask, generator, samples=16384) -> Tensor:
    warped = fields.warp(moving, displacement)
    similarity = theta(fixed, warped, mask=mask, samples=samples, generator=generator)
    return similarity - SMOOTHNESS * fields.diffusion(displacement)


def _fit(theta: KLDivNet, fixed: Tensor, warped: Tensor, mask, steps: int, generator: torch.Generator) -> None:
    """Brings D to this pair."""
    optimiser = torch.optim.Adam(theta.parameters(), lr=5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        (-theta(fixed, warped, mask=mask, samples=8192, generator=generator)).backward()
        optimiser.step()


def _optimise(fixed, moving, start, theta, every, steps, mask, generator, progress) -> Tensor:
    """One level: ``start o exp(v)`` with v on a grid ``every`` voxels apart; the iterate with the best running score."""
    shape = tuple(max(-(-n // every), 2) for n in fixed.shape[2:])
    velocity = torch.zeros(1, 3, *shape, device=fixed.device, requires_grad=True)
    optimiser = torch.optim.Adam(
        [{"params": [velocity], "lr": 0.1}, {"params": theta.parameters(), "lr": 1e-3}]
    )  # velocity in voxels of its own grid

    def deform() -> Tensor:
        return fields.compose(start, fields.resize(fields.integrate(velocity, 4), fixed.shape[2:]))

    running, best, waited, best_velocity = None, -torch.inf, 0, velocity.detach().clone()
    for step in range(steps):
        optimiser.zero_grad()
        score = _objective(fixed, moving, deform(), theta, mask, generator)
        running = score.item() if running is None else 0.8 * running + 0.2 * score.item()
        if running > best + 1e-4:
            best, waited, best_velocity = running, 0, velocity.detach().clone()
        else:
            waited += 1
            if waited >= PATIENCE:
                break
        (-score).backward()
        optimiser.step()
        progress((step + 1) / steps)
    with torch.no_grad():
        velocity.copy_(best_velocity)
        return deform()
