"""Sources of pairs for training: a cohort of volumes, phantoms of one template, or generated pairs."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from training.config import Config
from training.data import phantoms, synthesis
from training.data.cohort import SPLITS, Cohort, Volume, load
from training.data.pairs import Augmentation, Pair, augment
from training.data.randomness import Random


class Source(Protocol):
    """Random pairs to train on, and fixed pairs to validate and test with."""

    cohort: Cohort

    def draw(self, random: Random) -> Pair: ...

    def held_out(self, split: str) -> Iterator[tuple[str, Pair]]:
        """(task, pair) of the split ``validation`` or ``test``, the same at each call."""


@dataclass(frozen=True)
class CohortPairs:
    """Pairs of two volumes of one split, as their roles allow; each volume shows one of its contrasts at random."""

    cohort: Cohort
    augmentation: Augmentation
    count: int
    pairs: "dict[str, OrderedPairs]" = field(init=False)

    def __post_init__(self) -> None:
        with_images = {split: [v for v in self.cohort.split(split) if v.images is not None] for split in SPLITS}
        object.__setattr__(self, "pairs", {split: OrderedPairs(volumes) for split, volumes in with_images.items()})
        for split in ("train", "validation"):
            if not self.pairs[split]:
                raise ValueError(f"the cohort's split {split!r} has no fixed and moving volume to make a pair of")

    def draw(self, random: Random) -> Pair:
        pairs = self.pairs["train"]
        fixed, moving = pairs[random.index(len(pairs))]
        return augment(_pair(fixed, moving, random), self.augmentation, self.cohort.spacing, random)

    def held_out(self, split: str) -> Iterator[tuple[str, Pair]]:
        random, pairs, taken = Random(0), self.pairs[split], []
        for _ in range(min(self.count, len(pairs))):
            number = random.index(len(pairs) - len(taken))
            for other in taken:  # in ascending order: the number counts the pairs that are left
                number += other <= number
            bisect.insort(taken, number)
            yield "cohort", _pair(*pairs[number], random)


class OrderedPairs(Sequence):
    """All (fixed, moving) pairs of different volumes that their roles allow, computed from their number, not listed."""

    def __init__(self, volumes: list[Volume]) -> None:
        self._moving = [v for v in volumes if v.role != "fixed"]
        self._fixed = [v for v in volumes if v.role != "moving"]
        self._own = [next((i for i, m in enumerate(self._moving) if m is f), None) for f in self._fixed]
        counts = [len(self._moving) - (own is not None) for own in self._own]
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> tuple[Volume, Volume]:
        i = bisect.bisect_right(self._ends, number)
        j = number - (self._ends[i - 1] if i else 0)
        own = self._own[i]
        return self._fixed[i], self._moving[j + (own is not None and j >= own)]


def _pair(fixed: Volume, moving: Volume, random: Random) -> Pair:
    def image(volume: Volume) -> Tensor:
        return random.choice(volume.images)[None].float()

    labels = (fixed.labels, moving.labels) if fixed.labels is not None and moving.labels is not None else (None, None)
    return Pair(image(fixed), image(moving), None, None, *labels)


@dataclass(frozen=True)
class Phantoms:
    """The AAL Brain experiment of arXiv 1908.08767: see :mod:`training.data.phantoms`."""

    cohort: Cohort
    augmentation: Augmentation
    count: int
    tasks: tuple[str, ...] = phantoms.TASKS

    def draw(self, random: Random) -> Pair:
        number = random.index(phantoms.COUNTS["train"])
        pair = phantoms.phantom(self.cohort, random.choice(self.tasks), phantoms.seed_of("train", number))
        return augment(pair, self.augmentation, self.cohort.spacing, random)

    def held_out(self, split: str) -> Iterator[tuple[str, Pair]]:
        for task in self.tasks:
            for number in range(min(self.count, phantoms.COUNTS[split])):
                yield task, phantoms.phantom(self.cohort, task, phantoms.seed_of(split, number))


@dataclass(frozen=True)
class Synthesis:
    """Generated pairs (:mod:`training.data.synthesis`); phantoms are held out."""

    cohort: Cohort
    recipe: synthesis.Recipe
    count: int

    def draw(self, random: Random) -> Pair:
        return synthesis.make_pair(self.cohort, self.recipe, random)

    def held_out(self, split: str) -> Iterator[tuple[str, Pair]]:
        return Phantoms(self.cohort, Augmentation(), self.count).held_out(split)


def source_of(config: Config, device: torch.device | str = "cpu") -> Source:
    """The source that a configuration names.

    Raises:
        FileNotFoundError, ValueError: the cohort is missing, cannot be read, or has no pairs.
    """
    data = config.data
    if not data.cohort:
        raise ValueError("data.cohort names no folder: give volumes (--images, ...), or data.cohort=DIR")
    cohort = load(Path(data.cohort), device)
    if data.pairs == "cohort":
        return CohortPairs(cohort, data.augmentation, data.held_out)
    phantoms.template(cohort)
    if data.pairs == "phantoms":
        return Phantoms(cohort, data.augmentation, data.held_out, tuple(data.tasks))
    return Synthesis(cohort, data.recipe, data.held_out)
