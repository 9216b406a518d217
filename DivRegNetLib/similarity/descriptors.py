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


def mind_ssc(image: Tensor, *, radius: int = 1, dilation: int = 1, valid: Tensor | None = None) -> Tensor:
    """The MIND-SSC descriptor of every voxel, values from 0 to 1, the largest of a voxel 1.

    Twelve patch distances (sums of squared differences) between those of the six neighbors that are not opposite, less the
    smallest of them, divided by their mean and taken to ``exp(-x)``.

    Args:
        image: (N, 1, D, H, W) float; the border is repeated.
        radius: of the patches, voxels; 0 compares single voxels.
        dilation: distance of the neighbors, voxels.
        valid: (N, 1, D, H, W) bool: where the image was measured. It decides on the image's mean patch distance; which
            descriptors can be believed, :func:`believable` says.
    Returns:
        (N, 12, D, H, W).
    """
    reach = dilation + radius
    padded, shape = F.pad(image, [reach] * 6, mode="replicate"), image.shape[2:]
    distances = image.new_empty((len(image), CHANNELS, *shape))
    pairs = [
        (a, side, b, other)
        for a, b in itertools.combinations(range(3), 2)
        for side, other in itertools.product((dilation, -dilation), repeat=2)
    ]
    for out, (a, side, b, other) in zip(distances.unbind(1), pairs, strict=True):
        one, two = ([offset if d == axis else 0 for d in range(3)] for axis, offset in ((a, side), (b, other)))
        one, two = (_window(padded, offset, reach, radius, shape) for offset in (one, two))
        out.copy_(_box((one - two).square_(), radius)[:, 0])
    distances -= distances.amin(1, keepdim=True)
    variance = distances.mean(1, keepdim=True)
    usual = variance.flatten(1).mean(1) if valid is None else torch.stack([
        v[inside].mean() if inside.any() else v.mean() for v, inside in zip(variance, valid, strict=True)
    ])  # fmt: skip
    low, high = (usual.clamp_min(torch.finfo(image.dtype).tiny).view(-1, 1, 1, 1, 1) * k for k in VARIANCES)
    return distances.div_(variance.clamp_(min=low, max=high)).neg_().exp_()


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


def _box(image: Tensor, radius: int) -> Tensor:
    """Sum over cubes of ``2 * radius + 1`` voxels a side, ``radius`` voxels less on each side."""
    for dim in (2, 3, 4):
        length = image.shape[dim] - 2 * radius
        total = image.narrow(dim, 0, length)
        for start in range(1, 2 * radius + 1):
            total = total + image.narrow(dim, start, length)
        image = total
    return image
