"""Local normalized cross-correlation of two images (N, 1, D, H, W) on one grid: one number to **maximize**."""

from torch import Tensor
from torch.nn import functional as F


def lncc(fixed: Tensor, moving: Tensor, *, window: int = 9, mask: Tensor | None = None) -> Tensor:
    """Mean squared local normalized cross-correlation over cubic windows, 0 to 1 (a scalar).

    Source: Avants et al., Med. Image Anal. 2008, as used by VoxelMorph. Flat windows count as 0.

    Args:
        fixed, moving: (N, 1, D, H, W).
        window: odd side of the window in voxels.
        mask: (1, 1, D, H, W) bool; windows centered outside do not count.
    Raises:
        ValueError: an even or non-positive window, or an image smaller than half of it.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"the LNCC window is an odd number of voxels, got {window}")
    if min(fixed.shape[2:]) < window // 2:
        raise ValueError(f"an LNCC window of {window} voxels is too large for an image of {tuple(fixed.shape[2:])}")

    def local_mean(x: Tensor) -> Tensor:
        for dim in range(3):
            kernel, pad = [1, 1, 1], [0, 0, 0]
            kernel[dim], pad[dim] = window, window // 2
            x = F.avg_pool3d(x, kernel, stride=1, padding=pad, count_include_pad=False)
        return x

    # Centering first keeps the variances E[x^2] - E[x]^2 from cancelling in float32.
    f, m = (x - x.mean((2, 3, 4), keepdim=True).detach() for x in (fixed, moving))
    mean_f, mean_m = local_mean(f), local_mean(m)
    cross = local_mean(f * m) - mean_f * mean_m
    var_f = (local_mean(f * f) - mean_f.square()).clamp_min(0)
    var_m = (local_mean(m * m) - mean_m.square()).clamp_min(0)
    correlation = cross.square() / (var_f * var_m + 1e-5 * var_f.mean().detach() * var_m.mean().detach() + 1e-12)
    return correlation.mean() if mask is None else correlation[mask.expand_as(correlation)].mean()
