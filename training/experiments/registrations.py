"""Registrations whose truth is known, made to succeed and to fail: what the verdict is calibrated on.

A case is a fixed and a moving image, the true map between them, and an initial alignment that is right, slightly off or wrong.
The two images show one subject, in two contrasts, of which one is moved, bent, cut, cut open or scanned in thick slices; or
two subjects with label maps; or what does not belong together. A subject is either fitted on or held
out.
"""

import collections
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.core.intensity import without_padding
from DivRegNetLib.io.images import read_image, read_labels
from training.data import hippocampus
from training.data.prepare_head import BRAIN, tissue

Generator = np.random.Generator
Look = Callable[[Generator], sitk.Image]
BRAIN_HU, BODY_HU = (-100, 200), (-200, 300)  # windows of CT
GRAYS = {"T1": (0.62, 0.46, 0.2), "T2": (0.35, 0.47, 0.95), "PD": (0.74, 0.85, 0.95)}  # white and gray matter, fluid
STRUCTURES = (
    {2}, {41}, {3}, {42}, {4, 5, 14, 15, 43, 44, 72}, {24}, {7, 8}, {46, 47}, {10, 11, 12, 13, 26, 28},
    {49, 50, 51, 52, 58, 60}, {16, 85}, {17, 18}, {53, 54},
)  # fmt: skip
"""Classes of FreeSurfer, of the label maps of heads, that two subjects are registered by."""

RIGHT = ("near", "bent", "still", "slab", "thick", "resected", "halves", "strongly bent")
WRONG = ("turned", "axes", "shifted", "scaled", "slightly")
"""Kinds of cases, by whether their initial alignment is near the truth."""


@dataclass(frozen=True)
class Subject:
    """One anatomy and what it can look like.

    family: kind of anatomy.
    held_out: not fitted on.
    looks: name -> function of a generator of random numbers that makes an image. All images are on one grid.
    labels: reads a label map; None: there is none.
    """

    name: str
    family: str
    held_out: bool
    looks: dict[str, Look]
    labels: Callable[[], sitk.Image] | None = None


@dataclass(frozen=True)
class Case:
    """A registration to make.

    kind: what was done to the images.
    truth: maps fixed to moving points (LPS, mm); None where it is not known, or the images do not belong together.
    labels: of the fixed and the moving image, and the groups of values that correspond: they tell how far it is off.
    align: as in :class:`~DivRegNetLib.options.Options`.
    """

    name: str
    family: str
    kind: str
    held_out: bool
    fixed: sitk.Image
    moving: sitk.Image
    truth: sitk.Transform | None = None
    labels: tuple[sitk.Image, sitk.Image, tuple[set[int], ...]] | None = None
    align: "str | sitk.Transform" = field(default="affine", compare=False)


def cases(data: Path, turns: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names of the cases and functions that make them, in an order in which any beginning is a fair sample."""
    everyone = subjects(data)
    for turn in range(turns):
        groups = collections.defaultdict(list)
        for subject, name, make in _turn(everyone, turn):
            groups[subject.family, subject.held_out].append((zlib.crc32(name.encode()), name, make))
        places = []
        for some in groups.values():
            places += [((i + 0.5) / len(some), *named) for i, (_, *named) in enumerate(sorted(some))]
        yield from ((name, make) for _, name, make in sorted(places))


def _turn(everyone: list[Subject], turn: int) -> Iterator[tuple[Subject, str, Callable[[], Case]]]:
    """Some cases of every subject; in each turn others."""
    for i, subject in enumerate(everyone):
        if subject.family in ("hippocampus", "shapes") and (i + turn) % 3:
            continue
        for kind in (RIGHT[(turn * 3 + i * 5) % len(RIGHT)], WRONG[(turn + i * 2) % len(WRONG)]):
            yield subject, f"{subject.name}, {kind} {turn}", functools.partial(one_subject, subject, kind, turn)
        if (i + turn) % 6 == 0:
            strangers = [s for s in everyone if s.family != subject.family and s.held_out == subject.held_out]
            other = strangers[(i * 3 + turn) % len(strangers)] if (i + turn) % 4 else None
            name = f"{subject.name}, {'noise' if other is None else other.name} {turn}"
            yield subject, name, functools.partial(unrelated, subject, other, turn)
        if subject.labels is not None and (i + turn) % 2 == 0:
            peers = [s for s in everyone if (s.family, s.held_out) == (subject.family, subject.held_out) and s.labels]
            other = peers[(peers.index(subject) + turn + 1) % len(peers)]
            if other is not subject:
                name = f"{subject.name}, {other.name} {turn}"
                yield subject, name, functools.partial(two_subjects, subject, other, turn)


# --- subjects


def subjects(data: Path) -> list[Subject]:
    """All subjects of the data folder."""
    scan = functools.partial(_scan, data)
    found = [
        Subject("BrainWeb", "head", False, {c: scan(f"brain_t1t2pd/brainweb_{c}.nii.gz", 2) for c in ("T1", "T2", "PD")}),
        Subject("Colin27", "head", False, {"T1": scan("brain_t1t2pd/ch2.nii.gz", 2)}),
        Subject("MS07", "head", True, {
            c: scan(f"brain_multicontrast/ms07_{c}.nii.gz", 2) for c in ("T1", "T2", "FLAIR", "T1POST")
        }),
        Subject("IXI012", "head", False, {"T1": scan("brain_t1/IXI012-HH-1211_T1.nii.gz")}),
        Subject("IXI015", "head", True, {"T1": scan("brain_t1/IXI015-HH-1258_T1.nii.gz")}),
        Subject("CT template", "head", False, {"CT": scan("brain_ct/scct.nii.gz", 1, BRAIN_HU)}),
        Subject("CT atlas", "head", True, {"CT": scan("brain_ct/ct_brain_atlas_1mm.nii.gz", 2, BRAIN_HU)}),
        Subject("liver CT", "abdomen", False, {"CT": scan("liver/ct_crlm1004.nii.gz", (2, 2, 1), BODY_HU)}),
        Subject("liver MR", "abdomen", True, {"T2": scan("liver/mr_t2_cmb001.nii.gz", (2, 2, 1))}),
        Subject("abdomen CT", "abdomen", False, {"CT": scan("abdomen/example_ct.nii.gz", 1, BODY_HU)}),
        Subject("abdomen MR", "abdomen", True, {"MR": scan("abdomen/example_mr_sm.nii.gz")}),
    ]  # fmt: skip
    for patient in ("001", "003", "005", "008", "012"):
        for kind, window in (("CT", BODY_HU), ("MR_T1", None)):
            look = scan(f"limb_ct_mr/STS_{patient}_{kind}_image.nii.gz", (2, 2, 1), window)
            found.append(Subject(f"limb {patient} {kind}", "limb", patient in ("008", "012"), {kind: look}))
    for number in range(1, 16):
        path = data / f"brain_labelmaps/training_seg_{number:02}.nii.gz"
        looks = {"whole": functools.partial(_painted, path, False), "brain": functools.partial(_painted, path, True)}
        found.append(
            Subject(f"label map {number}", "painted head", number > 10, looks, functools.partial(read_labels, path))
        )
    held_out = hippocampus.held_out(data)[::2]
    for name in (*hippocampus.learned(data)[::10], *held_out):
        labels = functools.partial(read_labels, data / "hippocampus/labels" / name)
        looks = {"T1": scan(f"hippocampus/images/{name}")}
        found.append(Subject(name[:15], "hippocampus", name in held_out, looks, labels))
    found += [Subject(f"shapes {n}", "shapes", n > 6, {"any": functools.partial(_shapes, n)}) for n in range(1, 13)]
    return found


def _scan(data: Path, path: str, shrink: int | tuple = 1, window: tuple | None = None) -> Look:
    def look(random: Generator) -> sitk.Image:
        image = sitk.Cast(without_padding(read_image(data / path)), sitk.sitkFloat32)
        image = image if window is None else sitk.Clamp(image, sitk.sitkFloat32, *window)
        return sitk.BinShrink(image, [shrink] * 3 if isinstance(shrink, int) else list(shrink))

    return look


def _painted(path: Path, brain_only: bool, random: Generator) -> sitk.Image:
    """A label map of a head with a gray for each class and some texture, averaged to 2 mm."""
    labels = read_labels(path)
    box = sitk.LabelShapeStatisticsImageFilter()
    box.Execute(sitk.Cast(labels > 0, sitk.sitkUInt8))
    bounds = box.GetBoundingBox(1)
    start = [max(n - 10, 0) for n in bounds[:3]]
    size = [min(n + 20, all_of - s) for n, s, all_of in zip(bounds[3:], start, labels.GetSize(), strict=True)]
    labels = sitk.RegionOfInterest(labels, size, start)
    array = sitk.GetArrayFromImage(labels).astype(int)
    means = random.uniform(0.1, 1, array.max() + 1)
    known = str(random.choice([*GRAYS])) if random.random() < 0.75 else ""
    grays = dict(zip(("white", "gray", "fluid"), GRAYS.get(known, random.uniform(0.1, 1, 3)), strict=True))
    for label in range(len(means)):
        if tissue(label) in grays:
            means[label] = grays[tissue(label)] + random.normal(0, 0.03)
    means[0] = 0
    image = means[array] + random.normal(0, 0.05, array.shape) * (array > 0)
    if brain_only:
        image = image * np.isin(array, sorted(BRAIN))
    return sitk.BinShrink(Grid.of(labels).image(image.clip(0).astype(np.float32)), [2, 2, 2])


def _shapes(seed: int, random: Generator) -> sitk.Image:
    """Random shapes, the same for each seed, of random grays: no anatomy at all."""
    geometry = np.random.default_rng(1000 + seed)
    size, classes = [int(n) for n in geometry.integers(64, 110, 3)], int(geometry.integers(5, 14))
    coarse = [max(n // int(geometry.integers(7, 16)), 3) for n in size]
    highest, labels = None, np.zeros(size[::-1], int)
    for label in range(classes):
        noise = sitk.GetImageFromArray(geometry.normal(0, 1, coarse[::-1]).astype(np.float32))
        smooth = sitk.GetArrayFromImage(_stretched(noise, size, sitk.sitkBSpline3))
        if highest is not None:
            labels[smooth > highest] = label
        highest = smooth if highest is None else np.maximum(highest, smooth)
    if geometry.random() < 0.7:  # in an ellipsoid, with air around it
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size[::-1]), indexing="ij")
        labels[sum((a / geometry.uniform(0.7, 1.0)) ** 2 for a in axes) > 1] = classes
    means = np.append(random.uniform(0.15, 1, classes), 0)
    image = sitk.GetImageFromArray(
        (means[labels] + random.normal(0, 0.03, labels.shape) * (labels < classes)).astype(np.float32)
    )
    image.SetSpacing([float(2 * geometry.uniform(0.5, 1.5))] * 3)
    return sitk.SmoothingRecursiveGaussian(image, 0.5 * image.GetSpacing()[0])


def _stretched(image: sitk.Image, size: list[int], interpolator: int) -> sitk.Image:
    """An image of few voxels over a grid of many, of unit spacing."""
    image.SetSpacing([(n - 1) / (c - 1) for n, c in zip(size, image.GetSize(), strict=True)])
    return sitk.Resample(image, size, sitk.Transform(), interpolator, (0.0,) * 3, (1.0,) * 3)


# --- what happens to an image


def recolored(image: sitk.Image, random: Generator) -> sitk.Image:
    """Another contrast: intensities through a random curve under which the darkest, air, stays dark."""
    knots = random.uniform(0.1, 1, 6)
    knots[0] = 0
    return Grid.of(image).image(np.interp(_unit(image), np.linspace(0, 1, 6) ** 1.2, knots).astype(np.float32))


def scanned(image: sitk.Image, random: Generator) -> sitk.Image:
    """With a bias field, blur and noise."""
    bias = sitk.GetImageFromArray(random.normal(0, random.uniform(0, 0.25), (4, 4, 4)).astype(np.float32))
    bias = sitk.GetArrayFromImage(_stretched(bias, list(image.GetSize()), sitk.sitkLinear))
    made = Grid.of(image).image((_unit(image, clipped=False) * np.exp(bias)).astype(np.float32))
    if sigma := random.choice((0, 0.4, 0.7)) * min(image.GetSpacing()):
        made = sitk.SmoothingRecursiveGaussian(made, float(sigma))
    array = sitk.GetArrayFromImage(made)
    array = np.abs(array + random.normal(0, random.choice((0.005, 0.02, 0.05)), array.shape))
    return Grid.of(image).image((1000 * array).clip(0, 3000).astype(np.int16))


def _unit(image: sitk.Image, clipped: bool = True) -> np.ndarray:
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    low, high = np.percentile(array, [0.5, 99.5])
    array = (array - low) / max(high - low, 1e-6)
    return array.clip(0, 1) if clipped else array


def thick(image: sitk.Image, random: Generator) -> sitk.Image:
    """Slices two to four times as thick along one axis."""
    axis, factor = int(random.integers(3)), int(random.integers(2, 5))
    if image.GetSize()[axis] < 12 * factor:
        return image
    return sitk.Cast(sitk.BinShrink(image, [factor if a == axis else 1 for a in range(3)]), image.GetPixelID())


def slab(image: sitk.Image, random: Generator) -> sitk.Image:
    """30 to 60 % of the image along one axis."""
    axis, size, start = int(random.integers(3)), list(image.GetSize()), [0, 0, 0]
    kept = max(int(size[axis] * random.uniform(0.3, 0.6)), min(12, size[axis]))
    start[axis], size[axis] = int(random.integers(0, size[axis] - kept + 1)), kept
    return sitk.RegionOfInterest(image, size, start)


def halves(fixed: sitk.Image, moving: sitk.Image, random: Generator) -> tuple[sitk.Image, sitk.Image]:
    """The lower part of one image along an axis and the upper part of the other, 10 to 40 % of the whole in common."""
    axis = int(random.integers(3))
    n = fixed.GetSize()[axis]
    kept = max(int(random.uniform(0.55, 0.7) * n), 8)
    lower, upper = ([slice(None)] * 3 for _ in range(2))
    lower[axis], upper[axis] = slice(0, kept), slice(n - kept, None)
    return fixed[tuple(lower)], moving[tuple(upper)]


def resected(image: sitk.Image, random: Generator) -> sitk.Image:
    """An ellipsoid of one gray, with radii of 8 to 16 % of the image's sides, somewhere in what is not dark."""
    array = sitk.GetArrayFromImage(image)
    inside = np.argwhere(array > 0.3 * np.percentile(array, 99))
    center, radii = inside[int(random.integers(len(inside)))], random.uniform(0.08, 0.16, 3) * array.shape
    axes = np.ogrid[tuple(slice(n) for n in array.shape)]
    cavity = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, center, radii, strict=True)) < 1
    array[cavity] = np.percentile(array, random.choice((5, 99)))
    return Grid.of(image).image(array)


def extent(image: sitk.Image) -> float:
    """Cube root of the volume, mm."""
    return float(np.prod([n * s for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]) ** (1 / 3))


def bending(image: sitk.Image, random: Generator, share: float, control: float) -> sitk.Transform:
    """A cubic B-spline deformation whose control points are ``control`` extents apart and moved by N(0, share) of that."""
    mm = control * extent(image)
    mesh = [max(round(n * s / mm), 1) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    made = sitk.BSplineTransformInitializer(image, mesh, 3)
    made.SetParameters(random.normal(0, share * mm, len(made.GetParameters())).tolist())
    return made


def about_center(image: sitk.Image, linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(4, 4): ``linear`` about the middle of an image, and a shift (mm)."""
    center, matrix = Grid.of(image).center, np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, center - linear @ center + shift
    return matrix


def placed(image: sitk.Image, matrix: np.ndarray) -> sitk.Image:
    """The image with its header mapped by a (4, 4) matrix."""
    grid, moved = Grid.of(image), sitk.Image(image)
    return Grid(grid.size, matrix @ grid.matrix).stamp(moved)


def rotation(random: Generator, degrees: float) -> np.ndarray:
    """(3, 3), about a random axis."""
    axis = random.normal(0, 1, 3)
    return np.reshape(
        sitk.VersorTransform((axis / np.linalg.norm(axis)).tolist(), np.radians(degrees)).GetMatrix(), (3, 3)
    )


def cube_rotations() -> list[np.ndarray]:
    """The 23 turns that map the axes onto one another."""
    signed = (
        np.eye(3)[list(o)] * s for o in itertools.permutations(range(3)) for s in itertools.product((1, -1), repeat=3)
    )
    return [m for m in signed if np.linalg.det(m) > 0 and not np.array_equal(m, np.eye(3))]


def slightly_off(truth: np.ndarray, image: sitk.Image, random: Generator, times: float = 1.0) -> sitk.Transform:
    """A linear alignment about as far off as a good one is, or some times as far."""
    linear = rotation(random, abs(random.normal(0, 1.2 * times))) @ np.diag(np.exp(random.normal(0, 0.008 * times, 3)))
    shift = random.normal(0, 0.006 * extent(image) * times, 3)
    return affine_transform(truth @ about_center(image, linear, shift))


# --- cases


def one_subject(subject: Subject, kind: str, number: int) -> Case:
    """Two images of one subject. The number seeds all that is random."""
    random = _generator(subject.name, kind, number)
    fixed, moving = _two_looks(subject, random)
    size, linear, shift, bend = extent(fixed), np.eye(3), np.zeros(3), None
    little = rotation(random, random.uniform(0, 12)), random.normal(0, 0.04 * size, 3)
    if kind in ("near", "slab", "thick", "resected", "scaled", "strongly bent"):
        linear, shift = little
    if kind in ("bent", "resected") or (kind in ("near", "slab", "thick", "scaled") and random.random() < 0.5):
        bend = bending(fixed, random, random.uniform(0.1, 0.3), random.choice((0.1, 0.15, 0.25)))
    elif kind == "strongly bent":
        bend = bending(fixed, random, random.uniform(0.3, 0.8), random.choice((0.15, 0.25)))
    elif kind == "turned":
        linear, shift = rotation(random, random.uniform(40, 180)), random.normal(0, 0.05 * size, 3)
    elif kind == "axes":
        turns = cube_rotations()
        linear = turns[int(random.integers(len(turns)))]
    elif kind == "shifted":
        way = random.normal(0, 1, 3)
        shift = way / np.linalg.norm(way) * size * random.choice((0.02, 0.05, 0.1, 0.2, 0.3))
    if kind == "scaled":
        linear = linear * random.choice((0.65, 0.8, 0.9, 1.12, 1.25, 1.5))
    if bend is not None:
        fixed = sitk.Resample(fixed, fixed, bend, sitk.sitkLinear, 0)
    if kind == "halves":
        fixed, moving = halves(fixed, moving, random)
    change = {"slab": slab, "thick": thick, "resected": resected}.get(kind)
    moving = moving if change is None else change(moving, random)
    matrix = about_center(fixed, linear, shift)
    moving, truth = placed(moving, matrix), affine_transform(matrix)
    if kind in RIGHT:
        align = slightly_off(matrix, fixed, random)
    elif kind == "slightly":
        align = slightly_off(matrix, fixed, random, random.uniform(3, 14))
    elif kind in ("turned", "axes") and random.random() < 0.25:
        align = "affine"
    else:
        align = "none" if kind == "shifted" else "center"
    if bend is not None:
        truth = sitk.CompositeTransform([truth, bend])  # the last is applied first
    return Case(
        f"{subject.name}, {kind} {number}", subject.family, kind, subject.held_out, fixed, moving, truth, None, align
    )


def two_subjects(subject: Subject, other: Subject, number: int) -> Case:
    """Images of two subjects of one family, with label maps."""
    random = _generator(subject.name, other.name, number)
    look = str(random.choice([*subject.looks]))
    fixed, moving = (scanned(s.looks[look](random), random) for s in (subject, other))
    groups = STRUCTURES if subject.family == "painted head" else ({1}, {2})
    labels = subject.labels(), other.labels(), groups
    name = f"{subject.name}, {other.name} {number}"
    return Case(name, subject.family, "two subjects", subject.held_out, fixed, moving, None, labels)


def unrelated(subject: Subject, other: Subject | None, number: int) -> Case:
    """Images that do not belong together: another organ, or noise."""
    random = _generator(subject.name, "unrelated", number)
    fixed = scanned(_any_look(subject, random), random)
    if other is not None:
        moving = scanned(_any_look(other, random), random)
        shift = np.eye(4)
        shift[:3, 3] = Grid.of(fixed).center - Grid.of(moving).center
        moving = placed(moving, shift)
    else:
        moving = Grid.of(fixed).image(random.normal(500, 200, fixed.GetSize()[::-1]).astype(np.float32))
        if sigma := float(random.choice((0.0, 1.0, 2.5)) * fixed.GetSpacing()[0]):
            moving = sitk.SmoothingRecursiveGaussian(moving, sigma)
        moving = sitk.Cast(moving, sitk.sitkInt16)
    name = f"{subject.name}, {'noise' if other is None else other.name} {number}"
    return Case(name, subject.family, "unrelated", subject.held_out, fixed, moving, align="center")


def _generator(*seeds: str | int) -> Generator:
    return np.random.default_rng([s if isinstance(s, int) else zlib.crc32(s.encode()) for s in seeds])


def _any_look(subject: Subject, random: Generator) -> sitk.Image:
    return subject.looks[str(random.choice([*subject.looks]))](random)


def _two_looks(subject: Subject, random: Generator) -> tuple[sitk.Image, sitk.Image]:
    """Two contrasts of a subject: two of its own, or one of them recolored."""
    names = [*subject.looks]
    one = str(random.choice(names))
    painted = subject.family in ("painted head", "shapes")  # each time with other grays
    others = [one] if painted else [n for n in names if n != one] or [one]
    other = str(random.choice(others))
    fixed, moving = subject.looks[one](random), subject.looks[other](random)
    if other == one and not painted:
        moving = recolored(moving, random)
    return scanned(fixed, random), scanned(moving, random)
