"""Training does not wait for a GPU: operators whose result is needed on the CPU are counted. They are the same on a CPU."""

import random as python_random
from dataclasses import replace

import pytest
import torch
from lightning_fabric import Fabric
from operators import Operators, operators

from DivRegNetLib.core import intensity
from training import config as configs
from training.data.cohort import load
from training.data.pairs import Augmentation, augment
from training.data.randomness import Random
from training.data.sources import CohortPairs, Phantoms, source_of
from training.data.synthesis import Recipe, make_pair
from training.trainer import Trainer

MOST_WAITS = 2  # of a step: for the terms of the loss, and for the norm of their gradient
READ_ON_CPU = 2  # of a step: the number of averages, which AveragedModel keeps on the CPU


class DrawnElsewhere(Random):
    """Random numbers whose single ones come from Python: torch draws them on the CPU, which is not to be counted here."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._python = python_random.Random(seed)

    def few(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.full(shape, low + (high - low) * self._python.random())

    def number(self, low: float, high: float) -> float:
        return low + (high - low) * self._python.random()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Intensities are normalized as on a GPU."""
    monkeypatch.setattr(intensity, "_limits", intensity._limits_by_sorting)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(real=0.0), Recipe(shapes=1.0, thick=1.0)])
def test_a_generated_pair_is_made_without_waiting(head_cohort, on_a_gpu, recipe):
    cohort = load(head_cohort)
    for seed in range(6):
        make_pair(cohort, recipe, DrawnElsewhere(seed))  # fills the caches of small matrices
    for seed in range(6):
        counted = operators(lambda seed=seed: make_pair(cohort, recipe, DrawnElsewhere(seed)))
        assert not counted.waits, counted.waits


def test_pairs_of_a_cohort_and_phantoms_are_made_without_waiting(tiny_cohort, head_cohort, on_a_gpu):
    apart = Augmentation(apart_degrees=2.0, apart_mm=3.0)
    for source in (CohortPairs(load(tiny_cohort), apart, 2), Phantoms(load(head_cohort), apart, 2)):
        source.draw(DrawnElsewhere(0))
        counted = operators(lambda source=source: source.draw(DrawnElsewhere(1)))
        assert not counted.waits, counted.waits


def test_a_known_displacement_is_augmented_without_waiting(head_cohort):
    pair = make_pair(load(head_cohort), Recipe(same_subject=1.0), Random(0))
    augment(pair, Augmentation(), 4.0, DrawnElsewhere(0))
    assert not operators(lambda: augment(pair, Augmentation(), 4.0, DrawnElsewhere(1))).waits


@pytest.mark.parametrize("count", [1, 2, 7, 200, 1001])
def test_limits_by_sorting_are_those_by_selection(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).round(decimals=1)
    for sample in (values, torch.full_like(values, 2.0)):
        assert intensity._limits_by_sorting(sample) == intensity._limits(sample)


@pytest.mark.parametrize("values", [{}, {"loss": {"similarity": "mi"}, "methods": ["regnet"]}], ids=["KLDivNet", "MI"])
def test_a_step_of_training_waits_for_the_loss_and_for_the_gradient(tiny_cohort, on_a_gpu, values, monkeypatch):
    """The terms of the loss are needed on the CPU, as is whether they and the gradient are finite."""
    changed = {"data": {"cohort": str(tiny_cohort)}, "variational": {"steps": 2}, "warmup": 1, "batch": 2}
    small = {"regnet": {"channels": [2, 2, 2, 2], "guided": "loss" not in values}, "kldivnet": {"channels": 4}}
    config = configs.build(
        {"name": "tiny", "steps": 6, "methods": ["variational", "regnet"]} | changed | small | values
    )
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.precision)
    fabric.launch()
    trainer = Trainer(config, source_of(config), fabric)
    pair = replace(trainer.source.draw(Random(0)), fixed_labels=None, moving_labels=None)
    monkeypatch.setattr(type(trainer.source), "draw", lambda self, random: pair)
    for _ in range(2):
        trainer.step()
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # Adam keeps the numbers of its steps on the CPU
    with Operators() as counted:
        trainer.step()
    assert sum(counted.waits.values()) <= MOST_WAITS + READ_ON_CPU, counted.waits
