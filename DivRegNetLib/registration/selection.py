"""Candidates and evidence: whether there is a deformation at all, and how stiff it is, is chosen for each pair.

Every step that raises the mutual information of a pair also follows its noise and the bias of its estimate. Two contrasts of
one head that are aligned already are moved apart by it, by a third of a voxel with the usual stiffness. So no deformation is
a candidate, too, and a thorough registration has more of them: a stiffer one, and one from a discrete start.

A :class:`Candidate` is a name and a function that makes a displacement. :class:`Agreement` gathers the evidence for a
displacement, and :func:`best_of` takes the candidate that it speaks for. :func:`deform` makes the candidates and keeps to no
deformation unless the best of them is better by all evidence.

Axis order and units as in :mod:`DivRegNetLib.core.fields`.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.quality import evidence
from DivRegNetLib.registration import methods
from DivRegNetLib.registration.methods import Deform, Images
from DivRegNetLib.registration.regnet import RegNet
from DivRegNetLib.registration.variational.equations import gradient
from DivRegNetLib.registration.variational.settings import VariationalSettings
from DivRegNetLib.similarity.descriptors import VARIANCES, believable

Progress = Callable[[float], None]

STIFFNESSES = (1.0, 3.0)
"""Factors of the elastic weight that a thorough registration tries; the first is usual, and else the only one."""

NO_DEFORMATION = "none"
DISCRETE_START = "discrete start"
LEAST_OF_EDGES, LEAST_EDGES = 0.18, 0.035
"""A deformation has to bring the edges' cosine nearer to 1 than none, by this share of what it lacks or by as much."""
LEAST_INFORMATION = 0.1  # share by which a deformation has to raise the mutual information
CUBE = 5  # voxels a side that a gradient and a descriptor look at
BINS = 32  # of the joint histogram
COUNTED, COMPARED = 100_000, 4_000  # voxels of the histogram, and of the edges, at least


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

    distance: mean squared distance between the MIND-SSC descriptors (:mod:`DivRegNetLib.similarity.descriptors`) of the two
        images, at strong edges of the fixed image. It tells deformations from each other.
    edges: mean squared cosine between the gradients of the two images at these edges, as in
        :mod:`DivRegNetLib.quality.evidence`; a third by chance, 1 at best.
    information: mutual information of the foreground as a whole, in nats. The methods maximize that of small blocks; a wrong
        deformation raises it while that of the whole falls.
    """

    distance: float
    edges: float
    information: float

    def beats(self, none: "Score") -> bool:
        """Whether it is better by all than no deformation, and by more than what is gained where nothing is to be moved. Each
        alone can be misled: edges where they are few, the others where noise can be fitted."""
        least = min(LEAST_OF_EDGES * (1 - none.edges), LEAST_EDGES)
        return (
            self.distance < none.distance
            and self.edges > none.edges + least
            and self.information > (1 + LEAST_INFORMATION) * none.information
        )


NOTHING = Score(math.inf, 0.0, 0.0)
"""The score where too little is left to compare."""


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
        scores = {
            name: {k: float(f"{v:.5g}") if math.isfinite(v) else None for k, v in vars(score).items()}
            for name, score in self.scores.items()
        }
        return {"chosen": self.candidate.name, "stiffness": self.candidate.stiffness, "scores": scores}


def best_of(candidates: Iterable[Candidate], evidence: Callable[[Tensor], Score]) -> Choice:
    """The candidate whose descriptors have the least distance; of equal ones the first.

    Raises:
        ValueError: there is no candidate.
    """
    best, scores = None, {}
    for candidate in candidates:
        displacement = candidate.make()
        scores[candidate.name] = evidence(displacement)
        if best is None or scores[candidate.name].distance < scores[best.candidate.name].distance:
            best = Choice(candidate, displacement, scores)
    if best is None:
        raise ValueError("there is no candidate to choose")
    return replace(best, scores=scores)


class Agreement:
    """The evidence for any displacement of a pair."""

    def __init__(self, images: Images) -> None:
        measured = images.measured_in_masks() or (torch.ones_like(images.fixed, dtype=torch.bool),) * 2
        # Neither gradients nor descriptors reach across the border of what was measured.
        inner, moving = (m if m.all() else believable(m, radius=CUBE // 2, dilation=0) for m in measured)
        inside = _foreground(images.fixed, measured[0]) & inner
        self.foreground = _every(inside, COUNTED)
        strength = gradient(fields.smooth(images.fixed, 1.0)).square().sum(1, keepdim=True)
        values = strength[inside] if inside.any() else strength.flatten()
        strong = values.kthvalue(1 + int((1 - evidence.STRONG) * (len(values) - 1))).values
        self.edges = _every(inside & (strength >= strong), COMPARED)
        self.fixed = _in_bins(images.fixed).flatten()[self.foreground]
        cubes = cubes_at(images.fixed, self.edges)
        self.descriptors, self.slopes = descriptors_of(cubes), slopes_of(cubes)
        self.moving = torch.cat((images.moving, moving.to(images.moving.dtype)), 1)

    def __call__(self, displacement: Tensor) -> Score:
        """The score of a displacement (1, 3, D, H, W)."""
        warped, measured = fields.warp(self.moving, displacement).split(1, 1)
        measured = measured.flatten() > evidence.MEASURED
        counted, inside = measured[self.edges], measured[self.foreground]
        if min(counted.sum(), inside.sum()) < evidence.MIN_VOXELS:
            return NOTHING
        cubes = cubes_at(warped, self.edges)
        distance = (descriptors_of(cubes) - self.descriptors).square().mean(1)
        cosine = evidence.squared_cosine(self.slopes, slopes_of(cubes))
        information = _information(self.fixed[inside], _in_bins(warped).flatten()[self.foreground][inside])
        return Score(distance[counted].mean().item(), cosine[counted].mean().item(), information)


def _foreground(image: Tensor, measured: Tensor) -> Tensor:
    """What is not air, (1, 1, D, H, W) bool, to two voxels."""
    shape = image.shape[2:]
    if min(shape) < 16:
        return evidence.foreground(image, measured)
    half = F.avg_pool3d(torch.cat((image, measured.to(image.dtype)), 1), 2, ceil_mode=True)
    found = evidence.foreground(half[:, :1], half[:, 1:] > evidence.MEASURED)
    found = F.interpolate(found.to(image.dtype), scale_factor=2, mode="nearest")
    return found[..., : shape[0], : shape[1], : shape[2]] > 0.5


def _every(mask: Tensor, most: int) -> Tensor:
    """(n,) indices into a flattened mask of at least ``most`` of its voxels, evenly spread, or of all."""
    at = mask.flatten().nonzero()[:, 0]
    return at[:: max(len(at) // most, 1)]


def cubes_at(image: Tensor, at: Tensor) -> Tensor:
    """The voxels around some voxels, (n, 5, 5, 5) along D, H, W; beyond the border, the border's.

    Args:
        image: (1, 1, D, H, W).
        at: (n,) indices into the flattened image.
    """
    depth, height, width = image.shape[2:]
    around = torch.arange(CUBE, device=image.device) - CUBE // 2
    axes = zip((at // (height * width), at // width % height, at % width), (depth, height, width), strict=True)
    k, j, i = ((a[:, None] + around).clamp_(0, n - 1) for a, n in axes)
    return image.flatten()[((k[:, :, None] * height + j[:, None]) * width)[..., None] + i[:, None, None]]


def slopes_of(cubes: Tensor) -> Tensor:
    """Derivatives along D, H, W, (n, 3), in the middle of cubes (n, 5, 5, 5), by a Gaussian of one voxel."""
    x = torch.arange(CUBE, dtype=cubes.dtype, device=cubes.device) - CUBE // 2
    bell = torch.exp(-x.square() / 2)
    bell, slope = bell / bell.sum(), bell * x / (bell * x.square()).sum()
    weights = [torch.einsum("i,j,k->ijk", *(slope if d == axis else bell for d in range(3))) for axis in range(3)]
    return cubes.flatten(1) @ torch.stack(weights).flatten(1).T


def descriptors_of(cubes: Tensor) -> Tensor:
    """The MIND-SSC descriptors, (n, 12), of the middle voxels of cubes (n, 5, 5, 5): as those of
    :func:`~DivRegNetLib.similarity.descriptors.mind_ssc`, with the mean patch distance of these voxels for that of the image.
    """

    def patch(axis: int, side: int) -> Tensor:
        start = [1 + side if d == axis else 1 for d in range(3)]
        return cubes[(slice(None), *(slice(a, a + 3) for a in start))]

    distances = torch.stack([
        (patch(a, side) - patch(b, other)).square_().sum((1, 2, 3))
        for a, b in itertools.combinations(range(3), 2)
        for side, other in itertools.product((1, -1), repeat=2)
    ], 1)  # fmt: skip
    distances -= distances.amin(1, keepdim=True)
    variance = distances.mean(1, keepdim=True)
    usual = variance.mean().clamp_min(torch.finfo(cubes.dtype).tiny)
    return distances.div_(variance.clamp(*(k * usual for k in VARIANCES))).neg_().exp_()


def _in_bins(image: Tensor) -> Tensor:
    return (image * (BINS - 1)).round_().clamp_(0, BINS - 1).int()


def _information(rows: Tensor, columns: Tensor) -> float:
    """The mutual information of pairs of bins, in nats."""
    joint = torch.bincount(rows * BINS + columns, minlength=BINS**2).view(BINS, BINS).double()
    joint = joint / joint.sum()
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * (joint.clamp_min(1e-12) / product.clamp_min(1e-12)).log()).sum().item()


def deform(
    images: Images,
    names: tuple[str, ...],
    variational: VariationalSettings,
    regnet: RegNet | None,
    stiffness: float | None = None,
    *,
    thorough: bool = False,
    run: Deform = methods.deform,
    progress: Progress = lambda fraction: None,
) -> Choice:
    """The displacement of some methods, or none, as suits the pair.

    Args:
        names, variational, regnet: as of :func:`DivRegNetLib.registration.methods.deform`.
        stiffness: factor of the elastic weight; None: there is a choice, unless the methods are without the variational one.
        thorough: choose among all of STIFFNESSES and a discrete start (:mod:`DivRegNetLib.registration.discrete`) as well.
        run: runs methods, as :func:`DivRegNetLib.registration.methods.deform`.
        progress: called with the fraction that is done; what it raises ends the registration.
    """
    methods.check_methods(names)
    if stiffness is not None or "variational" not in names:
        settings = variational if stiffness is None else stiffened(variational, stiffness)
        name = "+".join(names) if stiffness is None else _name(stiffness)
        made = run(images, names, settings, regnet, progress)
        return Choice(Candidate(name, lambda: made, stiffness), made, {})
    tried = [(_name(factor), names, factor) for factor in (STIFFNESSES if thorough else STIFFNESSES[:1])]
    if thorough and names[0] == "variational":
        tried.append((DISCRETE_START, ("discrete", *names), STIFFNESSES[0]))

    def make(number: int, methods_in_order: tuple[str, ...], factor: float) -> Tensor:
        def report(fraction: float) -> None:
            progress((number + fraction) / len(tried))

        return run(images, methods_in_order, stiffened(variational, factor), regnet, report)

    score = Agreement(images)
    chosen = best_of(
        (Candidate(name, partial(make, i, order, factor), factor) for i, (name, order, factor) in enumerate(tried)),
        score,
    )
    none = no_deformation(images)
    undeformed = score(none.displacement)
    scores = {NO_DEFORMATION: undeformed, **chosen.scores}
    unknown = all(s is NOTHING for s in scores.values())  # the first candidate is usual
    if not (unknown or chosen.scores[chosen.candidate.name].beats(undeformed)):
        chosen = none
    return replace(chosen, scores=scores)


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


def _name(stiffness: float) -> str:
    return f"stiffness {stiffness:g}"
