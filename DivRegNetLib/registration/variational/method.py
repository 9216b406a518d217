"""Variational registration of two images of any contrasts, by Gauss-Newton steps on mutual information.

The discriminant that maximizes the Donsker-Varadhan bound (arXiv 1908.08767, Eq. 9) is the pointwise mutual information,
which joint histograms give in closed form for a single pair. :mod:`.equations` turns it into information and force,
:mod:`.solver` into a smooth step; here steps are made from level to level. docs/method.md derives them.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational import solver
from DivRegNetLib.registration.variational.equations import Equations
from DivRegNetLib.registration.variational.features import FeatureEquations, Features, Valid, descriptors, eroded
from DivRegNetLib.registration.variational.schedule import Stage, schedule
from DivRegNetLib.registration.variational.settings import Smoothness, VariationalSettings

Progress = Callable[[float], None]


@torch.no_grad()
def register(
    fixed: Tensor,
    moving: Tensor,
    settings: VariationalSettings,
    *,
    start: Tensor | None = None,
    valid: Valid | None = None,
    measured: int | None = None,
    features: Sequence[Features] = (),
    progress: Progress = lambda fraction: None,
) -> Tensor:
    """The displacement after ``settings.steps`` steps.

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1] on one grid, any sides; padded inside to multiples of ``settings.multiple``.
        start: displacement as it is returned; None: the identity.
        valid: where the images were measured; None: everywhere.
        measured: voxels that were measured in both images, where that is known; None: they are counted, for which a GPU is
            waited for.
        features: of both images, whose equations are added to those of mutual information.
        progress: called after every step with the fraction of the steps that are done, up to 1; what it raises ends the
            registration.
    Returns:
        (N, 3, d, h, w) on the grid of the padded images coarsened by ``settings.output_stride``, in voxels of that grid;
        :func:`fields.upsample <DivRegNetLib.core.fields.upsample>` brings it to the images' grid. With
        ``settings.min_gain`` it is ``start`` itself where no round gained enough.
    """
    fixed, moving, valid = _padded(fixed, moving, valid, settings.multiple)
    output = tuple(n // settings.output_stride for n in fixed.shape[2:])
    if start is None and settings.min_gain is not None:
        start = fixed.new_zeros(len(fixed), 3, *output)
    with torch.autocast(fixed.device.type, enabled=False):  # counting voxels needs more than 16 bits
        stages = schedule(settings, _measured(fixed, valid, settings) if measured is None else measured)
        multiple = math.lcm(settings.multiple, *(settings.stride * stage.level.shrink for stage in stages))
        fixed, moving, valid = _padded(fixed, moving, valid, multiple)
        shape = fixed.shape[2:]
        features = [f.extended(shape) for f in features]
        padded = tuple(n // settings.output_stride for n in shape)
        displacement = before_all = None if start is None else _extended(start, padded)
        inner = None if valid is None else eroded(*valid)
        total, done = sum(len(stage.smoothness) for stage in stages), 0
        described, kind = None, None  # descriptors of the level before, and what they depend on
        for level, smoothness in stages:
            grid = tuple(n // (settings.stride * level.shrink) for n in shape)
            before = None if displacement is None else fields.resize(displacement, grid)
            terms = [FeatureEquations(f, grid, valid, settings.validity_threshold) for f in features]
            if settings.descriptor_weight * level.descriptors:
                if kind == (level.shrink, level.descriptors):
                    described.trust_regions(before, settings.descriptor_trust, settings.descriptor_region)
                else:
                    described = descriptors(fixed, moving, settings, level, valid, before)
                    kind = level.shrink, level.descriptors
                terms.append(described)
            equations = Equations(fixed, moving, settings, level, inner, terms)
            after = _level(
                equations, Stage(level, smoothness), before, lambda steps, done=done: progress((done + steps) / total)
            )
            done += len(smoothness)
            if after is not before:
                displacement = after
    progress(1.0)
    if displacement is before_all:
        return start
    return fields.resize(displacement, padded)[(..., *(slice(n) for n in output))]


def _padded(fixed: Tensor, moving: Tensor, valid: Valid | None, multiple: int) -> tuple[Tensor, Tensor, Valid | None]:
    """Images and validity padded to multiples of a number of voxels; what is added was not measured."""
    fixed, moving = (fields.padded(x, multiple) for x in (fixed, moving))
    return fixed, moving, None if valid is None else tuple(fields.padded(v, multiple, mode="constant") for v in valid)


def _extended(displacement: Tensor, shape: tuple[int, ...]) -> Tensor:
    """With the border repeated at the far ends, to the grid of images that were padded further."""
    return fields.extended(displacement, [n - m for n, m in zip(shape, displacement.shape[2:], strict=True)])


def _level(
    equations: Equations, stage: Stage, displacement: Tensor | None, report: Callable[[int], None]
) -> Tensor | None:
    """The displacement after the steps at one level; with ``min_gain``, after the last round that gained enough."""
    settings, step = equations.settings, None
    accepted = displacement
    reached = None if settings.min_gain is None else _objective(equations, displacement)
    for number, smoothness in enumerate(stage.smoothness):
        displacement, step = next_step(equations, displacement, smoothness, number, step)
        report(number + 1)
        if settings.min_gain is None:
            accepted = displacement
        elif number + 1 == len(stage.smoothness) or (number + 1) % len(equations.offsets) == 0:  # the end of a round
            before, reached = reached, _objective(equations, displacement)
            if not reached > before + settings.min_gain:
                break
            accepted = displacement
    return accepted


def next_step(
    equations: Equations,
    displacement: Tensor | None,
    smoothness: Smoothness,
    number: int = 0,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One Gauss-Newton step.

    Args:
        displacement: (N, 3, d, h, w) in voxels of its grid; None: the identity.
        number: of the step, which decides the voxels that are sampled.
        previous: the step before, for momentum; None: there is none.
    Returns:
        The displacement after the step, and the step.
    """
    step = solver.step(
        equations(displacement, number),
        smoothness,
        equations.settings,
        displacement,
        previous,
        equations.level.momentum,
    )
    return step if displacement is None else fields.compose(displacement, step), step


def _objective(equations: Equations, displacement: Tensor) -> float:
    """Mean pointwise mutual information less the elastic energy, in nats per voxel; the mean over the batch. The same voxels
    are sampled each time, so that values can be compared."""
    # fields.diffusion is a mean over the three components, of which the energy is the sum.
    elastic = equations.settings.last_smoothness.elastic / 2 * 3 * fields.diffusion(displacement).item()
    return equations.objective(displacement).mean().item() - elastic


def _measured(fixed: Tensor, valid: Valid | None, settings: VariationalSettings) -> int:
    """Voxels that were measured in both images, of the pair that has the fewest."""
    if valid is None or len(settings.levels) == 1:
        return fixed[0].numel()
    threshold = settings.validity_threshold
    return ((valid[0] > threshold) & (valid[1] > threshold)).flatten(1).sum(1).min().item()
