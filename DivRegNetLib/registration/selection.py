"""Candidates and evidence: how stiff a deformation is, or whether there is one at all, is chosen for each pair.

Every step that raises the mutual information of a pair also follows its noise and the bias of its estimate. Two contrasts of
one head that are aligned already are moved apart by it, by a third of a voxel with the usual stiffness. No stiffness suits all
pairs: two patients' organs need a loose deformation, small or smooth differences a stiff one. So there are several candidates,
and evidence that none of them was made to maximize chooses between them.

A :class:`Candidate` is a name and a function that makes a displacement. :class:`Agreement` gathers two pieces of evidence for a
displacement, :func:`best_of` takes the candidate that they speak for. :func:`deform` makes candidates of several stiffnesses,
which share all but the last steps, and keeps to no deformation unless the best of them is better by both.

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
from DivRegNetLib.similarity.descriptors import believable

Progress = Callable[[float], None]

STIFFNESSES = (1.0, 3.0, 0.3, 0.1)
"""Factors of the elastic weight that are tried; the first is usual."""

LAST_STEPS = 2  # of the last level, that each stiffness makes by itself
PARTS_SHARED = 3  # of the progress, in units of a candidate
NO_DEFORMATION = "none"
LEAST_GAIN = 0.003  # of the edges' cosine, by which a deformation has to be better than none
WEIGHT = 0.1  # of the information beside the edges: a deformation changes it by about ten times as much, relatively
REACH = 3  # voxels that a gradient looks in each direction
BINS = 32  # of the joint histogram
EVERY = 300_000  # voxels from which it is counted, at most


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
class Score:
    """The evidence for a displacement.

    edges: mean squared cosine between the gradients of the two images where those of the fixed image are strongest, as in
        :mod:`DivRegNetLib.quality.evidence`; a third by chance, 1 at best.
    information: mutual information of the foreground as a whole, in nats. The methods maximize that of small blocks; a wrong
        deformation raises it while that of the whole falls.
    """

    edges: float
    information: float

    @property
    def total(self) -> float:
        """Both in one number, to compare deformations with each other."""
        return math.log(max(self.edges, 1e-6)) + WEIGHT * math.log(max(self.information, 1e-6))

    def beats(self, none: "Score") -> bool:
        """Whether it is better by both than no deformation. Either one alone can be misled: edges where they are few, the
        information where noise can be fitted."""
        return self.edges > none.edges + LEAST_GAIN and self.information > none.information


@dataclass(frozen=True)
class Choice:
    """The candidate that was chosen.

    displacement: what it made.
    scores: by name, of all candidates, in the order in which they were made; empty where there was no choice.
    """

    candidate: Candidate
    displacement: Tensor
    scores: dict[str, Score]

    def as_dict(self) -> dict:
        """For the quality card."""
        scores = {name: {k: float(f"{v:.5g}") for k, v in vars(score).items()} for name, score in self.scores.items()}
        return {"chosen": self.candidate.name, "stiffness": self.candidate.stiffness, "scores": scores}


def best_of(
    candidates: Iterable[Candidate], evidence: Callable[[Tensor], Score], before: Choice | None = None
) -> Choice:
    """The candidate with the highest total score; of equal ones the first.

    Args:
        before: an earlier choice, which is among the candidates.
    Raises:
        ValueError: there is no candidate.
    """
    best, scores = before, {} if before is None else dict(before.scores)
    for candidate in candidates:
        displacement = candidate.make()
        scores[candidate.name] = evidence(displacement)
        if best is None or scores[candidate.name].total > scores[best.candidate.name].total:
            best = Choice(candidate, displacement, scores)
    if best is None:
        raise ValueError("there is no candidate to choose")
    return replace(best, scores=scores)


class Agreement:
    """The evidence for any displacement of a pair."""

    def __init__(self, images: Images) -> None:
        measured = images.measured_in_masks() or (torch.ones_like(images.fixed, dtype=torch.bool),) * 2
        # Gradients do not reach across the border of what was measured.
        inner, moving = (m if m.all() else believable(m, radius=REACH, dilation=0) for m in measured)
        self.inside = evidence.foreground(images.fixed, measured[0]) & inner
        self.gradient = _slopes(images.fixed)
        self.strength = self.gradient.square().sum(1, keepdim=True)
        values = self.strength[self.inside] if self.inside.any() else self.strength.flatten()
        strong = values.kthvalue(1 + int((1 - evidence.STRONG) * (len(values) - 1))).values
        self.edges = self.inside & (self.strength >= strong)
        self.fixed = _in_bins(images.fixed)
        self.moving = torch.cat((images.moving, moving.to(images.moving.dtype)), 1)

    def __call__(self, displacement: Tensor) -> Score:
        """The score of a displacement (1, 3, D, H, W); zeros where too little is left to compare."""
        warped, measured = fields.warp(self.moving, displacement).split(1, 1)
        measured = measured > evidence.MEASURED
        edges, inside = self.edges & measured, self.inside & measured
        if edges.sum() < evidence.MIN_VOXELS:
            return Score(0.0, 0.0)
        slopes = _slopes(warped)
        product = (self.gradient * slopes).sum(1, keepdim=True).square_()
        cosine = product / (self.strength * slopes.square().sum(1, keepdim=True)).clamp_min_(1e-12)
        at = inside.flatten().nonzero()[:, 0]
        at = at[:: max(len(at) // EVERY, 1)]
        information = _information(self.fixed.flatten()[at], _in_bins(warped).flatten()[at])
        return Score(cosine[edges].mean().item(), information)


def _in_bins(image: Tensor) -> Tensor:
    return (image * (BINS - 1)).round_().clamp_(0, BINS - 1).int()


def _information(rows: Tensor, columns: Tensor) -> float:
    """The mutual information of pairs of bins, in nats."""
    joint = torch.bincount(rows * BINS + columns, minlength=BINS**2).view(BINS, BINS).double()
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
        stiffness: factor of the elastic weight; None: it is chosen, or no deformation. Without the variational method there
            is no choice.
        progress: called with the fraction that is done; what it raises ends the registration.
    """
    methods.check_methods(names)
    if stiffness is not None or "variational" not in names:
        settings = variational if stiffness is None else stiffened(variational, stiffness)
        name = "+".join(names) if stiffness is None else _name(stiffness)
        made = methods.deform(images, names, settings, regnet, progress)
        return Choice(Candidate(name, lambda: made, stiffness), made, {})
    score = Agreement(images)
    none = no_deformation(images)
    at = len(names) - names[::-1].index("variational")
    before, after = names[:at], names[at:]
    shared, last = split(variational)
    parts = PARTS_SHARED + len(STIFFNESSES) + len(after)
    start = methods.run(images, before, shared, regnet, lambda f: progress(PARTS_SHARED * f / parts))
    finished: dict[str, Coarse] = {}

    def report(fraction: float) -> None:
        progress((PARTS_SHARED + len(finished) + fraction) / parts)

    def finish(factor: float) -> Tensor:
        moved = methods.run(images, ("variational",), stiffened(last, factor), None, report, start)
        finished[_name(factor)] = moved
        return moved.fine()

    chosen = best_of((Candidate(_name(s), partial(finish, s), s) for s in STIFFNESSES), score)
    undeformed = score(none.displacement)
    if not chosen.scores[chosen.candidate.name].beats(undeformed):
        chosen = replace(none, scores=chosen.scores)
    elif after:
        moved = methods.run(images, after, variational, regnet, report, finished[chosen.candidate.name])
        chosen = best_of([Candidate("+".join(after), moved.fine, chosen.candidate.stiffness)], score, chosen)
    chosen = replace(chosen, scores={NO_DEFORMATION: undeformed, **chosen.scores})
    progress(1.0)
    return chosen


def no_deformation(images: Images) -> Choice:
    """The choice where nothing is to be deformed."""
    nothing = images.fixed.new_zeros(1, 3, *images.fixed.shape[2:])
    return Choice(Candidate(NO_DEFORMATION, lambda: nothing), nothing, {})


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
