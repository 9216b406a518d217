"""The search: many starts at once, few of which are optimized."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.registration.alignment import pyramid, transforms
from DivRegNetLib.registration.alignment.correlation import Correlation
from DivRegNetLib.registration.alignment.evidence import Edges
from DivRegNetLib.registration.alignment.optimization import optimize
from DivRegNetLib.registration.alignment.pyramid import Look
from DivRegNetLib.registration.alignment.settings import AlignmentSettings, Rounds
from DivRegNetLib.registration.alignment.similarity import Frame, Level

STAGES = {"rigid": ("rigid",), "similarity": ("rigid", "similarity"), "affine": ("rigid", "similarity", "affine")}
"""Kinds of maps that are optimized one after the other, for each kind that is asked for."""


@dataclass(frozen=True)
class Problem:
    """Two images and all that the search knows of them.

    fixed, moving: with their masks, as :func:`~DivRegNetLib.registration.alignment.pyramid.prepare` gives them.
    both: what is done with both images, such as ``map``.
    """

    fixed: tuple[sitk.Image, sitk.Image | None]
    moving: tuple[sitk.Image, sitk.Image | None]
    settings: AlignmentSettings
    both: Callable = map

    @cached_property
    def extent(self) -> float:
        """The smaller of the extents of the two contents, mm."""
        return min(pyramid.look(*pair, _side(pair[0]) / 24, self.settings).extent for pair in (self.fixed, self.moving))

    def _looks(self, voxels: float) -> tuple[Look, Look]:
        spacing = self.extent / voxels
        return tuple(pyramid.look(*pair, spacing, self.settings) for pair in (self.fixed, self.moving))

    @cached_property
    def coarse(self) -> tuple[Look, Look]:
        return self._looks(self.settings.coarse_voxels)

    @cached_property
    def fine(self) -> tuple[Look, Look]:
        return self._looks(2 * self.settings.coarse_voxels)

    @cached_property
    def frames(self) -> tuple[Frame, Frame]:
        return tuple(Frame(look.centers[1], self.settings.radius * self.extent) for look in self.coarse)

    @cached_property
    def whole(self) -> bool:
        """Whether both images end in air all around."""
        return all(look.known.all() for look in self.coarse)

    @cached_property
    def scale(self) -> float:
        """How much larger the moving content is than the fixed one, by its spread."""
        fixed, moving = (np.linalg.det(look.spread) for look in self.coarse)
        return float(moving / fixed) ** (1 / 3)

    @cached_property
    def edges(self) -> Edges:
        return Edges(*self.fine, self.frames, self.settings, self.both)

    @cached_property
    def correlations(self) -> list[Correlation]:
        """That of the directions of edges, on coarse and on finer cells."""
        return [Correlation(self.edges, voxels, self.settings) for voxels in self.settings.correlation_voxels]

    def level(self, stage: str, power: float = 0.0) -> Level:
        """The similarity of a stage: ``search``, ``rough``, ``coarse`` or ``fine``."""
        if (stage, power) not in self._levels:
            count, bins = (getattr(self.settings, f"{stage}_{what}") for what in ("points", "bins"))
            looks = self.fine if stage == "fine" else self.coarse
            self._levels[stage, power] = Level(*looks, self.frames, count, bins, self.settings, power, self.both)
        return self._levels[stage, power]

    @cached_property
    def _levels(self) -> dict[tuple[str, float], Level]:
        return {}

    def normalized(self, matrices: np.ndarray) -> Tensor:
        """(K, 4, 4) maps of normalized coordinates from matrices (K, 4, 4) in LPS mm."""
        fixed, moving = (frame.matrix for frame in self.frames)
        return torch.tensor(np.linalg.inv(moving) @ matrices @ fixed)

    def physical(self, maps: Tensor) -> np.ndarray:
        """(K, 4, 4) matrices in LPS mm from maps of normalized coordinates."""
        fixed, moving = (frame.matrix for frame in self.frames)
        return moving @ maps.numpy() @ np.linalg.inv(fixed)

    @cached_property
    def centers(self) -> np.ndarray:
        """(4, 2, 3) normalized: points of the fixed and of the moving image that may belong together: the centers of the
        content's boxes, of the grids and of the content's masses, and the first with where the headers put it."""
        fixed, moving = ((x.centers - f.center) / f.radius for x, f in zip(self.coarse, self.frames, strict=True))
        header = self.normalized(np.eye(4)[None])[0].numpy()
        there = header[:3, :3] @ fixed[1] + header[:3, 3]
        pairs = [(fixed[i], moving[i]) for i in (1, 0, 2)]
        return np.array([*pairs, (fixed[1], there)])


@dataclass(frozen=True)
class Candidates:
    """Maps and what is known of each.

    maps: (K, 4, 4), normalized coordinates.
    references: (K,) scales from which stretch is penalized.
    """

    maps: Tensor
    references: Tensor

    def __getitem__(self, index) -> "Candidates":
        return Candidates(self.maps[index], self.references[index])

    @staticmethod
    def joined(parts: list["Candidates"]) -> "Candidates":
        return Candidates(torch.cat([p.maps for p in parts]), torch.cat([p.references for p in parts]))


def searches(problem: Problem, mode: str) -> Iterator[Candidates]:
    """The candidates of one search after the other, each wider than the one before."""
    s = problem.settings

    def best(starts: Candidates, rough: Rounds = s.rough, most: int = s.survivors) -> Candidates:
        return stretched(problem, survivors(problem, starts, rough, most), mode)

    affine = mode == "affine"
    # Where an image is cut off, or ends in air on some sides, the spread of its content says nothing of its size.
    sized = affine and (problem.whole or all(look.content.mean() > s.filled for look in problem.coarse))
    unlike = sized and abs(np.log(problem.scale)) > np.log(s.alike)
    first = best(turned_starts(problem, s.rotations))
    # What is of another size can be stretched until its edges agree, though it lies the wrong way.
    yield Candidates.joined([first, best(alike_starts(problem))]) if unlike else first
    if sized and not unlike:
        yield best(alike_starts(problem))
    if problem.whole:
        yield best(turned_starts(problem, s.more_rotations), s.more_rough, s.more_survivors)
        return
    yield stretched(problem, shifted(problem), mode)
    if affine:
        yield best(scaled_starts(problem))


def turned_starts(problem: Problem, rotations: int, mirror: bool = False) -> Candidates:
    """Rotations about each pair of centers, or, after a mirror, all improper ones."""
    turns = _turns(rotations, mirror)
    return _candidates(problem, np.concatenate([transforms.about(turns, *pair) for pair in problem.centers]), 1.0)


def alike_starts(problem: Problem) -> Candidates:
    """Rotations of contents that are given the same spread along all axes, about their centers of mass."""
    s = problem.settings
    turns = _turns(s.rotations)
    fixed, moving = (look.spread for look in problem.coarse)
    maps = moving @ turns @ np.linalg.inv(fixed)
    stretches = np.linalg.svd(maps, compute_uv=False)
    maps = maps[(stretches.min(1) > 1 / s.most_stretch) & (stretches.max(1) < s.most_stretch)]
    reference = problem.scale if abs(np.log(problem.scale)) > np.log(s.alike) else 1.0
    return _candidates(problem, transforms.about(maps, *problem.centers[2]), reference)


def scaled_starts(problem: Problem) -> Candidates:
    """Rotations about each pair of centers at other scales."""
    turns = _turns(problem.settings.rotations)
    return Candidates.joined([
        _candidates(problem, np.concatenate([transforms.about(scale * turns, *pair) for pair in problem.centers]), scale)
        for scale in problem.settings.scales
    ])  # fmt: skip


def shifted(problem: Problem, mirror: bool = False) -> Candidates:
    """Rotations with the best of all shifts after each, optimized by the directions of edges and then at the coarse level.

    For images that are cut off: a piece lies anywhere in the whole, so that no centers belong together, and the similarity
    is as high in wrong places as some way from the right one.

    Args:
        mirror: after a mirror.
    """
    s = problem.settings
    maps, scores = problem.correlations[0].best_shifts(torch.tensor(_turns(s.rotations, mirror)))
    for level, (count, steps) in zip(problem.correlations, s.correlated, strict=True):
        maps = maps[distinct(maps, scores, s.apart, count)]
        maps, scores = optimize(level, maps, "rigid", steps, s.correlation_reach * level.voxel, s)
    maps = maps[distinct(maps, scores, s.apart, s.survivors)]
    return refined(problem, Candidates(maps, maps.new_ones(len(maps))), "rigid", "coarse", s.overlap_power)


def mirrored(problem: Problem, best: Candidates, mode: str, rival: float, *, everywhere: bool) -> Candidates:
    """The best mirrored map, optimized at the fine level if its merit exceeds ``rival`` before.

    Args:
        best: one map; it is tried after mirrors at planes of many directions through the middle of the fixed content.
        everywhere: tries all rotations after a mirror as well.
    """
    s = problem.settings
    normals = transforms.rotations(s.mirrors)[:, :, 0]
    planes = transforms.about(np.eye(3) - 2 * normals[:, :, None] * normals[:, None, :], *[problem.centers[0, 0]] * 2)
    maps = best.maps @ torch.tensor(planes)
    starts = Candidates(maps, best.references.expand(len(maps)))
    rough, most = s.mirror_rough, s.finalists
    if everywhere and problem.whole:
        starts = Candidates.joined([starts, turned_starts(problem, s.rotations, mirror=True)])
        rough, most = s.rough, s.survivors
    found = survivors(problem, starts, rough, most)
    if everywhere and not problem.whole:
        found = Candidates.joined([found, shifted(problem, mirror=True)])
    found = stretched(problem, found, mode)
    merits = merit(problem, found)
    found = found[[int(merits.argmax())]]
    return refined(problem, found, mode, "fine") if float(merits.max()) > rival else found


def survivors(problem: Problem, starts: Candidates, rough: Rounds, most: int) -> Candidates:
    """The best of many starts, turned and shifted to where they fit best at the coarse level.

    Args:
        rough: in each round, how many of the best are optimized in how many steps; the best are the most similar ones, and
            after a round those whose edges agree as well.
        most: how many of these are left.
    """
    s, power = problem.settings, problem.settings.overlap_power
    if not len(starts.maps):
        return starts
    scores, level = problem.level("search", power).search(starts.maps), problem.level("rough", power)
    for count, steps in rough:
        starts = starts[distinct(starts.maps, scores, s.apart, count)]
        maps, scores = optimize(level, starts.maps, "rigid", steps, s.rough_reach * level.voxel, s)
        starts = Candidates(maps, starts.references)
        # Edges tell the right one of these from the others where contents are cut off, and the similarity does not.
        scores = problem.edges.agreement(maps, s.edge_every) + s.similarity_weight * scores
    return refined(problem, starts[distinct(starts.maps, scores, s.apart, most)], "rigid", "coarse", power)


def stretched(problem: Problem, candidates: Candidates, mode: str) -> Candidates:
    """The best of some, optimized at the coarse level as similarities and affine maps up to ``mode``, and as they were."""
    s = problem.settings
    if not len(candidates.maps):
        return candidates
    best = candidates[distinct(candidates.maps, merit(problem, candidates), s.apart / 2, s.stretched)]
    found = [best]
    for kind in STAGES[mode][1:]:
        found.append(refined(problem, found[-1], kind, "coarse", s.overlap_power))
    return Candidates.joined(found)


def refined(problem: Problem, candidates: Candidates, kind: str, stage: str, power: float = 0.0) -> Candidates:
    """Candidates optimized as one kind of map at a level."""
    s = problem.settings
    level, steps = problem.level(stage, power), getattr(s, f"{stage}_steps")
    maps, _ = optimize(level, candidates.maps, kind, steps, s.reach * level.voxel, s, candidates.references)
    return Candidates(maps, candidates.references)


def merit(problem: Problem, candidates: Candidates) -> Tensor:
    """(K,): what maps are compared by in the end: the agreement of edges and, next to it, the similarity."""
    s = problem.settings
    similarity = problem.level("fine").search(candidates.maps, s.overlap_power)
    return problem.edges.agreement(candidates.maps) + s.similarity_weight * similarity


def stands_out(problem: Problem, candidates: Candidates, merits: Tensor) -> bool:
    """Whether the best map by its merit needs no further search: its edges agree well, or better than those of any other place.

    Where contents differ, as those of two subjects do, edges never agree well; but then wrong places are as good as one
    another, and the right one is not.
    """
    s = problem.settings
    if not len(candidates.maps):
        return False
    best, rows = int(merits.argmax()), _rows(candidates.maps)
    elsewhere = torch.from_numpy(((rows - rows[best]) ** 2).sum(1) > s.elsewhere**2)
    lead = float(merits[best] - merits[elsewhere].max()) if elsewhere.any() else 0.0
    return float(problem.edges.agreement(candidates.maps[[best]])) + lead >= s.sure


def _turns(rotations: int, mirror: bool = False) -> np.ndarray:
    """(K, 3, 3): those that take axes to axes and some that are spread evenly over all, proper or all after a mirror."""
    turns = np.concatenate([cube_rotations(), transforms.rotations(rotations)])
    return turns @ np.diag([-1.0 if mirror else 1.0, 1.0, 1.0])


def _candidates(problem: Problem, maps: np.ndarray, scale: float) -> Candidates:
    maps = torch.tensor(maps)
    return Candidates(maps, maps.new_full((len(maps),), scale))


def cube_rotations() -> np.ndarray:
    """(24, 3, 3): all that take axes to axes, the identity first."""
    found = []
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        matrix = np.eye(3)[list(order)] * np.array(signs, float)[:, None]
        if np.linalg.det(matrix) > 0:
            found.append(matrix)
    return np.stack(sorted(found, key=lambda m: -np.trace(m)))


def distinct(maps: Tensor, scores: Tensor, apart: float, most: int) -> list[int]:
    """Indices of the best maps, best first, no two of which take points at radius 1 closer together than ``apart``."""
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    rows = _rows(maps)
    chosen, taken = [], np.zeros((most, 12))
    for i in order:
        if ((taken[: len(chosen)] - rows[i]) ** 2).sum(1).min(initial=np.inf) >= apart**2:
            taken[len(chosen)] = rows[i]
            chosen.append(i)
            if len(chosen) == most:
                break
    return chosen


def _rows(maps: Tensor) -> np.ndarray:
    """(K, 12), whose squared distances are the mean squared distances between what maps make of a ball of radius 1: those of
    the shifts, and a fifth of those of each column."""
    return (maps[:, :3].numpy() * np.array([0.2**0.5] * 3 + [1.0])).reshape(len(maps), 12)


def _side(image: sitk.Image) -> float:
    """Side of a cube as large as an image, mm."""
    return float(np.prod(image.GetSize()) * abs(np.linalg.det(Grid.of(image).matrix[:3, :3]))) ** (1 / 3)
