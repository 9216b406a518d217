"""Generated training pairs: subjects of a cohort, or random shapes, are deformed and given random contrast and artifacts.

All of this runs on the training device. Lengths are in voxels of the cohort's grid, points and components in x, y, z order.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.core.intensity import normalize
from training.data.cohort import Cohort, Volume
from training.data.free_form import ffd
from training.data.pairs import Pair, center_of, random_affine, transform, untransform
from training.data.randomness import Random

# Mean intensities of white matter, gray matter and fluid in BrainWeb's images.
CONTRAST_OF_TISSUE = {
    "T1": {"white": 0.62, "gray": 0.46, "fluid": 0.2},
    "T2": {"white": 0.35, "gray": 0.47, "fluid": 0.95},
    "PD": {"white": 0.74, "gray": 0.85, "fluid": 0.95},
}


@dataclass(frozen=True)
class Recipe:
    """Probabilities of the kinds of pairs.

    same_subject: of pairs of one subject, whose true deformation is known.
    real: of subjects with images rather than only a label map.
    known_contrast: of images with the contrast of T1, T2 or PD; the others have random contrasts.
    strip: of pairs without a skull; a tenth of it is the probability that only one image lacks it.
    thick: of images with thick slices.
    shapes: of pairs of random shapes instead of subjects (Hoffmann et al., "SynthMorph", IEEE TMI 2022).
    """

    same_subject: float = 0.75
    real: float = 0.65
    known_contrast: float = 0.75
    strip: float = 0.3
    thick: float = 0.1
    shapes: float = 0.0


def make_pair(cohort: Cohort, recipe: Recipe, random: Random) -> Pair:
    """Two subjects, or one subject twice, with independent deformations, contrasts and artifacts."""
    if random.chance(recipe.shapes):
        cohort = _shapes(cohort, random)
    volumes = cohort.split("train")
    with_images = [s for s in volumes if s.images is not None]
    maps = [s for s in volumes if s.images is None]
    first = random.choice(with_images if with_images and (random.chance(recipe.real) or not maps) else maps)
    same = random.chance(recipe.same_subject) or len(volumes) == 1
    second = first if same else random.choice([s for s in volumes if s is not first])

    shape = cohort.shape
    at = fields.identity(shape, like=first.brain.float())
    center = center_of(shape, like=at)
    mm = 1 / cohort.spacing
    # Both heads get the same affine map; the moving one gets another small one, like the residual of an affine alignment.
    place, placed_by = random_affine(random, 8, 6 * mm, 0.06, 0.02)
    rest, rest_by = random_affine(random, 1.5, 1.5 * mm, 0.02, 0.01)
    strength = random.number(0, 1.15)
    control = random.choice((12.0, 20.0, 20.0, 20.0, 30.0, 45.0))
    warp_fixed = ffd(shape, control * mm, strength * 0.3 * control * mm, random)
    # The velocity is smooth enough to be integrated at half the resolution.
    half = tuple(n // 2 for n in shape)
    velocity = ffd(half, 15 * mm, random.number(0, 2) * mm, random) * random.choice((0, 1))
    warp_moving, unwarp_moving = (fields.resize(fields.integrate(v, 4), shape) for v in (velocity, -velocity))

    deformed = at + warp_fixed
    fixed_points = transform(deformed, place, placed_by, center)
    moving_points = transform(transform(at + warp_moving, rest, rest_by, center), place, placed_by, center)
    truth = None
    if same:
        before_rest = untransform(deformed, rest, rest_by, center)
        truth = before_rest + fields.sample(unwarp_moving, before_rest) - at

    strip_both = random.chance(recipe.strip * 0.75)
    fixed, brain, fixed_labels = _acquire(first, fixed_points, cohort, recipe, strip_both, random)
    moving, _, moving_labels = _acquire(second, moving_points, cohort, recipe, strip_both, random)
    comparable = first.images is None and second.images is None
    if not comparable:
        fixed_labels = moving_labels = None
    return Pair(fixed, moving, brain, truth, fixed_labels, moving_labels)


def _shapes(cohort: Cohort, random: Random) -> Cohort:
    """A cohort of one label map of random shapes: at each voxel the class whose smooth noise is highest, inside a blob."""
    classes, size = 5 + random.index(16), random.choice((8, 12, 16, 24))
    highest = labels = None
    for label in range(1, classes + 1):
        noise = _noise(cohort.shape, size, random)
        if highest is None:
            highest, labels = noise, torch.ones_like(noise, dtype=torch.uint8)
        else:
            labels = torch.where(noise > highest, label, labels)
            highest = torch.maximum(highest, noise)
    if random.chance(0.7):
        axes = [torch.linspace(-1, 1, n, device=random.device).square() / random.number(0.4, 1) for n in cohort.shape]
        distance = axes[0][:, None, None] + axes[1][:, None] + axes[2]
        labels = labels * (distance + 0.3 * _noise(cohort.shape, 24, random) < 0.9)
    volume = Volume("shapes", "shapes", "both", "train", (), None, labels, (labels > 0).to(torch.uint8))
    return replace(cohort, volumes=(volume,), tissues=("background",) + ("other",) * classes)


def _noise(shape: tuple[int, int, int], size: int, random: Random) -> Tensor:
    """Smooth noise with structures of about ``size`` voxels, (1, 1, D, H, W)."""
    coarse = random.normal(1, 1, *(-(-n // size) + 1 for n in shape))
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)


def _acquire(subject: Volume, points: Tensor, cohort: Cohort, recipe: Recipe, strip: bool, random: Random):
    """Image, brain and labels of a subject sampled at ``points``, with random contrast, bias field, blur and noise."""
    labels = fields.sample(subject.labels.float(), points, mode="nearest", padding="zeros")
    brain = fields.sample(subject.brain.float(), points, mode="nearest", padding="zeros")
    if subject.images is not None:
        which = random.index(len(subject.images))
        image = fields.sample(subject.images[which : which + 1].float(), points, padding="zeros")
        image = image ** (2 ** random.number(-0.6, 0.6))
        if not random.chance(recipe.known_contrast + 0.2):
            image = _remap(image, random)
    else:
        image = _paint(labels.long(), cohort.tissues, recipe, random)
    if strip or random.chance(recipe.strip * 0.1):
        width = random.choice((1, 1, 3, 5))
        image = image * _erode(brain, width)
    image = image * (ffd(cohort.shape, 35, 0.25, random)[:, :1] * random.number(0, 1)).exp()
    image = _blur(image, random.number(0.3, 0.9) if subject.images is None else random.number(0, 0.6))
    if random.chance(recipe.thick):
        image = _thicken(image, random)
    image = normalize(image, cohort.normalization)
    image = (image + random.normal(*image.shape) * random.number(0, 0.05)).clamp(0, 1)
    return image, brain, labels.to(torch.uint8)


def _remap(image: Tensor, random: Random) -> Tensor:
    """An image in [0, 1] with a random contrast: a piecewise linear curve that maps 0 to 0."""
    knots = random.uniform(0, 1, 8)
    knots[0].zero_()
    position = image.clamp(0, 1) * (len(knots) - 1)
    lower = position.floor().long().clamp(max=len(knots) - 2)
    return torch.lerp(knots[lower], knots[lower + 1], position - lower)


def _paint(labels: Tensor, tissues: tuple[str, ...], recipe: Recipe, random: Random) -> Tensor:
    """An image generated from a label map: a mean intensity per class, of a known or a random contrast, and noise."""
    table = {t: random.number(0.05, 1) for t in ("white", "gray", "fluid")}
    if random.chance(recipe.known_contrast):
        table = CONTRAST_OF_TISSUE[random.choice(tuple(CONTRAST_OF_TISSUE))]
        table = {t: mean + random.number(-0.06, 0.06) for t, mean in table.items()}
    means = random.uniform(0.05, 1, len(tissues))
    for i, name in enumerate(tissues):
        if name in table:
            means[i] = table[name] + 0.04 * random.normal(1)
    means[0].fill_(random.number(0, 0.1) * random.choice((0, 1)))
    texture = random.normal(*labels.shape) * random.uniform(0, 0.08, len(tissues))[labels]
    return (means[labels] + texture).clamp_min(0)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing by ``sigma`` voxels."""
    if sigma < 0.2:
        return image
    x = torch.arange(-2, 3, device=image.device, dtype=image.dtype)
    kernel = (-0.5 * (x / sigma) ** 2).exp()
    kernel = kernel / kernel.sum()
    for dim in range(3):
        size, pad = [1, 1, 1], [0, 0, 0]
        size[dim], pad[dim] = 5, 2
        image = F.conv3d(image, kernel.view(1, 1, *size), padding=pad)
    return image


def _erode(mask: Tensor, width: int) -> Tensor:
    """A mask eroded by half of ``width`` voxels."""
    outside = 1 - mask
    for dim in range(3):
        size = [width if d == dim else 1 for d in range(3)]
        outside = F.max_pool3d(outside, size, 1, [n // 2 for n in size])
    return 1 - outside


def _thicken(image: Tensor, random: Random) -> Tensor:
    """An image with slices of two or three voxels along a random axis, interpolated back to the grid."""
    axis, factor = random.choice((0, 1, 2)), random.choice((2, 3))
    kernel = [factor if d == axis else 1 for d in range(3)]
    return F.interpolate(F.avg_pool3d(image, kernel), size=image.shape[2:], mode="trilinear", align_corners=False)
