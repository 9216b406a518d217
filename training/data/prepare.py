"""Brings a cohort of raw volumes into one space, once, so that training reads nothing but arrays.

    python training/data/prepare.py --images DIR [--labels DIR] --output build/cohorts/NAME
    python training/data/prepare.py --fixed DIR --moving DIR [--fixed-labels DIR --moving-labels DIR] --output ...
    python training/data/prepare.py --manifest CSV --output ...
    python training/data/prepare.py --cohort DIR --output ...       nnU-Net, Decathlon, LiTS or a plain folder

Every volume is aligned to one of them, resampled and normalised just as a registration does before its network sees
anything. Given again, the command goes on where it was interrupted, and redoes what has changed: a source file, a setting,
the reference. The spacing and the reference are chosen from the whole cohort; give ``--spacing`` and ``--reference`` where
it will grow, or a new volume may change them.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import SimpleITK as sitk
import torch
from tqdm import tqdm

from DivRegNetLib import affine, files
from DivRegNetLib.check import check_geometry, check_image
from DivRegNetLib.errors import DeviceError, DivRegNetError, InputError, is_out_of_memory
from DivRegNetLib.geometry import LARGEST_WORKING_VOXELS, Grid
from DivRegNetLib.intensity import normalise
from DivRegNetLib.options import ALIGNMENTS
from DivRegNetLib.physical import resample_mask, resample_smooth
from training.data import layouts
from training.data.cohort import FORMAT, SPLITS
from training.data.layouts import Source

NORMALISATION = "robust"
MULTIPLE = 16  # sides of the common grid, in voxels: what RegNet takes without padding
MOST_VOXELS = 1_200_000  # of a grid whose spacing is chosen here
NICE = tuple(step * 10.0**power for power in (-2, -1, 0, 1) for step in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
NIFTI_SIZE = ("vox_offset", "bitpix", *(f"dim[{i}]" for i in range(8)))  # what ITK calls these fields of the header
INTERRUPTED = 130

Progress = Callable[[str, int, int], object]
"""Called with the name of a volume that is done, how many are, and how many there are; may raise to stop."""


@dataclass(frozen=True)
class Preparation:
    """How a cohort is brought into one space.

    spacing_mm: of the common grid; None: the median of the volumes' median spacings, rounded, and coarser where the grid
        would have more than MOST_VOXELS.
    align: to the reference: ``none``, ``centre``, ``rigid`` or ``affine``, as a registration starts with.
    reference: name of the volume whose extent is the common grid's; None: of those in training that may be fixed, the one
        of median size in mm^3.
    fractions, seed: see :func:`training.data.layouts.split`. Volumes are dealt out before broken ones are left out.
    skip_broken: leave files out that cannot be used, and list them; else they are an error.
    workers: processes; 0: one per CPU. One holds about five times the largest volume in memory.
    """

    spacing_mm: float | None = None
    align: str = "affine"
    reference: str | None = None
    fractions: tuple = (0.7, 0.15, 0.15)
    seed: int = 1
    skip_broken: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a value that cannot be meant."""
        if self.spacing_mm is not None and not (math.isfinite(self.spacing_mm) and 0.1 <= self.spacing_mm <= 50):
            raise ValueError(f"spacing_mm is a number of millimetres from 0.1 to 50, got {self.spacing_mm!r}")
        if self.align not in ALIGNMENTS:
            raise ValueError(f"align is one of {', '.join(ALIGNMENTS)}, got {self.align!r}")
        if self.workers < 0:
            raise ValueError(f"workers is a number of processes, 0 for one per CPU, got {self.workers!r}")
        object.__setattr__(self, "fractions", layouts.check_fractions(self.fractions))


class _Broken(Exception):
    """A file that cannot be used, and why."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason.removeprefix(f"{file}: ")


@dataclass(frozen=True)
class _Task:
    """What a worker needs to make one volume's file.

    reference: its image, and what tells whether that is still the same file.
    grid: the common one.
    """

    source: Source
    reference: tuple[Path, str]
    grid: Grid
    align: str
    output: Path
    fingerprint: str

    @property
    def file(self) -> Path:
        return self.output / f"{self.source.name}.npz"


def prepare(
    sources: Sequence[Source],
    output: Path,
    preparation: Preparation = Preparation(),
    progress: Progress | None = None,
) -> Path:
    """Writes the cache that :func:`training.data.cohort.load` reads: a ``NAME.npz`` per volume, and last ``cohort.json``.

    Each file appears whole or not at all, so several processes may work on one cache, and one that is killed leaves what it
    has done. Uses worker processes that import the main module anew: scripts need ``if __name__ == "__main__":``.

    Args:
        progress: None shows a bar.
    Returns:
        the path of ``cohort.json``.
    Raises:
        ValueError: files that cannot be used (all are named), unless they are to be skipped, or a cohort, split, reference
            or spacing that cannot be; DeviceError: the memory ran out.
    """
    sources, output = layouts.unique(list(sources), "the cohort"), Path(output)
    splits = layouts.split(sources, preparation.fractions, preparation.seed)
    broken: dict[str, _Broken] = {}
    sizes: dict[str, tuple[float, float]] = {}
    for source in sources:
        try:
            sizes[source.name] = _measure(source)
        except _Broken as error:
            broken[source.name] = error
    reference, image = _choose_reference(sources, splits, sizes, preparation.reference, broken)
    grid = _common_grid(Grid.of(image), preparation.spacing_mm, [spacing for spacing, _ in sizes.values()])
    del image

    settings = [FORMAT, NORMALISATION, preparation.align, grid.size, grid.spacing, grid.origin]
    reference_state = _state(reference.images[0])
    tasks, records = [], {}
    for source in (source for source in sources if source.name not in broken):
        state = [[_state(path) for path in source.images], source.labels and _state(source.labels)]
        fingerprint = hashlib.sha256(json.dumps([settings, reference_state, state]).encode()).hexdigest()
        task = _Task(source, (reference.images[0], reference_state), grid, preparation.align, output, fingerprint)
        if (record := _recorded(task)) is None:
            tasks.append(task)
        else:
            records[source.name] = record
    output.mkdir(parents=True, exist_ok=True)
    listing = output / "cohort.json"
    if tasks:
        listing.unlink(missing_ok=True)  # where it is, all that it lists is there
    with contextlib.ExitStack() as stack:
        progress = progress or stack.enter_context(_bar(len(sources), len(broken) + len(records)))
        done = stack.enter_context(contextlib.closing(_run(tasks, preparation.workers or os.cpu_count() or 1)))
        for task, result in done:
            (broken if isinstance(result, _Broken) else records)[task.source.name] = result
            progress(task.source.name, len(broken) + len(records), len(sources))
    unfit = [broken[source.name] for source in sources if source.name in broken]
    if unfit and (not preparation.skip_broken or not records):
        raise InputError(_complaint(unfit, len(sources)))
    asked = asdict(preparation)
    del asked["workers"], asked["skip_broken"]  # they change nothing in the result
    about = {
        "format": FORMAT,
        "spacing": grid.spacing[0],
        "shape": list(grid.shape),
        "origin": list(grid.origin),
        "normalisation": NORMALISATION,
        "seed": preparation.seed,
        "reference": reference.name,
        "preparation": asked,
        "volumes": [
            _entry(source, splits[source.name], records[source.name]) for source in sources if source.name in records
        ],
        "skipped": [{"file": str(error.file), "reason": error.reason} for error in unfit],
    }
    files.write_json(about, listing)
    return listing


def _entry(source: Source, split: str, record: dict) -> dict:
    """What cohort.json says of a volume."""
    return {
        "name": source.name,
        "subject": source.subject,
        "role": source.role,
        "split": split,
        "contrasts": list(source.contrasts),
        "labels": source.labels is not None,
        **record,
        "files": {
            "images": [str(path.resolve()) for path in source.images],
            "labels": source.labels and str(source.labels.resolve()),
        },
    }


def _complaint(unfit: list[_Broken], total: int) -> str:
    lines = [f"  {error.file}: {error.reason}" for error in unfit]
    return "\n".join(
        [
            f"{len(unfit)} of {total} volumes cannot be used:",
            *lines,
            "repair or remove them, or leave them out with --skip-broken; what else is prepared is kept",
        ]
    )


@contextlib.contextmanager
def _bar(total: int, done: int) -> Iterator[Progress]:
    with tqdm(total=total, initial=done, desc="preparing", unit="volume") as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


def _measure(source: Source) -> tuple[float, float]:
    """Median side of a voxel (mm) and extent (mm^3) of a volume, from its header alone where that can be.

    Raises:
        _Broken: a file is missing, or cannot be opened.
    """
    with _blame() as at:
        for path in reversed(source.files):  # the first image last
            at(path)
            if not path.exists():
                raise InputError("there is no such file")
        reader = sitk.ImageFileReader()
        slices = 1
        if path.is_dir():
            names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
            path, slices = Path(names[0]) if names else path, len(names)
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            reader = files.read_image(path)  # for its error
        spacing, size = ((*numbers, 1.0, 1.0)[:3] for numbers in (reader.GetSpacing(), reader.GetSize()))
        return float(np.median(spacing)), float(np.prod(spacing) * np.prod(size) * slices)


def _choose_reference(
    sources: list[Source],
    splits: dict[str, str],
    sizes: dict[str, tuple[float, float]],
    wanted: str | None,
    broken: dict[str, _Broken],
) -> tuple[Source, sitk.Image]:
    """The reference and its first image; candidates that turn out broken are added to ``broken``.

    Raises:
        ValueError: the one that is wanted is not there or broken, or all are.
    """
    if wanted is not None:
        found = [source for source in sources if source.name == wanted]
        if not found:
            names = ", ".join(source.name for source in sources[:5])
            raise ValueError(f"the reference {wanted!r} is not in the cohort; its volumes are {names}, ...")
        if wanted in broken:
            raise InputError(f"the reference cannot be used: {broken[wanted].file}: {broken[wanted].reason}")
    else:
        usable = [source for source in sources if source.name in sizes]
        training = [source for source in usable if source.role != "moving" and splits[source.name] == "train"]
        ranked = sorted(training or usable, key=lambda source: (sizes[source.name][1], source.name))
        middle = (len(ranked) - 1) / 2
        found = [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: abs(i - middle))]
        found += [source for source in usable if source not in found]
    for source in found:
        try:
            return source, _read(source)[0][0]
        except _Broken as error:
            broken[source.name] = error
    raise InputError(_complaint([broken[source.name] for source in sources if source.name in broken], len(sources)))


def _common_grid(reference: Grid, spacing: float | None, spacings: list[float]) -> Grid:
    """The isotropic grid along the LPS axes that covers the reference.

    Raises:
        ValueError: the spacing asked for makes a grid larger than a registration works on.
    """
    if spacing is not None:
        grid = reference.axis_aligned(spacing, multiple=MULTIPLE)
        if math.prod(grid.size) > LARGEST_WORKING_VOXELS:
            raise ValueError(
                f"at {spacing:g} mm the common grid has {' x '.join(map(str, grid.size))} voxels, more than the "
                f"{LARGEST_WORKING_VOXELS:,} that a registration works on; choose a coarser spacing"
            )
        return grid
    median = float(np.median(spacings))
    nearest = min(range(len(NICE)), key=lambda i: abs(math.log(NICE[i] / median)))
    grids = (reference.axis_aligned(step, multiple=MULTIPLE) for step in NICE[nearest:])
    return next(grid for grid in grids if math.prod(grid.size) <= MOST_VOXELS or grid.spacing[0] >= NICE[-1])


def _state(path: Path) -> str:
    """What changes when a file, or a file in a folder, does: paths, sizes and times."""
    listed = sorted(path.iterdir()) if path.is_dir() else [path]
    return json.dumps([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in listed])


def _recorded(task: _Task) -> dict | None:
    """``fingerprint`` and ``to_reference`` of a volume that is made already; None where it is to be made."""
    try:
        with zipfile.ZipFile(task.file) as archive:
            record = json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return record if record["fingerprint"] == task.fingerprint else None


def _run(tasks: list[_Task], workers: int) -> Iterator[tuple[_Task, dict | _Broken]]:
    """Every task with its record or what is broken, as they end.

    Raises:
        DeviceError: the memory ran out.
    """
    workers = min(workers, len(tasks))
    try:
        if workers <= 1:
            with _one_thread():
                for task in tasks:
                    yield task, _make(task)
            return
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        try:
            futures = {pool.submit(_make, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    except (BrokenProcessPool, MemoryError) as error:
        raise DeviceError(
            f"a worker of {workers} ended, most likely because the memory ran out; give fewer --workers. What is "
            "prepared is kept"
        ) from error


def _start_worker() -> None:
    """One thread; Ctrl-C is the parent's to handle; the end of the parent, however it comes, is the end of the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker, so that a sum comes out the same in whichever process it is made."""
    threads = torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads[1])


def _make(task: _Task) -> dict | _Broken:
    """Writes one volume's file, and returns its record; or what is broken."""
    try:
        arrays, matrix = _arrays(task)
    except _Broken as error:
        return error
    record = {"to_reference": matrix.tolist(), "fingerprint": task.fingerprint}

    def write(part: Path) -> None:
        np.savez_compressed(part, **arrays)
        with zipfile.ZipFile(part, "a") as archive:  # the record in the same file: they cannot contradict each other
            archive.comment = json.dumps(record).encode()

    files.write_whole(task.file, write)
    return record


def _arrays(task: _Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """``images`` (C, D, H, W) float16 and perhaps ``labels`` (D, H, W) uint8 on the common grid, and the (4, 4) LPS map
    from the common space to the volume.

    Raises:
        _Broken: a file cannot be used.
    """
    source, grid = task.source, task.grid
    images, labels = _read(source)
    arrays, matrix = {}, np.eye(4)
    with _blame() as at:
        at(source.images[0])
        if source.images[0] != task.reference[0]:
            matrix = affine.align(_reference_image(*task.reference), images[0], task.align)
        stack = []
        for path, image in zip(source.images, images, strict=True):
            at(path)
            values = sitk.GetArrayFromImage(resample_smooth(image, grid, matrix))
            if values.min() == values.max():
                raise InputError(
                    f"nothing of it lies in the common space, aligned by {task.align!r}; try another --align"
                )
            stack.append(normalise(torch.from_numpy(values)[None, None], NORMALISATION)[0, 0].numpy())
        arrays["images"] = np.stack(stack).astype(np.float16)
        if labels is not None:
            at(source.labels)
            arrays["labels"] = sitk.GetArrayFromImage(resample_mask(labels, grid, matrix)).astype(np.uint8)
            if not arrays["labels"].any():
                raise InputError(f"no label lies in the common space, aligned by {task.align!r}; try another --align")
    return arrays, matrix


@lru_cache(maxsize=1)
def _reference_image(path: Path, state: str) -> sitk.Image:
    """The reference, read once by each worker; ``state`` tells one content of the file from another."""
    return files.read_image(path)


def _read(source: Source) -> tuple[list[sitk.Image], sitk.Image | None]:
    """The images of a source and its labels as uint8, all checked.

    Raises:
        _Broken: the file that cannot be used.
    """
    images, labels = [], None
    with _blame() as at:
        for path in source.images:
            at(path)
            _check_complete(path)
            images.append(check_image(files.read_image(path), source.name))
        if source.labels is not None:
            at(source.labels)
            _check_complete(source.labels)
            labels = files.read_labels(source.labels)
            check_geometry(labels, f"{source.name} label map")
            values = sitk.GetArrayViewFromImage(labels)
            low, high = int(values.min()), int(values.max())
            if low < 0 or high > 255:
                raise InputError(f"holds labels from {low} to {high}, 0 to 255 are possible; renumber them")
            if high == 0:
                raise InputError("no voxel is labelled; draw labels or remove the file")
            labels = sitk.Cast(labels, sitk.sitkUInt8)
            if Grid.of(labels) != Grid.of(images[0]):
                on_image = resample_mask(labels, Grid.of(images[0]), np.eye(4))
                if not sitk.GetArrayViewFromImage(on_image).any():
                    raise InputError(f"no label lies where {source.images[0].name} is; give both files the same origin")
    return images, labels


def _check_complete(path: Path) -> None:
    """Raises InputError for a NIfTI file that is cut short, which ITK reads as zeros without a word."""
    if path.is_dir() or not path.name.lower().endswith((".nii", ".nii.gz")):
        return
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        header = {key: float(reader.GetMetaData(key)) for key in reader.GetMetaDataKeys() if key in NIFTI_SIZE}
    except (RuntimeError, ValueError):
        return  # reading it will say why
    sides = [header[f"dim[{i}]"] for i in range(1, int(header["dim[0]"]) + 1)]
    expected = header["vox_offset"] + header["bitpix"] / 8 * math.prod(sides)
    length = path.stat().st_size
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        if compressed:
            with gzip.open(path) as file:
                length = sum(map(len, iter(lambda: file.read(1 << 20), b"")))
    except (EOFError, gzip.BadGzipFile, zlib.error):
        length = 0
    if length < expected:
        raise InputError("the file is cut short or damaged; fetch it again")


@contextlib.contextmanager
def _blame() -> Iterator[Callable[[Path], None]]:
    """Turns what goes wrong into _Broken of the file last told; memory that ran out is no file's fault."""
    told: list[Path] = []
    try:
        yield told.append
    except (InputError, OSError, RuntimeError) as error:
        if any(e is not None and is_out_of_memory(e) for e in (error, error.__cause__)):
            raise MemoryError(str(error)) from error
        raise _Broken(told[-1], str(error)) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a preparation, for :func:`from_arguments`."""
    group = parser.add_argument_group("preparation of the volumes")
    group.add_argument("--spacing", type=float, metavar="MM", help="of the common grid (default: from the volumes)")
    group.add_argument("--align", choices=ALIGNMENTS, default=Preparation.align, help="default: %(default)s")
    group.add_argument(
        "--reference", metavar="NAME", help="what the others are aligned to (default: the median volume)"
    )
    group.add_argument(
        "--split",
        nargs="+",
        type=float,
        default=Preparation.fractions,
        metavar="SHARE",
        help=f"of {', '.join(SPLITS)}: shares (default: 0.7 0.15 0.15), or numbers of subjects",
    )
    group.add_argument("--skip-broken", action="store_true", help="leave files out that cannot be used, and say which")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per CPU)")


def from_arguments(args: argparse.Namespace, seed: int) -> Preparation:
    """The preparation that the command line asks for; raises ValueError for a value that cannot be meant."""
    return Preparation(
        args.spacing, args.align, args.reference, tuple(args.split), seed, args.skip_broken, args.workers
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts.add_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the prepared cohort goes")
    parser.add_argument("--seed", type=int, default=Preparation.seed, help="of the split; default: %(default)s")
    args = parser.parse_args()
    try:
        sources = layouts.from_arguments(args)
        if sources is None:
            raise ValueError("name a cohort: --images, --fixed and --moving, --manifest or --cohort")
        listing = prepare(sources, args.output, from_arguments(args, args.seed))
    except (ValueError, OSError, DivRegNetError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    about = json.loads(listing.read_text(encoding="utf-8"))
    counts = Counter(volume["split"] for volume in about["volumes"])
    for skipped in about["skipped"]:
        print(f"left out {skipped['file']}: {skipped['reason']}")
    print(
        f"{listing}: {', '.join(f'{counts[name]} {name}' for name in SPLITS)}; "
        f"{' x '.join(map(str, about['shape'][::-1]))} voxels of {about['spacing']:g} mm, reference {about['reference']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
