"""KLDivNet: a network that estimates the similarity of two images whose intensities need not be comparable.

Images are (N, 1, D, H, W) on one grid. The estimate is one number to **maximize**, averaged over N.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

SHUFFLES = ("patches", "voxels")


def donsker_varadhan(joint: Tensor, product: Tensor) -> Tensor:
    """Lower bound of KL(P_FM || P_F P_M) in nats, ``mean(joint) - log mean exp(product)``.

    Source: arXiv 1908.08767, Eq. 9. The logarithm of the mean is taken by log-sum-exp in float32, so that no value
    of D overflows.

    Args:
        joint, product: (..., K) values of D on aligned and on shuffled samples.
    Returns:
        (...): the bound.
    """
    joint, product = joint.float(), product.float()
    return joint.mean(-1) - (product.logsumexp(-1) - math.log(product.shape[-1]))


@dataclass(frozen=True)
class KLDivNetConfig:
    """Architecture of a :class:`KLDivNet`.

    channels: features of every block.
    patch: side of the voxel patch that the downsampling layer averages.
    frequencies: number of sine/cosine pairs of the intensity that are added to the input; 0 as in the paper.
    context: size of the embedding of the pair that D is conditioned on, so that one D fits many contrasts; 0 as in the paper.
    """

    channels: int = 32
    patch: int = 2
    frequencies: int = 0
    context: int = 0

    def __post_init__(self) -> None:
        for name, least in (("channels", 1), ("patch", 1), ("frequencies", 0), ("context", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1024:
                raise ValueError(f"KLDivNet's {name} is a whole number from {least} to 1024, got {value!r}")

    def as_dict(self) -> dict:
        return asdict(self)


class KLDivNet(nn.Module):
    """The network D of arXiv 1908.08767 whose Donsker-Varadhan bound estimates mutual information.

    Y-shaped and pointwise: each image goes through two blocks (1x1x1 convolution, leaky ReLU, no normalization) and a
    downsampling layer that averages patches; the two branches are joined and go through two more blocks. D is evaluated on
    a random subset of the patches, which estimates S as accurately as all of them at a fraction of the cost; on single
    patches, 1x1x1 convolutions are linear layers.

    With ``context``, D is conditioned on the mean embedding of one half of the patches and evaluated on the other half. The
    result is still a lower bound of MI, as the embedding is independent of the patches that D is evaluated on.
    """

    def __init__(self, config: KLDivNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or KLDivNetConfig()
        c, inputs = config.channels, 1 + 2 * config.frequencies

        def two_blocks(n_in: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(n_in, c), nn.LeakyReLU(0.2, inplace=True), nn.Linear(c, c), nn.LeakyReLU(0.2, inplace=True)
            )

        self.fixed_branch, self.moving_branch = two_blocks(inputs), two_blocks(inputs)
        self.joined = nn.Sequential(two_blocks(2 * c + config.context), nn.Linear(c, 1))
        self.summary = nn.Sequential(two_blocks(2 * c), nn.Linear(c, config.context)) if config.context else None

    def forward(
        self,
        fixed: Tensor,
        moving: Tensor,
        *,
        mask: Tensor | None = None,
        samples: int = 16384,
        shuffle: str = "patches",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """S, the estimate of mutual information in nats (a scalar, mean over N).

        Args:
            fixed, moving: (N, 1, D, H, W), moving already warped; any intensities (standardized inside).
            mask: (1, 1, D, H, W) bool; only patches entirely inside count. None: all.
            samples: number of patches drawn at random; fewer where the image has fewer.
            shuffle: what is permuted for the product of marginals: ``patches`` after the downsampling layer, or, as in
                the paper, the ``voxels`` of the fixed image before it. The latter is no bound where a patch has more
                than one voxel, as the texture inside a patch distinguishes shuffled from aligned pairs.
            generator: random numbers, on the CPU.
        Raises:
            ValueError: unknown shuffle, images that differ in shape, or fewer than 4 patches inside the mask.
        """
        if fixed.shape != moving.shape:
            raise ValueError(f"fixed {tuple(fixed.shape)} and moving {tuple(moving.shape)} differ in shape")
        side = self.config.patch
        allowed = None if mask is None else patches(mask, side).all(-1)[0].nonzero()[:, 0]
        count = math.prod(n // side for n in fixed.shape[2:]) if allowed is None else len(allowed)
        if count < 4:
            raise ValueError(f"{count} patches of {side} voxels lie inside the mask, at least 4 needed")
        chosen = torch.randperm(count, generator=generator)[: samples - samples % 2].to(fixed.device)
        chosen = chosen if allowed is None else allowed[chosen]
        f, m = (standardize(x, patches(x, side, chosen), mask) for x in (fixed, moving))
        return self.estimate(f, m, shuffle=shuffle, generator=generator)

    def estimate(
        self, f: Tensor, m: Tensor, *, shuffle: str = "patches", generator: torch.Generator | None = None
    ) -> Tensor:
        """S of corresponding patches (a scalar, mean over N): :meth:`forward` after the patches are drawn.

        Args:
            f, m: (N, K, patch^3) intensities of K patches of the fixed and the warped moving image, standardized.
            shuffle, generator: see :meth:`forward`.
        Raises:
            ValueError: unknown shuffle.
        """
        if shuffle not in SHUFFLES:
            raise ValueError(f"shuffle is one of {SHUFFLES}, got {shuffle!r}")
        hf, hm = self._branch(self.fixed_branch, f), self._branch(self.moving_branch, m)
        context = None
        if self.summary is not None:  # one half is embedded, the other evaluated and shuffled
            half = f.shape[1] // 2
            context = self.summary(torch.cat((hf[:, :half], hm[:, :half]), -1)).mean(1, keepdim=True)
            f, hf, hm = f[:, half:], hf[:, half:], hm[:, half:]
        if shuffle == "patches":
            shuffled = hf[:, torch.randperm(f.shape[1], generator=generator).to(f.device)]
        else:
            voxels = torch.randperm(f[0].numel(), generator=generator).to(f.device)
            shuffled = self._branch(self.fixed_branch, f.flatten(1)[:, voxels].view_as(f))
        return donsker_varadhan(self._join(hf, hm, context), self._join(shuffled, hm, context)).mean()

    def _branch(self, branch: nn.Sequential, values: Tensor) -> Tensor:
        """(N, K, P) intensities -> (N, K, C): blocks per voxel, then the downsampling layer (mean over the patch)."""
        x = values[..., None]
        if self.config.frequencies:
            k = torch.arange(1, self.config.frequencies + 1, device=x.device, dtype=x.dtype)
            x = torch.cat((x, (k * x).sin(), (k * x).cos()), -1)
        return branch(x).mean(2)

    def _join(self, hf: Tensor, hm: Tensor, context: Tensor | None) -> Tensor:
        parts = (hf, hm) if context is None else (hf, hm, context.expand(-1, hf.shape[1], -1))
        return self.joined(torch.cat(parts, -1))[..., 0]


def patches(image: Tensor, patch: int, chosen: Tensor | None = None) -> Tensor:
    """(N, 1, D, H, W) -> (N, number of patches, patch^3); incomplete patches at the far end are left out.

    Args:
        chosen: (K,) indices of patches; None: all.
    """
    every = image[:, 0].unfold(1, patch, patch).unfold(2, patch, patch).unfold(3, patch, patch)
    if chosen is None:
        return every.flatten(4).flatten(1, 3)
    rows, columns = every.shape[2:4]  # torch.unravel_index would copy them to a GPU and wait for it
    line = chosen // columns
    return every[:, line // rows, line % rows, chosen % columns].flatten(2)


def standardize(image: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Values (N, K, P) of an image, scaled so that the image has zero mean and unit variance (inside the mask). D hardly
    learns from inputs in [0, 1]."""
    with torch.no_grad():
        inside = image.flatten(1) if mask is None else image[mask.expand_as(image)].view(len(image), -1)
        mean = inside.mean(1)
        var = (inside - mean[:, None]).square().mean(1)  # ten times as fast on a CPU as torch.var_mean
    return (values - mean.view(-1, 1, 1)) * torch.rsqrt(var + 1e-8).view(-1, 1, 1)
