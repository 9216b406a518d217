"""One pair of files registered into one folder."""

import os
from pathlib import Path

import SimpleITK as sitk

from DivRegNetLib.core.grid import affine_transform
from DivRegNetLib.core.points import invert_points
from DivRegNetLib.errors import InputError
from DivRegNetLib.io.atomic import staging_folder, write_json
from DivRegNetLib.io.images import check_right_angles, read_image, read_labels, write_image
from DivRegNetLib.io.landmarks import Landmarks, read_landmarks, write_landmarks
from DivRegNetLib.io.output_folder import exclusive
from DivRegNetLib.io.transforms import write_transform
from DivRegNetLib.models import Model
from DivRegNetLib.options import Options, Progress
from DivRegNetLib.quality import metrics
from DivRegNetLib.quality.expected_error import on_grid
from DivRegNetLib.quality.preview import write_preview
from DivRegNetLib.quality.verdict import judge
from DivRegNetLib.registration.check import check_image
from DivRegNetLib.registration.pipeline import register
from DivRegNetLib.result import Result
from DivRegNetLib.run.cohort.pairs import Pair
from DivRegNetLib.run.cohort.results import QUALITY


def register_files(
    pair: Pair,
    output: Path,
    options: Options,
    *,
    model: Model | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Registers files and writes the results, which appear in the folder together, ``quality.json`` last.

    Writes ``warped.nii.gz``, ``transform.h5``, ``inverse.h5``, ``displacement.nii.gz`` (3-vectors, LPS mm, on the fixed
    grid), ``preview.png``, ``quality.json`` and, where labels or landmarks are given, ``warped_labels.nii.gz`` and
    ``warped_landmarks.mrk.json`` (the moving landmarks in fixed space), and where it is asked for ``error_map.nii.gz`` (the
    expected error, mm, on the fixed grid).

    Args:
        model: already loaded; None: ``options.model`` is loaded.
        overwrite: results that are in the folder.
    Returns:
        The content of ``quality.json``.
    Raises:
        InputError: a file cannot be used, another process is writing into the folder, or it holds results already and
            ``overwrite`` is False.
    """
    with exclusive(output):
        if (output / QUALITY).exists() and not overwrite:
            raise InputError(f"{output}: holds the results of a registration; choose another folder, or --overwrite")
        return _register_files(pair, output, options, model, progress)


def _register_files(pair: Pair, output: Path, options: Options, model: Model | None, progress: Progress | None) -> dict:
    """:func:`register_files` in a folder that this process holds and whose results may be replaced."""
    _both_or_none(pair.fixed_labels, pair.moving_labels, "labels")
    _both_or_none(pair.fixed_landmarks, pair.moving_landmarks, "landmarks")
    fixed, moving = (_read_checked(path) for path in (pair.fixed, pair.moving))
    check_right_angles(fixed, str(pair.fixed))
    masks = [None if path is None else read_image(path) for path in (pair.fixed_mask, pair.moving_mask)]
    labels = [read_labels(p) for p in (pair.fixed_labels, pair.moving_labels) if p is not None]
    landmarks = [read_landmarks(p) for p in (pair.fixed_landmarks, pair.moving_landmarks) if p is not None]
    if landmarks:
        metrics.landmark_error(*(marks.points for marks in landmarks))  # raises if they are not paired, before the work
    arguments = options.as_arguments() | ({} if model is None else {"model": model})
    result = register(fixed, moving, fixed_mask=masks[0], moving_mask=masks[1], progress=progress, **arguments)

    writers = {
        "warped.nii.gz": lambda path: write_image(result.warped, path),
        "transform.h5": lambda path: write_transform(result.transform, path),
        "inverse.h5": lambda path: write_transform(result.inverse, path),
        "displacement.nii.gz": lambda path: write_image(
            sitk.Cast(result.transform.GetDisplacementField(), sitk.sitkVectorFloat32), path
        ),
        "preview.png": lambda path: write_preview(fixed, moving, result, path),
    }
    if result.error_map is not None:
        writers["error_map.nii.gz"] = lambda path: write_image(on_grid(result.error_map, fixed), path)
    report = {"quality": dict(result.quality)}
    if labels:
        report["quality"]["labels"], warped_labels = _compare_labels(*labels, result)
        writers["warped_labels.nii.gz"] = lambda path: write_image(warped_labels, path)
    if landmarks:
        report["quality"]["landmarks_mm"], in_fixed = _compare_landmarks(*landmarks, result)
        writers["warped_landmarks.mrk.json"] = lambda path: write_landmarks(in_fixed, path)
    inputs = {os.path.realpath(path) for path in pair.paths().values()}
    for name in (*writers, QUALITY):
        if os.path.realpath(output / name) in inputs:
            raise InputError(f"{output / name}: is an input of this registration; choose another output folder")
    report |= {
        "verdict": judge(report["quality"]).as_dict(),
        "files": sorted([*writers, QUALITY]),
        "inputs": {name: str(path) for name, path in pair.paths().items()},
        "settings": result.settings,
        "seconds": {stage: round(s, 3) for stage, s in result.timings.items()},
        "initial_alignment_lps": result.initial.tolist(),
        "warnings": list(result.warnings),
    }
    try:
        with staging_folder(output) as folder:
            for name, write in writers.items():
                write(folder / name)
            write_json(report, folder / QUALITY)
            (output / QUALITY).unlink(missing_ok=True)
            for name in (*writers, QUALITY):
                os.replace(folder / name, output / name)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from error
    return report


def _read_checked(path: Path) -> sitk.Image:
    """An image that can be registered. Errors name its file."""
    return check_image(read_image(path), str(path))


def _both_or_none(fixed: Path | None, moving: Path | None, what: str) -> None:
    if (fixed is None) != (moving is None):
        raise InputError(f"{what} are compared in pairs: give both the fixed and the moving {what}")


def _compare_labels(fixed: sitk.Image, moving: sitk.Image, result: Result) -> tuple[dict, sitk.Image]:
    """Overlap before and after the initial alignment and after registration, and the warped labels on the fixed
    labels' grid."""
    stages = {"before": sitk.Transform(), "aligned": affine_transform(result.initial), "after": result.transform}
    warped = {name: sitk.Resample(moving, fixed, t, sitk.sitkNearestNeighbor, 0) for name, t in stages.items()}
    return {name: metrics.label_overlap(fixed, image) for name, image in warped.items()}, warped["after"]


def _compare_landmarks(fixed: Landmarks, moving: Landmarks, result: Result) -> tuple[dict, Landmarks]:
    """Target registration error before and after the initial alignment and after registration, and the moving landmarks in
    fixed space."""
    stages = {"before": None, "aligned": affine_transform(result.initial), "after": result.transform}
    errors = {name: metrics.landmark_error(fixed.points, moving.points, t) for name, t in stages.items()}
    in_fixed = Landmarks(invert_points(result.transform, moving.points), moving.labels)
    return {
        name: {"mean": float(e.mean()), "largest": float(e.max()), "each": e.tolist()} for name, e in errors.items()
    }, in_fixed
