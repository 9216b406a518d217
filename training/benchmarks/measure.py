"""One row of the benchmark: a method registers a pair in a process of its own, and the result is scored."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

import DivRegNetLib
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.io import atomic
from DivRegNetLib.quality import metrics
from training import scoring
from training.benchmarks import methods
from training.benchmarks.cases import UNBENT, Prepared
from training.scoring import displacement_on

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Settings of all rows.

    model: name or card of the DivRegNet model.
    threads: threads of every method.
    refine: steps of refinement.
    limit: longest duration of a registration in seconds.
    """

    model: str
    device: str
    threads: int
    refine: int = methods.REFINE_STEPS
    limit: float = 3600.0

    def environment(self) -> dict[str, str]:
        """Environment variables that limit a process to the number of threads."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
        return dict(os.environ) | dict.fromkeys(names, str(self.threads))

    def of(self, method: str) -> dict:
        """The settings that a method gets."""
        given: dict = {"device": self.device, "threads": self.threads}
        about = methods.METHODS[method]
        if about.options is not None:
            options = about.all_options() | ({"refine": self.refine} if "refine" in about.options else {})
            given |= {"model": self.model, "options": options}
        return given


def row(prepared: Prepared, method: str, settings: Settings, kept: Path) -> dict:
    """Scores, time and memory of a method on a pair.

    The folder ``kept`` holds the row and the displacement. They are used again while method, settings, pair and, for
    DivRegNet, weights and code are the same. The row of a method that fails has only ``failed``, the reason; it is tried
    again the next time.
    """
    about = methods.METHODS[method]
    key = {"settings": settings.of(method), "pair": _digest(prepared), "with": about.settings}
    if method in methods.OURS:
        key |= {"weights": _weights(settings.model), "code": _code()}
    file = kept / "row.json"
    if file.exists() and (stored := json.loads(file.read_text()))["key"] == key:
        return stored["row"]
    if prepared.unbent is not None:
        before = row(prepared.unbent, method, settings, kept / UNBENT)
        if "failed" in before:
            return before
        prepared = replace(prepared, truth=_truth(prepared, _result(prepared.unbent, method, kept / UNBENT)))
    measured = {"seconds": prepared.seconds if method == "affine" else None}
    if about.start:
        kept.mkdir(parents=True, exist_ok=True)
        measured = _run(prepared.folder, method, settings, kept)
    if "failed" in measured:  # not kept, so that it is tried again
        return measured
    measured = scores(prepared, *_result(prepared, method, kept)) | measured
    atomic.write_json({"key": key, "row": measured}, file)
    return measured


def _run(pair: Path, method: str, settings: Settings, kept: Path) -> dict:
    with tempfile.TemporaryDirectory(dir=kept.resolve()) as folder:
        given = json.dumps(settings.of(method) | {"output": folder})
        command = [sys.executable, "-m", "training.benchmarks.methods", method, str(pair.resolve()), given]
        try:
            # In a folder of its own, because some methods leave files in the working directory.
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=settings.limit,
                                  env=settings.environment(), cwd=folder)  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"was not finished after {settings.limit:g} s"}
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return {"failed": (lines or [f"ended with {done.returncode}"])[-1][:200]}
        for kind in ("displacement", "inverse"):
            (kept / f"{kind}.mha").unlink(missing_ok=True)
            if (made := Path(folder) / f"{kind}.mha").exists():
                made.replace(kept / made.name)
        measured = json.loads((Path(folder) / "measured.json").read_text())
    return {
        "seconds": measured["seconds"],
        "deformation s": measured["predicted"],
        "CPU s": measured["cpu"],
        "peak MiB": measured["peak"] / MIB,
        "above start MiB": measured["added"] / MIB,
        "GPU MiB": None if measured["gpu"] is None else measured["gpu"] / MIB,
    }


def _result(prepared: Prepared, method: str, kept: Path) -> tuple[np.ndarray, sitk.Image | None, sitk.Image | None]:
    """Initial alignment, displacement and inverse of a method, as :func:`scores` takes them."""
    start = np.eye(4) if method == "initial" else prepared.initial
    there = [kept / f"{kind}.mha" for kind in ("displacement", "inverse")]
    return start, *(sitk.ReadImage(str(f), sitk.sitkVectorFloat64) if f.exists() else None for f in there)


def _truth(prepared: Prepared, unbent: tuple[np.ndarray, sitk.Image | None, sitk.Image | None]) -> sitk.Image:
    """The known deformation of a pair followed by a method's result on the unbent pair; a displacement (LPS, mm)."""
    there = [_transform(*unbent[:2]), _transform(np.eye(4), prepared.truth)]
    return displacement_on(sitk.CompositeTransform(there), Grid.of(prepared.fixed))


def scores(
    prepared: Prepared, start: np.ndarray, displacement: sitk.Image | None = None, inverse: sitk.Image | None = None
) -> dict:
    """Scores of the map from fixed to moving points ``p -> start(p + u(p))``.

    Args:
        start: (4, 4), LPS.
        displacement: u on the pair's grid (LPS, mm); None: 0.
        inverse: v with ``q + v(q)`` inverse to ``p + u(p)``, on the same grid.
    Returns:
        those of :func:`training.scoring.of_transform`; ``folded %``, the share of voxels with a Jacobian determinant that is
        not positive; ``inverse mm``, the mean inverse-consistency error. Scores that cannot be computed are left out.
    """
    transform = _transform(start, displacement)
    known = {"truth": prepared.truth, "inside": prepared.inside, "landmarks": prepared.landmarks}
    scores = scoring.of_transform(transform, prepared.fixed_labels, prepared.moving_labels, **known)
    if displacement is not None:
        u = _in_voxels(displacement)
        scores["folded %"] = metrics.jacobian_statistics(u)["folded_percent"]
        if inverse is not None:
            spacing = prepared.fixed.GetSpacing()[0]
            scores["inverse mm"] = metrics.inverse_consistency(u, _in_voxels(inverse), spacing)["mean"]
    return scores


def _transform(start: np.ndarray, displacement: sitk.Image | None) -> sitk.Transform:
    """``p -> start(p + u(p))``, see :func:`scores`."""
    if displacement is None:
        return affine_transform(start)
    # A transform owns its field and empties the image it is given.
    bend = sitk.DisplacementFieldTransform(sitk.Cast(displacement, sitk.sitkVectorFloat64))
    return sitk.CompositeTransform([affine_transform(start), bend])


def _in_voxels(displacement: sitk.Image) -> torch.Tensor:
    """(1, 3, D, H, W); the grid is isotropic and lies along the LPS axes."""
    array = sitk.GetArrayFromImage(displacement).astype(np.float32) / displacement.GetSpacing()[0]
    return torch.from_numpy(np.moveaxis(array, -1, 0).copy())[None]


def _digest(prepared: Prepared) -> str:
    about = hashlib.sha256()
    for name in ("fixed.mha", "moving.mha"):
        about.update((prepared.folder / name).read_bytes())
    return about.hexdigest()[:16]


@lru_cache
def _code() -> str:
    """A digest of the library's modules that a registration depends on."""
    about = hashlib.sha256()
    for room in ("core", "similarity", "registration"):
        for file in sorted((Path(DivRegNetLib.__file__).parent / room).rglob("*.py")):
            about.update(file.read_bytes())
    return about.hexdigest()[:16]


@lru_cache
def _weights(model: str) -> str:
    from DivRegNetLib import models

    return models.load(model, torch.device("cpu")).card.sha256[:16]
