"""Registrations whose truth is known, made to succeed and to fail: what a verdict is calibrated on.

A case is a fixed and a moving image of one subject, the true map between them and the options of the registration. What it
came to is kept in a file: both images on the working grid, the deformation, and the distance to the truth at every voxel.
Subjects are either fitted on or held out, never both.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.intensity import without_padding
from DivRegNetLib.io.images import read_image, read_labels

HEAD, OTHER = "head", "other"
AIR = 0


@dataclass(frozen=True)
class Subject:
    """One anatomy, and how it can look.

    name, family: of the subject, and of its kind ("head", "hippocampus", ...).
    held_out: not fitted on.
    looks: name -> function of a generator and the data folder that makes an image; all on one grid, where the anatomy is
        the same.
    """

    name: str
    family: str
    held_out: bool
    looks: dict[str, Callable[[np.random.Generator], sitk.Image]]


@dataclass(frozen=True)
class Case:
    """A registration to make.

    truth: fixed -> moving points (LPS, mm); None where the images do not belong together.
    options: of :func:`DivRegNetLib.register`.
    """

    name: str
    family: str
    kind: str
    held_out: bool
    fixed: sitk.Image
    moving: sitk.Image
    truth: sitk.Transform | None
    options: dict = field(default_factory=dict)


# --- Subjects --------------------------------------------------------------------------------------------------------


def subjects(data: Path) -> list[Subject]:
    """All subjects of the data folder."""
    found = []

    def scan(path: str, shrink: int | tuple = 1, window: tuple | None = None) -> Callable:
        def look(random: np.random.Generator) -> sitk.Image:
            image = sitk.Cast(without_padding(read_image(data / path)), sitk.sitkFloat32)
            image = image if window is None else sitk.Clamp(image, sitk.sitkFloat32, *window)
            return sitk.BinShrink(image, [shrink] * 3 if isinstance(shrink, int) else list(shrink))

        return look

    def add(name: str, family: str, held_out: bool, looks: dict) -> None:
        found.append(Subject(name, family, held_out, looks))

    brain = {c: scan(f"brain_t1t2pd/brainweb_{c}.nii.gz", 2) for c in ("T1", "T2", "PD")}
    add("brainweb", "head", False, brain)
    add("colin", "head", False, {"T1": scan("brain_t1t2pd/ch2.nii.gz", 2)})
    ms07 = {c: scan(f"brain_multicontrast/ms07_{c}.nii.gz", 2) for c in ("T1", "T2", "FLAIR", "T1POST")}
    add("ms07", "brain", True, ms07)
    for name, held_out in (("IXI012-HH-1211", False), ("IXI015-HH-1258", True)):
        add(name, "head", held_out, {"T1": scan(f"brain_t1/{name}_T1.nii.gz")})
    for number in range(1, 16):
        path = data / f"brain_labelmaps/training_seg_{number:02}.nii.gz"
        add(f"labels{number:02}", "painted head", number > 10, {"painted": painter(path), "stripped": painter(path, True)})
    add("scct", "head CT", False, {"CT": scan("brain_ct/scct.nii.gz", 1, (-100, 200))})
    add("atlasct", "head CT", True, {"CT": scan("brain_ct/ct_brain_atlas_1mm.nii.gz", 2, (-100, 200))})
    for path in sorted((data / "hippocampus/images").glob("*.nii.gz"))[::8]:
        number = int(path.name[12:15])
        add(path.name[:15], "hippocampus", number % 3 == 0, {"T1": scan(f"hippocampus/images/{path.name}")})
    add("liver CT", "abdomen", False, {"CT": scan("liver/ct_crlm1004.nii.gz", (2, 2, 1), (-200, 300))})
    add("liver MR", "abdomen", True, {"T2": scan("liver/mr_t2_cmb001.nii.gz", (2, 2, 1))})
    add("abdomen CT", "abdomen", False, {"CT": scan("abdomen/example_ct.nii.gz", 1, (-200, 300))})
    add("abdomen MR", "abdomen", True, {"MR": scan("abdomen/example_mr_sm.nii.gz")})
    for patient in ("001", "003", "005", "008", "012"):
        for kind, window in (("CT", (-200, 300)), ("MR_T1", None)):
            look = scan(f"limb_ct_mr/STS_{patient}_{kind}_image.nii.gz", (2, 2, 1), window)
            add(f"limb {patient} {kind}", "limb", patient in ("008", "012"), {kind: look})
    for number in range(1, 13):
        add(f"shapes{number:02}", "shapes", number > 6, {"shapes": shapes(number)})
    return found


# FreeSurfer's classes, see training/data/prepare_head.py.
def painter(path: Path, strip: bool = False) -> Callable[[np.random.Generator], sitk.Image]:
    """Paints a label map with a gray for each class, some texture, and averages it to 2 mm."""

    def look(random: np.random.Generator) -> sitk.Image:
        from training.data.prepare_head import BRAIN, tissue

        labels = read_labels(path)
        box = sitk.LabelShapeStatisticsImageFilter()
        box.Execute(sitk.Cast(labels > 0, sitk.sitkUInt8))
        x, y, z, *size = box.GetBoundingBox(1)
        start = [max(n - 10, 0) for n in (x, y, z)]
        size = [min(n + 20, whole - s) for n, s, whole in zip(size, start, labels.GetSize(), strict=True)]
        labels = sitk.RegionOfInterest(labels, size, start)
        array = sitk.GetArrayFromImage(labels).astype(int)
        means = random.uniform(0.1, 1, array.max() + 1)
        known = str(random.choice(("T1", "T2", "PD", ""))) if random.random() < 0.75 else ""
        tissues = {"T1": (0.62, 0.46, 0.2), "T2": (0.35, 0.47, 0.95), "PD": (0.74, 0.85, 0.95), "": random.uniform(0.1, 1, 3)}
        of = dict(zip(("white", "gray", "fluid"), tissues[known], strict=True))
        for label in range(len(means)):
            if tissue(label) in of:
                means[label] = of[tissue(label)] + random.normal(0, 0.03)
        means[0] = 0
        image = means[array] + random.normal(0, 0.05, array.shape) * (array > 0)
        if strip:
            image = image * np.isin(array, sorted(BRAIN))
        painted = Grid.of(labels).image(image.clip(0).astype(np.float32))
        return sitk.BinShrink(painted, [2, 2, 2])

    return look


def shapes(seed: int) -> Callable[[np.random.Generator], sitk.Image]:
    """Random shapes of one geometry per seed, each class of some gray: no anatomy at all."""

    def look(random: np.random.Generator) -> sitk.Image:
        geometry = np.random.default_rng(1000 + seed)
        size = [int(n) for n in geometry.integers(64, 110, 3)]
        classes = int(geometry.integers(5, 14))
        coarse = [max(n // int(geometry.integers(7, 16)), 3) for n in size]
        best, labels = None, None
        for k in range(classes):
            noise = sitk.GetImageFromArray(geometry.normal(0, 1, coarse[::-1]).astype(np.float32))
            noise.SetSpacing([(n - 1) / (c - 1) for n, c in zip(size, coarse, strict=True)])
            smooth = sitk.GetArrayFromImage(
                sitk.Resample(noise, size, sitk.Transform(), sitk.sitkBSpline3, (0, 0, 0), (1, 1, 1))
            )
            if best is None:
                best, labels = smooth, np.zeros(smooth.shape, int)
            else:
                labels[smooth > best] = k
                best = np.maximum(best, smooth)
        if geometry.random() < 0.7:  # inside an ellipsoid, air around it
            axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size[::-1]), indexing="ij")
            labels[sum((a / geometry.uniform(0.7, 1.0)) ** 2 for a in axes) > 1] = classes
        means = np.append(random.uniform(0.15, 1, classes), 0)
        image = means[labels] + random.normal(0, 0.03, labels.shape) * (labels < classes)
        found = sitk.GetImageFromArray(image.astype(np.float32))
        found.SetSpacing([float(2 * geometry.uniform(0.5, 1.5))] * 3)
        return sitk.SmoothingRecursiveGaussian(found, 0.5 * found.GetSpacing()[0])

    return look


# --- How an image came out of the scanner ----------------------------------------------------------------------------


def recolored(image: sitk.Image, random: np.random.Generator) -> sitk.Image:
    """Another contrast: intensities through a random curve that keeps what is darkest (air) dark."""
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    low, high = np.percentile(array, [0.5, 99.5])
    unit = ((array - low) / max(high - low, 1e-6)).clip(0, 1)
    knots = random.uniform(0.1, 1, 6)
    knots[0] = 0
    return Grid.of(image).image(np.interp(unit, np.linspace(0, 1, 6) ** 1.2, knots).astype(np.float32))


def scanned(image: sitk.Image, random: np.random.Generator, noise: float | None = None) -> sitk.Image:
    """With bias field, blur and noise; values around 0 to 1000."""
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    low, high = np.percentile(array, [0.5, 99.5])
    array = (array - low) / max(high - low, 1e-6)
    bias = sitk.GetImageFromArray(random.normal(0, random.uniform(0, 0.25), (4, 4, 4)).astype(np.float32))
    bias.SetSpacing([(n - 1) / 3 for n in image.GetSize()])
    bias = sitk.Resample(bias, image.GetSize(), sitk.Transform(), sitk.sitkLinear, (0, 0, 0), (1, 1, 1))
    array = array * np.exp(sitk.GetArrayFromImage(bias))
    found = Grid.of(image).image(array)
    sigma = random.choice((0, 0.4, 0.7)) * min(image.GetSpacing())
    if sigma:
        found = sitk.SmoothingRecursiveGaussian(found, float(sigma))
    level = random.choice((0.005, 0.02, 0.05)) if noise is None else noise
    array = np.abs(sitk.GetArrayFromImage(found) + random.normal(0, level, array.shape))
    return Grid.of(image).image((1000 * array).clip(-100, 3000).astype(np.int16))


def thick(image: sitk.Image, random: np.random.Generator) -> sitk.Image:
    """Slices two to four times as thick along one axis."""
    axis, size = int(random.integers(3)), image.GetSize()
    factor = int(random.integers(2, 5))
    if size[axis] < 12 * factor:
        return image
    return sitk.Cast(sitk.BinShrink(image, [factor if a == axis else 1 for a in range(3)]), image.GetPixelID())


def slab(image: sitk.Image, random: np.random.Generator, share: tuple[float, float]) -> sitk.Image:
    """A part of the image along one axis."""
    axis = int(random.integers(3))
    size, start = list(image.GetSize()), [0, 0, 0]
    kept = max(int(size[axis] * random.uniform(*share)), min(12, size[axis]))
    start[axis] = int(random.integers(0, size[axis] - kept + 1))
    size[axis] = kept
    return sitk.RegionOfInterest(image, size, start)


def resected(image: sitk.Image, random: np.random.Generator) -> sitk.Image:
    """A cavity of one gray, of 6 to 12 % of the image along each axis as radius, somewhere in what is bright."""
    array = sitk.GetArrayFromImage(image)
    inside = np.argwhere(array > 0.3 * np.percentile(array, 99))
    center = inside[int(random.integers(len(inside)))]
    radii = random.uniform(0.08, 0.16, 3) * array.shape
    axes = np.ogrid[tuple(slice(n) for n in array.shape)]
    cavity = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, center, radii, strict=True)) < 1
    array[cavity] = np.percentile(array, random.choice((5, 99)))
    return Grid.of(image).image(array)


# --- Maps ------------------------------------------------------------------------------------------------------------


def extent(image: sitk.Image) -> float:
    """Cube root of the volume, mm."""
    return float(np.prod([n * s for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]) ** (1 / 3))


def bending(image: sitk.Image, random: np.random.Generator, share: float, control: float) -> sitk.Transform:
    """A cubic B-spline deformation, control points ``control`` of the extent apart, moved by N(0, share * control)."""
    mesh = [max(int(round(n * s / (control * extent(image)))), 1) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    transform = sitk.BSplineTransformInitializer(image, mesh, 3)
    sd = share * control * extent(image)
    transform.SetParameters(random.normal(0, sd, len(transform.GetParameters())).tolist())
    return transform


def placed(image: sitk.Image, linear: np.ndarray, shift: np.ndarray) -> tuple[sitk.Image, sitk.AffineTransform]:
    """An image with its header turned and scaled about its middle and shifted; and where its points went."""
    center = Grid.of(image).center
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = center - linear @ center + shift
    grid = Grid.of(image)
    moved = Grid(grid.size, matrix @ grid.matrix)
    found = sitk.Image(image)
    moved.stamp(found)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(linear.ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return found, transform


def rotation(random: np.random.Generator, degrees: float) -> np.ndarray:
    axis = random.normal(0, 1, 3)
    axis /= np.linalg.norm(axis)
    return np.reshape(sitk.VersorTransform(axis.tolist(), np.radians(degrees)).GetMatrix(), (3, 3))


def cube_rotations() -> list[np.ndarray]:
    """The 23 turns by multiples of 90 degrees that are not the identity."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            matrix = np.eye(3)[list(order)] * signs
            if np.linalg.det(matrix) > 0 and not np.array_equal(matrix, np.eye(3)):
                found.append(matrix)
    return found


# --- Cases -----------------------------------------------------------------------------------------------------------

KINDS = ("near", "still", "bent", "strongly bent", "turned", "axes", "shifted", "scaled", "slab", "halves", "thick", "resected")


def make(subject: Subject, kind: str, number: int, others: list[Subject]) -> Case:
    """A case of a kind; the number seeds all that is random in it."""
    random = np.random.default_rng([number, *kind.encode(), *subject.name.encode()])
    names = list(subject.looks)
    one = names[int(random.integers(len(names)))]
    rest = [n for n in names if n != one and ("stripped" in n) == ("stripped" in one)] or [one]
    other = rest[int(random.integers(len(rest)))]
    fixed, moving = subject.looks[one](random), subject.looks[other](random)
    if one == other and one not in ("painted", "stripped", "shapes"):
        moving = recolored(moving, random)
    fixed, moving = scanned(fixed, random), scanned(moving, random)
    size, linear, shift, bend, options = extent(fixed), np.eye(3), np.zeros(3), None, {}
    little = rotation(random, random.uniform(0, 12)), random.normal(0, 0.04 * size, 3)
    if kind not in ("still", "shifted", "axes", "turned", "bent", "halves"):
        linear, shift = little
    if kind in ("bent", "resected") or (kind in ("near", "scaled", "slab", "thick") and random.random() < 0.5):
        bend = bending(fixed, random, random.uniform(0.1, 0.3), random.choice((0.1, 0.15, 0.25)))
        options["align"] = "none" if kind == "bent" else "affine"
    if kind == "strongly bent":
        bend = bending(fixed, random, random.uniform(0.3, 0.8), random.choice((0.15, 0.25)))
    if kind == "turned":
        linear, shift = rotation(random, random.uniform(40, 180)), random.normal(0, 0.05 * size, 3)
    if kind == "axes":
        turns = cube_rotations()
        linear = turns[int(random.integers(len(turns)))]
    if kind == "shifted":
        way = random.normal(0, 1, 3)
        shift = way / np.linalg.norm(way) * size * random.choice((0.02, 0.05, 0.1, 0.2, 0.3))
        options["align"] = "none"
    if kind == "scaled":
        linear = linear * random.choice((0.65, 0.8, 0.9, 1.12, 1.25, 1.5))
        if random.random() < 0.3:
            options["align"] = "rigid"
    if kind == "still":
        options["align"] = str(random.choice(("none", "rigid", "affine")))
    if bend is not None:
        fixed = sitk.Resample(fixed, fixed, bend, sitk.sitkLinear, 0)
    if kind == "slab":
        moving = slab(moving, random, (0.3, 0.6))
    if kind == "halves":
        axis, reach = int(random.integers(3)), random.uniform(0.55, 0.7)
        n = fixed.GetSize()[axis]
        kept = max(int(reach * n), 8)
        lower = [slice(None)] * 3
        upper = list(lower)
        lower[axis], upper[axis] = slice(0, kept), slice(n - kept, None)
        fixed, moving = fixed[tuple(lower)], moving[tuple(upper)]
        options["align"] = str(random.choice(("none", "affine")))
    if kind == "thick":
        moving = thick(moving, random)
    if kind == "resected":
        moving = resected(moving, random)
    moving, truth = placed(moving, linear, shift)
    if kind in ("slab", "thick", "resected") and random.random() < 0.3:
        fixed, moving, truth, bend = _swapped(fixed, moving, truth, bend)
    whole = truth if bend is None else sitk.CompositeTransform([truth, bend])  # the last is applied first
    return Case(f"{subject.name} {kind} {number}", subject.family, kind, subject.held_out, fixed, moving, whole, options)


def _swapped(fixed, moving, truth, bend):
    """The other way round, where the truth has an inverse in closed form."""
    return (fixed, moving, truth, bend) if bend is not None else (moving, fixed, truth.GetInverse(), None)


def wrong(subject: Subject, other: Subject | None, number: int) -> Case:
    """Images that do not belong together: another organ, or noise."""
    random = np.random.default_rng([number, 77, *subject.name.encode()])
    looks = list(subject.looks)
    fixed = scanned(subject.looks[looks[int(random.integers(len(looks)))]](random), random)
    if other is None:
        noise = random.normal(500, 200, fixed.GetSize()[::-1]).astype(np.float32)
        moving = Grid.of(fixed).image(noise)
        sigma = random.choice((0.0, 1.0, 2.5))
        moving = sitk.SmoothingRecursiveGaussian(moving, float(sigma * fixed.GetSpacing()[0])) if sigma else moving
        moving = sitk.Cast(moving, sitk.sitkInt16)
    else:
        looks = list(other.looks)
        moving = scanned(other.looks[looks[int(random.integers(len(looks)))]](random), random)
        shift = Grid.of(fixed).center - Grid.of(moving).center
        moving, _ = placed(moving, np.eye(3), shift)
    name = f"{subject.name} with {'noise' if other is None else other.name} {number}"
    kind = "noise" if other is None else "other organ"
    return Case(name, subject.family, kind, subject.held_out, fixed, moving, None, {})


def cases(data: Path) -> Iterator[Callable[[], Case]]:
    """All cases, as functions that make them, in an order in which any beginning is a fair sample."""
    everyone = subjects(data)
    for turn in range(40):
        for i, subject in enumerate(everyone):
            kind = KINDS[(turn * 5 + i * 7) % len(KINDS)]
            if turn and subject.family in ("hippocampus", "shapes") and turn % 4 != i % 4:
                continue
            yield lambda s=subject, k=kind, t=turn: make(s, k, t, everyone)
            if (i + turn) % 7 == 0:
                peers = [s for s in everyone if s.family != subject.family and s.held_out == subject.held_out]
                other = peers[(i * 3 + turn) % len(peers)] if (i + turn) % 3 else None
                yield lambda s=subject, o=other, t=turn: wrong(s, o, t)
