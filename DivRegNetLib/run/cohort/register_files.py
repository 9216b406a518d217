"""One pair of files registered into one folder."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import SimpleITK as sitk

from DivRegNetLib.core.composites import displacement_on
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.core.points import invert_points
from DivRegNetLib.errors import InputError, reason_of
from DivRegNetLib.io.atomic import staging_folder, write_json
from DivRegNetLib.io.images import check_right_angles, read_image, write_image
from DivRegNetLib.io.landmarks import Landmarks, write_landmarks
from DivRegNetLib.io.output_folder import exclusive
from DivRegNetLib.io.paths import unchanged, utf8_name
from DivRegNetLib.io.segmentations import read_mask, write_segmentation
from DivRegNetLib.io.transforms import write_transform
from DivRegNetLib.io.volume_files import files_of
from DivRegNetLib.models import Model
from DivRegNetLib.options import LANDMARK_ALIGNMENTS, Options, Progress
from DivRegNetLib.quality.expected_error import on_grid
from DivRegNetLib.quality.preview import write_preview
from DivRegNetLib.quality.verdict import judge
from DivRegNetLib.registration.check import check_image
from DivRegNetLib.registration.landmark_alignment import align_landmarks
from DivRegNetLib.result import Result
from DivRegNetLib.run.cohort.origin import origin_of
from DivRegNetLib.run.cohort.pairs import Pair
from DivRegNetLib.run.cohort.results import QUALITY
from DivRegNetLib.run.comparison import LabelMaps, LandmarkLists, not_inverted
from DivRegNetLib.run.process import without_collection

WARPED_LABELS = ("warped_labels.nii.gz", "warped_labels.seg.nrrd")  # of label maps, and of segmentations with names
PREVIEW, ERROR_MAP = "preview.png", "error_map.nii.gz"
POSSIBLE_FILES = (
    "warped.nii.gz", "transform.h5", "inverse.h5", "displacement.nii.gz", PREVIEW, *WARPED_LABELS,
    "warped_landmarks.mrk.json", ERROR_MAP,
)  # fmt: skip


def register_files(
    pair: Pair,
    output: Path,
    options: Options,
    *,
    model: Model | None = None,
    overwrite: bool = False,
    preview: bool = True,
    progress: Progress | None = None,
) -> dict:
    """Registers files and writes the results, which appear in the folder together, ``quality.json`` last.

    Writes ``warped.nii.gz``, ``transform.h5``, ``inverse.h5``, ``displacement.nii.gz`` (3-vectors, LPS mm, on the fixed
    grid), ``preview.png``, ``quality.json`` and, where labels or landmarks are given, ``warped_labels.nii.gz`` (of a
    segmentation ``warped_labels.seg.nrrd``) and ``warped_landmarks.mrk.json`` (the moving landmarks in fixed space), and where
    it is asked for ``error_map.nii.gz`` (the expected error, mm, on the fixed grid).

    Args:
        model: already loaded; None: ``options.model`` is loaded.
        overwrite: results that are in the folder.
        preview: draw the preview.
    Returns:
        The content of ``quality.json``.
    Raises:
        InputError: a file cannot be used, another process is writing into the folder, or it holds results already and
            ``overwrite`` is False.
    """
    utf8_name(output)
    with exclusive(output):
        if (output / QUALITY).exists() and not overwrite:
            raise InputError(f"{output}: holds the results of a registration; choose another folder, or --overwrite")
        return _register_files(pair, output, options, model, preview, progress)


def _register_files(
    pair: Pair, output: Path, options: Options, model: Model | None, preview: bool, progress: Progress | None
) -> dict:
    """:func:`register_files` in a folder that this process holds and whose results may be replaced."""
    _check_no_input(pair, output)
    with ThreadPoolExecutor(1) as thread, unchanged(*_files_of(pair)):
        pipeline = thread.submit(_pipeline)  # while the files are read
        fixed, moving = (_read_checked(path) for path in (pair.fixed, pair.moving))
        check_right_angles(fixed, str(pair.fixed))
        masks = [None if path is None else read_mask(path) for path in (pair.fixed_mask, pair.moving_mask)]
        labels = LabelMaps.read(pair.fixed_labels, pair.moving_labels)
        landmarks = LandmarkLists.read(pair.fixed_landmarks, pair.moving_landmarks)
        origin = origin_of(pair, options, None if model is None else model.card)
    options = replace(options, align=_alignment(options, landmarks))
    arguments = options.as_arguments() | ({} if model is None else {"model": model})
    result = pipeline.result().register(
        fixed, moving, fixed_mask=masks[0], moving_mask=masks[1], progress=progress, **arguments
    )

    writers = {
        "warped.nii.gz": lambda path: write_image(result.warped, path),
        "transform.h5": lambda path: write_transform(result.transform, path),
        "inverse.h5": lambda path: write_transform(result.inverse, path),
        "displacement.nii.gz": lambda path: write_image(
            displacement_on(result.transform, Grid.of(result.warped), sitk.sitkVectorFloat32), path
        ),
    }
    if result.error_map is not None:
        writers[ERROR_MAP] = lambda path: write_image(on_grid(result.error_map, fixed), path)
    report, notes = {"quality": dict(result.quality)}, list(result.warnings)
    stages = {"before": sitk.Transform(), "aligned": affine_transform(result.initial), "after": result.transform}
    if labels:
        report["quality"]["labels"], warped_labels = labels.compare(stages)
        notes += labels.notes
        name = WARPED_LABELS[bool(labels.metadata)]
        writers[name] = lambda path: write_segmentation(warped_labels, labels.metadata, path)
    if landmarks:
        report["quality"]["landmarks_mm"] = landmarks.compare(stages)
        report["quality"]["landmark_labels"] = list(landmarks.pairs.labels)
        inverted = invert_points(result.transform, landmarks.moving.points, result.initial)
        notes += [*landmarks.pairs.notes, *not_inverted(landmarks.moving.labels, inverted)]
        in_fixed = Landmarks(inverted.points, landmarks.moving.labels)
        writers["warped_landmarks.mrk.json"] = lambda path: write_landmarks(in_fixed, path)
    report |= {
        "verdict": judge(report["quality"]).as_dict(),
        "inputs": {name: utf8_name(path) for name, path in pair.paths().items()},
        "origin": origin,
        "settings": result.settings,
        "seconds": {stage: round(s, 3) for stage, s in result.timings.items()},
        "initial_alignment_lps": result.initial.tolist(),
    }
    try:
        with staging_folder(output) as folder:
            # ITK writes one file after the other while the preview is drawn.
            with ThreadPoolExecutor(1) as thread:
                written = [thread.submit(_write, w, folder / name, output / name) for name, w in writers.items()]
                if preview:
                    _write(
                        lambda path: notes.extend(_write_preview(fixed, moving, result, path)),
                        folder / PREVIEW,
                        output / PREVIEW,
                    )
                for file in written:
                    file.result()
            names = [name for name in POSSIBLE_FILES if (folder / name).exists()]
            write_json(report | {"files": sorted([*names, QUALITY]), "warnings": notes}, folder / QUALITY)
            (output / QUALITY).unlink(missing_ok=True)
            for name in POSSIBLE_FILES:
                if name not in names:  # of an earlier registration into this folder
                    (output / name).unlink(missing_ok=True)
            for name in (*names, QUALITY):
                os.replace(folder / name, output / name)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from error
    return json.loads((output / QUALITY).read_text(encoding="utf-8"))


def _pipeline() -> ModuleType:
    """The module with :func:`DivRegNetLib.register`, which is imported with PyTorch in a second."""
    with without_collection():
        from DivRegNetLib.registration import pipeline
    return pipeline


def _write(write: Callable[[Path], object], staged: Path, path: Path) -> None:
    """Writes a file into the staging folder; an error names the file that it was to become."""
    try:
        write(staged)
    except InputError as error:
        raise InputError(str(error).replace(str(staged), str(path))) from error


def _write_preview(fixed: sitk.Image, moving: sitk.Image, result: Result, path: Path) -> list[str]:
    """Draws the preview. A sentence where that fails: it must not cost the registration.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        write_preview(fixed, moving, result, path)
    except InputError:
        raise
    except Exception as error:  # whatever is wrong with Pillow
        return [f"there is no preview, as it could not be drawn ({type(error).__name__}: {reason_of(error)})"]
    return []


def _files_of(pair: Pair) -> list[Path]:
    """All files of a pair; those whose parts cannot be listed as they are, since reading them gives the reason."""
    files = []
    for path in pair.paths().values():
        try:
            files += files_of(path)
        except OSError:
            files.append(path)
    return files


def _check_no_input(pair: Pair, output: Path) -> None:
    """Raises InputError where a result would replace an input of its own registration."""
    inputs = {os.path.realpath(path) for path in pair.paths().values()}
    for name in (*POSSIBLE_FILES, QUALITY):
        if os.path.realpath(output / name) in inputs:
            raise InputError(f"{output / name}: is an input of this registration; choose another output folder")


def _read_checked(path: Path) -> sitk.Image:
    """An image that can be registered. Errors name its file."""
    return check_image(read_image(path), str(path))


def _alignment(options: Options, landmarks: LandmarkLists | None) -> "str | sitk.Transform":
    """The initial alignment of the options; the transform itself where it is fitted to the landmarks."""
    kind = LANDMARK_ALIGNMENTS.get(options.align) if isinstance(options.align, str) else None
    if kind is None:
        return options.align
    if landmarks is None:
        raise InputError(f"--align {options.align} needs --fixed-landmarks and --moving-landmarks, or these columns")
    return affine_transform(align_landmarks(landmarks.pairs.fixed, landmarks.pairs.moving, kind))
