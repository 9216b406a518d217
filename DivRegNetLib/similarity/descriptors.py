"""MIND-SSC: what a voxel's surroundings look like, told alike in images of any contrast.

Source: Heinrich et al., "Towards realtime multimodal fusion for image-guided interventions using self-similarities",
MICCAI 2013: the self-similarity context compares the patches around the six neighbors of a voxel with one another. An
image that shows the same anatomy in other grays, even inverted, has nearly the same descriptor.

Axis order and units as in :mod:`DivRegNetLib.core.fields`.
"""

import itertools
import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.core.torch_state import computed_in_parts

CHANNELS = 12
LITTLE = 1e-6  # weight of a voxel that was not measured, beside others
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
    reach, depth, *plane = 2 * dilation + radius, *(n // stride for n in image.shape[2:])
    padded = F.pad(image, [reach] * 6, mode="replicate")
    distances, variance = (image.new_empty(len(image), n, depth, *plane) for n in (CHANNELS, 1))
    # Patches reach into the slices before and after, which thin slabs would compute too often.
    at_once = 2 * fields.slices_at_once(len(image) * math.prod(plane), like=image)
    parts = list(zip(distances.split(at_once, 2), variance.split(at_once, 2), strict=True))

    def compare(number: int) -> None:
        part, mean = parts[number]
        slices = padded.narrow(2, number * at_once * stride, part.shape[2] * stride + 2 * reach)
        torch.stack(_patch_distances(slices, radius, dilation, stride), 1, out=part)
        part -= part.amin(1, keepdim=True)
        mean[:] = part.mean(1, keepdim=True)

    computed_in_parts(compare, range(len(parts)))
    usual = variance.flatten(1)
    if valid is None:
        usual = usual.mean(1)
    else:
        inside = valid.flatten(1) + LITTLE
        usual = (usual * inside).sum(1) / inside.sum(1)
    usual = usual.clamp_min_(torch.finfo(image.dtype).tiny).view(-1, 1, 1, 1, 1)
    variance = variance.clamp_(min=usual * floor, max=usual * VARIANCES[1]).neg_()
    means = variance.split(at_once, 2)
    computed_in_parts(lambda number: parts[number][0].div_(means[number]).exp_(), range(len(parts)))
    return distances


def _patch_distances(padded: Tensor, radius: int, dilation: int, stride: int) -> list[Tensor]:
    """The twelve patch distances of each voxel, or of each cube of ``stride`` voxels, (N, D, H, W).

    Between the patches around the neighbors a and b of a voxel lies that of the move a - b, around b; it is also that between
    -b and -a, around -a. So there are six moves in all.

    Args:
        padded: with ``2 * dilation + radius`` voxels more on each side.
    """
    margin = dilation + radius
    shape = [n - 2 * (dilation + margin) for n in padded.shape[2:]]
    # Two axes, and the offset along the second that a patch is compared at, ``dilation`` voxels further along the first.
    moves = list(itertools.product(itertools.combinations(range(3), 2), (dilation, -dilation)))
    window = partial(_window, padded, reach=dilation + margin, margin=margin, shape=shape)
    around = torch.cat([window(_offset(a, dilation, b, -other)) for (a, b), other in moves], 1)
    sums = _box(around.sub_(window([0, 0, 0])).square_(), radius, stride)
    distances = []
    for a, side, b, other in _pairs(dilation):
        move = moves.index(((a, b), other * side // dilation))
        around = _offset(b, other) if side > 0 else _offset(a, side)
        index = (slice(o + dilation, o + dilation + n - stride + 1, stride) for o, n in zip(around, shape, strict=True))
        distances.append(sums[(slice(None), move, *index)])
    return distances


def _pairs(dilation: int) -> list[tuple[int, int, int, int]]:
    """The twelve pairs of neighbors that are not opposite: axis and offset of the one, axis and offset of the other."""
    return [
        (a, side, b, other)
        for a, b in itertools.combinations(range(3), 2)
        for side, other in itertools.product((dilation, -dilation), repeat=2)
    ]


def _offset(*along: int) -> list[int]:
    """Voxels along D, H and W, from pairs of axis and voxels."""
    return [sum(v for axis, v in zip(along[::2], along[1::2], strict=True) if axis == d) for d in range(3)]


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


def _window(padded: Tensor, offset: list[int], *, reach: int, margin: int, shape: torch.Size) -> Tensor:
    """The image so many voxels further along D, H and W, with ``margin`` voxels more on each side."""
    index = [slice(reach + o - margin, reach + o + n + margin) for o, n in zip(offset, shape, strict=True)]
    return padded[(..., *index)]


def _box(image: Tensor, radius: int, stride: int = 1) -> Tensor:
    """Sum over cubes of ``2 * radius + stride`` voxels a side, which begin at each voxel."""
    for dim in (2, 3, 4):
        length = image.shape[dim] - 2 * radius - stride + 1
        parts = [image.narrow(dim, start, length) for start in range(2 * radius + stride)]
        total = parts[0] + parts[1] if parts[1:] else parts[0]
        for part in parts[2:]:
            total += part
        image = total
    return image
