"""A prepared cohort: a folder with one ``.npz`` file per volume, all on one grid, and ``cohort.json``.

The file of a volume holds ``images`` (C, D, H, W) float16 in [0, 1], one channel per contrast, and optionally ``labels``
(D, H, W) uint8 and ``brain`` (D, H, W) bool. ``prepare.py`` and ``prepare_head.py`` write cohorts.
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

    subject: all volumes of a subject are in the same split.
    role: the role of the volume in a pair: ``fixed``, ``moving`` or ``both``.
    images: (C, 1, D, H, W) float16 in [0, 1], one per contrast; None if there is only a label map.
    labels: (1, 1, D, H, W) uint8 class per voxel, or None.
    brain: (1, 1, D, H, W) uint8, 1 inside the skull, or None.
    files: the image files that the volume was made from.
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
    """All volumes and their common grid, which is isotropic and along the LPS axes.

    spacing: mm.
    shape: (D, H, W).
    origin: x, y, z of the first voxel's center, LPS mm.
    tissues: class -> ``white``, ``gray``, ``fluid`` or ``other``, for label maps that images are generated from.
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
        FileNotFoundError: there is no cohort.json.
        ValueError: the cohort has another format, or the file of a volume does not fit it; names the file.
    """
    listing = Path(folder) / "cohort.json"
    if not listing.exists():
        raise FileNotFoundError(f"{listing} is missing: prepare the cohort first, see docs/training.md")
    try:
        about = json.loads(listing.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{listing}: cannot be read ({error}); prepare the cohort again") from error
    format_ = about.get("format") if isinstance(about, dict) else None
    if format_ != FORMAT:
        raise ValueError(f"{listing}: has format {format_!r}, but {FORMAT} is needed; prepare the cohort again")
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
            by_name = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read ({error}); prepare the cohort again") from error
    for name, array in by_name.items():
        if array.shape[-3:] != shape:
            raise ValueError(
                f"{file}: {name} has the shape {array.shape[-3:]}, but the cohort has {shape}; prepare the cohort again"
            )
    return by_name
