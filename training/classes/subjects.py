"""What the class network learns from: volumes of prepared cohorts, and what their labels say of the classes.

A label may be one class, one of several (a coarser drawing), or none of those that the volume labels. So each label stands
for a *set* of classes that are possible at a voxel. Background is class 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.classes.config import ClassTraining, Source
from training.data import cohort as cohorts

LABELS = 256
LABELED = ("images", "paint")  # kinds of sources whose labels are learned
OUTSIDE = 0  # number of the set that holds background alone


class NoLabelsError(ValueError):
    """A cohort has no labels to learn from."""


@dataclass(frozen=True)
class Subject:
    """A volume to learn from.

    images: (C, 1, D, H, W) float16 in [0, 1], one per contrast; None: it is painted, or random shapes where there are no
        ``tissues``.
    labels: (1, 1, D, H, W) uint8.
    set_of: (256,) long: label -> number of the set of classes that it stands for.
    brain: (1, 1, D, H, W) uint8, 1 inside the skull, or None.
    tissues: label -> ``white``, ``gray``, ``fluid`` or ``other``, where that is known.
    spacing: mm.
    """

    name: str
    kind: str
    images: Tensor | None
    labels: Tensor
    set_of: Tensor
    brain: Tensor | None
    tissues: tuple[str, ...]
    spacing: float


@dataclass(frozen=True)
class Stock:
    """What a source has to learn from.

    subjects: to train on; ``validation``: to judge by.
    shape: (D, H, W) of the images that are looked at, in voxels.
    spacing: mm of their voxels, from and to.
    """

    share: float
    subjects: tuple[Subject, ...]
    validation: tuple[Subject, ...]
    shape: tuple[int, int, int]
    spacing: tuple[float, float]


@dataclass(frozen=True)
class Subjects:
    """All that a training reads.

    names: of the classes, background first.
    sets: (sets, classes) float, 1 where a set holds a class; the first holds background alone.
    stocks: one for each source.
    normalization: a key of :data:`DivRegNetLib.core.intensity.SCHEMES`.
    """

    names: tuple[str, ...]
    sets: Tensor
    stocks: tuple[Stock, ...]
    normalization: str


def load(config: ClassTraining, device: torch.device | str = "cpu") -> Subjects:
    """Reads the cohorts of a configuration.

    Raises:
        FileNotFoundError, ValueError: a cohort is missing or cannot be read, or a class is named that is not there.
        NoLabelsError: a cohort holds nothing to learn from.
    """
    if not config.sources:
        raise ValueError("sources: name a cohort to learn from")
    read = [cohorts.load(Path(source.cohort), device) for source in config.sources]
    names = _names(config, read)
    sets: dict[frozenset[int], int] = {frozenset((0,)): OUTSIDE}
    stocks = []
    for source, cohort in zip(config.sources, read, strict=True):
        source = _named(source, cohort, config.names)
        usable = _usable(cohort, source.kind, device)
        made = {v.name: _subject(v, cohort, source, names, sets) for v in usable}
        train = tuple(made[v.name] for v in usable if v.split == "train")[: source.cases or None]
        if not train:
            raise NoLabelsError(
                f"{source.cohort}: no volume to train on has what a source of kind {source.kind!r} needs"
            )
        held = tuple(made[v.name] for v in usable if v.split == "validation" and source.kind in LABELED)
        shape = tuple(source.shape or config.shape) or cohort.shape
        pairs = zip(source.spacing, config.spacing, strict=True)
        stocks.append(Stock(source.share, train, held, shape, tuple(a or b or cohort.spacing for a, b in pairs)))
    table = torch.zeros(len(sets), len(names))
    for members, number in sets.items():
        table[number, list(members)] = 1
    return Subjects(names, table.to(device), tuple(stocks), config.normalization or read[0].normalization)


def _named(source: Source, cohort: cohorts.Cohort, names: Sequence[str]) -> Source:
    """The source with a class for each label: in their order those that are named, where the source does not say which.

    Raises:
        ValueError: there are not as many names as labels.
    """
    if not names or source.classes is not None or source.kind not in LABELED:
        return source
    labels = sorted(_labels(cohort))
    if len(labels) != len(names):
        raise ValueError(f"names: {len(names)} names for {len(labels)} labels of {source.cohort}: {labels}")
    return replace(source, classes=dict(zip(labels, names, strict=True)))


def _usable(cohort: cohorts.Cohort, kind: str, device: torch.device | str) -> list[cohorts.Volume]:
    """The volumes of a cohort that a source of a kind uses."""
    if kind == "shapes":  # made anew each time, on the cohort's grid
        nothing = torch.zeros(1, 1, *cohort.shape, dtype=torch.uint8, device=device)
        return [cohorts.Volume("shapes", "shapes", "both", "train", (), None, nothing, None)]
    if kind == "nothing":
        return [v for v in cohort.volumes if v.images is not None]
    labeled = [v for v in cohort.volumes if v.labels is not None]
    if kind == "images":
        return [v for v in labeled if v.images is not None]
    return [v for v in labeled if v.images is None] or labeled


def _names(config: ClassTraining, read: Sequence[cohorts.Cohort]) -> tuple[str, ...]:
    """Names of the classes, background first."""
    names = list(config.names)
    if not names:
        for source, cohort in zip(config.sources, read, strict=True):
            if source.kind not in LABELED:
                continue
            for label in sorted(_labels(cohort)):
                named = str(label) if source.classes is None else source.classes.get(label, "")
                names += [n for n in named.split("|") if n and n not in names]
    if not names:
        raise NoLabelsError(f"{config.sources[0].cohort}: holds no labels to learn classes from")
    return ("background", *names)


def _labels(cohort: cohorts.Cohort) -> set[int]:
    return {label for v in cohort.volumes if v.labels is not None for label in _present(v.labels)} - {0}


def _present(labels: Tensor) -> list[int]:
    return np.flatnonzero(torch.bincount(labels.flatten().int(), minlength=1).cpu().numpy()).tolist()


def _subject(
    volume: cohorts.Volume,
    cohort: cohorts.Cohort,
    source: Source,
    names: tuple[str, ...],
    sets: dict[frozenset[int], int],
) -> Subject:
    """A volume as :class:`Subject`; sets of classes that are new are added to ``sets``."""

    def number(members: frozenset[int]) -> int:
        return sets.setdefault(members, len(sets))

    def members_of(named: str, where: str) -> frozenset[int]:
        if unknown := [n for n in named.split("|") if n and n not in names]:
            raise ValueError(
                f"{source.cohort}: {where}: there is no class {unknown[0]!r}; known are {', '.join(names)}"
            )
        return frozenset(names.index(n) for n in named.split("|") if n)

    def classes(label: int) -> frozenset[int]:
        return members_of(str(label) if source.classes is None else source.classes.get(label, ""), f"label {label}")

    device = (volume.images if volume.labels is None else volume.labels).device
    set_of = np.full(LABELS, OUTSIDE)
    if source.kind not in LABELED:
        labels = torch.zeros(1, 1, *cohort.shape, dtype=torch.uint8, device=device)
    else:
        labels = volume.labels
        drawn = _present(labels) if source.absent == "unknown" else sorted(_labels(cohort))
        known = frozenset().union(*(classes(label) for label in drawn if label))
        elsewhere = members_of("|".join(source.elsewhere), "elsewhere")
        rest = number(frozenset(range(len(names))) - known | elsewhere)
        for label in range(LABELS):
            members = classes(label) if label and (source.classes is not None or label in drawn) else frozenset()
            set_of[label] = number(members) if members else rest
    return Subject(
        volume.name,
        source.kind,
        None if source.kind == "paint" else volume.images,
        labels,
        torch.from_numpy(set_of).to(device),
        volume.brain,
        cohort.tissues,
        cohort.spacing,
    )
