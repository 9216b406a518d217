"""The cohort that training reads: a folder with one ``.npz`` per volume on one common grid, and ``cohort.json``.

A volume's file holds ``images`` (C, D, H, W) float16 in [0, 1], a channel per contrast, and what there is of ``labels``
(D, H, W) uint8 and ``brain`` (D, H, W) bool. Reading a cohort needs numpy and torch alone; ``prepare.py`` and
``prepare_head.py`` write one.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FORMAT = 2
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Volume:
    """One acquisition on the cohort's grid.

    subject: whose it is; volumes of a subject are in one split.
    role: ``fixed``, ``moving`` or ``both``: what it may be in a pair.
    images: (C, 1, D, H, W) float16 in [0, 1], one per contrast; None for a label map alone.
    labels: (1, 1, D, H, W) uint8 class per voxel, or None.
    brain: (1, 1, D, H, W) uint8, 1 inside the skull, or None.
    files: the images it was made from.
    """

    name: str
    subject: str
    role: str
    split: str
    contrasts: tuple[str, ...]
    images: Tensor | None
    labels: Tensor | None
    brain: Tensor | None
    files: tuple[Path, ...] = ()

    def to(self, device: torch.device) -> "Volume":
        tensors = {k: getattr(self, k) for k in ("images", "labels", "brain")}
        return replace(self, **{k: None if t is None else t.to(device) for k, t in tensors.items()})


@dataclass(frozen=True)
class Cohort:
    """All volumes and the grid they share: isotropic, along the LPS axes.

    spacing: mm.
    shape: (D, H, W).
    origin: x, y, z of the first voxel's center, LPS mm.
    tissues: class -> ``white``, ``gray``, ``fluid`` or ``other``, for label maps that images are painted from.
    """

    volumes: tuple[Volume, ...]
    spacing: float
    shape: tuple[int, int, int]
    origin: tuple[float, float, float]
    normalization: str
    tissues: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[Volume, ...]:
        return tuple(v for v in self.volumes if v.split == name)


def load(folder: Path, device: torch.device | str = "cpu") -> Cohort:
    """Reads a cohort.

    Raises:
        FileNotFoundError: there is no cohort.json; says how to make one.
        ValueError: it is of another format, or a volume's file does not fit it; names the file.
    """
    listing = Path(folder) / "cohort.json"
    if not listing.exists():
        raise FileNotFoundError(f"{listing} is missing: make the cohort first, see training/README.md")
    try:
        about = json.loads(listing.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{listing}: cannot be read ({error}); prepare the cohort again") from error
    found = about.get("format") if isinstance(about, dict) else None
    if found != FORMAT:
        raise ValueError(f"{listing}: format {found!r} where {FORMAT} is read; prepare the cohort again")
    shape = tuple(about["shape"])
    volumes = []
    for entry in about["volumes"]:
        arrays = _arrays(listing.parent / f"{entry['name']}.npz", shape)
        images, labels, brain = (arrays.get(k) for k in ("images", "labels", "brain"))
        volume = Volume(
            name=entry["name"],
            subject=entry["subject"],
            role=entry["role"],
            split=entry["split"],
            contrasts=tuple(entry["contrasts"]),
            images=None if images is None else torch.from_numpy(images.astype(np.float16))[:, None],
            labels=None if labels is None else torch.from_numpy(labels)[None, None],
            brain=None if brain is None else torch.from_numpy(brain.astype(np.uint8))[None, None],
            files=tuple(Path(f) for f in entry.get("files", {}).get("images", ())),
        )
        volumes.append(volume.to(torch.device(device)))
    return Cohort(
        tuple(volumes),
        about["spacing"],
        shape,
        tuple(about["origin"]),
        about["normalization"],
        tuple(about.get("tissues", ())),
    )


def _arrays(file: Path, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read ({error}); prepare the cohort again") from error
    for name, array in found.items():
        if array.shape[-3:] != shape:
            raise ValueError(f"{file}: {name} is {array.shape[-3:]} where the cohort is {shape}; prepare it again")
    return found
