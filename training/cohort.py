"""The cohort that training reads: one ``.npz`` per subject on one common grid, and ``cohort.json`` that lists them.

A subject holds ``images`` (C, D, H, W) uint8 or none, ``labels`` (D, H, W) uint8 or none and ``brain`` (D, H, W) bool.
Reading a cohort needs numpy and torch alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """One head on the cohort's grid.

    images: (C, 1, D, H, W) float32 in [0, 1], one per contrast; None for a subject that is a label map alone.
    labels: (1, 1, D, H, W) uint8 class per voxel.
    brain: (1, 1, D, H, W) float32, 1 inside the skull.
    """

    name: str
    contrasts: tuple[str, ...]
    images: Tensor | None
    labels: Tensor
    brain: Tensor

    def to(self, device: torch.device) -> "Subject":
        images = None if self.images is None else self.images.to(device)
        return Subject(self.name, self.contrasts, images, self.labels.to(device), self.brain.to(device))


@dataclass(frozen=True)
class Cohort:
    """All subjects, the grid they share and what the classes of the label maps are.

    tissues: class -> ``white``, ``grey``, ``fluid`` or ``other`` for subjects without images.
    """

    subjects: tuple[Subject, ...]
    spacing: float
    shape: tuple[int, int, int]
    tissues: tuple[str, ...]


def load(folder: Path, device: torch.device | str = "cpu") -> Cohort:
    """Reads a cohort.

    Raises:
        FileNotFoundError: the folder has no cohort.json; says how to make one.
    """
    listing = folder / "cohort.json"
    if not listing.exists():
        raise FileNotFoundError(f"{listing} is missing: make the cohort first, with python training/prepare_head.py")
    about = json.loads(listing.read_text())
    subjects = []
    for entry in about["subjects"]:
        with np.load(folder / f"{entry['name']}.npz", allow_pickle=False) as arrays:
            images = None
            if "images" in arrays:
                images = torch.from_numpy(arrays["images"]).float().unsqueeze(1) / 255
            subject = Subject(
                entry["name"],
                tuple(entry["contrasts"]),
                images,
                torch.from_numpy(arrays["labels"])[None, None],
                torch.from_numpy(arrays["brain"])[None, None].float(),
            )
        subjects.append(subject.to(torch.device(device)))
    return Cohort(tuple(subjects), about["spacing"], tuple(about["shape"]), tuple(about["tissues"]))
