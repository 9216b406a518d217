"""RegNet: the network that predicts a deformation from a fixed and a moving image in one forward pass.

Source: Huang et al., "KLDivNet: An unsupervised neural network for multi-modality image registration",
arXiv 1908.08767, section 2: a U-Net of four encoding and four decoding blocks with skip connections, switchable
normalisation (Luo et al., "Differentiable learning-to-normalize via switchable normalization", ICLR 2019) in both and
squeeze-and-excitation (Hu et al., CVPR 2018) in the decoders.
"""

import itertools
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from DivRegNetLib import fields

LEVELS = 4


@dataclass(frozen=True)
class RegNetConfig:
    """Architecture of a :class:`RegNet`, stored in its model card.

    channels: features of the four levels, finest first.
    stride: 2 predicts the field at half the resolution of the images (a quarter of the time), 1 at full resolution.
    velocity: True predicts a stationary velocity field that is integrated by scaling and squaring (diffeomorphic),
        False the displacement itself.
    integration_steps: number of squarings.
    passes: how often the network is applied, each time to the moving image warped by the passes before.
    match: True gives the network, beside the two images, a first guess by block matching (see :func:`matching`); False
        the two images alone, as in the paper.
    symmetric: True takes half of what is predicted for (fixed, moving) less what is predicted for (moving, fixed), at
        twice the cost: identical images then do not move, and a velocity is the opposite of that of the swapped pair.
    """

    channels: tuple[int, int, int, int] = (16, 32, 32, 32)
    stride: int = 2
    velocity: bool = True
    integration_steps: int = 6
    passes: int = 1
    match: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        whole = [*self.channels, self.stride, self.integration_steps, self.passes]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in whole):
            raise ValueError("RegNet: channels, stride, integration_steps and passes are whole numbers")
        if len(self.channels) != LEVELS or not all(1 <= c <= 1024 for c in self.channels):
            raise ValueError(f"RegNet has {LEVELS} levels of 1 to 1024 channels, got channels={self.channels}")
        if self.stride not in (1, 2):
            raise ValueError(f"RegNet's stride is 1 (full resolution) or 2 (half), got {self.stride}")
        for name in ("velocity", "match", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"RegNet's {name} is true or false, got {getattr(self, name)!r}")
        if not 0 <= self.integration_steps <= 16 or not 1 <= self.passes <= 16:
            raise ValueError(
                "RegNet's integration_steps are 0 to 16 and passes 1 to 16, "
                f"got {self.integration_steps} and {self.passes}"
            )

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this number of voxels per axis before they enter the network."""
        return self.stride * 2 ** (LEVELS - 1)

    def as_dict(self) -> dict:
        return asdict(self) | {"channels": list(self.channels)}


def translate(image: Tensor, other: Tensor, bins: int = 32) -> Tensor:
    """An image in the intensities of another: the mean of ``other`` where ``image`` has that value, E[other | image].

    With roughly aligned images of any two contrasts this makes a pair of like contrast, the estimator inside the
    correlation ratio (Roche et al., MICCAI 1998). The conditional mean is a piecewise linear curve over ``bins`` knots.

    Args:
        image, other: (N, 1, D, H, W) in [0, 1].
    Returns:
        (N, 1, D, H, W).
    """
    translated = []
    for values, target in zip(image, other, strict=True):
        position = values.flatten() * (bins - 1)
        lower = position.floor().clamp(0, bins - 2)
        upper_share, lower = position - lower, lower.long()
        knots = torch.cat((lower, lower + 1))
        weights = torch.cat((1 - upper_share, upper_share))
        mass = weights.new_zeros(bins).index_add(0, knots, weights)
        total = weights.new_zeros(bins).index_add(0, knots, weights * target.flatten().repeat(2))
        curve = total / mass.clamp_min(1e-3)
        translated.append(torch.lerp(curve[lower], curve[lower + 1], upper_share).view_as(values))
    return torch.stack(translated)


OFFSETS = [offset for offset in itertools.product((-1, 0, 1), repeat=3)]
OFFSETS += [tuple(2 * sign * (a == axis) for a in range(3)) for axis in range(3) for sign in (-1, 1)]
"""Offsets along x, y, z at which :func:`matching` compares, in voxels of the network's output grid."""

WINDOWS = 2
SHARPNESS = 30.0


@torch.no_grad()
def matching(fixed: Tensor, moving: Tensor, stride: int) -> Tensor:
    """Block matching of two images whose contrasts need not be alike: a first guess of the displacement, and how sure.

    Each image is compared with the other as :func:`translate` makes it, at each of OFFSETS. The squared differences,
    averaged over a window, become weights by a softmax of their ratio to the mean over the offsets; what comes out is
    the weighted mean offset and the largest weight. The windows are 5 and, averaged again, about 9 voxels wide. The
    network learns what to make of these guesses instead of learning first to compare. Not differentiated.

    Args:
        fixed, moving: (N, 1, D, H, W) in [0, 1], sides multiples of ``stride``.
    Returns:
        (N, 4 * WINDOWS, D/stride, H/stride, W/stride): per window x, y, z in voxels of the output grid, and the weight.
    """
    # Voxels of an output cell become channels, so that offsets are whole cells but nothing is averaged.
    images = (fixed, translate(fixed, moving), translate(moving, fixed), moving)
    still, moved = (_cells(torch.cat(pair, 1), stride) for pair in (images[:2], images[2:]))
    moved = F.pad(moved, [2] * 6, mode="replicate")
    d, h, w = still.shape[2:]
    difference = still.new_empty(len(still), len(OFFSETS), d, h, w)
    buffer = torch.empty_like(still)
    for i, (x, y, z) in enumerate(OFFSETS):
        torch.sub(still, moved[:, :, 2 + z : 2 + z + d, 2 + y : 2 + y + h, 2 + x : 2 + x + w], out=buffer)
        difference[:, i] = buffer.square_().mean(1)
    offsets = difference.new_tensor(OFFSETS)
    floor = 0.05 * difference.mean((1, 2, 3, 4), keepdim=True) + 1e-6
    found = []
    for _ in range(WINDOWS):
        for dim in range(3):
            size = [5 if i == dim else 1 for i in range(3)]
            pad = [n // 2 for n in size]
            difference = F.avg_pool3d(difference, size, stride=1, padding=pad, count_include_pad=False)
        weights = (-SHARPNESS * difference / (difference.mean(1, keepdim=True) + floor)).softmax(1)
        found += [torch.einsum("nodhw,oc->ncdhw", weights, offsets), weights.amax(1, keepdim=True)]
    return torch.cat(found, 1)


def _cells(image: Tensor, stride: int) -> Tensor:
    """(N, C, D, H, W) -> (N, C * stride^3, D/stride, H/stride, W/stride)."""
    for dim in (2, 3, 4):
        image = torch.cat([image[_every(dim, i, stride)] for i in range(stride)], 1)
    return image


def _every(dim: int, first: int, stride: int) -> tuple[slice, ...]:
    return tuple(slice(first, None, stride) if d == dim else slice(None) for d in range(5))


class SwitchableNorm(nn.Module):
    """Normalises by a learnt mixture of instance, layer and batch statistics; shape (N, C, D, H, W) in and out."""

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean_mix = nn.Parameter(torch.zeros(3))
        self.var_mix = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        var_in, mean_in = torch.var_mean(x, dim=(2, 3, 4), correction=0)
        square_in = var_in + mean_in.square()
        mean_ln = mean_in.mean(1, keepdim=True).expand_as(mean_in)
        var_ln = square_in.mean(1, keepdim=True) - mean_ln.square()
        if self.training:
            mean_bn = mean_in.mean(0)
            var_bn = square_in.mean(0) - mean_bn.square()
            with torch.no_grad():
                self.running_mean.lerp_(mean_bn.detach().to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(var_bn.detach().to(self.running_var.dtype), self.momentum)
        else:
            mean_bn, var_bn = self.running_mean, self.running_var
        m, v = self.mean_mix.softmax(0), self.var_mix.softmax(0)
        mean = m[0] * mean_in + m[1] * mean_ln + m[2] * mean_bn
        var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
        scale = self.weight * torch.rsqrt(var.clamp_min(0) + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[..., None, None, None], x, scale[..., None, None, None])


class SqueezeExcitation(nn.Module):
    """Re-weights channels by what the whole image shows; shape (N, C, D, H, W) in and out."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 4)
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3, 4)))[..., None, None, None]


class Block(nn.Sequential):
    """Convolution, switchable normalisation, leaky ReLU and, in decoders, squeeze-and-excitation.

    With stride 2 the kernel is 4 wide, so that an output voxel is centred on the 2x2x2 input voxels it replaces.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, excite: bool = False) -> None:
        kernel = 4 if stride == 2 else 3
        layers = [
            nn.Conv3d(inputs, outputs, kernel, stride=stride, padding=1, bias=False),
            SwitchableNorm(outputs),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        super().__init__(*layers, *([SqueezeExcitation(outputs)] if excite else []))


class RegNet(nn.Module):
    """Predicts the displacement that maps fixed voxels to moving voxels (arXiv 1908.08767, section 2)."""

    def __init__(self, config: RegNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RegNetConfig()
        c = config.channels
        self.encoders = nn.ModuleList([Block(2, c[0], stride=config.stride)])
        self.encoders.extend(Block(c[i - 1], c[i], stride=2) for i in range(1, LEVELS))
        self.reader = Block(4 * WINDOWS, c[0]) if config.match else None
        # Deepest first; each but the deepest joins the upsampled features with the encoder's of its own level.
        self.decoders = nn.ModuleList(
            [Block(c[-1], c[-1], excite=True)]
            + [Block(c[i + 1] + c[i], c[i], excite=True) for i in reversed(range(LEVELS - 1))]
        )
        self.head = nn.Conv3d(c[0], 3, 3, padding=1)
        nn.init.normal_(self.head.weight, std=1e-5)  # start from the identity
        nn.init.zeros_(self.head.bias)

    def predict(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """One pass: velocity or displacement on the network's output grid, in voxels of that grid.

        Args:
            fixed, moving: (N, 1, D, H, W), sides multiples of ``config.multiple``.
        Returns:
            (N, 3, D/stride, H/stride, W/stride), components along x, y, z (that is W, H, D).
        """
        if not self.config.symmetric:
            return self._predict(fixed, moving)
        return (self._predict(fixed, moving) - self._predict(moving, fixed)) / 2

    def _predict(self, fixed: Tensor, moving: Tensor) -> Tensor:
        x = self.encoders[0](torch.cat((fixed, moving), 1))
        if self.reader is not None:
            x = x + self.reader(matching(fixed, moving, self.config.stride))
        skips = [x]
        for encoder in self.encoders[1:]:
            x = encoder(x)
            skips.append(x)
        x = self.decoders[0](skips.pop())
        for decoder in self.decoders[1:]:
            skip = skips.pop()
            x = decoder(torch.cat((F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip), 1))
        return self.head(x)

    def advance(self, fixed: Tensor, moving: Tensor, displacement: Tensor | None = None) -> Tensor:
        """One pass further: looks at the moving image as warped so far, and composes what it finds with it.

        Args:
            fixed, moving: (N, 1, D, H, W), sides multiples of ``config.multiple``.
            displacement: (N, 3, D/stride, H/stride, W/stride), what this method returned before; None at first.
        Returns:
            The displacement on the network's output grid, in voxels of that grid.
        """
        if displacement is not None:
            moving = fields.warp(moving, fields.resize(displacement, moving.shape[2:]))
        update = self.predict(fixed, moving)
        if self.config.velocity:
            update = fields.integrate(update, self.config.integration_steps)
        return update if displacement is None else fields.compose(displacement, update)

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """Displacement in voxels of the images' grid.

        Args:
            fixed, moving: (N, 1, D, H, W) on one grid, any sides; padded inside to multiples of ``config.multiple``.
        Returns:
            (N, 3, D, H, W): components along x, y, z (W, H, D); ``warp(moving, forward(...))`` resembles fixed.
        """
        shape = fixed.shape[2:]
        pad = [amount for side in reversed(shape) for amount in (0, -side % self.config.multiple)]
        fixed, moving = (F.pad(x, pad, mode="replicate") if any(pad) else x for x in (fixed, moving))
        displacement = None
        for _ in range(self.config.passes):
            displacement = self.advance(fixed, moving, displacement)
        return fields.resize(displacement, fixed.shape[2:])[:, :, : shape[0], : shape[1], : shape[2]]
