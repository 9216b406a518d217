"""Pairs whose alignment is known, and the ways in which they are misplaced, for the benchmark of the initial alignment.

A *scene* is a pair of images in one frame, or two subjects with a reference between their frames. A *kind* misplaces the
moving image: its header is turned, shifted or rescaled, or it is resampled, cut to a slab, cropped. All is drawn from seeds
made of the names. Subjects are split: constants of the alignment were chosen on ``fitted`` ones only, and the figures that
count are those of ``held out`` ones.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, apply_matrix

POINTS = 400  # of the fixed foreground, where errors are measured
LIMIT_MM = 5.0  # that a result may be off on average, for a field of view of a head
LIMIT_SHARE = 0.04  # of the side of a cube as large as the fixed image, if that is less
TWO_SUBJECTS = 2.0  # times as much, where the reference itself is only good to some mm


@dataclass(frozen=True)
class Scene:
    """A pair before it is misplaced.

    fixed, moving: images; moving may be None until painted.
    truth: (4, 4) LPS, fixed -> moving points.
    limit_mm: mean distance to the truth up to which a result is right.
    """

    fixed: sitk.Image
    moving: sitk.Image
    truth: np.ndarray
    limit_mm: float


@dataclass(frozen=True)
class Case:
    """One registration: ``make(data folder)`` gives fixed, moving, truth (4, 4), points (n, 3) and the limit in mm."""

    family: str
    scene: str
    kind: str
    split: str
    load: Callable[[Path], Scene]
    misplace: Callable

    @property
    def name(self) -> str:
        return f"{self.family}/{self.scene}/{self.kind}"

    def make(self, data: Path) -> tuple[sitk.Image, sitk.Image, np.ndarray, np.ndarray, float]:
        scene = self.load(data)
        random = np.random.default_rng(zlib.crc32(self.name.encode()))
        fixed, moving, truth = self.misplace(scene.fixed, scene.moving, scene.truth, random)
        points = foreground(fixed, moving, truth, random)
        return fixed, moving, truth, points, scene.limit_mm * _common_scale(scene.fixed, fixed)


def _common_scale(before: sitk.Image, after: sitk.Image) -> float:
    """How much larger a fixed image is than it was (1 but for the kind that shrinks both)."""
    volumes = [abs(np.linalg.det(Grid.of(x).matrix[:3, :3])) for x in (before, after)]
    ratio = (volumes[1] / volumes[0]) ** (1 / 3)
    return ratio if ratio < 0.5 else 1.0


def foreground(fixed: sitk.Image, moving: sitk.Image, truth: np.ndarray, random) -> np.ndarray:
    """Points (n, 3) LPS of the fixed image's foreground whose true place lies in the moving image."""
    array = sitk.GetArrayFromImage(fixed).astype(float)
    low, high = np.percentile(array, [0.5, 99.5])
    bright = np.argwhere(array > low + 0.15 * (high - low))[:, ::-1]
    points = Grid.of(fixed).to_physical(bright[random.permutation(len(bright))[: 20 * POINTS]])
    there = Grid.of(moving).contains(apply_matrix(truth, points))
    return points[there][:POINTS]


# How an image is misplaced. Each is a function of (fixed, moving, truth, random) to the same three.


def moved(image: sitk.Image, matrix: np.ndarray) -> sitk.Image:
    """The same voxels elsewhere: a (4, 4) rotation, shift and isotropic scale goes into the header."""
    grid, image = Grid.of(image), sitk.Image(image)
    return Grid(grid.size, matrix @ grid.matrix).stamp(image)


def about(center: np.ndarray, linear: np.ndarray, shift=(0.0, 0.0, 0.0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = center - linear @ center + shift
    return matrix


def rotation(degrees: float, random) -> np.ndarray:
    """(3, 3) about an axis at random, or one of the LPS axes in half of the cases."""
    axis = random.normal(size=3)
    if random.random() < 0.5:
        axis = np.eye(3)[random.integers(3)]
    versor = sitk.VersorTransform((axis / np.linalg.norm(axis)).tolist(), float(np.radians(degrees)))
    return np.reshape(versor.GetMatrix(), (3, 3))


def _extent(image: sitk.Image) -> float:
    return float(Grid.of(image).voxels * abs(np.linalg.det(Grid.of(image).matrix[:3, :3]))) ** (1 / 3)


def _header(linear, fixed, moving, truth, random, share: float = 0.15):
    """Applies a linear map about the middle of the moving image and a shift of up to a share of its extent."""
    shift = random.uniform(-1, 1, 3) * share * _extent(moving)
    place = about(Grid.of(moving).center, linear, shift)
    return fixed, moved(moving, place), place @ truth


def turned(fixed, moving, truth, random, *, degrees: tuple[float, ...]):
    angle = degrees[0] if len(degrees) == 1 else random.uniform(*degrees)
    return _header(rotation(angle, random), fixed, moving, truth, random)


def axis_order(fixed, moving, truth, random):
    """One of the 23 rotations that cycle, swap and flip axes."""
    found = []
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        matrix = np.eye(3)[list(order)] * np.array(signs)[:, None]
        if np.linalg.det(matrix) > 0 and not np.allclose(matrix, np.eye(3)):
            found.append(matrix)
    return _header(found[random.integers(len(found))], fixed, moving, truth, random, 0.05)


def far(fixed, moving, truth, random):
    return _header(rotation(random.uniform(0, 20), random), fixed, moving, truth, random, 6.0)


def as_it_is(fixed, moving, truth, random):
    return fixed, moving, truth


def scaled(fixed, moving, truth, random, *, degrees=(0.0, 20.0)):
    """By 0.6 to 1.6, and turned."""
    scale = np.exp(random.uniform(np.log(0.6), np.log(1.6)))
    return _header(scale * rotation(random.uniform(*degrees), random), fixed, moving, truth, random)


def slice_spacing(fixed, moving, truth, random):
    """One voxel axis stretched by 1/1.5 to 1.5, and turned by up to 15 degrees."""
    grid, axis = Grid.of(moving), random.integers(3)
    stretch = np.eye(3)
    stretch[axis, axis] = np.exp(random.uniform(-1, 1) * np.log(1.5))
    frame = np.reshape(grid.direction, (3, 3))
    linear = rotation(random.uniform(0, 15), random) @ frame @ stretch @ frame.T
    return _header(linear, fixed, moving, truth, random, 0.05)


def thick_slices(fixed, moving, truth, random):
    """Averaged over 6 to 9 mm along one axis (less for small images), turned by up to 45 degrees."""
    axis = random.integers(3)
    thick = random.uniform(6, 9) * min(_extent(moving) / 170, 1)
    factors = [1, 1, 1]
    factors[axis] = max(round(thick / moving.GetSpacing()[axis]), 1)
    moving = sitk.BinShrink(moving, factors)
    return _header(rotation(random.uniform(0, 45), random), fixed, moving, truth, random)


def cut(image: sitk.Image, size_share: np.ndarray, random) -> sitk.Image:
    """A box of the image about a voxel of the middle of its content."""
    array = sitk.GetArrayFromImage(image).astype(float)
    low, high = np.percentile(array, [0.5, 99.5])
    content = np.argwhere(array > low + 0.15 * (high - low))[:, ::-1]
    first, last = np.percentile(content, [2, 98], axis=0)
    size = np.maximum(np.round((last - first) * size_share), np.minimum(12, last - first)).astype(int)
    room = np.maximum(last - first - size, 0)
    start = np.clip(np.round(first + room * random.uniform(0.1, 0.9, 3)), 0, np.array(image.GetSize()) - 2).astype(int)
    stop = np.minimum(start + np.maximum(size, 4), image.GetSize())
    return image[start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]]


def slab(fixed, moving, truth, random, *, degrees=(0.0, 30.0)):
    """A quarter to a half of the content along one axis, all of it along the others."""
    share = np.full(3, 1.1)
    share[random.integers(3)] = random.uniform(0.25, 0.5)
    return _either(fixed, moving, truth, share, degrees, random)


def crop(fixed, moving, truth, random, *, degrees=(0.0, 30.0)):
    """A box of 45 to 75 % of the content along each axis."""
    return _either(fixed, moving, truth, random.uniform(0.45, 0.75, 3), degrees, random)


def _either(fixed, moving, truth, share, degrees, random):
    """Cuts one of the two images, then turns the moving one and shifts it by up to 5 % of the larger one's extent."""
    extent = _extent(moving)
    if random.random() < 0.5:
        moving = cut(moving, share, random)
    else:
        fixed = cut(fixed, share, random)
    shift = random.uniform(-1, 1, 3) * 0.05 * extent
    place = about(Grid.of(moving).center, rotation(random.uniform(*degrees), random), shift)
    return fixed, moved(moving, place), place @ truth


def small(fixed, moving, truth, random):
    """Both images shrunk to a field of view of 0.3 to 5 mm, the moving one turned by up to 45 degrees."""
    scale = np.exp(random.uniform(np.log(0.3), np.log(5))) / _extent(fixed)
    shrink = about(np.zeros(3), scale * np.eye(3))
    truth = shrink @ truth @ np.linalg.inv(shrink)
    fixed, moving = moved(fixed, shrink), moved(moving, shrink)
    return _header(rotation(random.uniform(0, 45), random), fixed, moving, truth, random)


KINDS: dict[str, Callable] = {
    "as it is": as_it_is,
    "turned 10-60": partial(turned, degrees=(10.0, 60.0)),
    "turned 60-120": partial(turned, degrees=(60.0, 120.0)),
    "turned 120-180": partial(turned, degrees=(120.0, 180.0)),
    "turned 180": partial(turned, degrees=(180.0,)),
    "axis order": axis_order,
    "far": far,
    "scale 0.6-1.6": scaled,
    "scale, turned 90-180": partial(scaled, degrees=(90.0, 180.0)),
    "slice spacing": slice_spacing,
    "thick slices": thick_slices,
    "slab": slab,
    "slab, turned 90-180": partial(slab, degrees=(90.0, 180.0)),
    "crop": crop,
    "crop, turned 90-180": partial(crop, degrees=(90.0, 180.0)),
    "small": small,
}
SUBJECT_KINDS = {
    "as it is": as_it_is,
    "turned 90": partial(turned, degrees=(90.0,)),
    "turned 180": partial(turned, degrees=(180.0,)),
    "turned 10-60": partial(turned, degrees=(10.0, 60.0)),
}
SAME_HEAD = ("heads, painted", "heads, MR")

# Scenes.


def _read(path: Path, mm: float | None = None) -> sitk.Image:
    """Float32, averaged in blocks to about ``mm``."""
    image = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkFloat32)
    if mm:
        image = sitk.BinShrink(image, [max(round(mm / s), 1) for s in image.GetSpacing()])
    return image


def limit(image: sitk.Image) -> float:
    return min(LIMIT_MM, LIMIT_SHARE * _extent(image))


@lru_cache(4)
def _map(data: Path, number: int) -> sitk.Image:
    """A label map without most of the air around it."""
    labels = sitk.Cast(sitk.ReadImage(str(data / f"brain_labelmaps/training_seg_{number:02}.nii.gz")), sitk.sitkUInt16)
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(labels > 0)
    box = np.array(statistics.GetBoundingBox(1))
    first, last = np.maximum(box[:3] - 4, 0), np.minimum(box[:3] + box[3:] + 4, labels.GetSize())
    return labels[first[0] : last[0], first[1] : last[1], first[2] : last[2]]


@lru_cache(8)
def painted(data: Path, number: int, look: int) -> sitk.Image:
    """A label map as an image: gray values of its own, shading, noise; voxels of 1.5 to 2.5 mm, axes in a random order."""
    random = np.random.default_rng([number, look])
    labels = _map(data, number)
    array = sitk.GetArrayFromImage(labels)
    means = random.uniform(0.15, 1, array.max() + 1)
    means[0] = 0
    image = sitk.SmoothingRecursiveGaussian(Grid.of(labels).image(means[array].astype(np.float32)), 0.7)
    content = np.argwhere(array > 0)[:, ::-1]
    grid = Grid.of(labels)
    corners = grid.to_physical(np.stack([content.min(0), content.max(0)]))
    margin = random.uniform(4, 25, 3)
    extent = np.abs(corners[1] - corners[0]) + 2 * margin
    spacing = random.choice([[2, 2, 2], [1.5, 1.5, 2.5], [2.5, 1.5, 1.5], [1.5, 2.2, 1.8]])
    frame = np.eye(3)[random.permutation(3)] * random.choice([1, -1], 3)
    if np.linalg.det(frame) < 0:
        frame[0] *= -1
    tilt = sitk.Euler3DTransform((0, 0, 0), *np.radians(random.uniform(-8, 8, 3)))
    frame = np.reshape(tilt.GetMatrix(), (3, 3)) @ frame
    size = np.ceil(np.abs(frame.T) @ extent / spacing).astype(int)
    middle = corners.mean(0) - frame @ ((size - 1) / 2 * spacing)
    target = Grid.build(size.tolist(), list(spacing), middle.tolist(), frame.ravel().tolist())
    seen = sitk.GetArrayFromImage(sitk.Resample(image, target.empty_image(), sitk.Transform(), sitk.sitkLinear, 0.0))
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in seen.shape), indexing="ij")
    shading = np.exp(sum(random.uniform(-0.25, 0.25) * axis for axis in axes))
    noisy = seen * shading + 0.03 * random.normal(size=seen.shape)
    return target.image(np.abs(1000 * noisy).astype(np.int16))


def painted_head(data: Path, number: int, looks: tuple[int, int]) -> Scene:
    fixed, moving = (painted(data, number, look) for look in looks)
    return Scene(fixed, moving, np.eye(4), LIMIT_MM)


CLASSES = (4, 10, 11, 12, 13, 17, 18, 26, 28, 43, 49, 50, 51, 52, 53, 54, 58, 60, 2, 41, 7, 46, 16)


def painted_subjects(data: Path, pair: tuple[int, int], looks: tuple[int, int]) -> Scene:
    """Reference: the affine map that fits the centers of 23 structures best."""
    centers = []
    for number in pair:
        array, grid = sitk.GetArrayFromImage(_map(data, number)), Grid.of(_map(data, number))
        centers.append(np.stack([grid.to_physical(np.argwhere(array == c)[:, ::-1].mean(0)) for c in CLASSES]))
    fixed, moving = (painted(data, n, look) for n, look in zip(pair, looks, strict=True))
    return Scene(fixed, moving, affine_fit(*centers), TWO_SUBJECTS * LIMIT_MM)


def affine_fit(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """(4, 4): least squares from points (n, 3) to points (n, 3)."""
    matrix = np.eye(4)
    matrix[:3] = np.linalg.lstsq(np.c_[fixed, np.ones(len(fixed))], moving, rcond=None)[0].T
    return matrix


def one_frame(data: Path, fixed: str, moving: str, mm: float | None = None, times: float = 1.0) -> Scene:
    images = _read(data / fixed, mm), _read(data / moving, mm)
    return Scene(*images, np.eye(4), times * limit(images[0]))


def itself(data: Path, path: str, mm: float | None = None) -> Scene:
    """An image and the same with a contrast that is no function of monotone steps, and noise."""
    image = _read(data / path, mm)
    array = sitk.GetArrayFromImage(image)
    low, high = np.percentile(array, [1, 99.5])
    unit = np.clip((array - low) / (high - low), 0, 1)
    noise = np.random.default_rng(zlib.crc32(path.encode())).normal(size=array.shape)
    other = 0.8 * np.sin(np.pi * unit) + 0.35 * unit + 0.04 * noise
    return Scene(image, Grid.of(image).image((1000 * other).astype(np.float32)), np.eye(4), limit(image))


def hippocampi(data: Path, pair: tuple[str, str]) -> Scene:
    """Reference: a rigid map that brings the smoothed labels together (mean squares), from their centers."""
    read = [_read(data / f"hippocampus/images/{n}.nii.gz") for n in pair]
    labels = [sitk.SmoothingRecursiveGaussian(_read(data / f"hippocampus/labels/{n}.nii.gz"), 1.5) for n in pair]
    # The labels of the anterior and the posterior part are 1 and 2.
    rigid = sitk.Euler3DTransform()
    start = sitk.CenteredTransformInitializer(*labels, rigid, sitk.CenteredTransformInitializerFilter.MOMENTS)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(start, inPlace=True)
    method.Execute(*labels)
    found = sitk.Euler3DTransform(start)
    matrix = about(np.array(found.GetCenter()), np.reshape(found.GetMatrix(), (3, 3)), found.GetTranslation())
    return Scene(*read, matrix, 2 * TWO_SUBJECTS * limit(read[0]))


def ixi012(data: Path) -> Scene:
    """Reference: the affine map that fits the centers of fourteen structures that AAL and DLMUSE both outline best."""
    from training.benchmarks import cases

    material = cases.ixi012(data, "T1")
    centers = []
    for labels in (material.fixed_labels, material.moving_labels):
        array = sitk.GetArrayFromImage(labels)
        ids = range(1, 15)
        centers.append(Grid.of(labels).to_physical([np.argwhere(array == n)[:, ::-1].mean(0) for n in ids]))
    return Scene(material.fixed, material.moving, affine_fit(*centers), TWO_SUBJECTS * LIMIT_MM)


def livers(data: Path) -> Scene:
    """Reference: the centers of the livers and what the bodies have in common, found by hand to some cm."""
    fixed, moving = _read(data / "liver/ct_crlm1004.nii.gz"), _read(data / "liver/mr_t2_cmb001.nii.gz")
    centers = []
    for name in ("ct_crlm1004", "mr_t2_cmb001"):
        labels = sitk.ReadImage(str(data / f"liver/{name}_liver.nii.gz"))
        centers.append(Grid.of(labels).to_physical(np.argwhere(sitk.GetArrayFromImage(labels) > 0)[:, ::-1].mean(0)))
    return Scene(fixed, moving, about(np.zeros(3), np.eye(3), centers[1] - centers[0]), 40.0)


HIPPOCAMPI = (1, 3, 4, 6, 7, 8, 11, 14, 15, 17, 19, 20, 23, 24, 25, 26, 33, 34, 35, 36)
HIPPOCAMPI_HELD_OUT = (279, 280, 282, 286, 287, 288, 289, 290, 299, 300, 301, 302, 303, 304, 309, 310)


def scenes() -> Iterator[tuple[str, str, str, Callable, dict]]:
    """Family, scene, split, loader and kinds."""
    for n in range(1, 16):
        split = "fitted" if n <= 5 else "held out"
        for looks in ((0, 1), (2, 3)) if n <= 5 else ((0, 1),):
            load = partial(painted_head, number=n, looks=looks)
            yield "heads, painted", f"map {n}, {looks[0]}-{looks[1]}", split, load, KINDS
    folder = "brain_t1t2pd/brainweb_"
    for a, b in (("T1", "T2"), ("T2", "PD"), ("PD", "T1")):
        load = partial(one_frame, fixed=f"{folder}{a}.nii.gz", moving=f"{folder}{b}.nii.gz", mm=None)
        yield "heads, MR", f"BrainWeb {b} to {a}", "fitted", load, KINDS
    folder = "brain_multicontrast/ms07_"
    for a, b in (("T1", "T2"), ("FLAIR", "T1POST"), ("T2", "FLAIR"), ("T1POST", "T2")):
        load = partial(one_frame, fixed=f"{folder}{a}.nii.gz", moving=f"{folder}{b}.nii.gz", mm=None)
        yield "heads, MR", f"MS07 {b} to {a}", "held out", load, KINDS
    for i, j in ((1, 2), (2, 3), (3, 4), (4, 5), (5, 1), (1, 3)):
        load = partial(painted_subjects, pair=(i, j), looks=(4, 5))
        yield "two heads, painted", f"maps {i}-{j}", "fitted", load, SUBJECT_KINDS
    for i in range(6, 16):
        pair = i, 6 + (i - 3) % 10
        load = partial(painted_subjects, pair=pair, looks=(4, 5))
        yield "two heads, painted", f"maps {pair[0]}-{pair[1]}", "held out", load, SUBJECT_KINDS
    yield "two heads, MR", "IXI012 to BrainWeb T1", "held out", ixi012, SUBJECT_KINDS
    load = partial(
        one_frame, fixed="brain_t1t2pd/brainweb_T1.nii.gz", moving="brain_ct/scct.nii.gz", times=TWO_SUBJECTS
    )
    yield "head CT to MR", "template to BrainWeb T1", "fitted", load, SUBJECT_KINDS
    load = partial(
        one_frame,
        fixed="brain_multicontrast/ms07_T1.nii.gz",
        moving="brain_ct/scct_stripped.nii.gz",
        times=TWO_SUBJECTS,
    )
    yield "head CT to MR", "stripped template to MS07 T1", "held out", load, SUBJECT_KINDS
    for path, split in (("brain_ct/scct.nii.gz", "fitted"), ("brain_ct/ct_brain_atlas_1mm.nii.gz", "held out"),
                        ("abdomen/example_ct.nii.gz", "fitted"), ("liver/ct_crlm1004.nii.gz", "held out"),
                        ("liver/mr_t2_cmb001.nii.gz", "held out")):  # fmt: skip
        family = "heads, CT" if "brain" in path else "bodies"
        yield family, Path(path).name.split(".")[0], split, partial(itself, path=path), KINDS
    for names, split in ((HIPPOCAMPI, "fitted"), (HIPPOCAMPI_HELD_OUT, "held out")):
        crops = [f"hippocampus_{n:03}" for n in names]
        for name in crops[::5]:
            load = partial(itself, path=f"hippocampus/images/{name}.nii.gz")
            yield "hippocampus crops", name, split, load, KINDS
        for pair in zip(crops[::2], crops[1::2], strict=True):
            load = partial(hippocampi, pair=pair)
            yield "two hippocampi", "-".join(n.split("_")[1] for n in pair), split, load, SUBJECT_KINDS
    for patient in ("001", "003", "005", "008", "012"):
        split = "fitted" if patient <= "003" else "held out"
        files = {
            f"{r}": f"limb_ct_mr/STS_{patient}_{m}_image.nii.gz" for r, m in (("fixed", "MR_T1"), ("moving", "CT"))
        }
        yield "limbs CT to MR", patient, split, partial(one_frame, **files, times=4), SUBJECT_KINDS
    yield "two bodies", "liver MR to CT", "held out", livers, SUBJECT_KINDS


def cases() -> list[Case]:
    found = []
    for family, scene, split, load, kinds in scenes():
        found += [Case(family, scene, kind, split, load, misplace) for kind, misplace in kinds.items()]
    return found
