"""Where a training run's pairs come from: a cohort of real volumes, phantoms of one template, or synthesis."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from training.config import Config
from training.data import phantoms, synthesis
from training.data.cohort import Cohort, Volume, load
from training.data.pairs import Augmentation, Pair, Random, augment


class Source(Protocol):
    """Pairs to train on, drawn at random, and pairs to judge by, always the same ones."""

    cohort: Cohort

    def draw(self, random: Random) -> Pair: ...

    def held_out(self, split: str) -> Iterator[tuple[str, Pair]]:
        """(task, pair) of ``validation`` or ``test``."""


@dataclass(frozen=True)
class CohortPairs:
    """Two volumes of one split, as their roles allow; each shows one of its contrasts."""

    cohort: Cohort
    augmentation: Augmentation
    count: int

    def __post_init__(self) -> None:
        for split in ("train", "validation"):
            if not any(True for _ in self._choices(split)):
                raise ValueError(f"the cohort's split {split!r} has no fixed and moving volume to make a pair of")

    def _choices(self, split: str) -> Iterator[tuple[Volume, Volume]]:
        volumes = [v for v in self.cohort.split(split) if v.images is not None]
        for fixed in volumes:
            for moving in volumes:
                if fixed is not moving and fixed.role != "moving" and moving.role != "fixed":
                    yield fixed, moving

    def draw(self, random: Random) -> Pair:
        fixed, moving = random.choice(list(self._choices("train")))
        return augment(_pair(fixed, moving, random), self.augmentation, self.cohort.spacing, random)

    def held_out(self, split: str) -> Iterator[tuple[str, Pair]]:
        random, choices = Random(0), list(self._choices(split))
        for _ in range(min(self.count, len(choices))):
            fixed, moving = choices.pop(random.index(len(choices)))
            yield "cohort", _pair(fixed, moving, random)


def _pair(fixed: Volume, moving: Volume, random: Random) -> Pair:
    def shown(volume: Volume):
        return random.choice(volume.images)[None].float()

    labels = (fixed.labels, moving.labels) if fixed.labels is not None and moving.labels is not None else (None, None)
    return Pair(shown(fixed), shown(moving), None, None, *labels)


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
    """Pairs made on the fly (:mod:`training.data.synthesis`), judged on phantoms."""

    cohort: Cohort
    recipe: synthesis.Recipe
    count: int

    def draw(self, random: Random) -> Pair:
        return synthesis.make_pair(self.cohort, self.recipe, random)

    def held_out(self, split: str) -> Iterator[tuple[str, Pair]]:
        return Phantoms(self.cohort, Augmentation(), self.count).held_out(split)


def source_of(config: Config, device: torch.device | str = "cpu") -> Source:
    """The source that a configuration asks for.

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
