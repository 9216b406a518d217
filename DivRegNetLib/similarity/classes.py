"""ClassNet: a small U-Net that tells the anatomical class of every voxel of one image.

Where two images have nothing to do with each other but through the class c of what lies at a voxel, the discriminant that
maximizes the Donsker-Varadhan bound (arXiv 1908.08767, Eq. 9) is ``log sum_c p(c|f) p(c|m) / p(c)``: what a network says of
the classes in each image is all that a similarity has to know. Its probabilities are features of the Gauss-Newton equations
(:mod:`DivRegNetLib.registration.variational.features`).

The network sees one image at a time, so that each image of a pair is looked at once, before any step.

Source of the architecture: Ronneberger et al., "U-Net", MICCAI 2015, with instance normalization as in Isensee et al.,
"nnU-Net", Nature Methods 2021. Axis order as in :mod:`DivRegNetLib.core.fields`.
"""

import itertools
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.01  # of the leaky ReLU below 0
SHARED = 0.25  # smaller volume of a class over its larger one in a pair, below which the class counts less
AGREEMENT = 0.4  # of the classes of a pair, below which the network does not know what the images show


@dataclass(frozen=True)
class ClassNetConfig:
    """Architecture of a :class:`ClassNet`, stored in its model card.

    classes: how many there are, class 0 being background: air, padding, what lies outside the field of view, and all that
        no other class is.
    channels: features of each level, finest first; every level has half the resolution of the one before.
    stride: 1 has features at every voxel, 2 at every second one along each axis (an eighth of the time).
    subvoxel: with stride 2, features at every second voxel still tell the class of every one, as the last convolution has an
        output for each of the eight voxels (sub-pixel convolution, Shi et al., CVPR 2016).
    """

    classes: int
    channels: tuple[int, ...] = (16, 32, 64, 64)
    stride: int = 1
    subvoxel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        whole = [self.classes, self.stride, *self.channels]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in whole):
            raise ValueError("ClassNet: classes, channels and stride are whole numbers")
        if not 2 <= self.classes <= 256:
            raise ValueError(f"ClassNet tells 2 to 256 classes apart, background among them, got {self.classes}")
        if not 2 <= len(self.channels) <= 6 or not all(1 <= c <= 1024 for c in self.channels):
            raise ValueError(f"ClassNet has 2 to 6 levels of 1 to 1024 channels, got channels={self.channels}")
        if self.stride not in (1, 2):
            raise ValueError(f"ClassNet's stride is 1 (full resolution) or 2 (half), got {self.stride}")
        if not isinstance(self.subvoxel, bool):
            raise ValueError(f"ClassNet's subvoxel is true or false, got {self.subvoxel!r}")

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this number of voxels per axis."""
        return self.stride * 2 ** (len(self.channels) - 1)

    @property
    def output_stride(self) -> int:
        """Voxels of the image per voxel of the probabilities, along each axis."""
        return 1 if self.subvoxel else self.stride

    def as_dict(self) -> dict:
        return asdict(self) | {"channels": list(self.channels)}


class Block(nn.Sequential):
    """Convolution, instance normalization and leaky ReLU.

    Kernels that halve the resolution are 2 or 4 wide, so that an output voxel is centered on the voxels that it replaces.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, kernel, stride=stride, padding=(kernel - 1) // 2, bias=False),
            nn.InstanceNorm3d(outputs, affine=True),
            nn.LeakyReLU(SLOPE, inplace=True),
        )


class ClassNet(nn.Module):
    """Tells the class of every voxel of an image (N, 1, D, H, W)."""

    def __init__(self, config: ClassNetConfig) -> None:
        super().__init__()
        self.config, c = config, config.channels
        first = Block(1, c[0], *((3, 1) if config.stride == 1 else (4, 2)))
        self.encoders = nn.ModuleList([nn.Sequential(first, Block(c[0], c[0]))])
        self.encoders.extend(
            nn.Sequential(Block(above, here, 2, 2), Block(here, here)) for above, here in itertools.pairwise(c)
        )
        # Deepest first; each joins the upsampled features with the encoder's of its own level.
        self.decoders = nn.ModuleList(
            Block(below + here, here) for here, below in reversed(list(itertools.pairwise(c)))
        )
        self.head = nn.Conv3d(c[0], config.classes * (config.stride // config.output_stride) ** 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the classes.

        Args:
            image: (N, 1, D, H, W), normalized, 0 outside the field of view; sides multiples of ``config.multiple``.
        Returns:
            (N, classes, D/stride, H/stride, W/stride), with ``config.output_stride``.
        """
        skips, x = [], image
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
        skips.pop()
        for decoder in self.decoders:
            x = decoder(torch.cat((F.interpolate(x, scale_factor=2, mode="nearest"), skips.pop()), 1))
        return _interleaved(self.head(x), self.config.classes)

    @torch.no_grad()
    def probabilities(self, image: Tensor, inside: Tensor | None = None) -> Tensor:
        """How probable each class is at every voxel.

        Args:
            image: (N, 1, D, H, W), normalized as the network's card says; any sides.
            inside: (N, 1, D, H, W) bool, the field of view; outside it is background. None: everywhere.
        Returns:
            (N, classes, d, h, w) of the image's type, with ``d = ceil(D / config.output_stride)`` and so on; the classes of a
            voxel add up to 1.
        """
        stride, shape, multiple = self.config.output_stride, image.shape[2:], self.config.multiple
        share = torch.ones_like(image) if inside is None else inside.to(image.dtype)
        # At least two voxels a side at the deepest level, as one alone has no variance.
        more = [n for side in reversed(shape) for n in (0, max(-side % multiple, 2 * multiple - side))]
        padded, share = (F.pad(x, more) for x in (image * share, share))
        found = self(padded.to(self.head.weight.dtype)).to(image.dtype).softmax(1)
        share = F.avg_pool3d(share, stride) if stride > 1 else share
        found = found.mul_(share)
        found[:, :1] += 1 - share
        return found[(..., *(slice(0, -(-n // stride)) for n in shape))]


def _interleaved(x: Tensor, channels: int) -> Tensor:
    """(N, channels * r^3, D, H, W) to (N, channels, D r, H r, W r): r^3 channels become the voxels of a cube."""
    ratio = round((x.shape[1] / channels) ** (1 / 3))
    if ratio == 1:
        return x
    n, _, d, h, w = x.shape
    cubes = x.view(n, channels, ratio, ratio, ratio, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return cubes.reshape(n, channels, d * ratio, h * ratio, w * ratio)


def shared(fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of a pair's images without classes that one image alone has, which would be moved to nowhere.

    A class whose volume in one image is less than ``SHARED`` of that in the other fades into the background, in both.

    Args:
        fixed, moving: (N, classes, d, h, w), background first.
    """
    volumes = [x.mean((2, 3, 4), keepdim=True) for x in (fixed, moving)]
    ratio = torch.minimum(*volumes) / torch.maximum(*volumes).clamp_min(torch.finfo(fixed.dtype).tiny)
    kept = (ratio / SHARED).clamp_max(1)[:, 1:]
    both = []
    for x in (fixed, moving):
        known = x[:, 1:] * kept
        both.append(torch.cat((x[:, :1] + (x[:, 1:] - known).sum(1, keepdim=True), known), 1))
    return both[0], both[1]


def are_known(fixed: Tensor, moving: Tensor) -> bool:
    """Whether a network knows what a pair shows: after the initial alignment its classes in both images agree by far more than
    chance. In anatomy that it has not learned it sees classes here and there, in each image elsewhere.

    The agreement is Cohen's kappa (Educational and Psychological Measurement 1960) of the probabilities: 0 by chance, 1 where
    both images have the same classes everywhere.

    Args:
        fixed, moving: (N, classes, d, h, w), background first.
    """
    both = torch.einsum("ncdhw,nkdhw->nck", fixed, moving) / fixed[0, 0].numel()
    ours, theirs = both.sum(2), both.sum(1)
    agreed, chance = both.diagonal(dim1=1, dim2=2).sum(1), (ours * theirs).sum(1)
    return bool((agreed - chance > AGREEMENT * (1 - chance)).all())
