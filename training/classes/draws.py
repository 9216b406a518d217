"""One look at a subject: placed, bent, painted, shaded and degraded at random, on the training device.

All random numbers of an image come from its seed. What decides how an image is made is drawn on the CPU, noise on the
training device, and nothing waits for a GPU: no number is ever read back from it.

Lengths are in voxels of the image that is made, components in x, y, z order (DivRegNetLib/core/fields.py).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core.intensity import LEVELS, QUANTILE_VOXELS
from training.classes.config import Augmentation, Painting
from training.classes.subjects import LABELS, OUTSIDE, Subject
from training.data.free_form import bspline_basis, evaluate
from training.data.randomness import Random
from training.data.synthesis import CONTRAST_OF_TISSUE

KNOTS = 8  # of a contrast curve


class Look(NamedTuple):
    """An image (1, 1, D, H, W) float32 in [0, 1], 0 outside the field of view; and (1, 1, D, H, W) long, the number of the
    set of classes that is possible at each voxel."""

    image: Tensor
    sets: Tensor


def look(
    subject: Subject,
    shape: tuple[int, int, int],
    spacing: float,
    normalization: str,
    augmentation: Augmentation,
    painting: Painting,
    seed: int,
) -> Look:
    """A subject as some scanner might have seen it.

    Args:
        shape: (D, H, W) of the image.
        spacing: mm of its voxels.
        normalization: a key of :data:`DivRegNetLib.core.intensity.SCHEMES`.
    """
    device, a = subject.labels.device, augmentation
    numbers, noise = Random(seed), Random(seed, device)
    points = _points(subject, shape, spacing, a, numbers, device)
    inside = (points.abs() <= 1).all(-1)[:, None] & _field_of_view(shape, a, numbers).to(device, non_blocking=True)
    labels = _sampled(subject.labels, points, "nearest").long()
    if subject.kind == "shapes":
        image = _painted_shapes(points, painting, numbers, noise)
    elif subject.images is None:
        image = _painted(subject, labels, points, painting, numbers, noise)
    else:
        which = numbers.index(len(subject.images))
        image = _sampled(subject.images[which : which + 1], points, "bilinear")
    image = _shaded(image.clamp(0, 1), a, numbers, noise)
    image = normalized(image, normalization, inside)
    image = image + noise.normal(*image.shape) * numbers.number(0, a.noise)
    return Look(image.clamp(0, 1) * inside, torch.where(inside, subject.set_of[labels], OUTSIDE))


def plain(subject: Subject, shape: tuple[int, int, int], spacing: float, normalization: str, seed: int = 0) -> Look:
    """A subject as it is, in the middle of the image; label maps are painted as the seed wants it."""
    none = Augmentation(**dict.fromkeys(Augmentation.__dataclass_fields__, 0.0) | {"control": (8.0, 8.0)})
    return look(subject, shape, spacing, normalization, none, Painting(strip=0, alike=0), seed)


def _points(
    subject: Subject, shape: tuple[int, int, int], spacing: float, a: Augmentation, numbers: Random, device
) -> Tensor:
    """Where each voxel of the image lies in the subject, (1, D, H, W, 3), as ``grid_sample`` takes it."""
    sides = torch.tensor(subject.labels.shape[:1:-1], dtype=torch.float32)
    of_image = torch.tensor(shape[::-1], dtype=torch.float32)
    turn, skew, stretch = numbers.uniform(-1, 1, 3) * math.radians(a.degrees), torch.zeros(3, 3), torch.zeros(3, 3)
    for angle, shear, (i, j) in zip(turn, numbers.uniform(-1, 1, 3) * a.shear, ((0, 1), (0, 2), (1, 2)), strict=True):
        skew[i, j], skew[j, i] = angle, -angle
        stretch[i, j] = stretch[j, i] = shear
    stretch += torch.diag(numbers.uniform(-1, 1, 3) * a.stretch + numbers.number(-1, 1) * a.scale)
    matrix = torch.linalg.matrix_exp(skew) @ torch.linalg.matrix_exp(stretch)
    if numbers.chance(a.mirror):
        matrix = matrix * torch.tensor([-1.0, 1.0, 1.0])
    ratio = spacing / subject.spacing
    # A part that is smaller than the subject may be anywhere in it.
    room = a.shift * sides + (sides - of_image * ratio).clamp_min(0) / 2 * (1 if a.shift else 0)
    shift = numbers.uniform(-1, 1, 3) * room
    control = numbers.number(*a.control)
    bent = _bent(shape, control, numbers.number(0, a.elastic) * control, numbers, device)
    # To grid_sample's coordinates: -1 and 1 are the outer edges of the first and the last voxel.
    by = matrix * ratio * 2 / sides[:, None]
    affine = torch.cat((by, (2 * shift / sides)[:, None]), 1)[None].to(device, non_blocking=True)
    axes = [torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in shape]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None]
    return (at + bent) @ affine[0, :, :3].T + affine[0, :, 3]


def _bent(shape: tuple[int, int, int], control: float, sd: float, numbers: Random, device) -> Tensor:
    """A free-form deformation of cubic B-splines, (1, D, H, W, 3) in voxels."""
    bases = [bspline_basis(n, control, "cpu") for n in shape]
    control = numbers.normal(3, *(b.shape[1] for b in bases)) * sd
    moved = evaluate(control.to(device, non_blocking=True), [b.to(device, non_blocking=True) for b in bases])
    return moved.movedim(1, -1)


def _field_of_view(shape: tuple[int, int, int], a: Augmentation, numbers: Random) -> Tensor:
    """(1, 1, D, H, W) bool, on the CPU: what is left of the field of view where sides of it are cut off."""
    inside = torch.ones(1, 1, *shape, dtype=torch.bool)
    if numbers.chance(a.crop):
        for dim, n in enumerate(shape, start=2):
            for end in (0, 1):
                cut = int(max(numbers.number(-0.3, 0.3), 0) * n)
                inside.narrow(dim, 0 if end == 0 else n - cut, cut).fill_(False)
    return inside


def _sampled(image: Tensor, points: Tensor, mode: str) -> Tensor:
    return F.grid_sample(image.float(), points, mode=mode, padding_mode="zeros", align_corners=False)


def _painted(
    subject: Subject, labels: Tensor, points: Tensor, painting: Painting, numbers: Random, noise: Random
) -> Tensor:
    """An image of a label map: a mean and a texture per label."""
    count = len(subject.tissues) or LABELS
    means, texture = numbers.uniform(0.03, 1, count), numbers.uniform(0, painting.texture, count)
    if numbers.chance(painting.known_contrast) and subject.tissues:
        table = CONTRAST_OF_TISSUE[numbers.choice(tuple(CONTRAST_OF_TISSUE))]
        for i, name in enumerate(subject.tissues):
            if name in table:
                means[i] = table[name] + numbers.number(-0.1, 0.1)
    others = torch.randperm(count, generator=numbers.generator)
    means = torch.where(numbers.uniform(0, 1, count) < painting.alike, means[others], means)
    means[0], texture[0] = numbers.number(0, 0.1) * numbers.choice((0, 1)), texture[0] * numbers.choice((0, 1))
    means, texture = (x.to(labels.device, non_blocking=True) for x in (means, texture))
    image = means[labels] + texture[labels] * noise.normal(*labels.shape)
    if numbers.chance(painting.strip) and subject.brain is not None:
        image = image * _sampled(subject.brain, points, "nearest")
    return image.clamp_min(0)


def _painted_shapes(points: Tensor, painting: Painting, numbers: Random, noise: Random) -> Tensor:
    """Random shapes of random brightness (as in Hoffmann et al., "SynthMorph", IEEE TMI 2022): at each voxel the one whose
    smooth noise is highest; sometimes inside a blob alone."""
    count, size = 4 + numbers.index(13), numbers.choice((6, 10, 16, 24))
    coarse = noise.normal(1, count, *(-(-n // size) + 1 for n in points.shape[1:4]))
    labels = F.interpolate(coarse, size=points.shape[1:4], mode="trilinear", align_corners=True).argmax(1, keepdim=True)
    if numbers.chance(0.6):
        blob = points.square().sum(-1)[:, None] + 0.3 * F.interpolate(
            coarse[:, :1], size=points.shape[1:4], mode="trilinear"
        )
        labels = torch.where(blob < numbers.number(0.5, 1.2), labels + 1, 0)
    means, texture = (
        numbers.uniform(0, high, count + 1).to(labels.device, non_blocking=True) for high in (1, painting.texture)
    )
    return (means[labels] + texture[labels] * noise.normal(*labels.shape)).clamp_min(0)


def _shaded(image: Tensor, a: Augmentation, numbers: Random, noise: Random) -> Tensor:
    """Another contrast, a bias field, blur and thick slices."""
    if a.gamma:
        image = image ** (2 ** numbers.number(-a.gamma, a.gamma))
    if numbers.chance(a.contrast):
        image = _through(image, numbers.uniform(0, 1, KNOTS).to(image.device, non_blocking=True))
    if a.bias:
        coarse = numbers.normal(1, 1, *(2 + numbers.index(3) for _ in range(3))) * numbers.number(0, a.bias)
        coarse = coarse.to(image.device, non_blocking=True)
        image = image * F.interpolate(coarse, size=image.shape[2:], mode="trilinear", align_corners=True).exp()
    if (sigma := numbers.number(0, a.blur)) > 0.2:
        image = _blurred(image, sigma)
    if numbers.chance(a.thick):
        axis, factor = numbers.index(3), 2 + numbers.index(2)
        pooled = F.avg_pool3d(image, [factor if d == axis else 1 for d in range(3)], ceil_mode=True)
        image = F.interpolate(pooled, size=image.shape[2:], mode="trilinear", align_corners=False)
    return image


def _through(image: Tensor, knots: Tensor) -> Tensor:
    """[0, 1] through a piecewise linear curve."""
    at = image.clamp(0, 1) * (len(knots) - 1)
    below = at.floor().long().clamp(max=len(knots) - 2)
    return torch.lerp(knots[below], knots[below + 1], at - below)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    x = torch.arange(-2, 3, dtype=image.dtype, device=image.device)
    kernel = (-0.5 * (x / sigma) ** 2).exp()
    kernel = kernel / kernel.sum()
    for dim in range(3):
        size, pad = [1, 1, 1], [0, 0, 0]
        size[dim], pad[dim] = 5, 2
        image = F.conv3d(image, kernel.view(1, 1, *size), padding=pad)
    return image


def normalized(image: Tensor, scheme: str, inside: Tensor) -> Tensor:
    """What :func:`DivRegNetLib.core.intensity.normalize` makes of an image, without waiting for a GPU.

    Args:
        image: (1, 1, D, H, W).
        inside: (1, 1, D, H, W) bool.
    """
    every = slice(None, None, max(image.numel() // QUANTILE_VOXELS, 1))
    values, seen = image.flatten()[every], inside.flatten()[every]
    seen = seen | ~seen.any()
    mean = torch.where(seen, values, 0).sum() / seen.sum()
    low, high = _quantile(values, seen, 0.005), _quantile(values, seen & (values > mean), 0.995)
    high = torch.where((seen & (values > mean)).any(), high, _quantile(values, seen, 0.995))

    def between(x: Tensor) -> Tensor:
        return ((x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)).clamp(0, 1)

    if scheme == "robust":
        return between(image)
    at, of_values = between(image) * LEVELS, between(values) * LEVELS
    number = of_values.int().clamp_(max=LEVELS - 1).long()
    common = torch.zeros(LEVELS, dtype=torch.float64, device=image.device).index_add_(0, number, seen.double())
    common = torch.minimum(common, 0.05 * seen.sum())
    share = (torch.cat((common.new_zeros(1), common.cumsum(0))) / common.sum()).to(image.dtype)
    below = at.int().clamp_(max=LEVELS - 1).long()
    rank = share[:-1][below].addcmul(at - below, share.diff()[below])
    return torch.lerp(at / LEVELS, rank, 0.25)


def _quantile(values: Tensor, among: Tensor, share: float) -> Tensor:
    """The value that so large a share of those among others does not exceed."""
    ordered = torch.where(among, values, torch.inf).sort().values
    number = (share * (among.sum() - 1)).round().long().clamp(0, len(values) - 1)
    return ordered.gather(0, number[None])[0]
