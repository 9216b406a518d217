"""RegNet: the network that predicts a deformation from a fixed and a moving image in one forward pass.

Source: Huang et al., "KLDivNet: An unsupervised neural network for multi-modality image registration",
arXiv 1908.08767, section 2: a U-Net of four encoding and four decoding blocks with skip connections, switchable
normalization (Luo et al., "Differentiable learning-to-normalize via switchable normalization", ICLR 2019) in both and
squeeze-and-excitation (Hu et al., CVPR 2018) in the decoders.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration import newton

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
    newton: how many Gauss-Newton steps on mutual information (:mod:`DivRegNetLib.registration.newton`) come before the first pass;
        the network then sees, beside the two images, the step that would be next, and predicts what to add to it. 0
        gives it the two images alone, as in the paper.
    symmetric: True takes half of what is predicted for (fixed, moving) less what is predicted for (moving, fixed), at
        twice the cost: identical images then do not move, and a velocity is the opposite of that of the swapped pair.
    """

    channels: tuple[int, int, int, int] = (16, 32, 32, 32)
    stride: int = 2
    velocity: bool = True
    integration_steps: int = 6
    passes: int = 1
    newton: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        whole = [*self.channels, self.stride, self.integration_steps, self.passes, self.newton]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in whole):
            raise ValueError("RegNet: channels, stride, integration_steps, passes and newton are whole numbers")
        if len(self.channels) != LEVELS or not all(1 <= c <= 1024 for c in self.channels):
            raise ValueError(f"RegNet has {LEVELS} levels of 1 to 1024 channels, got channels={self.channels}")
        if self.stride not in (1, 2):
            raise ValueError(f"RegNet's stride is 1 (full resolution) or 2 (half), got {self.stride}")
        for name in ("velocity", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"RegNet's {name} is true or false, got {getattr(self, name)!r}")
        for name, least, most in (("integration_steps", 0, 16), ("passes", 1, 16), ("newton", 0, 64)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"RegNet's {name} is {least} to {most}, got {getattr(self, name)}")

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this number of voxels per axis, so that Newton steps can halve them twice."""
        return self.stride * max(newton.LEVELS)

    def as_dict(self) -> dict:
        return asdict(self) | {"channels": list(self.channels)}


class SwitchableNorm(nn.Module):
    """Normalizes by a learnt mixture of instance, layer and batch statistics; shape (N, C, D, H, W) in and out.

    In a training by several processes the batch is that of all of them, each having as many images.
    """

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
        # Where channels lie last, as in a registration, this is a view, and five times as fast as torch.var_mean on a CPU.
        voxels = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
        mean_in = voxels.mean(1)
        var_in = (voxels - mean_in[:, None]).square().mean(1)
        # In mixed precision these few numbers are kept in full.
        mean_in, var_in = mean_in.to(self.weight.dtype), var_in.to(self.weight.dtype)
        square_in = var_in + mean_in.square()
        mean_ln = mean_in.mean(1, keepdim=True).expand_as(mean_in)
        var_ln = square_in.mean(1, keepdim=True) - mean_ln.square()
        if self.training:
            mean_bn, square_bn = mean_in.mean(0), square_in.mean(0)
            if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
                mean_bn, square_bn = _MeanOverProcesses.apply(torch.stack((mean_bn, square_bn)))
            var_bn = square_bn - mean_bn.square()
            with torch.no_grad():
                self.running_mean.lerp_(mean_bn, self.momentum)
                self.running_var.lerp_(var_bn, self.momentum)
        else:
            mean_bn, var_bn = self.running_mean, self.running_var
        m, v = self.mean_mix.softmax(0), self.var_mix.softmax(0)
        mean = m[0] * mean_in + m[1] * mean_ln + m[2] * mean_bn
        var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
        scale = self.weight * torch.rsqrt(var.clamp_min(0) + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[..., None, None, None], x, scale[..., None, None, None])


class _MeanOverProcesses(torch.autograd.Function):
    """Mean over the processes of a distributed training. Its adjoint is itself: each process's loss counts alike."""

    @staticmethod
    def forward(_, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total / distributed.get_world_size()

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return _MeanOverProcesses.forward(_, gradient)


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
    """Convolution, switchable normalization, leaky ReLU and, in decoders, squeeze-and-excitation.

    With stride 2 the kernel is 4 wide, so that an output voxel is centered on the 2x2x2 input voxels it replaces.
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
        self.reader = Block(4 * len(newton.TOLD), c[0]) if config.newton else None
        # Deepest first; each but the deepest joins the upsampled features with the encoder's of its own level.
        self.decoders = nn.ModuleList(
            [Block(c[-1], c[-1], excite=True)]
            + [Block(c[i + 1] + c[i], c[i], excite=True) for i in reversed(range(LEVELS - 1))]
        )
        self.head = nn.Conv3d(c[0], 3, 3, padding=1)
        nn.init.normal_(self.head.weight, std=1e-5)  # start from the identity
        nn.init.zeros_(self.head.bias)

    def predict(self, fixed: Tensor, moving: Tensor, counts: Tensor | None = None) -> Tensor:
        """One pass: velocity or displacement on the network's output grid, in voxels of that grid.

        Args:
            fixed, moving: (N, 1, D, H, W), sides multiples of ``config.multiple``.
            counts: (N, 1, D, H, W) bool, voxels that the Newton step looks at; None: all.
        Returns:
            (N, 3, D/stride, H/stride, W/stride), components along x, y, z (that is W, H, D).
        """
        step = told = None
        if self.config.newton:
            step, *told = newton.guess(fixed, moving, self.config.stride, counts)
        if self.config.symmetric:  # as one batch: PyTorch does not have its fast convolutions for a single small image
            both = torch.cat((fixed, moving)), torch.cat((moving, fixed)), torch.cat(told) if told else None
            forward, backward = self._predict(*both).chunk(2)
            found = (forward - backward) / 2
        else:
            found = self._predict(fixed, moving, told[0] if told else None)
        return found if step is None else found + step

    def _predict(self, fixed: Tensor, moving: Tensor, guess: Tensor | None) -> Tensor:
        stride, shape = self.config.stride, [n // self.config.stride for n in fixed.shape[2:]]
        more = [-n % 2 ** (LEVELS - 1) for n in shape]  # so that each level is half of the one before
        x = self.encoders[0](_padded(torch.cat((fixed, moving), 1), [stride * n for n in more]))
        if guess is not None:
            x = x + self.reader(_padded(guess, more))
        skips = [x]
        for encoder in self.encoders[1:]:
            x = encoder(x)
            skips.append(x)
        x = self.decoders[0](skips.pop())
        for decoder in self.decoders[1:]:
            skip = skips.pop()
            x = decoder(torch.cat((F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip), 1))
        return self.head(x)[:, :, : shape[0], : shape[1], : shape[2]].to(fixed.dtype)

    def begin(self, fixed: Tensor, moving: Tensor, valid: newton.Valid | None = None) -> Tensor | None:
        """The displacement that the first pass starts from, as :meth:`advance` takes it; None for the identity.

        Args:
            valid: where the images have been measured; None: everywhere.
        """
        if not self.config.newton:
            return None
        return newton.approach(fixed, moving, self.config.newton, self.config.stride, valid)

    def advance(
        self,
        fixed: Tensor,
        moving: Tensor,
        displacement: Tensor | None = None,
        valid: newton.Valid | None = None,
    ) -> Tensor:
        """One pass further: looks at the moving image as warped so far, and composes what it finds with it.

        Args:
            fixed, moving: (N, 1, D, H, W), sides multiples of ``config.multiple``.
            displacement: (N, 3, D/stride, H/stride, W/stride), what this method or :meth:`begin` returned.
            valid: where the images have been measured; None: everywhere.
        Returns:
            The displacement on the network's output grid, in voxels of that grid.
        """
        update = self.predict(fixed, *newton.warped(moving, displacement, valid))
        if self.config.velocity:
            update = fields.integrate(update, self.config.integration_steps)
        return update if displacement is None else fields.compose(displacement, update)

    def forward(self, fixed: Tensor, moving: Tensor, valid: newton.Valid | None = None) -> Tensor:
        """Displacement in voxels of the images' grid.

        Args:
            fixed, moving: (N, 1, D, H, W) on one grid, any sides; padded inside to multiples of ``config.multiple``.
            valid: where each has been measured, (N, 1, D, H, W) bool: Newton steps look there alone; None: everywhere.
        Returns:
            (N, 3, D, H, W): components along x, y, z (W, H, D); ``warp(moving, forward(...))`` resembles fixed.
        """
        shape = fixed.shape[2:]
        more = [-n % self.config.multiple for n in shape]
        fixed, moving = (_padded(x, more) for x in (fixed, moving))
        valid = None if valid is None else tuple(_padded(x, more, mode="constant") for x in valid)
        displacement = self.begin(fixed, moving, valid)
        for _ in range(self.config.passes):
            displacement = self.advance(fixed, moving, displacement, valid)
        return fields.resize(displacement, fixed.shape[2:])[:, :, : shape[0], : shape[1], : shape[2]]


def _padded(image: Tensor, more: list[int], mode: str = "replicate") -> Tensor:
    """(N, C, D, H, W) with so many voxels more at the far end of D, H and W."""
    return F.pad(image, [n for side in reversed(more) for n in (0, side)], mode=mode) if any(more) else image
