"""Candidates and evidence: how stiff a deformation is, or whether there is one at all, is chosen for each pair.

Every step that raises the mutual information of a pair also follows its noise and the bias of its estimate. Two contrasts of
one head that are aligned already are moved apart by it, by a third of a voxel with the usual stiffness. No stiffness suits all
pairs: two patients' organs need a loose deformation, small or smooth differences a stiff one. So there are several candidates,
and evidence that none of them was made to maximize chooses between them.

A :class:`Candidate` is a name and a function that makes a displacement; :func:`choose` takes the one that :class:`Agreement`
scores highest. :func:`deform` makes candidates of several stiffnesses, which share all but the last steps, and adds no
deformation.

Axis order and units as in :mod:`DivRegNetLib.core.fields`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.quality import evidence
from DivRegNetLib.registration import methods
from DivRegNetLib.registration.methods import Coarse, Images
from DivRegNetLib.registration.regnet import RegNet
from DivRegNetLib.registration.variational.equations import gradient
from DivRegNetLib.registration.variational.settings import Level, Smoothness, VariationalSettings

Progress = Callable[[float], None]

STIFFNESSES = (1.0, 3.0, 0.3, 0.1)
"""Factors of the elastic weight that are tried; the first is usual."""

LAST_STEPS = 2  # of the last level, that each stiffness makes by itself
PARTS_SHARED = 3  # of the progress, in units of a candidate
NO_DEFORMATION = "none"
EVERY = 400_000  # voxels at most that the mutual information is counted from


@dataclass(frozen=True)
class Candidate:
    """One way to register a pair.

    name: of the candidate, in the quality card.
    make: its displacement, (1, 3, D, H, W) in voxels of the working grid.
    stiffness: factor of the elastic weight; None: no deformation, or another method.
    """

    name: str
    make: Callable[[], Tensor]
    stiffness: float | None = None


@dataclass(frozen=True)
class Choice:
    """The candidate that was chosen.

    displacement: what it made.
    scores: name -> score of all candidates, in the order in which they were made; empty where there was no choice.
    """

    candidate: Candidate
    displacement: Tensor
    scores: dict[str, float]

    def as_dict(self) -> dict:
        """For the quality card."""
        return {"chosen": self.candidate.name, "stiffness": self.candidate.stiffness, "scores": self.scores}


def choose(candidates: Iterable[Candidate], score: Callable[[Tensor], float]) -> Choice:
    """The candidate whose displacement has the highest score; of equal ones the first.

    Raises:
        ValueError: there is no candidate.
    """
    best: Choice | None = None
    scores: dict[str, float] = {}
    for candidate in candidates:
        displacement = candidate.make()
        scores[candidate.name] = score(displacement)
        if best is None or scores[candidate.name] > scores[best.candidate.name]:
            best = Choice(candidate, displacement, scores)
    if best is None:
        raise ValueError("there is no candidate to choose")
    return best


class Agreement:
    """How well the two images agree after a displacement: the sum of the logarithms of the mean squared cosine between
    gradients at the strong edges of the fixed image (:mod:`DivRegNetLib.quality.evidence`), and, with WEIGHT, of the mutual
    information of the whole images. The methods maximize the information of small blocks, in which a wrong deformation raises
    it while the global one falls.
    """

    WEIGHT = 0.1  # a deformation changes the information by about ten times as much as the cosine
    BINS = 32

    def __init__(self, images: Images) -> None:
        measured = images.measured_in_masks() or (torch.ones_like(images.fixed, dtype=torch.bool),) * 2
        inside = evidence.foreground(images.fixed, measured[0])
        self.inside = inside if inside.sum() >= evidence.MIN_VOXELS else measured[0]
        self.gradient = _slopes(images.fixed)
        self.strength = self.gradient.square().sum(1, keepdim=True)
        values = self.strength[self.inside]
        self.strong = self.inside & (
            self.strength >= values.kthvalue(1 + int((1 - evidence.STRONG) * (len(values) - 1))).values
        )
        self.fixed = self._bins(images.fixed)
        self.moving = torch.cat((images.moving, measured[1].to(images.moving.dtype)), 1)

    def __call__(self, displacement: Tensor) -> float:
        """The score of a displacement (1, 3, D, H, W); 0, as for images that have nothing in common, where too little is left
        to compare."""
        warped, measured = fields.warp(self.moving, displacement).split(1, 1)
        measured = measured > evidence.MEASURED
        edges, inside = self.strong & measured, self.inside & measured
        if edges.sum() < evidence.MIN_VOXELS:
            return 0.0
        slopes = _slopes(warped)
        product = (self.gradient * slopes).sum(1, keepdim=True).square_()
        cosine = product / (self.strength * slopes.square().sum(1, keepdim=True)).clamp_min_(1e-12)
        at = inside[0, 0].flatten().nonzero()[:, 0]
        at = at[:: max(len(at) // EVERY, 1)]
        information = self._information(self.fixed.flatten()[at], self._bins(warped).flatten()[at])
        return math.log(max(cosine[edges].mean().item(), 1e-6)) + self.WEIGHT * math.log(max(information, 1e-6))

    def _bins(self, image: Tensor) -> Tensor:
        return (image * (self.BINS - 1)).round_().clamp_(0, self.BINS - 1).int()

    def _information(self, row: Tensor, column: Tensor) -> float:
        """The mutual information of pairs of bins, in nats."""
        joint = torch.bincount(row * self.BINS + column, minlength=self.BINS**2).view(self.BINS, self.BINS).double()
        joint = joint / joint.sum()
        product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return (joint * (joint.clamp_min(1e-12) / product.clamp_min(1e-12)).log()).sum().item()


def _slopes(image: Tensor) -> Tensor:
    """Derivatives along x, y, z of an image smoothed by a Gaussian of one voxel, (N, 3, D, H, W)."""
    return gradient(fields.smooth(image, 1.0))


def deform(
    images: Images,
    names: tuple[str, ...],
    variational: VariationalSettings,
    regnet: RegNet | None,
    stiffness: float | None = None,
    progress: Progress = lambda fraction: None,
) -> Choice:
    """The displacement of some methods, with the stiffness that suits the pair.

    Args:
        names, variational, regnet: as of :func:`DivRegNetLib.registration.methods.deform`.
        stiffness: factor of the elastic weight; None: it is chosen, or no deformation.
        progress: called with the fraction that is done; what it raises ends the registration.
    """
    methods.check_methods(names)
    if stiffness is not None:
        settings = stiffened(variational, stiffness)
        candidate = Candidate(
            _name(stiffness), lambda: methods.deform(images, names, settings, regnet, progress), stiffness
        )
        return Choice(candidate, candidate.make(), {})
    score = Agreement(images)
    none = _none(images)
    if "variational" not in names:
        moved = Candidate("+".join(names), lambda: methods.deform(images, names, variational, regnet, progress))
        return choose((moved, none), score)
    at = len(names) - names[::-1].index("variational")
    before, after = names[:at], names[at:]
    shared, last = split(variational)
    parts = PARTS_SHARED + len(STIFFNESSES) + len(after)
    start = methods.run(images, before, shared, regnet, lambda f: progress(PARTS_SHARED * f / parts))
    made: dict[str, Coarse] = {}

    def report(fraction: float) -> None:
        progress((PARTS_SHARED + len(made) + fraction) / parts)

    def finished(factor: float) -> Tensor:
        moved = methods.run(images, ("variational",), stiffened(last, factor), None, report, start)
        made[_name(factor)] = moved
        return moved.fine()

    chosen = choose((none, *(Candidate(_name(s), partial(finished, s), s) for s in STIFFNESSES)), score)
    if after and chosen.candidate is not none:
        moved = methods.run(images, after, variational, regnet, report, made[chosen.candidate.name])
        chosen = _better(chosen, Candidate("+".join(after), moved.fine, chosen.candidate.stiffness), score)
    progress(1.0)
    return chosen


def no_deformation(images: Images) -> Choice:
    """The choice where nothing is to be deformed."""
    candidate = _none(images)
    return Choice(candidate, candidate.make(), {})


def _none(images: Images) -> Candidate:
    return Candidate(NO_DEFORMATION, lambda: images.fixed.new_zeros(1, 3, *images.fixed.shape[2:]))


def _better(chosen: Choice, candidate: Candidate, score: Callable[[Tensor], float]) -> Choice:
    """The choice, or one more candidate that scores higher."""
    displacement = candidate.make()
    scores = chosen.scores | {candidate.name: score(displacement)}
    if scores[candidate.name] > scores[chosen.candidate.name]:
        return Choice(candidate, displacement, scores)
    return replace(chosen, scores=scores)


def stiffened(settings: VariationalSettings, factor: float) -> VariationalSettings:
    """The settings with all elastic weights multiplied by a factor."""
    first, last = (
        replace(s, elastic=s.elastic * factor) for s in (settings.first_smoothness, settings.last_smoothness)
    )
    return replace(settings, first_smoothness=first, last_smoothness=last)


def split(settings: VariationalSettings) -> tuple[VariationalSettings, VariationalSettings]:
    """Settings of the steps that all stiffnesses share, and of the last ones; one after the other they are what was given,
    but for the momentum between them."""
    *coarse, finest = settings.levels
    counts = [round(level.share * settings.steps) if settings.steps >= settings.min_steps else 0 for level in coarse]
    at_last = max(settings.steps - sum(counts), 1)
    own = min(LAST_STEPS, max(at_last - 1, 1))
    steps = max(settings.steps - own, 1)

    def levels(shares: list[float]) -> tuple[Level, ...]:  # all of them, so that images are padded as before
        return (*(replace(level, share=share) for level, share in zip(coarse, shares, strict=True)), finest)

    def smoothness(number: int) -> Smoothness:
        t = number / (at_last - 1) if at_last > 1 else 1.0
        pairs = (
            (getattr(s, n) for s in (settings.first_smoothness, settings.last_smoothness))
            for n in ("window", "fluid", "elastic")
        )
        return Smoothness(*(a + (b - a) * t for a, b in pairs))

    shared = replace(
        settings,
        steps=steps,
        levels=levels([n / steps for n in counts]),
        last_smoothness=smoothness(max(at_last - own - 1, 0)),
    )
    last = replace(settings, steps=own, levels=levels([0.0] * len(coarse)), first_smoothness=smoothness(at_last - own))
    return shared, last


def _name(stiffness: float) -> str:
    return f"stiffness {stiffness:g}"
