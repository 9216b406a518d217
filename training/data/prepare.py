"""Prepares a cohort: brings all volumes into one space and stores them as arrays for training.

    python training/data/prepare.py --images DIR [--labels DIR] --output build/cohorts/NAME
    python training/data/prepare.py --fixed DIR --moving DIR [--fixed-labels DIR --moving-labels DIR] --output ...
    python training/data/prepare.py --manifest CSV --output ...
    python training/data/prepare.py --cohort DIR --output ...       nnU-Net, Decathlon, LiTS or a plain folder

Every volume is aligned to a reference, resampled and normalized in the way a registration does it before the network runs;
volumes of one subject in the same frame are aligned together. Run again, the command continues where it was interrupted and
reprocesses only what changed: a source file, a setting or the reference. The default spacing and reference depend on the
whole cohort; if it will grow, give ``--spacing`` and ``--reference``, because a new volume may change the defaults.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import DivRegNetError, InputError
from DivRegNetLib.io import atomic
from DivRegNetLib.io.output_folder import exclusive
from DivRegNetLib.options import ALIGNMENTS
from training.data import layouts, space
from training.data.broken import Broken, complaint
from training.data.cohort import FORMAT, SPLITS
from training.data.layouts import Source
from training.data.volumes import NORMALIZATION, Task, recorded, state
from training.data.workers import run

INTERRUPTED = 130

Progress = Callable[[str, int, int], object]
"""Called with the name of a finished volume, the number of finished volumes and their total; may raise to cancel."""


@dataclass(frozen=True)
class Preparation:
    """Settings of a preparation.

    spacing_mm: spacing of the common grid; None: the median of the volumes' median spacings, rounded, or coarser so that the
        grid has at most MOST_VOXELS.
    align: alignment to the reference, the initial alignment of a registration: ``none``, ``center``, ``rigid`` or ``affine``.
    reference: name of the volume whose extent the common grid has; None: the volume of median size in mm^3 among the fixed
        volumes of the training split.
    together: align volumes of one subject in the same frame (see :func:`training.data.space.frames`) by one transform, so
        that their correspondence is kept; False aligns each volume separately.
    fractions, seed: see :func:`training.data.layouts.split`. Unusable volumes are left out after the split.
    skip_broken: leave out unusable files and list them; otherwise they are an error.
    workers: number of processes; 0: one per CPU. A process needs about five times the memory of the largest volume.
    """

    spacing_mm: float | None = None
    align: str = "affine"
    reference: str | None = None
    together: bool = True
    fractions: tuple = (0.7, 0.15, 0.15)
    seed: int = 1
    skip_broken: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid value."""
        if self.spacing_mm is not None and not (math.isfinite(self.spacing_mm) and 0.1 <= self.spacing_mm <= 50):
            raise ValueError(f"spacing_mm is a number of millimeters from 0.1 to 50, got {self.spacing_mm!r}")
        if self.align not in ALIGNMENTS:
            raise ValueError(f"align is one of {', '.join(ALIGNMENTS)}, got {self.align!r}")
        if self.workers < 0:
            raise ValueError(f"workers is a number of processes, 0 for one per CPU, got {self.workers!r}")
        object.__setattr__(self, "fractions", layouts.check_fractions(self.fractions))


def prepare_cohort(
    sources: Sequence[Source],
    output: Path,
    preparation: Preparation = Preparation(),
    progress: Progress | None = None,
) -> Path:
    """Writes the folder that :func:`training.data.cohort.load` reads: a ``NAME.npz`` per volume, and finally ``cohort.json``.

    Files are written atomically, and after a kill the finished volumes remain. A second process waits until the first has
    finished with the folder, and then finds the volumes there. Worker processes import the main module again, so scripts need
    ``if __name__ == "__main__":``.

    Args:
        progress: None shows a progress bar.
    Returns:
        the path of ``cohort.json``.
    Raises:
        ValueError: files are unusable (all are named) and not to be skipped, or the cohort, split, reference or spacing is
            invalid; DeviceError: out of memory.
    """
    with exclusive(Path(output), wait=True):
        return _prepare(layouts.unique(list(sources), "the cohort"), Path(output), preparation, progress)


def _prepare(sources: list[Source], output: Path, preparation: Preparation, progress: Progress | None) -> Path:
    """:func:`prepare_cohort`, while no other process works in the folder."""
    splits = layouts.split(sources, preparation.fractions, preparation.seed)
    headers: dict[str, space.Header] = {}
    broken: dict[str, Broken] = {}
    for source in sources:
        try:
            headers[source.name] = space.measure(source)
        except Broken as error:
            broken[source.name] = error
    reference, image = space.choose_reference(sources, splits, headers, preparation.reference, broken)
    grid = space.common_grid(Grid.of(image), preparation.spacing_mm, [header.spacing for header in headers.values()])
    del image
    usable = [source for source in sources if source.name not in broken]
    frames = space.frames(usable, headers, reference, preparation.together)
    settings = [FORMAT, NORMALIZATION, preparation.align, grid.size, grid.spacing, grid.origin]
    reference_state = state(reference.images[0])
    records: dict[str, dict] = {}

    def task(source: Source, leader: Source) -> Task:
        states = [
            state(leader.images[0]),
            [state(path) for path in source.images],
            source.labels and state(source.labels),
        ]
        fingerprint = hashlib.sha256(json.dumps([settings, reference_state, *states]).encode()).hexdigest()
        place = None if source is leader else records[leader.name]["to_reference"]
        return Task(source, (reference.images[0], reference_state), grid, preparation.align, place, output, fingerprint)

    listing = output / "cohort.json"
    with contextlib.ExitStack() as stack:
        progress = progress or stack.enter_context(_bar(len(sources), len(broken)))
        while ready := list(_ready(frames, records, broken)):
            tasks = [task(*pair) for pair in ready]
            records |= {task.source.name: record for task in tasks if (record := recorded(task))}
            tasks = [task for task in tasks if task.source.name not in records]
            if tasks:
                listing.unlink(missing_ok=True)  # it exists only while all volumes that it lists exist
            with contextlib.closing(run(tasks, preparation.workers or os.cpu_count() or 1)) as done:
                for made, result in done:
                    (broken if isinstance(result, Broken) else records)[made.source.name] = result
                    progress(made.source.name, len(broken) + len(records), len(sources))
    unfit = [broken[source.name] for source in sources if source.name in broken]
    if unfit and (not preparation.skip_broken or not records):
        raise InputError(complaint(unfit, len(sources)))
    asked = asdict(preparation)
    del asked["workers"], asked["skip_broken"]  # they do not change the result
    about = {
        "format": FORMAT,
        "spacing": grid.spacing[0],
        "shape": list(grid.shape),
        "origin": list(grid.origin),
        "normalization": NORMALIZATION,
        "seed": preparation.seed,
        "reference": reference.name,
        "preparation": asked,
        "volumes": [
            _entry(source, splits[source.name], records[source.name]) for source in sources if source.name in records
        ],
        "skipped": [{"file": str(error.file), "reason": error.reason} for error in unfit],
    }
    atomic.write_json(about, listing)
    return listing


def _ready(
    frames: list[list[Source]], records: Mapping[str, dict], broken: Mapping[str, Broken]
) -> Iterator[tuple[Source, Source]]:
    """Volumes that can be processed now, each with the leader whose alignment it shares: the first usable volume of a frame
    is its own leader; the others follow when it is done."""
    for frame in frames:
        leader, *others = [source for source in frame if source.name not in broken] or [None]
        for source in others if leader and leader.name in records else [leader]:
            if source and source.name not in records:
                yield source, leader


def _entry(source: Source, split: str, record: dict) -> dict:
    """The entry of a volume in cohort.json."""
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


@contextlib.contextmanager
def _bar(total: int, done: int) -> Iterator[Progress]:
    with tqdm(total=total, initial=done, desc="preparing", unit="volume") as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a preparation, for :func:`from_arguments`."""
    group = parser.add_argument_group("preparation of the volumes")
    group.add_argument(
        "--spacing", type=float, metavar="MM", help="spacing of the common grid (default: from the volumes)"
    )
    group.add_argument("--align", choices=ALIGNMENTS, default=Preparation.align, help="default: %(default)s")
    group.add_argument(
        "--reference",
        metavar="NAME",
        help="the volume that the others are aligned to (default: the one of median size)",
    )
    group.add_argument(
        "--apart",
        action="store_true",
        help="align each volume separately, even if volumes of one subject are in the same frame",
    )
    group.add_argument(
        "--split",
        type=_numbers,
        default=Preparation.fractions,
        metavar="SHARES",
        help=f"of {', '.join(SPLITS)}: shares (default: 0.7,0.15,0.15), or numbers of subjects (70,30,31)",
    )
    group.add_argument("--skip-broken", action="store_true", help="leave out unusable files and list them")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per CPU)")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def from_arguments(args: argparse.Namespace, seed: int) -> Preparation:
    """The preparation that the command line asks for; raises ValueError for an invalid value."""
    return Preparation(
        args.spacing,
        args.align,
        args.reference,
        not args.apart,
        args.split,
        seed,
        args.skip_broken,
        args.workers,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts.add_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the prepared cohort")
    parser.add_argument("--seed", type=int, default=Preparation.seed, help="seed of the split (default: %(default)s)")
    args = parser.parse_args()
    try:
        sources = layouts.from_arguments(args)
        if sources is None:
            raise ValueError("no cohort is named; give --images, --fixed and --moving, --manifest or --cohort")
        listing = prepare_cohort(sources, args.output, from_arguments(args, args.seed))
    except (ValueError, OSError, DivRegNetError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command continues from here", file=sys.stderr)
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
