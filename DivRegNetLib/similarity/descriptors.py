"""MIND-SSC: what a voxel's surroundings look like, told alike in images of any contrast.

Source: Heinrich et al., "Towards realtime multimodal fusion for image-guided interventions using self-similarities",
MICCAI 2013: the self-similarity context compares the patches around the six neighbors of a voxel with one another. An
image that shows the same anatomy in other grays, even inverted, has nearly the same descriptor.

Axis order and units as in :mod:`DivRegNetLib.core.fields`.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS = 12
VARIANCES = 1e-3, 1e3  # a voxel's mean patch distance is taken for no less and no more of the image's mean


def mind_ssc(
    image: Tensor,
    *,
    radius: int = 1,
    dilation: int = 1,
    stride: int = 1,
    floor: float = VARIANCES[0],
    valid: Tensor | None = None,
) -> Tensor:
    """The MIND-SSC descriptor of every voxel, values from 0 to 1, the largest of a voxel 1.

    Twelve patch distances (sums of squared differences) between those of the six neighbors that are not opposite, less the
    smallest of them, divided by their mean and taken to ``exp(-x)``.

    Args:
        image: (N, 1, D, H, W) float; the border is repeated.
        radius: of the patches, voxels; 0 compares single voxels.
        dilation: distance of the neighbors, voxels.
        stride: one descriptor for each cube of so many voxels a side, whose patches are cubes of ``stride + 2 * radius``
            voxels around the center of that cube. The sides of the image are multiples of it.
        floor: a voxel's mean patch distance is taken for no less than this fraction of the image's mean. Where it is less,
            the descriptor is nearly the same for all patches, and noise in flat regions does not count.
        valid: (N, 1, D, H, W) bool, on the grid of the descriptors: where the image was measured. It decides on the image's
            mean patch distance; which descriptors can be believed, :func:`believable` says.
    Returns:
        (N, 12, D / stride, H / stride, W / stride).
    """
    reach = 2 * dilation + radius
    padded, shape = F.pad(image, [reach] * 6, mode="replicate"), image.shape[2:]
    distances = image.new_empty((len(image), CHANNELS, *(n // stride for n in shape)))
    numbers = {pair: number for number, pair in enumerate(_pairs(dilation))}
    for (a, side, b, other), number in numbers.items():
        if side < 0:
            continue
        # Between the neighbors at the other sides there is the same distance, the other way round: the patches of each pair
        # are windows of one image of squared differences.
        first, second = ((a, side), (b, other)), ((b, -other), (a, -side))
        swapped = numbers[a, -side, b, -other]
        ahead = [_step(a, side)[d] - _step(b, other)[d] for d in range(3)]
        margin = dilation + radius
        squares = _window(padded, ahead, reach, margin, shape) - _window(padded, [0, 0, 0], reach, margin, shape)
        squares.square_()
        for out, (_, base) in ((number, first), (swapped, second)):
            distances[:, out] = _box(_window(squares, _step(*base), margin, radius, shape), radius, stride)[:, 0]
    distances -= distances.amin(1, keepdim=True)
    variance = distances.mean(1, keepdim=True)
    usual = variance.flatten(1).mean(1)
    if valid is not None:
        inside = valid.to(variance.dtype).flatten(1)
        count = inside.sum(1)
        usual = torch.where(count > 0, (variance.flatten(1) * inside).sum(1) / count.clamp_min(1), usual)
    low, high = (
        usual.clamp_min(torch.finfo(image.dtype).tiny).view(-1, 1, 1, 1, 1) * k for k in (floor, VARIANCES[1])
    )
    return distances.div_(variance.clamp_(min=low, max=high)).neg_().exp_()


def _pairs(dilation: int) -> list[tuple[int, int, int, int]]:
    """The twelve pairs of neighbors that are not opposite: axis and offset of the one, axis and offset of the other."""
    return [
        (a, side, b, other)
        for a, b in itertools.combinations(range(3), 2)
        for side, other in itertools.product((dilation, -dilation), repeat=2)
    ]


def _step(axis: int, offset: int) -> list[int]:
    return [offset if d == axis else 0 for d in range(3)]


def believable(valid: Tensor, *, radius: int = 1, dilation: int = 1) -> Tensor:
    """(N, 1, D, H, W) bool: descriptors that nothing outside of ``valid``, likewise, has part in.

    A border of the array is none: beyond it the image is repeated.
    """
    reach = dilation + radius
    outside = (~valid).to(torch.float32)
    for dim in range(3):
        size = [2 * reach + 1 if d == dim else 1 for d in range(3)]
        outside = F.max_pool3d(outside, size, 1, [n // 2 for n in size])
    return outside < 0.5


def _window(padded: Tensor, offset: list[int], reach: int, radius: int, shape: torch.Size) -> Tensor:
    """The image so many voxels further along D, H and W, with ``radius`` voxels more on each side."""
    index = [slice(reach + o - radius, reach + o + n + radius) for o, n in zip(offset, shape, strict=True)]
    return padded[(..., *index)]


def _box(image: Tensor, radius: int, stride: int = 1) -> Tensor:
    """Sum over cubes of ``2 * radius + stride`` voxels a side, one for each cube of ``stride`` voxels; ``radius`` voxels less
    on each side."""
    for dim in (2, 3, 4):
        length = image.shape[dim] - 2 * radius

        def part(start: int, image: Tensor = image, dim: int = dim, length: int = length) -> Tensor:
            return image[(slice(None),) * dim + (slice(start, start + length - stride + 1, stride),)]

        total = part(0)
        for start in range(1, 2 * radius + stride):
            total = total + part(start)
        image = total
    return image
