"""Refinement: optimise the deformation of one pair on S itself, with KLDivNet fitted to the pair.

Source: arXiv 1908.08767, Eq. 8, where theta and the deformation are optimised together, here for a single pair.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from DivRegNetLib import fields
from DivRegNetLib.similarity import KLDivNet, patches, standardise

SMOOTHNESS = 1.0  # weight of the diffusion of the displacement; at 2.5 the bundled model gained nothing
LEVELS = (4, 2)  # voxels of the working grid between the values of the correction, coarse to fine
PATCHES = 8192  # looked at in a step, anew each time
FIT_STEPS = 30
PATIENCE = 20
SQUARINGS = 4


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
        theta = copy.deepcopy(kldivnet) if kldivnet is not None else KLDivNet().to(fixed.device)
        pair = _Pair(fixed, moving, theta.requires_grad_(True), mask, torch.Generator().manual_seed(0))
        pair.fit(displacement, FIT_STEPS if kldivnet is not None else 5 * FIT_STEPS)
        current, done = displacement, 0
        for level, every in enumerate(LEVELS):
            share = (steps - done) // (len(LEVELS) - level)
            current = _optimise(
                pair, current, every, share, lambda f, d=done, n=share: progress((d + f * n) / max(steps, 1))
            )
            done += share
        better = pair.judge(current) > pair.judge(displacement)
    return current if better else displacement


@dataclass
class _Pair:
    """Both images, and the similarity being fitted to them."""

    fixed: Tensor
    moving: Tensor
    theta: KLDivNet
    mask: Tensor | None
    generator: torch.Generator

    def __post_init__(self) -> None:
        side = self.theta.config.patch
        shape = self.fixed.shape[2:]
        at = fields.identity(shape, like=self.fixed)
        self.points = torch.stack([patches(at[:, i : i + 1], side)[0] for i in range(3)])  # (3, number, side^3)
        self.values = patches(standardise(self.fixed, self.mask), side)[0]
        self.moving = standardise(self.moving, self.mask)
        if self.mask is not None:
            inside = patches(self.mask, side)[0].all(-1)
            self.points, self.values = self.points[:, inside], self.values[inside]

    def similarity(self, deform: Callable[[Tensor], Tensor], count: int = PATCHES) -> Tensor:
        """S of a random choice of patches; ``deform`` takes voxel coordinates (1, 3, d, h, w) to moving ones.

        Only what is looked at is warped, a small part of the image.
        """
        chosen = torch.randperm(len(self.values), generator=self.generator)[: count - count % 2].to(self.fixed.device)
        at = deform(self.points[:, chosen][None, ..., None])
        warped = fields.sample(self.moving, at)[0, 0, ..., 0]
        return self.theta.estimate(self.values[chosen][None], warped[None], generator=self.generator)

    def fit(self, displacement: Tensor, steps: int) -> None:
        """Brings D to this pair, under a displacement."""
        optimiser = torch.optim.Adam(self.theta.parameters(), lr=5e-3)
        for _ in range(steps):
            optimiser.zero_grad()
            (-self.similarity(lambda at: at + fields.sample(displacement, at))).backward()
            optimiser.step()

    def judge(self, displacement: Tensor) -> Tensor:
        """What is maximised, for a whole displacement: with D fitted to it, on the same patches every time."""
        self.generator.manual_seed(1)
        self.fit(displacement, FIT_STEPS)
        with torch.no_grad():
            similarity = self.similarity(lambda at: at + fields.sample(displacement, at), 8 * PATCHES)
            return similarity - SMOOTHNESS * fields.diffusion(displacement)


def _optimise(pair: _Pair, start: Tensor, every: int, steps: int, progress: Callable[[float], None]) -> Tensor:
    """One level: ``start o exp(v)`` with v on a grid ``every`` voxels apart; the iterate with the best running score."""
    full = pair.fixed.shape[2:]
    shape = tuple(max(round(n / every), 2) for n in full)
    coarse_start = fields.resize(start, shape)
    velocity = torch.zeros_like(coarse_start, requires_grad=True)
    ratio = start.new_tensor([n / m for n, m in zip(full, shape, strict=True)][::-1]).view(1, 3, 1, 1, 1)
    optimiser = torch.optim.Adam(
        [{"params": [velocity], "lr": 0.2 / every}, {"params": pair.theta.parameters(), "lr": 1e-3}]
    )
    running, best, waited, best_velocity = None, -torch.inf, 0, velocity.detach().clone()
    for step in range(steps):
        correction = fields.integrate(velocity, SQUARINGS)

        def deform(at: Tensor, correction: Tensor = correction) -> Tensor:
            moved = at + fields.sample(correction, (at + 0.5) / ratio - 0.5) * ratio
            return moved + fields.sample(start, moved)

        total = fields.compose(coarse_start, correction)
        score = pair.similarity(deform) - SMOOTHNESS * fields.diffusion(total)
        running = score.item() if running is None else 0.9 * running + 0.1 * score.item()
        if running > best:
            best, waited, best_velocity = running, 0, velocity.detach().clone()
        else:
            waited += 1
            if waited >= PATIENCE:
                break
        optimiser.zero_grad()
        (-score).backward()
        optimiser.step()
        progress((step + 1) / steps)
    with torch.no_grad():
        return fields.compose(start, fields.resize(fields.integrate(best_velocity, SQUARINGS), full))
