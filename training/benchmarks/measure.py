"""One row of the benchmark: a method registers a pair in a fresh process, and the result is scored."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.io import atomic
from DivRegNetLib.quality import metrics
from training.benchmarks import methods
from training.benchmarks.cases import UNBENT, Prepared, on_grid

WORKER = Path(methods.__file__)
MIB = 2**20
SCORES = {"Dice": "dice", "ASD mm": "asd", "HD95 mm": "hd95"}


@dataclass(frozen=True)
class Settings:
    """What all rows have in common.

    model: name or card of ours.
    threads: of every method.
    limit: seconds that a method may take.
    """

    model: str
    device: str
    threads: int
    refine: int = methods.REFINE_STEPS
    limit: float = 3600.0

    def environment(self) -> dict[str, str]:
        """Of a process that keeps to the number of threads."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
        return dict(os.environ) | dict.fromkeys(names, str(self.threads))

    def of(self, method: str) -> dict:
        """What a method is told."""
        told = {"device": self.device, "threads": self.threads}
        if method in methods.OURS:
            told |= {"model": self.model, "refine": self.refine if method == "DivRegNet, refined" else 0}
        if method == "Newton steps alone":
            told |= {"methods": ["variational"]}
        return told


def row(prepared: Prepared, method: str, settings: Settings, kept: Path) -> dict:
    """Scores, seconds and memory of a method on a pair; kept in the folder ``kept``, with the displacement.

    What is kept is taken as long as method, settings and pair are the same. A method that fails has a row that says why,
    and is tried again the next time.
    """
    about = methods.METHODS[method]
    key = {"settings": settings.of(method), "pair": _digest(prepared), "with": about.settings}
    if method in methods.OURS:
        key["weights"] = _weights(settings.model)
    file = kept / "row.json"
    if file.exists() and (found := json.loads(file.read_text()))["key"] == key:
        return found["row"]
    if prepared.unbent is not None:
        before = row(prepared.unbent, method, settings, kept / UNBENT)
        if "failed" in before:
            return before
        prepared = replace(prepared, truth=_truth(prepared, _found(prepared.unbent, method, kept / UNBENT)))
    measured = {"seconds": prepared.seconds if method == "affine" else None}
    if about.start:
        kept.mkdir(parents=True, exist_ok=True)
        measured = _run(prepared.folder, method, settings, kept)
    if "failed" in measured:  # to be tried again
        return measured
    measured = scores(prepared, *_found(prepared, method, kept)) | measured
    atomic.write_json({"key": key, "row": measured}, file)
    return measured


def _run(pair: Path, method: str, settings: Settings, kept: Path) -> dict:
    with tempfile.TemporaryDirectory(dir=kept.resolve()) as folder:
        told = json.dumps(settings.of(method) | {"output": folder})
        command = [sys.executable, str(WORKER), method, str(pair.resolve()), told]
        try:
            # In a folder of its own, as some leave files where they run.
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=settings.limit,
                                  env=settings.environment(), cwd=folder)  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"was not done after {settings.limit:g} s"}
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return {"failed": (said or [f"ended with {done.returncode}"])[-1][:200]}
        for kind in ("displacement", "inverse"):
            (kept / f"{kind}.mha").unlink(missing_ok=True)
            if (made := Path(folder) / f"{kind}.mha").exists():
                made.replace(kept / made.name)
        found = json.loads((Path(folder) / "measured.json").read_text())
    return {
        "seconds": found["seconds"],
        "forward s": found["predicted"],
        "CPU s": found["cpu"],
        "peak MiB": found["peak"] / MIB,
        "above start MiB": found["added"] / MIB,
        "GPU MiB": None if found["gpu"] is None else found["gpu"] / MIB,
    }


def _found(prepared: Prepared, method: str, kept: Path) -> tuple[np.ndarray, sitk.Image | None, sitk.Image | None]:
    """What a method made of a pair: start, displacement and inverse, as :func:`scores` takes them."""
    start = np.eye(4) if method == "initial" else prepared.initial
    there = [kept / f"{kind}.mha" for kind in ("displacement", "inverse")]
    return start, *(sitk.ReadImage(str(f), sitk.sitkVectorFloat64) if f.exists() else None for f in there)


def _truth(prepared: Prepared, unbent: tuple[np.ndarray, sitk.Image | None, sitk.Image | None]) -> sitk.Image:
    """The bending of a pair, and after it what a method made of the unbent pair: a displacement as ``prepared.truth``."""
    there = [_transform(*unbent[:2]), _transform(np.eye(4), prepared.truth)]
    return on_grid(sitk.CompositeTransform(there), Grid.of(prepared.fixed))


def scores(
    prepared: Prepared, start: np.ndarray, displacement: sitk.Image | None = None, inverse: sitk.Image | None = None
) -> dict:
    """How good ``p -> start(p + u(p))`` is, from fixed to moving points.

    Args:
        start: (4, 4), LPS.
        displacement: u on the pair's grid (LPS, mm); None: 0.
        inverse: v with ``q + v(q)`` inverse to ``p + u(p)``, on the same grid.
    Returns:
        Dice, ASD and HD95 (mm), means over the labels of the fixed image (a label that is lost has Dice 0);
        error (mm) inside the pair's ``inside``; TRE of landmarks (mm); folded voxels (%); ``inverse mm``, the distance
        from where a point starts to where forth and back takes it. What cannot be told is absent.
    """
    grid, transform = Grid.of(prepared.fixed), _transform(start, displacement)
    found = _overlap(prepared, transform)
    if prepared.truth is not None:
        error = sitk.GetArrayFromImage(on_grid(transform, grid)) - sitk.GetArrayViewFromImage(prepared.truth)
        found["error mm"] = float(np.linalg.norm(error, axis=-1)[prepared.inside].mean())
    if prepared.landmarks is not None:
        found["TRE mm"] = float(metrics.landmark_error(*prepared.landmarks, transform).mean())
    if displacement is not None:
        u = _in_voxels(displacement)
        found["folded %"] = metrics.jacobian_statistics(u)["folded_percent"]
        if inverse is not None:
            found["inverse mm"] = metrics.inverse_consistency(u, _in_voxels(inverse), grid.spacing[0])["mean"]
    return found


def _transform(start: np.ndarray, displacement: sitk.Image | None) -> sitk.Transform:
    """``p -> start(p + u(p))``, see :func:`scores`."""
    if displacement is None:
        return affine_transform(start)
    # A transform owns its field and empties the image it is given.
    bend = sitk.DisplacementFieldTransform(sitk.Cast(displacement, sitk.sitkVectorFloat64))
    return sitk.CompositeTransform([affine_transform(start), bend])


def _overlap(prepared: Prepared, transform: sitk.Transform) -> dict[str, float]:
    warped = sitk.Resample(prepared.moving_labels, prepared.fixed_labels, transform, sitk.sitkNearestNeighbor, 0)
    wanted = set(np.unique(sitk.GetArrayViewFromImage(prepared.fixed_labels)).tolist()) - {0}
    overlap = metrics.label_overlap(prepared.fixed_labels, sitk.Cast(warped, prepared.fixed_labels.GetPixelID()))
    labels = [overlap["labels"][str(label)] for label in sorted(wanted)]
    kept = {n: [s[k] for s in labels if s[k] is not None] for n, k in SCORES.items()}
    return {name: float(np.mean(values)) for name, values in kept.items() if values}


def _in_voxels(displacement: sitk.Image) -> torch.Tensor:
    """(1, 3, D, H, W); the grid is isotropic and lies along the LPS axes."""
    array = sitk.GetArrayFromImage(displacement).astype(np.float32) / displacement.GetSpacing()[0]
    return torch.from_numpy(np.moveaxis(array, -1, 0).copy())[None]


def _digest(prepared: Prepared) -> str:
    about = hashlib.sha256()
    for name in ("fixed.mha", "moving.mha"):
        about.update((prepared.folder / name).read_bytes())
    return about.hexdigest()[:16]


def _weights(model: str) -> str:
    from DivRegNetLib import models

    return models.load(model, torch.device("cpu")).card.sha256[:16]
