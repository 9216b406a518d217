"""From evidence to millimeters: how far a registration is expected to be off, as a mean and as a map. Without torch.

The coefficients in ``calibration.json`` are made by ``training/experiments/calibration.py`` from registrations whose truth is
known: a linear regression of the logarithm of the mean error, in voxels of the evidence's box, and a network of one hidden
layer for how the error differs from place to place.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid

FILE = Path(__file__).with_name("calibration.json")
FORMAT = 3
HALF_CELL = 0.4  # share of a cell that counts, from which on the map says something


@dataclass(frozen=True)
class Term:
    """One summand of a regression: ``weight * clip(f(value), low, high)``, where f is ``log(value + offset)`` or the value.

    name: of the number or of the cells' array.
    offset: None: f is the value itself.
    low, high: the range in which the regression was fitted; beyond it the summand stays as it is.
    missing: stands for f where the value could not be measured.
    """

    name: str
    offset: float | None
    low: float
    high: float
    missing: float
    weight: float

    def of(self, value: "float | np.ndarray | None") -> "float | np.ndarray":
        """The summand, of a number or of each of an array."""
        if value is None:
            return self.weight * self.missing
        value = transformed(value, self.offset)
        return self.weight * np.clip(np.where(np.isfinite(value), value, self.missing), self.low, self.high)


def transformed(value: "float | np.ndarray", offset: float | None) -> np.ndarray:
    """What a regression is linear in: ``log(value + offset)``, or the value itself where the offset is None."""
    value = np.asarray(value, float)
    return value if offset is None else np.log(np.maximum(value, 0) + offset)


@dataclass(frozen=True)
class Regression:
    """``exp(constant + sum of the terms)``."""

    constant: float
    terms: tuple[Term, ...]

    def of(self, values: dict) -> "float | np.ndarray":
        """The regression at numbers, or at arrays of one shape, by name."""
        return np.exp(self.constant + sum(term.of(values.get(term.name)) for term in self.terms))

    @classmethod
    def from_dict(cls, values: dict) -> "Regression":
        return cls(values["constant"], tuple(Term(**term) for term in values["terms"]))


EXPECTED = "expected error"
"""Name of the input of a :class:`Network` that is the same at all cells: the expected mean error, in voxels of the box. What
tells places apart in an image that is aligned well does not in one that is far off."""


@dataclass(frozen=True)
class Network:
    """``exp(output . tanh(hidden @ x + bias))``, where x are the terms.

    hidden: (H, number of terms). bias, output: (H,).
    """

    terms: tuple[Term, ...]
    hidden: np.ndarray
    bias: np.ndarray
    output: np.ndarray

    def of(self, values: dict) -> np.ndarray:
        """The network at arrays of one shape, by name; numbers stand for arrays of one value."""
        inputs = np.stack(np.broadcast_arrays(*(term.of(values.get(term.name)) for term in self.terms)), -1)
        return np.exp(np.tanh(inputs @ self.hidden.T + self.bias) @ self.output)

    @classmethod
    def from_dict(cls, values: dict) -> "Network":
        arrays = (np.array(values[name], float) for name in ("hidden", "bias", "output"))
        return cls(tuple(Term(**term) for term in values["terms"]), *arrays)


@dataclass(frozen=True)
class Calibration:
    """The content of ``calibration.json``.

    mean: mean error, in voxels of the box, from the numbers of an :class:`~DivRegNetLib.quality.evidence.Evidence`.
    cell: error of a cell, in any unit, from its cells and the mean error (EXPECTED).
    factor: within which the stated error is of the true one in nine of ten registrations of held-out subjects.
    largest_voxels: expected error, in voxels of the box, from which on it is only known to be large: in nine of ten such
        registrations that the fit has not seen, it is more than ``least_voxels``.
    green_mm, red_mm: largest expected error of a green, smallest of a red verdict, of an image whose diagonal is at
        least ``diagonal_mm``; less in proportion for smaller ones.
    """

    mean: Regression
    cell: Network
    factor: float
    largest_voxels: float
    least_voxels: float
    green_mm: float
    red_mm: float
    diagonal_mm: float

    def limits(self, numbers: dict) -> tuple[float, float]:
        """The largest expected error (mm) of a green and the smallest of a red verdict, for an image."""
        scale = min(numbers["diagonal_mm"] / self.diagonal_mm, 1.0)
        return self.green_mm * scale, self.red_mm * scale

    def range_mm(self, error_mm: float, numbers: dict) -> tuple[float, float]:
        """Where the true error is nine times in ten where so large an error (mm) is expected: from and to. To infinity where it
        is only known to be large."""
        if error_mm >= self.largest_voxels * numbers["voxel_mm"]:
            return self.least_voxels * numbers["voxel_mm"], math.inf
        return error_mm / self.factor, error_mm * self.factor


@functools.cache
def calibration(file: Path = FILE) -> Calibration:
    """The calibration in a file.

    Raises:
        ValueError: the file has another format.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise ValueError(f"{file}: format {FORMAT} is expected, got {values.get('format')!r}")
    names = ("factor", "largest_voxels", "least_voxels", "green_mm", "red_mm", "diagonal_mm")
    fits = Regression.from_dict(values["mean"]), Network.from_dict(values["cell"])
    return Calibration(*fits, *(values[name] for name in names))


def expected_error_mm(numbers: dict) -> float:
    """The expected mean distance (mm) to the truth over the fixed foreground, from the numbers of the evidence."""
    error = float(calibration().mean.of(numbers)) * numbers["voxel_mm"]
    return error if math.isfinite(error) else numbers["diagonal_mm"]


def error_map(numbers: dict, cells: dict[str, np.ndarray], cell_grid: Grid, grid: Grid) -> sitk.Image:
    """The expected error (mm) at every voxel of a grid, float32; 0 where nothing is known: in air, and outside of either
    field of view. Its mean over the rest is about :func:`expected_error_mm`.

    Args:
        numbers, cells, cell_grid: of an :class:`~DivRegNetLib.quality.evidence.Evidence`.
    """
    inside, known = cells["inside"], calibration()
    relative = known.cell.of(cells | {EXPECTED: float(known.mean.of(numbers))}) * np.ones_like(inside)
    error = relative * expected_error_mm(numbers) * inside.sum() / max((relative * inside).sum(), 1e-9)
    # Interpolated with the cells' shares as weights, so that the error does not fade towards the air.
    total, weight = (
        sitk.GetArrayFromImage(
            sitk.Resample(cell_grid.image(x.astype(np.float32)), grid.empty_image(), sitk.Transform())
        )
        for x in (error * inside, inside)
    )
    return grid.image(np.where(weight > HALF_CELL, total / np.maximum(weight, HALF_CELL), 0).astype(np.float32))


def on_grid(error_map: sitk.Image, reference: sitk.Image) -> sitk.Image:
    """A map of the expected error on the grid of another image; 0 beyond the map."""
    return sitk.Resample(error_map, reference, sitk.Transform(), sitk.sitkLinear, 0.0)
