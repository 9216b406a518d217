"""Calibration of the verdict: what evidence says of the error, on registrations whose truth is known.

    python training/experiments/calibration.py --data DIR

Registers the cases of :mod:`training.experiments.registrations`, puts known smooth deformations into those that went right,
gathers the evidence (:mod:`DivRegNetLib.quality.evidence`), and fits the error to it on two thirds of the subjects. Writes
``DivRegNetLib/quality/calibration.json``, and ``calibration.md``, ``.csv``, ``.json`` and ``.png`` with how it does on the
other third and on families of anatomy that were left out of the fit. Registrations are kept in the work folder: run again,
the command continues where it was interrupted; ``--fit`` fits to what is there, and measures the evidence again if that has
changed since.
"""

import argparse
import collections
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from DivRegNetLib import models
from DivRegNetLib.core import fields, resampling
from DivRegNetLib.core.grid import Grid, affine_transform, apply_matrix
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.io import atomic
from DivRegNetLib.options import Options
from DivRegNetLib.quality import evidence, expected_error, metrics
from DivRegNetLib.quality.evidence import Evidence
from DivRegNetLib.quality.expected_error import EXPECTED, FORMAT, Network, Regression, Term, transformed
from DivRegNetLib.registration import pipeline
from DivRegNetLib.registration.resources import Resources
from DivRegNetLib.similarity import descriptors
from training import report
from training.data.free_form import ffd
from training.data.randomness import Random
from training.experiments.registrations import Case, cases, rotation

NUMBERS = {
    "motion 1": 0.1, "soft motion 1": 0.1, "motion 2": 0.05, "soft motion 2": 0.1,
    "moved 1": None, "moved 2": None, "moved 4": None, "trend 1": 0.02, "trend 2": 0.02, "trend 4": 0.02, "bend": 0.1,
}  # fmt: skip
"""Numbers that the mean error is fitted to -> offset of their logarithm; None: as they are."""

CELLS = {
    "motion 1": 0.1, "soft motion 1": 0.1, "wide motion 1": 0.1, "spread 1": 0.1, "drift 1": 0.1, "trend 1": 0.1,
    "contrast 1": 0.1, "gain 1": 0.1, "edges 1": None, "bend": 0.1, "slope": 0.02, "ripple": 0.1,
    EXPECTED: 0.0,
}  # fmt: skip
"""The same of the error in a cell."""
HIDDEN = 32  # units of the network
EPOCHS, IMAGES, SAMPLES = 150, 32, 200  # images of a step, cells of each that are drawn
STEP_SIZE, DECAY = 1e-2, 1e-2  # the largest of AdamW, and its weight decay

RIDGE = 1.0  # weight of the squared coefficients, of standardized terms
UNRELATED = 10.0  # voxels of error that stand for images that do not belong together
LEAST, MOST = 0.25, 20.0  # voxels, to which errors are clipped
LARGEST = 4.0  # voxels of expected error, from which on it is only known to be large
CERTAIN = 90  # percent of the registrations for which what is stated holds
FAR = 16.0  # voxels of error that no shift the evidence looks at undoes
GOOD = 1.3  # voxels of mean error, up to which known deformations are put into a registration
PUT = (("local", 1.0), ("local", 3.0), ("any", 0.0))
REGISTERED, DEFORMED = 2.0, 1.0  # weight of what a registration came to, and of what a deformation was put into
RIGHT_MM, WRONG_MM = 2.0, 5.0


@dataclass(frozen=True)
class Observation:
    """An alignment: its evidence and how far it is off.

    put: what was put into it; empty: nothing; ``undeformed``: the initial alignment alone.
    error_mm: mean over the fixed foreground that both images show; None: the images do not belong together.
    errors: (n,) mean error of each cell whose truth is known, voxels of the box; cells: the evidence there.
    """

    case: str
    family: str
    kind: str
    held_out: bool
    put: str
    numbers: dict[str, float]
    error_mm: float | None
    errors: np.ndarray
    cells: dict[str, np.ndarray]

    @property
    def true_voxels(self) -> float:
        """The error in voxels of the box; infinite for images that do not belong together."""
        return math.inf if self.error_mm is None else self.error_mm / self.numbers["voxel_mm"]

    @property
    def voxels(self) -> float:
        """The same with UNRELATED for images that do not belong together, as errors are fitted."""
        return UNRELATED if self.error_mm is None else self.true_voxels


# --- registrations


@dataclass(frozen=True)
class Registration:
    """What the registration of a case came to: all that evidence is measured from.

    version: commit of the code that made it.
    grid: the working grid; images, valid: on it, as in :class:`~DivRegNetLib.registration.methods.Images`.
    displacement: (1, 3, D, H, W) voxels.
    linear: (3, 3) maps a displacement in voxels to one in mm in the moving image.
    error: (1, 3, D, H, W) estimated less true position of every voxel in the moving image, LPS mm; None where it is not
        known.
    error_mm: mean error told by label maps; None: there are none.
    """

    case: str
    family: str
    kind: str
    held_out: bool
    version: str
    grid: Grid
    fixed: Tensor
    moving: Tensor
    valid: tuple[Tensor, Tensor]
    displacement: Tensor
    linear: np.ndarray
    error: Tensor | None
    error_mm: float | None

    def save(self, path: Path) -> None:
        """Writes it in half precision; the error, which is smooth, on half the voxels along each axis."""
        names = ("case", "family", "kind", "held_out", "version", "error_mm")
        about = {name: getattr(self, name) for name in names}
        about |= {"size": self.grid.size, "matrix": self.grid.matrix.tolist(), "linear": self.linear.tolist()}
        arrays = {name: getattr(self, name) for name in ("fixed", "moving", "displacement")}
        if self.error is not None:
            half = [math.ceil(n / 2) for n in self.grid.shape]
            arrays["error"] = F.interpolate(self.error, size=half, mode="trilinear", align_corners=False)
        arrays = {name: values.numpy().astype(np.float16) for name, values in arrays.items()}
        arrays["valid"] = np.packbits(torch.cat(self.valid).numpy())
        _write_arrays(path, about, arrays)

    @classmethod
    def load(cls, path: Path) -> "Registration":
        """The inverse of :meth:`save`."""
        about, arrays = _read_arrays(path)
        grid = Grid(tuple(about.pop("size")), np.array(about.pop("matrix")))
        linear = np.array(about.pop("linear"))
        valid = torch.from_numpy(np.unpackbits(arrays.pop("valid"))[: 2 * np.prod(grid.shape)].astype(bool))
        images = {name: torch.from_numpy(values.astype(np.float32)) for name, values in arrays.items()}
        if "error" in images:
            images["error"] = F.interpolate(images["error"], size=grid.shape, mode="trilinear", align_corners=False)
        valid = tuple(valid.view(2, 1, 1, *grid.shape))
        return cls(**about, grid=grid, linear=linear, valid=valid, **{"error": None} | images)


def register(case: Case, model: models.Model) -> Registration:
    """Registers a case as the program does."""
    options = Options.of(align=case.align, device="cpu")
    inputs = pipeline.check(case.fixed, case.moving, None, None, options)
    resources = Resources.choose(options, inputs.fixed, inputs.moving, model)
    matrix = pipeline.align(inputs, options, progress=_nothing).matrix
    resources = pipeline.cover(inputs, matrix, resources)
    with torch.inference_mode():
        sampled = pipeline.sample(inputs, matrix, resources, progress=_nothing)
        displacement = pipeline.deform(sampled, resources, options, progress=_nothing).displacement
        error = _error(case, sampled, displacement, matrix)
        by_labels = None if case.labels is None else _error_by_labels(case, sampled, displacement, matrix)
    linear, images = matrix[:3, :3] @ sampled.grid.matrix[:3, :3], sampled.images
    return Registration(
        case.name, case.family, case.kind, case.held_out, report.commit(), sampled.grid, images.fixed, images.moving,
        images.valid, displacement, linear, error, by_labels,
    )  # fmt: skip


def _error(case: Case, sampled: pipeline.Sampled, displacement: Tensor, matrix: np.ndarray) -> Tensor | None:
    """Estimated less true position of every voxel in the moving image, (1, 3, D, H, W) LPS mm; None where it is not known."""
    grid = sampled.grid
    if case.truth is None:
        return None
    found = sitk.TransformToDisplacementField(
        case.truth, sitk.sitkVectorFloat64, grid.size, grid.origin, grid.spacing, grid.direction
    )
    true = np.moveaxis(sitk.GetArrayFromImage(found), -1, 0)
    points = fields.identity(grid.shape, like=displacement)[0]
    start, end = (grid.to_physical(p.flatten(1).T.double().numpy()) for p in (points, points + displacement[0]))
    moved = (apply_matrix(matrix, end) - start).T.reshape(true.shape)
    return torch.from_numpy(moved - true)[None].float()


def _error_by_labels(case: Case, sampled: pipeline.Sampled, displacement: Tensor, matrix: np.ndarray) -> float:
    """Mean error (mm) told by label maps: twice the mean distance between their surfaces, which does not see what goes along
    them."""
    fixed, moving, groups = case.labels
    grid, nearest = sampled.grid, sitk.sitkNearestNeighbor
    one = sitk.GetArrayFromImage(sitk.Resample(fixed, grid.empty_image(), sitk.Transform(), nearest, 0))
    other = sitk.GetArrayFromImage(sitk.Resample(moving, grid.empty_image(), affine_transform(matrix), nearest, 0))
    other = torch.from_numpy(other.astype(np.float32))[None, None]
    other = fields.warp(other, displacement, mode="nearest", padding="zeros")[0, 0].numpy()
    masks = ((np.isin(x, [*group]) for x in (one, other)) for group in groups)
    return 2 * float(np.nanmean([metrics.surface_distances(*pair, grid)["asd"] for pair in masks]))


# --- observations


def observe(registration: Registration) -> Iterator[Observation]:
    """What a registration came to; what its alignment alone did; and what it is after known deformations were put into
    it."""
    displacement, error = registration.displacement, registration.error
    first = _observation(registration, "", displacement, displacement, error)
    if first is None:
        return
    yield replace(first, error_mm=registration.error_mm) if error is None else first
    if error is None:
        return
    still, linear = torch.zeros_like(displacement), torch.tensor(registration.linear, dtype=torch.float32)

    def changed_by(change: Tensor) -> Tensor:
        return error + torch.einsum("ij,njdhw->nidhw", linear, change)

    found = _observation(registration, "undeformed", still, still, changed_by(-displacement))
    if found is not None:
        yield found
    if first.voxels > GOOD:
        return
    seed = zlib.crc32(registration.case.encode())
    for number, (kind, voxels) in enumerate(PUT):
        change = _deformation(kind, voxels, displacement.shape[2:], seed + number)
        changed = fields.compose(displacement, change)
        found = _observation(registration, kind, changed, displacement, changed_by(changed - displacement))
        if found is not None:
            yield found


def _observation(
    registration: Registration, put: str, displacement: Tensor, of_registration: Tensor, error: Tensor | None
) -> Observation | None:
    """
    Args:
        displacement: what the moving image is deformed by.
        of_registration: without what was put in, which the evidence is not to see.
        error: (1, 3, D, H, W) mm; None: not known.
    """
    fixed, (fixed_valid, moving_valid) = registration.fixed, registration.valid
    both = fields.warp(torch.cat((registration.moving, moving_valid.float()), 1), displacement)
    valid = fixed_valid & (both[:, 1:] > evidence.MEASURED)
    known = evidence.measure(fixed, both[:, :1], registration.grid, valid=valid, displacement=of_registration)
    if known is None:
        return None
    mean, errors, cells = None, np.zeros(0), {}
    if error is not None:
        length = fields.length(error)
        counts = valid & evidence.foreground(fixed)
        mean = length[counts].mean().item()
        errors, cells = _by_cell(known, length / known.numbers["voxel_mm"], counts, registration.grid)
    case, family, kind, held_out = (getattr(registration, n) for n in ("case", "family", "kind", "held_out"))
    return Observation(case, family, kind, held_out, put, known.numbers, mean, errors, cells)


def _by_cell(known: Evidence, error: Tensor, counts: Tensor, grid: Grid) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Mean error of the cells of which half counts, and the evidence there."""
    sums = [
        sitk.GetArrayFromImage(
            resampling.resample_smooth(grid.image(x[0, 0].float().numpy()), known.grid, np.eye(4))[0]
        )
        for x in (error * counts, counts)
    ]
    use = (sums[1] > 0.5) & (known.cells["inside"] > 0.5)
    return (sums[0] / np.maximum(sums[1], 1e-6))[use], {name: values[use] for name, values in known.cells.items()}


def _deformation(kind: str, voxels: float, shape: torch.Size, seed: int) -> Tensor:
    """A smooth displacement (1, 3, D, H, W) in voxels. A ``local`` one has the mean length that is given, and differs from
    place to place; of another one the length is drawn."""
    random, numbers = Random(seed), np.random.default_rng(seed)
    size = float(np.prod(shape) ** (1 / 3))
    if kind != "local":
        voxels = float(np.exp(numbers.uniform(np.log(0.4), np.log(12))))
    if kind != "local" and numbers.random() < 0.3:
        points = fields.identity(tuple(shape), like=torch.zeros(1))
        turn = torch.tensor(rotation(numbers, numbers.uniform(0, 115 * voxels / size)), dtype=torch.float32)
        center = points.amax((2, 3, 4), keepdim=True) / 2
        found = torch.einsum("ij,njdhw->nidhw", turn - torch.eye(3), points - center)
        found = found + torch.tensor(numbers.normal(0, 1, 3), dtype=torch.float32).view(1, 3, 1, 1, 1)
        return found * (voxels / fields.length(found).mean())
    found = ffd(tuple(shape), size * float(numbers.choice((0.12, 0.2, 0.3))), 1.0, random)
    size = ffd(tuple(shape), size * float(numbers.choice((0.2, 0.3))), 1.0, random)[:, :1]
    found = found * torch.exp((0.8 if kind == "local" else 0.2) * size / size.std())
    found = found * (voxels / fields.length(found).mean())
    return found * (4 * voxels / fields.length(found).clamp_min(4 * voxels))


def gather(data: Path, work: Path, turns: int) -> None:
    """Registers all cases that are not in the work folder yet."""
    work.mkdir(parents=True, exist_ok=True)
    model = models.load("general", torch.device("cpu"))
    todo = [(name, make) for name, make in cases(data, turns) if not any(work.glob(f"{name}.*"))]
    for name, make in tqdm(todo, unit="case", mininterval=10):
        try:
            register(make(), model).save(work / f"{name}.npz")
        except DivRegNetError as error:  # two images that are refused have no verdict
            atomic.write_text(f"{error}\n", work / f"{name}.txt")


def observations(work: Path) -> tuple[list[Observation], list[str]]:
    """The observations of all registrations in the work folder, and the versions that made these. Evidence is kept beside
    them until what measures it is changed."""
    sources = (Path(module.__file__).read_bytes() for module in (evidence, descriptors))
    folder = work / f"evidence-{zlib.crc32(b''.join(sources)):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    found, versions = [], []
    for path in tqdm(sorted(work.glob("*.npz")), unit="registration", mininterval=10):
        kept = folder / path.name
        if not kept.exists():
            with torch.inference_mode():
                save(list(observe(Registration.load(path))), kept)
        found += load(kept)
        versions.append(_read_arrays(path, only_about=True)[0]["version"])
    return found, versions


def save(observed: list[Observation], path: Path) -> None:
    """Writes observations of one case."""
    records, arrays = [], {}
    for i, found in enumerate(observed):
        records.append({k: v for k, v in vars(found).items() if k not in ("errors", "cells")})
        arrays |= {f"{i} errors": found.errors} | {f"{i} {name}": values for name, values in found.cells.items()}
    _write_arrays(path, records, {name: values.astype(np.float16) for name, values in arrays.items()})


def load(path: Path) -> list[Observation]:
    """The inverse of :func:`save`."""
    records, arrays = _read_arrays(path)
    found = []
    for i, record in enumerate(records):
        of_it = {n.split(" ", 1)[1]: v.astype(np.float32) for n, v in arrays.items() if n.split(" ", 1)[0] == str(i)}
        found.append(Observation(**record, errors=of_it.pop("errors"), cells=of_it))
    return found


def _write_arrays(path: Path, about: "dict | list", arrays: dict[str, np.ndarray]) -> None:
    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez_compressed(file, about=json.dumps(about), **arrays)

    atomic.write_atomically(path, write)


def _read_arrays(path: Path, only_about: bool = False) -> tuple["dict | list", dict[str, np.ndarray]]:
    with np.load(path) as file:
        arrays = {} if only_about else {name: file[name] for name in file.files if name != "about"}
        return json.loads(str(file["about"])), arrays


# --- fit


def fit_mean(observations: list[Observation]) -> Regression:
    """Regression of the mean error; each family of anatomy has the same weight in all."""
    values = {name: np.array([o.numbers.get(name, np.nan) for o in observations]) for name in NUMBERS}
    weights = np.array([DEFORMED if o.put else REGISTERED for o in observations])
    families = np.array([o.family for o in observations])
    weights = weights / np.array([weights[families == f].sum() for f in families]) ** 0.5
    errors = np.array([o.voxels for o in observations])
    return _ridge(values, NUMBERS, np.log(errors.clip(LEAST, MOST)), weights / weights.mean())


def has_map(observation: Observation) -> bool:
    """Whether the order of an image's errors from place to place means anything."""
    return len(observation.errors) > 50 and observation.voxels < 6


def cell_values(observation: Observation, mean: Regression) -> dict:
    """The inputs of the network of an image: arrays of its cells, and the mean error that is expected."""
    return observation.cells | {EXPECTED: float(mean.of(observation.numbers))}


def fit_cells(observations: list[Observation], mean: Regression) -> Network:
    """Network of the error in a cell, relative to that in the other cells of the image. Its order counts: images whose
    error differs little from place to place have the same weight as the others."""
    some, random = [o for o in observations if has_map(o)], np.random.default_rng(0)
    chosen = [random.choice(len(o.errors), 4 * SAMPLES, replace=len(o.errors) < 4 * SAMPLES) for o in some]
    targets = np.stack([np.log(o.errors[i] + 0.1) for o, i in zip(some, chosen, strict=True)])
    every, terms, inputs = [cell_values(o, mean) for o in some], [], []
    for name, offset in CELLS.items():
        columns = (np.broadcast_to(v[name], o.errors.shape)[i] for v, o, i in zip(every, some, chosen, strict=True))
        column = transformed(np.stack([*columns]), offset)
        low, high = (float(x) for x in np.percentile(column, [0.1, 99.9]))
        terms.append(Term(name, offset, low, high, float(np.median(column)), 1 / float(column.std())))
        inputs.append(terms[-1].weight * column.clip(low, high))
    scale = np.sqrt(targets.std(1).clip(0.1))
    arrays = np.stack(inputs, -1), targets / scale[:, None], scale
    return _trained(tuple(terms), *(torch.from_numpy(x).float() for x in arrays))


def _trained(terms: tuple[Term, ...], inputs: Tensor, targets: Tensor, scale: Tensor) -> Network:
    """The network whose deviations from its mean in an image, divided by the image's scale, are nearest to the targets'.

    Args:
        inputs: (images, cells, terms). targets: (images, cells), divided by the scale. scale: (images,).
    """
    random, middle = torch.Generator().manual_seed(0), inputs.mean((0, 1))
    hidden = torch.randn(HIDDEN, len(terms), generator=random) / math.sqrt(3 * len(terms))
    output = torch.randn(HIDDEN, generator=random) / math.sqrt(3 * HIDDEN)
    parameters = [x.requires_grad_() for x in (hidden, torch.zeros(HIDDEN), output)]
    optimizer = torch.optim.AdamW(parameters, STEP_SIZE, weight_decay=DECAY)
    steps = EPOCHS * len(inputs) // IMAGES
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, STEP_SIZE, total_steps=steps)
    for _ in range(steps):
        images = torch.randint(len(inputs), (IMAGES, 1), generator=random)
        cells = torch.randint(inputs.shape[1], (IMAGES, SAMPLES), generator=random)
        made = torch.tanh((inputs[images, cells] - middle) @ parameters[0].T + parameters[1]) @ parameters[2]
        error = made / scale[images] - targets[images, cells]
        loss = (error - error.mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    hidden, bias, output = (x.detach().double().numpy() for x in parameters)
    bias = bias - hidden @ middle.double().numpy()
    return Network(terms, *(x.round(4) for x in (hidden, bias, output)))


def _ridge(values: dict[str, np.ndarray], offsets: dict, target: np.ndarray, weights: np.ndarray) -> Regression:
    """Ridge regression of the target on transformed values, each clipped to the range seen and standardized."""
    columns, terms = [], []
    for name, offset in offsets.items():
        column = transformed(values[name], offset)
        measured = column[np.isfinite(column)]
        low, high, missing = float(measured.min()), float(measured.max()), float(np.median(measured))
        columns.append(np.where(np.isfinite(column), column, missing))
        terms.append((name, offset, low, high, missing))
    matrix = np.stack(columns, 1)
    mean = np.average(matrix, axis=0, weights=weights)
    scale = np.sqrt(np.average((matrix - mean) ** 2, axis=0, weights=weights))
    standard, middle = (matrix - mean) / scale, np.average(target, weights=weights)
    normal = (standard * weights[:, None]).T @ standard + RIDGE * np.eye(len(terms))
    factors = np.linalg.solve(normal, (standard * weights[:, None]).T @ (target - middle)) / scale
    return Regression(
        float(middle - factors @ mean), tuple(Term(*t, float(f)) for t, f in zip(terms, factors, strict=True))
    )


def predict(regression: Regression, observations: list[Observation]) -> np.ndarray:
    """Expected errors in mm."""
    return np.array([float(regression.of(o.numbers)) * o.numbers["voxel_mm"] for o in observations])


def left_out(observations: list[Observation], score: Callable[[list, list], np.ndarray]) -> np.ndarray:
    """``score(others, these)`` of the observations of each family of anatomy, fitted to those of the others."""
    scores = np.zeros(len(observations))
    for family in sorted({o.family for o in observations}):
        others = [o for o in observations if o.family != family]
        here = [i for i, o in enumerate(observations) if o.family == family]
        scores[here] = score(others, [observations[i] for i in here])
    return scores


def left_out_errors(observations: list[Observation]) -> np.ndarray:
    """Expected error (mm) of each observation by a fit without its family of anatomy."""
    return left_out(observations, lambda others, these: predict(fit_mean(others), these))


def left_out_maps(observations: list[Observation]) -> np.ndarray:
    """Rank correlation of expected and true error over the cells of each image, likewise."""

    def score(others: list[Observation], these: list[Observation]) -> np.ndarray:
        mean = fit_mean(others)
        return map_scores(these, mean, fit_cells(others, mean))

    return left_out(observations, score)


def green_limit(observations: list[Observation], expected: np.ndarray) -> float:
    """The expected error (mm) at which nineteen of twenty are not wrong.

    Args:
        expected: (mm) by a fit that has not seen them; the ratios of those that are neither near 0 nor far off count.
    """
    ratios = [
        o.error_mm / mm
        for o, mm in zip(observations, expected, strict=True)
        if o.error_mm is not None and RIGHT_MM <= mm <= WRONG_MM
    ]
    return round(WRONG_MM / float(np.percentile(ratios, 95)), 1)


def least_voxels(observations: list[Observation], expected: np.ndarray) -> float:
    """The true error (voxels) that nine of ten registrations exceed whose expected error is only known to be large.

    Args:
        expected: (mm) by a fit that has not seen them.
    """
    true = [o.true_voxels for o, mm in zip(observations, expected, strict=True) if not is_stated(o, mm)]
    return round(float(np.percentile(true, 100 - CERTAIN, method="lower")), 1)


def is_stated(observation: Observation, mm: float) -> bool:
    """Whether an expected error is stated as a number, and not only as large."""
    return mm / observation.numbers["voxel_mm"] < LARGEST


# --- how good it is


def scores(
    observations: list[Observation], expected: np.ndarray, green: float, red: float, least: float
) -> dict[str, float]:
    """The figures that a verdict is judged by; ``expected`` and limits in mm, ``least`` in voxels."""
    related = np.array([o.error_mm is not None for o in observations])
    true = np.array([np.inf if o.error_mm is None else o.error_mm for o in observations])
    scale = np.array([min(o.numbers["diagonal_mm"] / DIAGONAL_MM, 1.0) for o in observations])
    is_green, is_red = expected <= green * scale, expected >= red * scale
    right, wrong = true <= RIGHT_MM * scale, true > WRONG_MM * scale
    voxel = np.array([o.numbers["voxel_mm"] for o in observations])  # less than a quarter of it is not told apart
    shown, known = (np.maximum(x / voxel, LEAST)[related] for x in (expected, true))
    within = np.abs(np.log(shown / known)) <= np.log(2)
    stated = np.array([is_stated(o, mm) for o, mm in zip(observations, expected, strict=True)])
    more = (true / voxel > least)[~stated]
    percent = {
        "wrong, green %": is_green[wrong].mean() if wrong.any() else np.nan,
        "wrong, red %": is_red[wrong].mean() if wrong.any() else np.nan,
        "right, red %": is_red[right].mean() if right.any() else np.nan,
        "right, green %": is_green[right].mean() if right.any() else np.nan,
        "stated in mm: within a factor of 2 %": within[stated[related]].mean() if stated[related].any() else np.nan,
        "stated as more than: true %": more.mean() if len(more) else np.nan,
        "all within a factor of 2 %": within.mean(),
        f"the same, off by less than {FAR:g} voxels %": within[known < FAR].mean() if (known < FAR).any() else np.nan,
    }
    return {
        "alignments": len(observations), "right": int(right.sum()), "wrong": int(wrong.sum()),
        "stated in mm": int(stated.sum()),
        **{name: 100 * float(value) for name, value in percent.items()},
        "Spearman": spearman(expected[related], true[related]),
    }  # fmt: skip


def log_ratios(observations: list[Observation], expected: np.ndarray) -> np.ndarray:
    """|log(expected / true error)| where the expected error is below LARGEST; less than LEAST counts as LEAST."""
    ratios = []
    for o, mm in zip(observations, expected, strict=True):
        voxels = mm / o.numbers["voxel_mm"]
        if o.error_mm is not None and is_stated(o, mm):
            ratios.append(abs(np.log(max(voxels, LEAST) / max(o.voxels, LEAST))))
    return np.array(ratios)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; ties have the mean of their ranks. NaN where all values of a side are the same."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, index, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[index]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


def map_scores(observations: list[Observation], mean: Regression, cell: Network) -> np.ndarray:
    """Rank correlation of expected and true error over the cells of each image; NaN where that means nothing."""
    return np.array([spearman(cell.of(cell_values(o, mean)), o.errors) if has_map(o) else np.nan for o in observations])


RED_MM, DIAGONAL_MM = 4.0, 65.0


def _nothing(fraction: float) -> None:
    pass


def draw(observations: list[Observation], expected: np.ndarray, green: float, path: Path) -> None:
    """Expected against true error of held-out subjects, by family; ``green`` in mm."""
    figure = Figure((7, 6), layout="constrained")
    axes = figure.add_subplot()
    for family in sorted({o.family for o in observations}):
        for put, marker in ((False, "o"), (True, ".")):
            here = [i for i, o in enumerate(observations) if o.family == family and bool(o.put) == put and o.error_mm]
            color = f"C{sorted({o.family for o in observations}).index(family)}"
            axes.plot(
                [observations[i].error_mm for i in here], expected[here], marker, color=color, ms=7 if not put else 4,
                alpha=0.6, label=None if put else family,
            )  # fmt: skip
    ends = np.array([0.05, 200])
    axes.plot(ends, ends, "k", lw=0.8)
    for factor in (0.5, 2):
        axes.plot(ends, factor * ends, "k:", lw=0.8)
    axes.axhspan(green, RED_MM, color="orange", alpha=0.15)
    axes.axhspan(RED_MM, 200, color="red", alpha=0.08)
    axes.axhspan(0.05, green, color="green", alpha=0.08)
    axes.set(
        xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="true mean error, mm", ylabel="expected error, mm"
    )
    axes.set_title("Subjects that were held out; small dots: a known deformation was put in")
    axes.legend()
    atomic.write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=90))


def finish(work: Path, output: Path, started: float, file: Path = expected_error.FILE) -> None:
    """Fits to what is in the work folder, and writes the calibration and the report."""
    everything, versions = observations(work)
    fitted, held_out = ([o for o in everything if o.held_out == side] for side in (False, True))
    mean = fit_mean(fitted)
    cell = fit_cells(fitted, mean)
    unseen = left_out_errors(fitted)
    green, least = green_limit(fitted, unseen), least_voxels(fitted, unseen)
    expected, rows = predict(mean, held_out), []
    factor = float(np.exp(np.percentile(log_ratios(held_out, expected), CERTAIN)))

    def row(name: str, chosen: Callable[[Observation], bool], observations: list, *values: np.ndarray) -> None:
        use = [i for i, o in enumerate(observations) if chosen(o)]
        if use:
            errors, maps = (x[use] for x in values)
            about = scores([observations[i] for i in use], errors, green, RED_MM, least)
            rows.append({"alignments of": name} | about | {"map, Spearman in an image": float(np.nanmean(maps))})

    kinds = {
        "as registered": lambda o: not o.put,
        "initial alignment alone": lambda o: o.put == "undeformed",
        "deformation put in, 1 or 3 voxels, differing from place to place": lambda o: o.put == "local",
        "deformation put in, 0.4 to 12 voxels": lambda o: o.put == "any",
    }
    of_held_out = held_out, expected, map_scores(held_out, mean, cell)
    row("held-out subjects", lambda o: True, *of_held_out)
    for name, chosen in kinds.items():
        row(f"held-out subjects, {name}", chosen, *of_held_out)
    of_families = everything, left_out_errors(everything), left_out_maps(everything)
    row("families left out of the fit", lambda o: True, *of_families)
    for name, chosen in kinds.items():
        row(f"families left out, {name}", chosen, *of_families)
    for family in sorted({o.family for o in everything}):
        row(f"family left out: {family}", lambda o, f=family: o.family == f, *of_families)
    values = {
        "format": FORMAT, "command": "python training/experiments/calibration.py --data DIR",
        "alignments": len(fitted), "subjects": len({o.case.split(",")[0] for o in fitted}),
        "mean": {"constant": mean.constant, "terms": [vars(t) for t in mean.terms]},
        "cell": {
            "terms": [vars(t) for t in cell.terms],
            **{name: getattr(cell, name).tolist() for name in ("hidden", "bias", "output")},
        },
        "factor": factor, "largest_voxels": LARGEST, "least_voxels": least,
        "green_mm": green, "red_mm": RED_MM, "diagonal_mm": DIAGONAL_MM,
    }  # fmt: skip
    atomic.write_json(values, file)
    note = (
        f"Expected error against the truth. Right: off by no more than {RIGHT_MM:g} mm; wrong: by more than {WRONG_MM:g} "
        f"mm, or images that do not belong together; both less for images of a diagonal below {DIAGONAL_MM:g} mm. The fit "
        f"is of {len(fitted)} alignments of other subjects."
    )
    about = {
        "preset": f"{len(versions)} cases",
        "registered by": ", ".join(f"{n} x {v}" for v, n in collections.Counter(versions).items()),
        "seeds": "the cases'",
        "device": "cpu",
        "seconds": round(time.time() - started),
    }
    report.write(output, "calibration", rows, about | {"note": note})
    draw(held_out, expected, green, output / "calibration.png")
    print(report.table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/calibration"), help="folder of what is done already")
    parser.add_argument("--output", type=Path, default=Path("training/results"))
    parser.add_argument("--turns", type=int, default=6, help="cases of each kind of a subject")
    parser.add_argument("--fit", action="store_true", help="fit to what is in the work folder; register nothing")
    args = parser.parse_args()
    started = time.time()
    if not args.fit:
        gather(args.data, args.work, args.turns)
    finish(args.work, args.output, started)


if __name__ == "__main__":
    main()
