"""One pair of files registered into one folder, and a table of pairs into a folder each."""

import contextlib
import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib import models
from DivRegNetLib.core.device import pick_device
from DivRegNetLib.core.grid import affine_transform
from DivRegNetLib.errors import Cancelled, DivRegNetError, InputError
from DivRegNetLib.io.atomic import check_file, write_json, write_text
from DivRegNetLib.io.claim import PART, claimed, tidy
from DivRegNetLib.io.images import check_right_angles, read_image, read_labels, write_image
from DivRegNetLib.io.landmarks import Landmarks, read_landmarks, write_landmarks
from DivRegNetLib.io.transforms import invert_points, write_transform
from DivRegNetLib.options import Options, Progress
from DivRegNetLib.quality import metrics
from DivRegNetLib.quality.preview import write_preview
from DivRegNetLib.registration import memory
from DivRegNetLib.registration.check import check_image
from DivRegNetLib.registration.pipeline import Result, register

QUALITY = "quality.json"
TABLE = "results.csv"
LARGEST_TABLE_BYTES = 100_000_000  # of a table of pairs
TABLE_COLUMNS = (
    "name", "status", "dice_before", "dice_after", "tre_mm_before", "tre_mm_after", "nmi_before", "nmi_after",
    "folded_percent", "seconds", "message",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The files of one registration; all but the first two may be missing."""

    fixed: Path
    moving: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_landmarks: Path | None = None
    moving_landmarks: Path | None = None

    def paths(self) -> list[Path]:
        return [getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None]


def register_files(
    pair: Pair,
    output: Path,
    options: Options,
    *,
    model: models.Model | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Registers files and writes the results, which appear in the folder together, ``quality.json`` last.

    Writes ``warped.nii.gz``, ``transform.h5``, ``inverse.h5``, ``displacement.nii.gz`` (3-vectors, LPS mm, on the fixed
    grid), ``preview.png``, ``quality.json`` and, where they are given, ``warped_labels.nii.gz`` and
    ``warped_landmarks.mrk.json`` (the moving landmarks in fixed space).

    Returns:
        What ``quality.json`` holds.
    Raises:
        InputError: a file cannot be used, another process writes into the folder, or it holds results already and
            ``overwrite`` is False.
    """
    with claimed(output):
        if (output / QUALITY).exists() and not overwrite:
            raise InputError(f"{output}: holds the results of a registration; choose another folder, or --overwrite")
        return _register_files(pair, output, options, model, progress)


def _register_files(
    pair: Pair, output: Path, options: Options, model: models.Model | None, progress: Progress | None
) -> dict:
    """:func:`register_files` in a folder that is this process's own and holds no results that count."""
    _both_or_none(pair.fixed_labels, pair.moving_labels, "labels")
    _both_or_none(pair.fixed_landmarks, pair.moving_landmarks, "landmarks")
    fixed, moving = (_read_checked(path) for path in (pair.fixed, pair.moving))
    check_right_angles(fixed, str(pair.fixed))
    masks = [None if path is None else read_image(path) for path in (pair.fixed_mask, pair.moving_mask)]
    labels = [read_labels(p) for p in (pair.fixed_labels, pair.moving_labels) if p is not None]
    landmarks = [read_landmarks(p) for p in (pair.fixed_landmarks, pair.moving_landmarks) if p is not None]
    if landmarks:
        metrics.landmark_error(*(marks.points for marks in landmarks))  # pairs, before the work and not after
    arguments = options.as_arguments() | ({} if model is None else {"model": model})
    result = register(fixed, moving, fixed_mask=masks[0], moving_mask=masks[1], progress=progress, **arguments)

    written = {
        "warped.nii.gz": lambda path: write_image(result.warped, path),
        "transform.h5": lambda path: write_transform(result.transform, path),
        "inverse.h5": lambda path: write_transform(result.inverse, path),
        "displacement.nii.gz": lambda path: write_image(
            sitk.Cast(result.transform.GetDisplacementField(), sitk.sitkVectorFloat32), path
        ),
        "preview.png": lambda path: write_preview(fixed, moving, result, path),
    }
    report = {"quality": dict(result.quality)}
    if labels:
        report["quality"]["labels"], warped_labels = _compare_labels(*labels, result)
        written["warped_labels.nii.gz"] = lambda path: write_image(warped_labels, path)
    if landmarks:
        report["quality"]["landmarks_mm"], in_fixed = _compare_landmarks(*landmarks, result)
        written["warped_landmarks.mrk.json"] = lambda path: write_landmarks(in_fixed, path)
    inputs = {os.path.realpath(path) for path in pair.paths()}
    for name in (*written, QUALITY):
        if os.path.realpath(output / name) in inputs:
            raise InputError(f"{output / name}: is an input of this registration; choose another output folder")
    report |= {
        "files": sorted([*written, QUALITY]),
        "inputs": {f.name: str(getattr(pair, f.name)) for f in fields(pair) if getattr(pair, f.name) is not None},
        "settings": result.settings,
        "seconds": {stage: round(s, 3) for stage, s in result.timings.items()},
        "initial_alignment_lps": result.initial.tolist(),
        "warnings": list(result.warnings),
    }
    with _staging(output) as folder:
        for name, write in written.items():
            write(folder / name)
        write_json(report, folder / QUALITY)
        (output / QUALITY).unlink(missing_ok=True)
        for name in (*written, QUALITY):
            os.replace(folder / name, output / name)
    return report


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder in the output folder where files wait until all are written.

    Raises:
        InputError: names the output folder and why it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=PART, dir=output, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from error


def _read_checked(path: Path) -> sitk.Image:
    """An image whose errors name its file."""
    return check_image(read_image(path), str(path))


def _both_or_none(fixed: Path | None, moving: Path | None, what: str) -> None:
    if (fixed is None) != (moving is None):
        raise InputError(f"{what} are compared in pairs: give both the fixed and the moving {what}")


def _compare_labels(fixed: sitk.Image, moving: sitk.Image, result: Result) -> tuple[dict, sitk.Image]:
    """Overlap before, after the initial alignment and after registration, and the warped labels on the fixed labels' grid."""
    stages = {"before": sitk.Transform(), "aligned": affine_transform(result.initial), "after": result.transform}
    warped = {name: sitk.Resample(moving, fixed, t, sitk.sitkNearestNeighbor, 0) for name, t in stages.items()}
    return {name: metrics.label_overlap(fixed, image) for name, image in warped.items()}, warped["after"]


def _compare_landmarks(fixed: Landmarks, moving: Landmarks, result: Result) -> tuple[dict, Landmarks]:
    """Target registration error before, after the initial alignment and after registration; moving ones in fixed space."""
    stages = {"before": None, "aligned": affine_transform(result.initial), "after": result.transform}
    errors = {name: metrics.landmark_error(fixed.points, moving.points, t) for name, t in stages.items()}
    in_fixed = Landmarks(invert_points(result.transform, moving.points), moving.labels)
    return {
        name: {"mean": float(e.mean()), "largest": float(e.max()), "each": e.tolist()} for name, e in errors.items()
    }, in_fixed


def read_pairs(table: Path) -> dict[str, Pair]:
    """A CSV with a header: ``fixed`` and ``moving``, and where wanted ``name`` and the other fields of :class:`Pair`.

    Paths are relative to the table's folder.

    Raises:
        InputError: names the table, the line and what is wrong.
    """
    known = [f.name for f in fields(Pair)]
    check_file(table, LARGEST_TABLE_BYTES)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [c.strip() for c in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a table of pairs ({error})") from error
    for needed in ("fixed", "moving"):
        if needed not in columns:
            raise InputError(f"{table}: has no column {needed!r}; its first line names the columns")
    if unknown := [c for c in columns if c not in [*known, "name"]]:
        raise InputError(f"{table}: unknown column {unknown[0]!r}; known are name, {', '.join(known)}")
    pairs: dict[str, Pair] = {}
    for line, row in enumerate(rows, start=2):
        if not (row["fixed"] and row["moving"]):
            raise InputError(f"{table}, line {line}: fixed and moving are needed")
        name = (row.get("name") or f"{len(pairs) + 1:04d}").strip()
        if name in pairs or name in (".", "..") or any(c in name for c in "/\\\0"):
            raise InputError(f"{table}, line {line}: the name {name!r} is taken or cannot be the name of a folder")
        pairs[name] = Pair(**{k: table.parent / row[k].strip() for k in known if row.get(k)})
    if not pairs:
        raise InputError(f"{table}: lists no pair")
    return pairs


def register_pairs(
    pairs: dict[str, Pair],
    output: Path,
    options: Options,
    *,
    overwrite: bool = False,
    dask: str | None = None,
    finished: Callable[[], object] | None = None,
) -> list[dict]:
    """Registers a cohort, each pair into a folder of its name, all into ``results.csv``, which grows as pairs finish.

    A model is loaded once per process. Pairs that are done are not done again. A pair that fails is a row that says why.

    Args:
        dask: where :mod:`DivRegNetLib.run.cohort_dask` finds its workers; None: here, one pair after another.
        finished: called after each pair.
    Returns:
        The rows of the table, in the order of ``pairs``.
    Raises:
        DivRegNetError: the model, or with ``dask`` the scheduler or its workers, cannot be used; or another process
            registers a cohort into this folder.
    """
    with claimed(output):
        if dask is None:
            source = _one_after_another(pairs, output, options, overwrite)
        else:
            from DivRegNetLib.run import cohort_dask

            source = cohort_dask.register_pairs(pairs, output, options, dask, overwrite=overwrite)
        found: dict[str, dict] = {}
        with contextlib.closing(source):  # an interruption here must end what the workers do
            for row in source:
                found[row["name"]] = row
                rows = [found[name] for name in pairs if name in found]
                write_text(csv_text(rows), output / TABLE)
                if finished is not None:
                    finished()
        return rows


def _one_after_another(pairs: dict[str, Pair], output: Path, options: Options, overwrite: bool) -> Iterator[dict]:
    model = models.load(options.model, pick_device(options.device))
    for name, pair in pairs.items():
        yield register_row(name, pair, output, options, lambda: model, overwrite=overwrite)


def register_row(
    name: str,
    pair: Pair,
    output: Path,
    options: Options,
    model: Callable[[], models.Model],
    *,
    overwrite: bool,
    progress: Progress | None = None,
) -> dict:
    """Registers a pair of a cohort into ``output / name`` unless that is done; returns its row, also where it failed.

    Raises:
        Cancelled: the progress callback returned False.
    """
    folder = output / name
    try:
        if (folder / QUALITY).exists() and not overwrite:
            tidy(folder)  # of a process that was killed after its last file
            report = json.loads((folder / QUALITY).read_text(encoding="utf-8"))
        else:
            report = register_files(pair, folder, options, model=model(), overwrite=overwrite, progress=progress)
        return _row(name, report)
    except Cancelled:
        raise
    except (DivRegNetError, OSError, ValueError) as error:
        return failed_row(name, str(error))
    except Exception as error:  # whatever it is, the other pairs are not to blame
        return failed_row(name, f"unexpected {type(error).__name__}: {error}")
    finally:
        memory.give_back()


def failed_row(name: str, message: str) -> dict:
    return dict.fromkeys(TABLE_COLUMNS, "") | {"name": name, "status": "failed", "message": message}


def _row(name: str, report: dict) -> dict:
    quality = report["quality"]
    labels, marks = quality.get("labels"), quality.get("landmarks_mm")
    return {
        "name": name,
        "status": "ok",
        "dice_before": _short(labels and labels["before"]["mean"]["dice"]),
        "dice_after": _short(labels and labels["after"]["mean"]["dice"]),
        "tre_mm_before": _short(marks and marks["before"]["mean"]),
        "tre_mm_after": _short(marks and marks["after"]["mean"]),
        "nmi_before": _short(quality["nmi"]["before"]),
        "nmi_after": _short(quality["nmi"]["after"]),
        "folded_percent": _short(quality["folded_percent"]),
        "seconds": _short(sum(report["seconds"].values())),
        "message": " ".join(report["warnings"]),
    }


def _short(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.4g}"


def csv_text(rows: list[dict]) -> str:
    lines = [",".join(TABLE_COLUMNS)]
    for row in rows:
        cells = [str(row[c]).replace('"', '""').replace("\n", " ") for c in TABLE_COLUMNS]
        lines.append(",".join(f'"{c}"' if any(x in c for x in ',"') else c for c in cells))
    return "\n".join(lines) + "\n"
