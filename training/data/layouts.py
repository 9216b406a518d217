"""Layouts of cohorts on disk (manifests, folders, nnU-Net, Decathlon, LiTS), and the split of a cohort by subject.

Only names of files and small text files are read here; ``training/data/prepare.py`` reads and checks the volumes.
"""

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from DivRegNetLib.io.paths import VOLUME_SUFFIXES
from training.data.cohort import SPLITS

ROLES = ("both", "fixed", "moving")
COLUMNS = ("subject", "image", "labels", "role", "contrast", "split", "name", "frame")
LITS = ("volume", "segmentation")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net: CASE_0000.nii.gz


@dataclass(frozen=True)
class Source:
    """One acquisition of one subject.

    name: unique in the cohort, and a valid file name.
    subject: all volumes of a subject are in the same split.
    images: aligned contrasts of the acquisition, usually one; files, or folders of one DICOM series each.
    contrasts: the name of each image's contrast; ``image`` where it is unknown.
    labels: label map in the space of the images, or None.
    role: the role of the volume in a pair: ``both``, ``fixed`` or ``moving``.
    split: ``train``, ``validation`` or ``test`` if the cohort says so; None leaves the choice to :func:`split`.
    frame: volumes of a subject in the same frame are aligned together; "" leaves the decision to their headers.
    """

    name: str
    subject: str
    images: tuple[Path, ...]
    contrasts: tuple[str, ...]
    labels: Path | None = None
    role: str = "both"
    split: str | None = None
    frame: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid value."""
        if not self.name or _safe(self.name) != self.name:
            raise ValueError(f"the name {self.name!r} is not a valid file name: use letters, digits, '-', '_' and '.'")
        if not self.subject:
            raise ValueError(f"{self.name}: the subject is empty; volumes of one person share one")
        if not self.images or len(self.images) != len(self.contrasts):
            raise ValueError(f"{self.name}: {len(self.images)} images, but {len(self.contrasts)} contrasts")
        if self.role not in ROLES:
            raise ValueError(f"{self.name}: role is one of {', '.join(ROLES)}, got {self.role!r}")
        if self.split not in (*SPLITS, None):
            raise ValueError(f"{self.name}: split is one of {', '.join(SPLITS)}, got {self.split!r}")

    @property
    def files(self) -> tuple[Path, ...]:
        """Images, then labels."""
        return self.images if self.labels is None else (*self.images, self.labels)


def manifest(table: Path) -> list[Source]:
    """A CSV with a header, one acquisition a row: ``subject``, ``image``, and where wanted the other COLUMNS.

    Paths are relative to the folder of the table. Aligned contrasts of one acquisition are separated by ``;`` in ``image``
    and in ``contrast``. A subject may have several rows; without a ``name`` they are named SUBJECT-1, SUBJECT-2 and so on.

    Raises:
        FileNotFoundError: there is no such table; ValueError: the table is invalid; names the table and the line.
    """
    if not table.is_file():
        raise FileNotFoundError(f"{table}: there is no such table; name a CSV with the columns subject and image")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: cannot be read as a CSV ({error})") from error
    if unknown := [column for column in reader.fieldnames if column not in COLUMNS]:
        raise ValueError(f"{table}: unknown column {unknown[0]!r}; known are {', '.join(COLUMNS)}")
    if missing := [column for column in COLUMNS[:2] if column not in reader.fieldnames]:
        raise ValueError(f"{table}: has no column {missing[0]!r}; its first line names the columns")
    for line, row in enumerate(rows, start=2):
        if None in row:
            raise ValueError(f"{table}, line {line}: more cells than columns")
    rows = [{column: (cell or "").strip() for column, cell in row.items()} for row in rows]
    rows_of = Counter(row["subject"] for row in rows)
    rows_so_far: Counter[str] = Counter()
    sources = []
    for line, row in enumerate(rows, start=2):
        try:
            subject = row["subject"]
            if not subject or not row["image"]:
                raise ValueError("subject and image are needed")
            rows_so_far[subject] += 1
            numbered = f"-{rows_so_far[subject]}" if rows_of[subject] > 1 else ""
            images = tuple(table.parent / path.strip() for path in row["image"].split(";"))
            contrasts = row.get("contrast") or ";".join(_contrasts(len(images)))
            source = Source(
                name=row.get("name") or _safe(subject) + numbered,
                subject=subject,
                images=images,
                contrasts=tuple(name.strip() for name in contrasts.split(";")),
                labels=table.parent / row["labels"] if row.get("labels") else None,
                role=row.get("role") or "both",
                split=row.get("split") or None,
                frame=row.get("frame") or "",
            )
        except ValueError as error:
            raise ValueError(f"{table}, line {line}: {error}") from error
        sources.append(source)
    return unique(sources, table)


def folder(images: Path, labels: Path | None = None) -> list[Source]:
    """One folder of volumes, each of a different subject; any two make a pair.

    A label map has the file name of its image, with or without the same suffix. Images may lack a label map.

    Raises:
        FileNotFoundError: a folder is missing; ValueError: it holds no volume, or no label map belongs to an image.
    """
    return unique(_side(images, labels, "both"), images)


def fixed_moving(
    fixed: Path, moving: Path, fixed_labels: Path | None = None, moving_labels: Path | None = None
) -> list[Source]:
    """A folder of fixed and one of moving volumes, such as CT and MR; a file name without its suffix is a subject.

    The same name in both folders is one subject. Pairs are made within and between subjects.

    Raises:
        FileNotFoundError: a folder is missing; ValueError: it holds no volume, or no label map belongs to an image.
    """
    sides = [*_side(fixed, fixed_labels, "fixed"), *_side(moving, moving_labels, "moving")]
    return unique(sides, fixed)


def nnunet(root: Path) -> list[Source]:
    """``imagesTr`` and ``labelsTr`` of nnU-Net (``CASE_0000.nii.gz``, ``CASE_0001...``) or of the Decathlon (``CASE.nii.gz``).

    Channels are aligned contrasts, with the names in ``dataset.json`` if that exists. A channel that only other cases have
    is listed too, and the preparation reports it as missing.

    Raises:
        FileNotFoundError: there is no ``imagesTr``; ValueError: it holds no volume, or no label map belongs to an image.
    """
    images = root / "imagesTr"
    paths = _volumes(images)
    labels = _volumes(root / "labelsTr") if (root / "labelsTr").is_dir() else []
    labeled = {_stem(path): path for path in labels}
    named = {path: CHANNEL.fullmatch(_stem(path)) for path in paths}
    # The name of a Decathlon case may end in four digits; then the name of its label map does, too.
    with_channels = all(named.values()) and not any(_stem(path) in labeled for path in paths)
    cases: dict[str, dict[int, Path]] = {}
    for path, match in named.items():
        case, channel = (match[1], int(match[2])) if with_channels else (_stem(path), 0)
        if other := cases.setdefault(case, {}).get(channel):
            raise ValueError(f"{path}: {other.name} is the same volume; keep one of them")
        cases[case][channel] = path
    channels = sorted({channel for case in cases.values() for channel in case})
    names = _channel_names(root / "dataset.json")
    contrasts = tuple(
        names.get(str(channel), default) for channel, default in zip(channels, _contrasts(len(channels)), strict=True)
    )
    ending = _suffix(paths[0])
    sources = [
        Source(
            name=_safe(case),
            subject=case,
            images=tuple(files.get(channel, images / f"{case}_{channel:04d}{ending}") for channel in channels),
            contrasts=contrasts,
            labels=labeled.get(case),
        )
        for case, files in cases.items()
    ]
    if labels and not any(source.labels for source in sources):
        raise ValueError(f"{root / 'labelsTr'}: no file is named like a case of {images}, such as {sources[0].name}")
    return unique(sources, root)


def lits(root: Path) -> list[Source]:
    """LiTS: CT ``volume-N.nii`` and ``segmentation-N.nii`` (or ``.nii.gz``), in the folder or in its subfolders.

    Raises:
        FileNotFoundError: there is no such folder; ValueError: it holds no volume, or one volume twice.
    """
    _existing(root)
    volumes, labels = ({_stem(path).partition("-")[2]: path for path in _lits(root, kind)} for kind in LITS)
    sources = [
        Source(_safe(f"volume-{number}"), number, (path,), ("CT",), labels.get(number))
        for number, path in volumes.items()
    ]
    return unique(sources, root)


def find(root: Path) -> list[Source]:
    """Recognizes the layout: nnU-Net or Decathlon, LiTS, ``images`` with or without ``labels``, or a plain folder.

    Raises:
        FileNotFoundError, ValueError: those of the layout's loader.
    """
    _existing(root)
    if (root / "imagesTr").is_dir():
        return nnunet(root)
    if all(_lits(root, kind) for kind in LITS):
        return lits(root)
    if (root / "images").is_dir():
        return folder(root / "images", root / "labels" if (root / "labels").is_dir() else None)
    return folder(root)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a cohort, for :func:`from_arguments`."""
    group = parser.add_argument_group("cohort (choose one)")
    group.add_argument("--images", type=Path, metavar="DIR", help="one folder of volumes; any two make a pair")
    group.add_argument("--labels", type=Path, metavar="DIR", help="label maps with the names of the images")
    group.add_argument("--fixed", type=Path, metavar="DIR", help="fixed volumes (such as CT), with --moving")
    group.add_argument("--moving", type=Path, metavar="DIR", help="moving volumes (such as MR)")
    group.add_argument("--fixed-labels", type=Path, metavar="DIR")
    group.add_argument("--moving-labels", type=Path, metavar="DIR")
    group.add_argument("--manifest", type=Path, metavar="CSV", help=f"a table with the columns {', '.join(COLUMNS)}")
    group.add_argument("--cohort", type=Path, metavar="DIR", help="nnU-Net, Decathlon, LiTS or a plain folder")


def from_arguments(args: argparse.Namespace) -> list[Source] | None:
    """The cohort that the command line names, or None.

    Raises:
        ValueError: the options contradict each other; ValueError, FileNotFoundError: those of the layout's loader.
    """
    named = [f"--{key}" for key in ("images", "fixed", "manifest", "cohort") if getattr(args, key)]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} name two cohorts; give one of them")
    for option, needed in (
        ("labels", "images"),
        ("fixed", "moving"),
        ("moving", "fixed"),
        ("fixed_labels", "fixed"),
        ("moving_labels", "moving"),
    ):
        if getattr(args, option) and not getattr(args, needed):
            raise ValueError(f"--{option.replace('_', '-')} needs --{needed}")
    if args.images:
        return folder(args.images, args.labels)
    if args.fixed:
        return fixed_moving(args.fixed, args.moving, args.fixed_labels, args.moving_labels)
    if args.manifest:
        return manifest(args.manifest)
    return find(args.cohort) if args.cohort else None


def check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """The shares of SPLITS: three that add up to 1, or three or six integers, see :func:`split`.

    Raises:
        ValueError: otherwise.
    """
    numbers = tuple(fractions)
    if len(numbers) in (3, 6) and all(np.isfinite(n) and n >= 0 for n in numbers):
        if all(float(n).is_integer() for n in numbers) and sum(numbers) > 1:
            return tuple(int(n) for n in numbers)
        if len(numbers) == 3 and abs(sum(numbers) - 1) < 1e-6:
            return numbers
    raise ValueError(
        f"the split is three shares of {', '.join(SPLITS)} that add up to 1, or three numbers of subjects, "
        f"or six (three of fixed, three of moving subjects), got {' '.join(map(str, numbers))}"
    )


def split(sources: Sequence[Source], fractions: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 1) -> dict[str, str]:
    """Distributes the subjects over SPLITS; where a source has a split, its subject keeps it.

    Subjects that are only fixed, only moving, or both are distributed separately, so that each split gets some of each kind.
    Of three or more subjects of a kind, every split with a share gets at least one. The same seed gives the same split.

    Args:
        fractions: shares of ``train``, ``validation`` and ``test``, or numbers of subjects (6, 4, 4). If no subject is
            both fixed and moving, six numbers: first those of the fixed subjects, then those of the moving subjects.
    Returns:
        name of a source -> split.
    Raises:
        ValueError: the shares do not add up, the numbers do not fit the cohort, or a subject is in two splits.
    """
    fractions = check_fractions(fractions)
    roles: dict[str, set[str]] = {}
    split_of: dict[str, str] = {}
    for source in sources:
        roles.setdefault(source.subject, set()).add(source.role)
        if source.split and split_of.setdefault(source.subject, source.split) != source.split:
            raise ValueError(
                f"subject {source.subject} is in two splits, {split_of[source.subject]} and {source.split}"
            )
    kinds: dict[str, list[str]] = {}
    for subject in sorted(roles):
        kind = next(iter(roles[subject])) if len(roles[subject]) == 1 else "both"
        kinds.setdefault(kind, []).append(subject)
    shares = _shares(fractions, {kind: len(subjects) for kind, subjects in sorted(kinds.items())})
    random = np.random.default_rng(seed)
    for kind, subjects in sorted(kinds.items()):
        have = Counter(split_of[subject] for subject in subjects if subject in split_of)
        free = [subject for subject in subjects if subject not in split_of]
        for i, subject in enumerate(random.permutation(free).tolist()):
            lacking = {name: share - have[name] for name, share in shares[kind].items() if share}
            empty = {name: lack for name, lack in lacking.items() if not have[name]}
            among = empty if empty and len(free) - i <= len(empty) else lacking
            split_of[subject] = max(among, key=among.__getitem__)  # the first of SPLITS where they are equal
            have[split_of[subject]] += 1
    return {source.name: split_of[source.subject] for source in sources}


def _shares(fractions: tuple[float, ...], sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """For each kind of subject the number of subjects in each split."""
    if sum(fractions) <= 1 + 1e-6:
        return {
            kind: {name: size * f for name, f in zip(SPLITS, fractions, strict=True)} for kind, size in sizes.items()
        }
    there = " and ".join(f"{size} {'' if kind == 'both' else kind + ' '}subjects" for kind, size in sizes.items())
    wanted = dict(zip(("fixed", "moving"), (fractions[:3], fractions[3:]), strict=True))
    if len(fractions) == 3:
        wanted = dict.fromkeys(sizes, fractions)
    if wanted.keys() != sizes.keys() or any(sum(wanted[kind]) != size for kind, size in sizes.items()):
        raise ValueError(
            f"a split into {' '.join(map(str, fractions))} does not fit {there}: give numbers that add up to them (six "
            "where fixed and moving subjects differ), or shares such as 0.7 0.15 0.15, or a manifest with a split column"
        )
    return {kind: dict(zip(SPLITS, counts, strict=True)) for kind, counts in wanted.items()}


def unique(sources: list[Source], where: object) -> list[Source]:
    """The sources, after checking that there are any and that names differ, also on file systems that ignore case.

    Raises:
        ValueError: there is no source, or two have the same name; begins with ``where``.
    """
    if not sources:
        raise ValueError(f"{where}: holds no volume; volumes end in {', '.join(VOLUME_SUFFIXES)}")
    taken: dict[str, Source] = {}
    for source in sources:
        other = taken.setdefault(source.name.casefold(), source)
        if other is not source:
            raise ValueError(
                f"{where}: {other.images[0].name} and {source.images[0].name} are both named {source.name}; rename one"
            )
    return sources


def _side(images: Path, labels: Path | None, role: str) -> list[Source]:
    """The volumes of one folder with their label maps; names contain the role unless it is ``both``."""
    paths = _volumes(images)
    maps = [] if labels is None else _volumes(labels)
    by_stem = {_stem(path): path for path in maps} | {path.name: path for path in maps}
    sources = []
    for path in paths:
        stem = _stem(path)
        name = _safe(stem) if role == "both" else f"{_safe(stem)}-{role}"
        sources.append(Source(name, stem, (path,), ("image",), by_stem.get(path.name, by_stem.get(stem)), role))
    if maps and not any(source.labels for source in sources):
        raise ValueError(f"{labels}: no file is named like an image of {images}, such as {paths[0].name}")
    return sources


def _volumes(directory: Path) -> list[Path]:
    """The volumes of a folder, sorted by name: files, and folders of DICOM slices, but no hidden files.

    Raises:
        FileNotFoundError: there is no such folder; ValueError: it holds no volume.
    """
    _existing(directory)
    paths = sorted(path for path in directory.iterdir() if _is_volume(path) or _is_dicom(path))
    if not paths:
        raise ValueError(
            f"{directory}: holds no volume; volumes end in {', '.join(VOLUME_SUFFIXES)} or are folders of DICOM slices"
        )
    return paths


def _lits(root: Path, kind: str) -> list[Path]:
    """The LiTS files of a kind in a folder and its subfolders; raises ValueError if one is there twice."""
    paths = sorted(path for path in root.rglob(f"{kind}-*.nii*") if _is_volume(path))
    by_stem: dict[str, Path] = {}
    for path in paths:
        if (other := by_stem.setdefault(_stem(path), path)) is not path:
            raise ValueError(f"{path}: {other} is the same volume; keep one of them")
    return paths


def _existing(directory: Path) -> None:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such folder; name the folder that holds the volumes")


def _is_volume(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.lower().endswith(VOLUME_SUFFIXES) and not path.is_dir()


def _is_dicom(path: Path) -> bool:
    """Whether this is a folder whose first file is a DICOM file (PS3.10, 7.1: ``DICM`` after 128 bytes)."""
    if path.name.startswith(".") or not path.is_dir():
        return False
    first = min((file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")), default=None)
    if first is None:
        return False
    with first.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _suffix(path: Path) -> str:
    """The suffix of a volume's file, such as ``.nii.gz``; empty for a folder."""
    suffixes = [suffix for suffix in VOLUME_SUFFIXES if path.name.lower().endswith(suffix)]
    return path.name[-max(map(len, suffixes)) :] if suffixes and not path.is_dir() else ""


def _stem(path: Path) -> str:
    return path.name.removesuffix(_suffix(path))


def _safe(text: str) -> str:
    """A text turned into a file name that is valid on every system."""
    return re.sub(r"[^\w.-]+", "_", text).lstrip(".-")


def _contrasts(count: int) -> Iterable[str]:
    """Names for unknown contrasts."""
    return ["image"] if count == 1 else [f"image{i}" for i in range(count)]


def _channel_names(file: Path) -> dict[str, str]:
    """``channel_names`` (nnU-Net 2) or ``modality`` (nnU-Net 1, Decathlon) of a dataset.json; empty if it has neither."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        names = about.get("channel_names") or about.get("modality")
        return {str(key): name.strip() for key, name in names.items() if isinstance(name, str) and name.strip()}
    except (OSError, ValueError, AttributeError):
        return {}
