"""Initial linear alignment of two images of any contrast from anywhere: centers, rigid, affine.

Candidates and evidence. Rotations spread over all of them, about several pairs of centers, are compared by normalized mutual
information (Studholme et al., Pattern Recognition 1999) at a coarse level, in batches; the best few are optimized by BFGS, and
unless one place stands out, further starts (other scales, moved centers) join. The identity and the centered starts compete
with the result at the end, on the agreement of edges, which nothing has maximized.

All of it runs on the CPU, also where there is a GPU: thousands of operations on few points take a GPU longer to be asked for
than a CPU to do (docs/experiments.md, On a GPU), and so both devices deform the same pair.

pyramid     images at one resolution, their content and what is known beyond the field of view
transforms  linear maps in batches
similarity  mutual information of many maps at once, and its gradient
optimization, search   the candidates
evidence    what chooses between them
words       what is told to the user
settings    every constant
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core.torch_state import side_by_side
from DivRegNetLib.options import ALIGNMENTS
from DivRegNetLib.registration.alignment import pyramid, words
from DivRegNetLib.registration.alignment.search import (
    Candidates,
    Problem,
    distinct,
    merit,
    mirrored,
    refined,
    searches,
    stands_out,
)
from DivRegNetLib.registration.alignment.settings import AlignmentSettings

THINNEST = 4  # voxels along each axis that a rotation takes to be known

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Alignment:
    """An initial alignment.

    matrix: (4, 4), maps fixed points to moving points (LPS, mm).
    warnings: sentences that the user should read.
    agreement: of the edges, from about 0.2 (unrelated) to 1.
    """

    matrix: np.ndarray
    warnings: tuple[str, ...] = ()
    agreement: float | None = None


def align(
    fixed: sitk.Image,
    moving: sitk.Image,
    mode: str = "affine",
    *,
    fixed_mask: sitk.Image | None = None,
    moving_mask: sitk.Image | None = None,
    progress: Progress = lambda fraction: None,
) -> np.ndarray:
    """The linear map from fixed points to moving points; see :func:`find`.

    Returns:
        (4, 4) matrix, LPS mm.
    """
    return find(fixed, moving, mode, fixed_mask=fixed_mask, moving_mask=moving_mask, progress=progress).matrix


@torch.inference_mode(False)  # in which nothing could be differentiated, whatever the caller is in
def find(
    fixed: sitk.Image,
    moving: sitk.Image,
    mode: str = "affine",
    *,
    fixed_mask: sitk.Image | None = None,
    moving_mask: sitk.Image | None = None,
    progress: Progress = lambda fraction: None,
    settings: AlignmentSettings | None = None,
) -> Alignment:
    """Aligns two images.

    Args:
        fixed, moving: 3D scalar images of finite values.
        mode: ``none`` (identity), ``center`` (translation), ``rigid`` or ``affine``. What has fewer than 4 voxels along
            an axis cannot tell how it is turned and is only shifted.
        fixed_mask, moving_mask: where the images count, non-zero inside; on any grid.
        progress: called with a fraction from 0 to 1; may raise to cancel.
    Raises:
        ValueError: unknown mode.
    """
    if mode not in ALIGNMENTS:
        raise ValueError(f"the initial alignment is one of {', '.join(ALIGNMENTS)}, got {mode!r}")
    if mode == "none":
        return Alignment(np.eye(4))
    settings = settings or AlignmentSettings()
    prepared = (pyramid.prepare(*pair) for pair in ((fixed, fixed_mask), (moving, moving_mask)))
    with torch.no_grad(), side_by_side() as both:
        problem = Problem(*prepared, settings, both)
        if mode == "center" or min(*fixed.GetSize(), *moving.GetSize()) < THINNEST:
            centered = _centered(problem)
            scores = problem.level("coarse", settings.overlap_power).search(centered.maps)
            return Alignment(problem.physical(centered.maps[scores.argmax()][None])[0])
        progress(0.05)
        return _searched(problem, mode, progress)


def _searched(problem: Problem, mode: str, progress: Progress) -> Alignment:
    s, edges = problem.settings, problem.edges
    progress(0.1)
    found = []
    for number, more in enumerate(searches(problem, mode)):
        found.append(more)
        progress(0.7 - 0.6 * 0.5 ** (number + 1))
        candidates = Candidates.joined(found)
        merits = merit(problem, candidates)
        certain = stands_out(problem, candidates, merits)
        if certain:
            break
    finalists = _finalists(problem, candidates, merits)
    best = refined(problem, finalists, mode, "fine")
    progress(0.9)
    # Maps that nothing was done to compete on the same terms: no result is worse than its start by this evidence.
    candidates = Candidates.joined([best, _centered(problem)])
    merits = merit(problem, candidates)
    chosen = candidates[[int(merits.argmax())]]
    agreement = float(edges.agreement(chosen.maps))
    matrix = problem.physical(chosen.maps)[0]
    remarks = words.remarks(matrix, s.large_degrees, s.large_scale)
    rival = float(merit(problem, finalists).max())
    mirror = mirrored(problem, chosen, mode, rival, everywhere=not certain and agreement < s.sure)
    if float(merit(problem, mirror)) > float(merits.max()) + s.mirror_margin:
        remarks.append(words.MIRRORED)
    progress(1.0)
    return Alignment(matrix, tuple(remarks), agreement)


def _finalists(problem: Problem, candidates: Candidates, merits: Tensor) -> Candidates:
    """The best few."""
    s = problem.settings
    chosen = distinct(candidates.maps, merits, s.apart / 2, s.finalists)
    return candidates[[i for i in chosen if merits[i] >= merits[chosen[0]] - s.rival]]


def _centered(problem: Problem) -> Candidates:
    """The identity, and the translations that bring each pair of centers together."""
    maps = [problem.normalized(np.eye(4)[None])]
    for start, end in problem.centers[:3]:
        shift = torch.eye(4, dtype=torch.float64)
        shift[:3, 3] = torch.tensor(end - start)
        maps.append(shift[None])
    maps: Tensor = torch.cat(maps)
    return Candidates(maps, maps.new_ones(len(maps)))
