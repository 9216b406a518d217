"""The phantoms of the AAL Brain experiment (arXiv 1908.08767, section 3.1): free-form deformations of one template."""

import torch

from DivRegNetLib.core import fields
from DivRegNetLib.core.intensity import normalize
from training.data.cohort import Cohort, Volume
from training.data.free_form import CONTROL_MM, SD_MM, ffd
from training.data.pairs import Pair
from training.data.randomness import Random

COUNTS = {"train": 150, "validation": 50, "test": 50}
TASKS = ("T1-T2", "PD-T2", "T2-T2")  # moving-fixed


def seed_of(split: str, number: int) -> int:
    """The seed of a phantom of a split; no two splits share a seed.

    Raises:
        ValueError: the split has fewer phantoms.
    """
    if not 0 <= number < COUNTS[split]:
        raise ValueError(f"{split} has {COUNTS[split]} phantoms, there is no number {number}")
    first = dict(zip(COUNTS, (0, 150, 200), strict=True))
    return 900_000 + first[split] + number


def template(cohort: Cohort) -> Volume:
    """The volume that phantoms are made of: the first with several contrasts.

    Raises:
        ValueError: no volume has several contrasts, labels and a brain mask.
    """
    for volume in cohort.volumes:
        if len(volume.contrasts) > 1 and volume.labels is not None and volume.brain is not None:
            return volume
    raise ValueError("the cohort has no volume of several contrasts with labels and brain, which phantoms are made of")


def phantom(cohort: Cohort, task: str, seed: int) -> Pair:
    """A pair of the undeformed template (moving) and its free-form deformation (fixed).

    Args:
        task: the contrasts as ``moving-fixed``, such as ``T1-T2``.
        seed: determines the deformation, which is the same for all tasks.
    """
    volume = template(cohort)
    random = Random(seed, volume.images.device)
    truth = ffd(cohort.shape, CONTROL_MM / cohort.spacing, SD_MM / cohort.spacing, random)
    moving, fixed = (volume.images[volume.contrasts.index(c)][None].float() for c in task.split("-"))
    labels = (volume.labels > 0).float()  # the union of all regions is what the paper scores
    maps = fields.warp(torch.cat((volume.brain.float(), labels), 1), truth, mode="nearest", padding="zeros")
    return Pair(
        normalize(fields.warp(fixed, truth, padding="zeros"), cohort.normalization),
        normalize(moving, cohort.normalization),
        maps[:, :1],
        truth,
        maps[:, 1:].byte(),
        labels.byte(),
    )
