"""AAL Brain of arXiv 1908.08767, section 3.1: phantoms made of one template by random free-form deformation."""

import torch

from DivRegNetLib.core import fields
from DivRegNetLib.core.intensity import normalize
from training.data.cohort import Cohort, Volume
from training.data.pairs import Pair, Random, ffd

CONTROL_MM, SD_MM = 20.0, 6.0
COUNTS = {"train": 150, "validation": 50, "test": 50}
TASKS = ("T1-T2", "PD-T2", "T2-T2")  # moving-fixed


def seed_of(split: str, number: int) -> int:
    """The seed of a split's phantom; no two splits share one.

    Raises:
        ValueError: the split has fewer phantoms.
    """
    if not 0 <= number < COUNTS[split]:
        raise ValueError(f"{split} has {COUNTS[split]} phantoms, there is no number {number}")
    first = dict(zip(COUNTS, (0, 150, 200), strict=True))
    return 900_000 + first[split] + number


def template(cohort: Cohort) -> Volume:
    """The volume that phantoms are made of: the first that has several contrasts.

    Raises:
        ValueError: there is none, or it lacks labels or brain.
    """
    for volume in cohort.volumes:
        if len(volume.contrasts) > 1 and volume.labels is not None and volume.brain is not None:
            return volume
    raise ValueError("the cohort has no volume of several contrasts with labels and brain, which phantoms are made of")


def phantom(cohort: Cohort, task: str, seed: int) -> Pair:
    """The undeformed template as moving image, and as fixed image its free-form deformation.

    Args:
        task: ``moving-fixed`` contrasts, as ``T1-T2``.
        seed: of the deformation, which is the same for every task.
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
