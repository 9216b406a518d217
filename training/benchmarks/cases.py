"""The pairs of the benchmark, and what each is scored by.

A family is a kind of task; each of its cases is a function from the data folder to a :class:`Material`, the volumes as they
are on disk. :func:`prepare_pair` aligns a pair and resamples it onto the family's grid, once for all methods.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.core.intensity import normalize, percentile_window, subsample, without_padding
from DivRegNetLib.io.atomic import write_json
from DivRegNetLib.io.images import read_image, read_labels, write_image
from DivRegNetLib.io.landmarks import read_landmarks
from DivRegNetLib.registration import alignment
from training.data import hippocampus, label_maps, synthesis
from training.data.brainweb import aal, brain_mask, brainweb, tissues
from training.data.free_form import SD_MM, ffd_transform
from training.data.phantoms import TASKS
from training.scoring import displacement_on

FIRST_SEED = 5000
UNBENT = "unbent"  # folder of the pair before the deformation of its fixed image, in the folder of the pair
SAMPLE = Path(__file__).resolve().parents[2] / "Resources" / "SampleData"
BODY_WINDOW = (-160.0, 240.0)  # Hounsfield units, that of soft tissue
BRAIN_WINDOW = (1780.0, 3100.0)  # -20 to 100 Hounsfield units on the scale of the CT template: 900 + 11 (HU + 100)


@dataclass(frozen=True)
class Material:
    """A pair as it is on disk.

    fixed, moving: images, each on a grid of its own.
    fixed_labels, moving_labels: label maps with the same labels; 0 is background.
    truth: the true transform from fixed to moving points, where it is known.
    inside: mask in which the error is measured; None: inside the fixed labels.
    landmarks: (n, 3) LPS mm, in the fixed and in the moving image.
    unbent: the pair before its fixed image was deformed by ``truth``, if the two were not aligned even then. A method's own
        result on that pair, after ``truth``, then takes the place of the true transform.
    """

    fixed: sitk.Image
    moving: sitk.Image
    fixed_labels: sitk.Image
    moving_labels: sitk.Image
    truth: sitk.Transform | None = None
    inside: sitk.Image | None = None
    landmarks: tuple[np.ndarray, np.ndarray] | None = None
    unbent: "Material | None" = None


@dataclass(frozen=True)
class Family:
    """Cases of one kind.

    spacing: spacing in mm of the grid that all methods work on.
    quick_spacing: the same in the preset ``quick``.
    note: a description of the pairs and their scores.
    folders: folders in the data folder that the cases need.
    align: the alignment before all methods, see DivRegNetLib/options.py.
    judged: the score that ranks methods, a key of :func:`training.benchmarks.measure.scores`.
    seen: cases with images that a training or a choice of settings has used. They are reported apart from the others, which
        are held back.
    """

    spacing: float
    quick_spacing: float
    note: str
    cases: dict[str, Callable[[Path], Material]]
    folders: tuple[str, ...] = ()
    align: str = "affine"
    judged: str = "Dice"
    seen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A pair on one grid after the alignment, as :func:`prepare_pair` stores it in a folder.

    fixed_labels: on the grid; moving_labels: as on disk.
    truth: true displacement from fixed to moving points on the grid (LPS, mm), the affine part included; or None.
    inside: (D, H, W) bool, where the error is measured.
    initial: (4, 4) LPS, the affine alignment.
    seconds: duration of the alignment.
    unbent: see :class:`Material`; ``truth`` then maps to points of its fixed image.
    """

    folder: Path
    fixed: sitk.Image
    fixed_labels: sitk.Image
    moving_labels: sitk.Image
    truth: sitk.Image | None
    inside: np.ndarray
    landmarks: tuple[np.ndarray, np.ndarray] | None
    initial: np.ndarray
    seconds: float
    unbent: "Prepared | None" = None


def prepare_pair(load: Callable[[], Material], spacing: float, folder: Path, align: str = "affine") -> Prepared:
    """Aligns a pair and resamples it onto an isotropic grid over the fixed image, with normalized intensities.

    The folder keeps the result; methods register its ``fixed.mha`` and ``moving.mha``. If it exists, nothing is done.
    """
    if not (folder / "pair.json").exists():
        _prepare(load(), spacing, folder, align)
    return stored(folder)


def stored(folder: Path) -> Prepared:
    """The pair that :func:`prepare_pair` has put into a folder."""
    about = json.loads((folder / "pair.json").read_text())
    fixed, fixed_labels, moving_labels, inside = (
        sitk.ReadImage(str(folder / f"{n}.mha")) for n in ("fixed", "fixed_labels", "moving_labels", "inside")
    )
    truth, points = folder / "truth.mha", about["landmarks"]
    return Prepared(
        folder=folder,
        fixed=fixed,
        fixed_labels=fixed_labels,
        moving_labels=moving_labels,
        truth=sitk.ReadImage(str(truth)) if truth.exists() else None,
        inside=sitk.GetArrayFromImage(inside) > 0,
        landmarks=None if points is None else (np.array(points[0]), np.array(points[1])),
        initial=np.array(about["initial"]),
        seconds=about["seconds"],
        unbent=stored(folder / UNBENT) if (folder / UNBENT).is_dir() else None,
    )


def _prepare(material: Material, spacing: float, folder: Path, align: str) -> None:
    if material.unbent is not None:
        _prepare(material.unbent, spacing, folder / UNBENT, align)
    grid, m = Grid.of(material.fixed).axis_aligned(spacing), material
    started = time.perf_counter()
    initial = alignment.align(m.fixed, m.moving, align)
    seconds = time.perf_counter() - started
    nothing, nearest = sitk.Transform(), sitk.sitkNearestNeighbor
    labels = sitk.Resample(m.fixed_labels, grid.empty_image(), nothing, nearest, 0)
    inside = labels > 0 if m.inside is None else sitk.Resample(m.inside, grid.empty_image(), nothing, nearest, 0)
    images = {
        "fixed": _normalized(m.fixed, grid, np.eye(4)),
        "moving": _normalized(m.moving, grid, initial),
        "fixed_labels": labels,
        "moving_labels": m.moving_labels,
        "inside": sitk.Cast(inside, sitk.sitkUInt8),
    }
    if m.truth is not None:
        images["truth"] = sitk.Cast(displacement_on(m.truth, grid), sitk.sitkVectorFloat32)
    for name, image in images.items():
        write_image(image, folder / f"{name}.mha")
    points = None if m.landmarks is None else [p.tolist() for p in m.landmarks]
    about = {"initial": initial.tolist(), "seconds": seconds, "landmarks": points}
    write_json(about, folder / "pair.json")


def _normalized(image: sitk.Image, grid: Grid, matrix: np.ndarray) -> sitk.Image:
    """An image on a grid, smoothed and linearly interpolated: not by the library's own sampling, so that all methods still get
    the same volumes when that changes."""
    own = Grid.of(image)
    values = torch.from_numpy(sitk.GetArrayFromImage(sitk.Cast(without_padding(image), sitk.sitkFloat32)))[None, None]
    sigma = [math.sqrt(0.2 * max((grid.spacing[0] / s) ** 2 - 1, 0.0)) for s in own.spacing]
    smoothed = own.image(fields.smooth(values, *(s if s > 0.1 else 0.0 for s in sigma))[0, 0].numpy())
    outside = float(np.quantile(subsample(sitk.GetArrayViewFromImage(smoothed)), 0.005))
    resampled = sitk.Resample(smoothed, grid.empty_image(), affine_transform(matrix), sitk.sitkLinear, outside)
    values = torch.from_numpy(sitk.GetArrayFromImage(resampled))[None, None]
    return grid.image(normalize(values, "robust")[0, 0].numpy())


def deformed(material: Material, seed: int, *, one_frame: bool = True, sd_mm: float = SD_MM) -> Material:
    """The pair with its fixed image under a random free-form deformation, which is then known.

    Args:
        one_frame: the two images were aligned before, so that the deformation is the true transform.
        sd_mm: how large the deformation is, see :func:`~training.data.free_form.ffd_transform`.
    """
    bend = ffd_transform(material.fixed, seed, sd_mm)

    def warped(image: sitk.Image | None, how: int) -> sitk.Image | None:
        return None if image is None else sitk.Resample(image, image, bend, how, 0)

    return replace(
        material,
        fixed=warped(material.fixed, sitk.sitkLinear),
        fixed_labels=warped(material.fixed_labels, sitk.sitkNearestNeighbor),
        inside=warped(material.inside, sitk.sitkNearestNeighbor),
        truth=bend,
        unbent=None if one_frame else material,
    )


def relabeled(labels: sitk.Image, groups: list[tuple[int, ...]]) -> sitk.Image:
    """A label map in which the labels of the first group are 1, those of the second 2, and all others 0."""
    array = sitk.GetArrayViewFromImage(labels)
    return Grid.of(labels).image(sum(n * np.isin(array, group) for n, group in enumerate(groups, 1)).astype(np.uint8))


def brainweb_tissues(data: Path) -> tuple[sitk.Image, sitk.Image]:
    """The tissues of BrainWeb's head, and a mask of the inside of its skull."""
    brain = brain_mask(brainweb(data, "T1"), aal(data))
    return tissues(brainweb(data, "T1"), brain), brain


def sample_pair(data: Path) -> Material:
    fixed, moving = (read_image(SAMPLE / f"{n}.nii.gz") for n in ("fixed_T1", "moving_T2"))
    labels = [read_labels(SAMPLE / f"{n}_labels.nii.gz") for n in ("fixed_T1", "moving_T2")]
    points = tuple(read_landmarks(SAMPLE / f"{n}.mrk.json").points for n in ("fixed_T1", "moving_T2"))
    return Material(fixed, moving, *(sitk.Cast(x > 0, sitk.sitkUInt8) for x in labels), landmarks=points)


def phantom(data: Path, task: str, seed: int) -> Material:
    moving, fixed = task.split("-")
    union = sitk.Cast(aal(data) > 0, sitk.sitkUInt8)
    return deformed(Material(brainweb(data, fixed), brainweb(data, moving), union, union), seed)


def phantom_cases(seeds: Iterable[int]) -> dict[str, Callable[[Path], Material]]:
    """Phantoms of every task with the deformations of some seeds."""
    return {f"{task}, {seed}": partial(phantom, task=task, seed=seed) for seed in seeds for task in TASKS}


def ms07(data: Path, moving: str, fixed: str) -> Material:
    scans = {c: read_image(data / f"brain_multicontrast/ms07_{c}.nii.gz") for c in ("T1", moving)}
    fixed_tissues, brain = brainweb_tissues(data)
    inside = sitk.Cast(sitk.BinaryFillhole(scans["T1"] > 30), sitk.sitkUInt8)
    return Material(sitk.Mask(brainweb(data, fixed), brain), scans[moving], fixed_tissues, tissues(scans["T1"], inside))


# Right and left amygdala, caudate, hippocampus, pallidum, putamen, thalamus and cerebellum.
MUSE = [(31,), (32,), (36,), (37,), (47,), (48,), (55,), (56,), (57,), (58,), (59,), (60,), (38, 40), (39, 41)]
AAL = [(n + side,) for n in (41, 71, 37, 75, 73, 77) for side in (1, 0)]
AAL += [tuple(range(92, 109, 2)), tuple(range(91, 109, 2))]


def ixi012(data: Path, fixed: str) -> Material:
    head = read_image(data / "brain_t1/IXI012-HH-1211_T1.nii.gz")
    regions = read_labels(data / "brain_t1/IXI012-HH-1211_T1_DLMUSE.nii.gz")
    return Material(brainweb(data, fixed), head, relabeled(aal(data), AAL), relabeled(regions, MUSE))


def brain_ct(data: Path, fixed: str, seed: int) -> Material:
    priors = np.stack([sitk.GetArrayFromImage(read_image(data / f"brain_ct/sc{t}.nii.gz"))
                       for t in ("csf", "grey", "white")])  # fmt: skip
    ct = read_image(data / "brain_ct/scct.nii.gz")
    labels = Grid.of(ct).image(((priors.argmax(0) + 1) * (priors.max(0) > 0.5)).astype(np.uint8))
    fixed_tissues, brain = brainweb_tissues(data)
    ct = sitk.Clamp(ct, ct.GetPixelID(), *BRAIN_WINDOW)
    return deformed(Material(brainweb(data, fixed), ct, fixed_tissues, labels, inside=brain), seed)


def liver(data: Path) -> Material:
    ct, mr = "liver/ct_crlm1004", "liver/mr_t2_cmb001"
    images = [read_image(data / f"{n}.nii.gz") for n in (ct, mr)]
    labels = [read_labels(data / f"{n}_liver.nii.gz") for n in (ct, mr)]
    return Material(sitk.Clamp(images[0], images[0].GetPixelID(), *BODY_WINDOW), images[1], *labels)


def limb(data: Path, patient: str, seed: int) -> Material:
    mr, ct = (f"limb_ct_mr/STS_{patient}_{n}" for n in ("MR_T1", "CT"))
    images = [read_image(data / f"{n}_image.nii.gz") for n in (mr, ct)]
    labels = [read_labels(data / f"{n}_mask.nii.gz") for n in (mr, ct)]
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.Execute(images[0])  # its threshold separates fat from the rest; muscle has at least a third of it, air less
    body = sitk.BinaryMorphologicalClosing(images[0] > otsu.GetThreshold() / 4, [3, 3, 1])
    windowed = sitk.Clamp(images[1], sitk.sitkFloat32, *BODY_WINDOW)
    return deformed(Material(images[0], windowed, *labels, inside=sitk.BinaryFillhole(body)), seed, one_frame=False)


def hippocampus_crops(
    data: Path, fixed: int, moving: int, among: Callable[[Path], list[str]] = hippocampus.held_out
) -> Material:
    """Two crops, by number among those that no training may use, or among others."""
    names = among(data)
    images = [read_image(data / f"hippocampus/images/{names[i]}") for i in (fixed, moving)]
    return Material(*images, *(read_labels(data / f"hippocampus/labels/{names[i]}") for i in (fixed, moving)))


def painted(data: Path, fixed: str, moving: str, contrasts: tuple[str, str], seed: int) -> Material:
    """Two heads whose images are generated from label maps, see :func:`painted_image`."""
    random = np.random.default_rng(seed)
    maps = [cropped(read_labels(label_maps.file_of(data, name))) for name in (fixed, moving)]
    images = [painted_image(labels, contrast, random) for labels, contrast in zip(maps, contrasts, strict=True)]
    brain = sorted(label_maps.BRAIN)
    return Material(*images, *(relabeled(labels, [(n,) for n in brain]) for labels in maps))


def painted_image(labels: sitk.Image, contrast: str, random: np.random.Generator) -> sitk.Image:
    """An image of a label map with blur, noise and a bias field.

    Args:
        contrast: ``T1``, ``T2`` or ``PD`` gives white matter, gray matter and fluid the means of that contrast, and the other
            classes random means; ``any`` gives all classes random means.
    """
    array = sitk.GetArrayViewFromImage(labels)
    means = random.uniform(0.05, 1.0, int(array.max()) + 1)
    if contrast != "any":
        known = synthesis.CONTRAST_OF_TISSUE[contrast]
        for label in range(len(means)):
            if (name := label_maps.tissue(label)) in known:
                means[label] = known[name] + random.normal(0, 0.02)
    means[0] = 0.0
    image = Grid.of(labels).image(means[array].astype(np.float32))
    image = sitk.DiscreteGaussian(image, 0.7)
    coarse = sitk.GetImageFromArray(random.normal(0, 0.25, (4, 4, 4)))
    extent = [n * s for n, s in zip(labels.GetSize(), labels.GetSpacing(), strict=True)]
    coarse.SetSpacing([mm / 3 for mm in extent])
    field = sitk.Resample(coarse, labels.GetSize(), sitk.Transform(), sitk.sitkBSpline, [0.0] * 3, labels.GetSpacing())
    values = sitk.GetArrayFromImage(image) * np.exp(sitk.GetArrayFromImage(field))
    values += random.normal(0, 0.03, values.shape)
    return Grid.of(labels).image(values.clip(0).astype(np.float32))


def cropped(labels: sitk.Image) -> sitk.Image:
    """A label map without the air more than 10 voxels away from the head."""
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(sitk.Cast(labels > 0, sitk.sitkUInt8))
    box, size = shape.GetBoundingBox(1), labels.GetSize()
    low = [max(box[i] - 10, 0) for i in range(3)]
    return sitk.RegionOfInterest(labels, [min(box[i] + box[i + 3] + 10, size[i]) - low[i] for i in range(3)], low)


def patient_phantom(data: Path, moving: str, fixed: str, seed: int) -> Material:
    """Two contrasts of one MS patient (MS07), the fixed one under a known deformation."""
    images = {c: read_image(data / f"brain_multicontrast/ms07_{c}.nii.gz") for c in (moving, fixed)}
    brain = sitk.Cast(sitk.BinaryFillhole(read_image(data / "brain_multicontrast/ms07_T1.nii.gz") > 30), sitk.sitkUInt8)
    return deformed(Material(images[fixed], images[moving], brain, brain), seed)


def remapped_phantom(data: Path, inverted: str, seed: int) -> Material:
    """A T1 of a head (IXI015) and itself with other intensities, the fixed one under a known deformation.

    The map of intensities is not monotone: dark, medium and bright become dark, bright and gray.

    Args:
        inverted: ``fixed`` or ``moving``, the image whose intensities are mapped.
    """
    head = sitk.Cast(read_image(data / "brain_t1/IXI015-HH-1258_T1.nii.gz"), sitk.sitkFloat32)
    inside = sitk.Cast(sitk.BinaryFillhole(sitk.OtsuThreshold(head, 0, 1)), sitk.sitkUInt8)
    low, high = percentile_window(sitk.GetArrayViewFromImage(head), 0.5, 99.5)
    unit = ((sitk.GetArrayFromImage(head) - low) / (high - low)).clip(0, 1)
    mapped = Grid.of(head).image((0.8 * np.sin(np.pi * unit) + 0.2 * unit).astype(np.float32))
    fixed, moving = (mapped, head) if inverted == "fixed" else (head, mapped)
    return deformed(Material(fixed, moving, inside, inside), seed)


def aligned(data: Path, moving: str, fixed: str) -> Material:
    """Two contrasts of one head that are aligned already; the true displacement is zero."""
    if moving.startswith("MS07"):
        images = [read_image(data / f"brain_multicontrast/ms07_{c.split()[-1]}.nii.gz") for c in (fixed, moving)]
        inside = sitk.Cast(
            sitk.BinaryFillhole(read_image(data / "brain_multicontrast/ms07_T1.nii.gz") > 30), sitk.sitkUInt8
        )
    else:
        images = [brainweb(data, c) for c in (fixed, moving)]
        inside = brain_mask(brainweb(data, "T1"), aal(data))
    return Material(*images, inside, inside, truth=sitk.Transform())


def abdomen(data: Path, seed: int) -> Material:
    """A CT of an abdomen, in the window of soft tissue, and itself under a known deformation."""
    ct = read_image(data / "abdomen/example_ct.nii.gz")
    windowed = sitk.Clamp(ct, sitk.sitkFloat32, *BODY_WINDOW)
    body = sitk.Cast(sitk.BinaryFillhole(ct > -300), sitk.sitkUInt8)
    return deformed(Material(windowed, windowed, body, body), seed)


def liver_reversed(data: Path) -> Material:
    """The pair of :func:`liver`, with the MR as fixed image."""
    pair = liver(data)
    return Material(pair.moving, pair.fixed, pair.moving_labels, pair.fixed_labels)


SECOND_SEED = 1000  # added to the seeds of deformations for the second run
MS07 = {
    "T2 to T1": ("T2", "T1"),
    "T1 to T2": ("T1", "T2"),
    "FLAIR to T1": ("FLAIR", "T1"),
    "T1POST to T2": ("T1POST", "T2"),
}
LIMBS = ("001", "003", "005", "008", "012")
ALIGNED = (("T1", "T2"), ("PD", "T2"), ("MS07 T1POST", "MS07 FLAIR"), ("MS07 FLAIR", "MS07 T1POST"))


def _painted_cases() -> dict[str, Callable[[Path], Material]]:
    """Pairs of the heads that are held out, each in two pairs of contrasts."""
    cases = {}
    for fixed, moving in itertools.permutations(label_maps.HELD_OUT, 2):
        for contrasts in (("T2", "T1"), ("any", "any")):
            name = f"{moving[-2:]} to {fixed[-2:]}, {contrasts[1]} to {contrasts[0]}"
            seed = 5500 + len(cases)
            cases[name] = partial(painted, fixed=fixed, moving=moving, contrasts=contrasts, seed=seed)
    return cases


def _twice(seed: int) -> tuple[int, int]:
    """The seeds of the first and of the second run."""
    return seed, seed + SECOND_SEED


PATIENT_PHANTOMS = {
    f"{moving} to {fixed}, {seed}": partial(patient_phantom, moving=moving, fixed=fixed, seed=seed)
    for seed in _twice(5300) for moving, fixed in (("T1POST", "FLAIR"), ("FLAIR", "T1POST"))
}  # fmt: skip
REMAPPED_PHANTOMS = {
    f"{inverted} image mapped, {seed}": partial(remapped_phantom, inverted=inverted, seed=seed)
    for seed in _twice(5400) for inverted in ("fixed", "moving")
}  # fmt: skip
PAINTED = _painted_cases()
HEAD_PHANTOMS = phantom_cases(_twice(FIRST_SEED))
ABDOMENS = {f"CT, {seed}": partial(abdomen, seed=seed) for seed in _twice(5600)}
HIPPOCAMPUS = {f"{m} to {f}": partial(hippocampus_crops, fixed=f, moving=m) for f, m in hippocampus.pairs()}
SEEN_HIPPOCAMPI = range(10)  # of the held-back crops, those that pairs of earlier benchmarks were looked at

FAMILIES = {
    "sample pair": Family(
        2.0, 4.0, "the bundled pair: BrainWeb's T1, and its T2 deformed, rotated and with thick slices. Dice of the union of "
        "AAL's labels, landmarks", {"T2 to T1": sample_pair}, seen=("T2 to T1",),
    ),
    "AAL phantoms": Family(
        2.0, 4.0, "BrainWeb's T1, PD and T2 to its T2 after a free-form deformation (20 mm, N(0, 6 mm)), for two seeds. "
        "Dice of the union of AAL's labels, error inside it. The head is one that the bundled model is trained on, the "
        "deformations are not",
        HEAD_PHANTOMS, ("brain_t1t2pd",), align="none", judged="error mm", seen=tuple(HEAD_PHANTOMS),
    ),
    "MS07 phantoms": Family(
        2.0, 4.0, "an MS patient's T1 after contrast agent and FLAIR, skull-stripped, the fixed one after a free-form "
        "deformation, for two seeds. Error inside the brain. Other contrasts of the patient are in the family MS07 to "
        "BrainWeb",
        PATIENT_PHANTOMS, ("brain_multicontrast",), align="none", judged="error mm",
    ),
    "IXI015 phantoms": Family(
        2.0, 4.0, "a T1 of a whole head and itself with mapped intensities (dark, medium and bright become dark, bright and "
        "gray), the fixed one after a free-form deformation, for two seeds. Error inside the head",
        REMAPPED_PHANTOMS, ("brain_t1",), align="none", judged="error mm",
    ),
    "aligned pairs": Family(
        2.0, 4.0, "two contrasts of one head that are aligned: the error is what a method adds, inside the brain",
        {f"{m} to {f}": partial(aligned, moving=m, fixed=f) for m, f in ALIGNED}, ("brain_t1t2pd", "brain_multicontrast"),
        align="none", judged="error mm", seen=tuple(f"{m} to {f}" for m, f in ALIGNED[:2]),
    ),
    "painted heads": Family(
        2.0, 4.0, "two subjects' label maps, painted with the contrasts of T1 and T2 or with random ones, with noise, blur "
        "and bias field. Mean Dice of the brain's classes. The bundled model is trained on images that are generated in a "
        "similar way from other subjects", PAINTED, ("brain_labelmaps",),
        seen=tuple(name for name, case in PAINTED.items() if "validation" in map(
            label_maps.HELD_OUT.get, (case.keywords["fixed"], case.keywords["moving"]))),
    ),
    "MS07 to BrainWeb": Family(
        2.0, 4.0, "an MS patient to BrainWeb, both skull-stripped. Dice of fluid, gray and white matter, classified on each "
        "one's T1", {name: partial(ms07, moving=m, fixed=f) for name, (m, f) in MS07.items()},
        ("brain_t1t2pd", "brain_multicontrast"), seen=tuple(MS07),
    ),
    "IXI012 to BrainWeb": Family(
        2.0, 4.0, "a whole head to another. Dice of what AAL (drawn on this very head) and DLMUSE both outline: amygdala, "
        "caudate, hippocampus, pallidum, putamen, thalamus, cerebellum, left and right. The two protocols differ, so that "
        "1 cannot be reached", {f"T1 to {fixed}": partial(ixi012, fixed=fixed) for fixed in ("T1", "T2")},
        ("brain_t1t2pd", "brain_t1"), seen=("T1 to T1", "T1 to T2"),
    ),
    "brain CT to MR": Family(
        2.0, 4.0, "a CT template, in the window of the brain, to BrainWeb after a free-form deformation, for two seeds. "
        "Dice of fluid, gray and white matter; the error inside the skull assumes that the two are aligned in MNI space, so "
        "that it has a floor of some mm",
        {f"CT to T1, {seed}": partial(brain_ct, fixed="T1", seed=seed) for seed in _twice(5100)},
        ("brain_t1t2pd", "brain_ct"), seen=("CT to T1, 5100", "CT to T1, 6100"),
    ),
    "liver MR to CT": Family(
        4.0, 6.0, "two patients in both directions, CT in the window of soft tissue. Dice of the liver (silver standard)",
        {"T2 to CT": liver, "CT to T2": liver_reversed}, ("liver",), seen=("T2 to CT", "CT to T2"),
    ),
    "abdomen CT": Family(
        3.0, 6.0, "a CT, in the window of soft tissue, to itself after a free-form deformation, for two seeds. Error inside "
        "the body", ABDOMENS, ("abdomen",), align="none", judged="error mm", seen=tuple(ABDOMENS),
    ),
    "limb CT to MR": Family(
        2.0, 4.0, "five patients, CT in the window of soft tissue, the MR after a free-form deformation. In the frame that "
        "the two share, bone and skin lie up to 15 mm apart, so the true displacement is unknown. The error is the "
        "distance, inside the body, between a method's result on the deformed pair and its result on the undeformed pair "
        "followed by the deformation",
        {patient: partial(limb, patient=patient, seed=5200 + i) for i, patient in enumerate(LIMBS)},
        ("limb_ct_mr",), align="none", judged="error mm", seen=LIMBS,
    ),
    "hippocampus": Family(
        1.0, 1.0, "MR crops of two patients. Mean Dice of the anterior and posterior part", HIPPOCAMPUS, ("hippocampus",),
        seen=tuple(f"{m} to {f}" for f, m in hippocampus.pairs() if f in SEEN_HIPPOCAMPI and m in SEEN_HIPPOCAMPI),
    ),
}  # fmt: skip
