"""Labels and landmarks of both images, with which transforms are compared. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.points import Inverted, is_known
from DivRegNetLib.errors import InputError
from DivRegNetLib.io.images import read_labels
from DivRegNetLib.io.landmarks import LandmarkPairs, Landmarks, pair_landmarks, read_landmarks
from DivRegNetLib.io.segmentations import match_names, metadata_of, relabel, relabel_metadata
from DivRegNetLib.quality import metrics

Stages = Mapping[str, sitk.Transform]
"""Name of a stage, such as ``before`` or ``after`` -> transform that maps fixed points to moving points."""


@dataclass(frozen=True)
class LabelMaps:
    """Label maps of both images, with the same values for segments of the same names.

    metadata: of the segments in the moving one; empty for plain label maps.
    notes: sentences for the user.
    """

    fixed: sitk.Image
    moving: sitk.Image
    metadata: dict[str, str]
    notes: tuple[str, ...]

    @classmethod
    def read(cls, fixed: Path | None, moving: Path | None) -> "LabelMaps | None":
        """Label maps from files; None where none is given. Raises InputError for files that cannot be compared."""
        if not _both(fixed, moving, "labels"):
            return None
        images = [read_labels(path) for path in (fixed, moving)]
        for path, image in zip((fixed, moving), images, strict=True):
            if not sitk.GetArrayViewFromImage(image).any():
                raise InputError(f"{path}: holds no label (all voxels are 0)")
        metadata, values, notes = metadata_of(images[1]), match_names(*images), ()
        if values:
            images[1], metadata = relabel(images[1], values), relabel_metadata(metadata, values)
            notes = ("the segments have other label values in the two files and were compared by their names",)
        return cls(*images, metadata, notes)

    def compare(self, stages: Stages) -> tuple[dict, sitk.Image]:
        """Overlap at each stage, and the moving labels on the fixed labels' grid at the last one.

        Raises:
            InputError: a transform says nothing of some of the fixed labels.
        """
        overlap = {}
        for name, transform in stages.items():
            check_covered(transform, Grid.of(self.fixed), "the fixed label map")
            warped = sitk.Resample(self.moving, self.fixed, transform, sitk.sitkNearestNeighbor, 0)
            overlap[name] = metrics.label_overlap(self.fixed, warped)
        return overlap, warped


@dataclass(frozen=True)
class LandmarkLists:
    """Landmarks of both images, and the pairs among them."""

    fixed: Landmarks
    moving: Landmarks
    pairs: LandmarkPairs

    @classmethod
    def read(cls, fixed: Path | None, moving: Path | None) -> "LandmarkLists | None":
        """Landmarks from files; None where none is given. Raises InputError for files that cannot be compared."""
        if not _both(fixed, moving, "landmarks"):
            return None
        lists = [read_landmarks(path) for path in (fixed, moving)]
        return cls(*lists, pair_landmarks(*lists))

    def compare(self, stages: Stages) -> dict:
        """Target registration error at each stage: mean, largest, and of each pair.

        Raises:
            InputError: a transform says nothing of some of the fixed landmarks.
        """
        errors: dict = {}
        for name, transform in stages.items():
            outside = ~is_known(transform, self.pairs.fixed)
            if outside.any():
                labels = [label for label, out in zip(self.pairs.labels, outside, strict=True) if out]
                raise InputError(NOT_COVERED.format("the fixed landmarks " + ", ".join(labels[:10])))
            each = metrics.landmark_error(self.pairs.fixed, self.pairs.moving, transform)
            errors[name] = {"mean": float(each.mean()), "largest": float(each.max()), "each": each.tolist()}
        return errors


NOT_COVERED = (
    "{} lie outside the region that the transform covers, where nothing is known; use the transform.h5 of a registration, "
    "which goes on there as its initial alignment, or leave them out"
)


def check_covered(transform: sitk.Transform, grid: Grid, name: str) -> None:
    """Raises InputError where a grid reaches beyond what a transform says something about."""
    ends = [(0, n - 1) for n in grid.size]
    corners = grid.to_physical([(i, j, k) for i in ends[0] for j in ends[1] for k in ends[2]])
    if not is_known(transform, corners).all():
        raise InputError(NOT_COVERED.format(f"parts of {name}"))


def not_inverted(labels: tuple[str, ...], inverted: Inverted) -> list[str]:
    """A sentence on the moving landmarks that have no place in fixed space; none where all have one."""
    if not inverted.reasons:
        return []
    each = ", ".join(f"{labels[i] or f'number {i + 1}'} {reason}" for i, reason in list(inverted.reasons.items())[:10])
    return [
        f"{len(inverted.reasons)} moving landmarks have no place in fixed space and are marked as undefined: {each}"
    ]


def _both(fixed: Path | None, moving: Path | None, what: str) -> bool:
    """Whether both are given. Raises InputError where one is."""
    if (fixed is None) != (moving is None):
        raise InputError(f"{what} are compared in pairs: give both the fixed and the moving {what}")
    return fixed is not None
