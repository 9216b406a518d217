"""The order of the steps: levels, smoothness of each step, and the voxels at which each step samples the images."""

import itertools
from dataclasses import replace
from typing import NamedTuple

from DivRegNetLib.registration.variational.settings import Level, Smoothness, VariationalSettings

LARGEST_SHRINK = 64


class Stage(NamedTuple):
    """The steps at one level, in order.

    smoothness: one for each step.
    """

    level: Level
    smoothness: tuple[Smoothness, ...]


def schedule(settings: VariationalSettings, measured: int) -> list[Stage]:
    """The stages of a registration, coarsest first.

    Args:
        measured: voxels of the images that were measured in both.
    """
    *coarse, last = settings.levels
    more: list[Level] = []
    if coarse and settings.more_voxels is not None:
        more = _coarser(coarse[0], settings, measured)
    coarse, added = [*more, *coarse], len(more)
    first, end = settings.first_smoothness, settings.last_smoothness
    counts = [round(level.share * settings.steps) if settings.steps >= settings.min_steps else 0 for level in coarse]
    remaining = max(settings.steps - sum(counts[added:]), 0)
    fractions = [i / (remaining - 1) if remaining > 1 else 1.0 for i in range(remaining)]
    stages = [
        Stage(level, (first,) * count)
        for level, count in zip(coarse, counts, strict=True)
        if count and measured >= settings.min_voxels * (level.shrink * settings.stride) ** 3
    ]
    return [*stages, Stage(last, tuple(_between(first, end, t) for t in fractions))]


def _coarser(level: Level, settings: VariationalSettings, measured: int) -> list[Level]:
    """Levels before a level, each with half the resolution of the next, coarsest first."""
    levels, shrink = [], 2 * level.shrink
    while shrink <= LARGEST_SHRINK and measured >= settings.more_voxels * (shrink * settings.stride) ** 3:
        levels.insert(0, replace(level, shrink=shrink))
        shrink *= 2
    return levels


def _between(first: Smoothness, last: Smoothness, t: float) -> Smoothness:
    pairs = ((getattr(first, n), getattr(last, n)) for n in ("window", "fluid", "elastic"))
    return Smoothness(*(a + (b - a) * t for a, b in pairs))


def sampling_offsets(stride: int) -> list[tuple[int, int, int]]:
    """Offsets along D, H, W of the voxels at which successive steps sample the images: each of the ``stride ** 3`` voxels per
    voxel of the displacement's grid once in a round, opposite corners after each other."""
    offsets = list(itertools.product(range(stride), repeat=3))
    return [o for pair in zip(offsets, offsets[::-1], strict=True) for o in pair][: len(offsets)]
