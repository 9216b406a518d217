"""RegNet: the network that predicts a deformation from a fixed and a moving image in one forward pass.

Source: Huang et al., "KLDivNet: An unsupervised neural network for multi-modality image registration",
arXiv 1908.08767, section 2: a U-Net of four encoding and four decoding blocks with skip connections, switchable
normalization (Luo et al., "Differentiable learning-to-normalize via switchable normalization", ICLR 2019) in both and
squeeze-and-excitation (Hu et al., CVPR 2018) in the decoders.
"""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.equations import Valid
from DivRegNetLib.registration.variational.guidance import CHANNELS, guidance
from DivRegNetLib.registration.variational.settings import DEFAULT, VariationalSettings

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
    guided: True shows the network, beside the two images, the step that the variational method would make next, and adds
        its prediction to that step (:mod:`DivRegNetLib.registration.variational.guidance`). False shows it the two images
        alone, as in the paper.
    symmetric: True predicts half the difference of the predictions for (fixed, moving) and (moving, fixed), at twice the
        cost: identical images then do not move, and the swapped pair has the opposite velocity.
    """

    channels: tuple[int, int, int, int] = (16, 32, 32, 32)
    stride: int = 2
    velocity: bool = True
    integration_steps: int = 6
    passes: int = 1
    guided: bool = False
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
        for name in ("velocity", "guided", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"RegNet's {name} is true or false, got {getattr(self, name)!r}")
        for name, least, most in (("integration_steps", 0, 16), ("passes", 1, 16)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"RegNet's {name} is {least} to {most}, got {getattr(self, name)}")

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this number of voxels per axis: that of the default variational settings, so
        that both methods have the same output grid."""
        return self.stride * 4

    def as_dict(self) -> dict:
        return asdict(self) | {"channels": list(self.channels)}


class SwitchableNorm(nn.Module):
    """Normalizes by a learned mixture of instance, layer and batch statistics; shape (N, C, D, H, W) in and out.

    In a training by several processes the batch statistics are those of all processes, which have batches of equal size.
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
        # In the memory format channels_last_3d this is a view, and five times as fast as torch.var_mean on a CPU.
        voxels = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
        mean_in = voxels.mean(1)
        var_in = (voxels - mean_in[:, None]).square().mean(1)
        # In mixed precision the statistics keep full precision.
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
    """Mean over the processes of a distributed training. It is its own adjoint, as each process's loss has equal weight."""

    @staticmethod
    def forward(_, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total / distributed.get_world_size()

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return _MeanOverProcesses.forward(_, gradient)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the means of all channels; shape (N, C, D, H, W) in and out."""

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
    """Predicts the displacement that maps fixed points to moving points (arXiv 1908.08767, section 2)."""

    def __init__(self, config: RegNetConfig | None = None, variational: VariationalSettings = DEFAULT) -> None:
        """
        Args:
            variational: settings of the step that a guided network is shown, and the validity threshold.
        """
        super().__init__()
        self.config = config = config or RegNetConfig()
        self.variational = replace(variational, stride=config.stride)
        c = config.channels
        self.encoders = nn.ModuleList([Block(2, c[0], stride=config.stride)])
        self.encoders.extend(Block(c[i - 1], c[i], stride=2) for i in range(1, LEVELS))
        self.reader = Block(CHANNELS, c[0]) if config.guided else None
        # Deepest first; each but the deepest joins the upsampled features with the encoder's of its own level.
        self.decoders = nn.ModuleList(
            [Block(c[-1], c[-1], excite=True)]
            + [Block(c[i + 1] + c[i], c[i], excite=True) for i in reversed(range(LEVELS - 1))]
        )
        self.head = nn.Conv3d(c[0], 3, 3, padding=1)
        nn.init.normal_(self.head.weight, std=1e-5)  # start from the identity
        nn.init.zeros_(self.head.bias)

    def predict(self, fixed: Tensor, moving: Tensor, counted: Tensor | None = None) -> Tensor:
        """One pass: velocity or displacement on the network's output grid, in voxels of that grid.

        Args:
            fixed, moving: (N, 1, D, H, W), sides multiples of ``config.multiple``; moving already warped.
            counted: (N, 1, D, H, W) bool, voxels that the guidance counts; None: all.
        Returns:
            (N, 3, D/stride, H/stride, W/stride), components along x, y, z (that is W, H, D).
        """
        step = guides = None
        if self.config.guided:
            step, *guides = guidance(fixed, moving, self.variational, counted)
        if self.config.symmetric:  # as one batch: PyTorch has no fast convolutions for a single small image
            both = torch.cat((fixed, moving)), torch.cat((moving, fixed)), torch.cat(guides) if guides else None
            forward, backward = self._predict(*both).chunk(2)
            predicted = (forward - backward) / 2
        else:
            predicted = self._predict(fixed, moving, guides[0] if guides else None)
        return predicted if step is None else predicted + step

    def _predict(self, fixed: Tensor, moving: Tensor, guide: Tensor | None) -> Tensor:
        stride, shape = self.config.stride, [n // self.config.stride for n in fixed.shape[2:]]
        more = [-n % 2 ** (LEVELS - 1) for n in shape]  # so that each level has half the sides of the level before
        images = fields.extended(torch.cat((fixed, moving), 1), [stride * n for n in more])
        x = self.encoders[0](images)
        if guide is not None:
            x = x + self.reader(fields.extended(guide, more))
        skips = [x]
        for encoder in self.encoders[1:]:
            x = encoder(x)
            skips.append(x)
        x = self.decoders[0](skips.pop())
        for decoder in self.decoders[1:]:
            skip = skips.pop()
            x = decoder(torch.cat((F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip), 1))
        return self.head(x)[:, :, : shape[0], : shape[1], : shape[2]].to(fixed.dtype)

    def advance(
        self, fixed: Tensor, moving: Tensor, displacement: Tensor | None = None, valid: Valid | None = None
    ) -> Tensor:
        """One more pass: predicts from the fixed and the warped moving image, and composes the prediction with the
        displacement.

        Args:
            fixed, moving: (N, 1, D, H, W), sides multiples of ``config.multiple``.
            displacement: (N, 3, D/stride, H/stride, W/stride), as it is returned; None: the identity.
            valid: where the images were measured; None: everywhere.
        Returns:
            The displacement on the network's output grid, in voxels of that grid.
        """
        update = self.predict(fixed, *self._warped(moving, displacement, valid))
        if self.config.velocity:
            update = fields.integrate(update, self.config.integration_steps)
        return update if displacement is None else fields.compose(displacement, update)

    def _warped(self, moving: Tensor, displacement: Tensor | None, valid: Valid | None) -> tuple[Tensor, Tensor | None]:
        """The warped moving image (N, 1, D, H, W), and the voxels that were then measured in both images (bool), or None."""
        both = moving if valid is None else torch.cat((moving, valid[1].to(moving.dtype)), 1)
        if displacement is not None:
            both = fields.warp(both, fields.resize(displacement, moving.shape[2:]))
        if valid is None:
            return both, None
        threshold = self.variational.validity_threshold
        return both[:, :1], (valid[0] > threshold) & (both[:, 1:] > threshold)

    def register(
        self, fixed: Tensor, moving: Tensor, start: Tensor | None = None, valid: Valid | None = None
    ) -> Tensor:
        """All passes; the displacement on the network's output grid.

        Args:
            fixed, moving: (N, 1, D, H, W) on one grid, any sides; padded inside to multiples of ``config.multiple``.
            start: displacement before the first pass, as it is returned; None: the identity.
            valid: where each image was measured, (N, 1, D, H, W) bool: guidance counts these voxels only; None: everywhere.
        Returns:
            (N, 3, d, h, w) on the grid of the padded images coarsened by ``config.stride``, in voxels of that grid.
        """
        multiple = self.config.multiple
        fixed, moving = (fields.padded(x, multiple) for x in (fixed, moving))
        valid = None if valid is None else tuple(fields.padded(v, multiple, mode="constant") for v in valid)
        displacement = start
        for _ in range(self.config.passes):
            displacement = self.advance(fixed, moving, displacement, valid)
        return displacement

    def forward(self, fixed: Tensor, moving: Tensor, start: Tensor | None = None, valid: Valid | None = None) -> Tensor:
        """Displacement in voxels of the images' grid, (N, 3, D, H, W), components along x, y, z (W, H, D).

        ``warp(moving, forward(fixed, moving))`` resembles fixed. Arguments as of :meth:`register`.
        """
        return fields.upsample(self.register(fixed, moving, start, valid), self.config.stride, fixed.shape[2:])
