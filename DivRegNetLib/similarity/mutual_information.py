"""Mutual information of two images from joint histograms: differentiable with Parzen windows, and plain.

The differentiable estimates take images (N, 1, D, H, W) on one grid and return one number to **maximize**, averaged over N.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NMI_BINS = 64


def parzen_mi(
    fixed: Tensor,
    moving: Tensor,
    *,
    bins: int = 32,
    mask: Tensor | None = None,
    normalized: bool = False,
    chunk: int = 65536,
) -> Tensor:
    """Mutual information in nats from a Parzen-window joint histogram, differentiable in both images (a scalar).

    Cubic B-spline windows as in Mattes et al., IEEE TMI 2003; the range of each image is mapped to its bins. Voxels are
    processed in chunks that are recomputed in the backward pass, so memory grows with bins x chunk, not bins x voxels.

    Args:
        fixed, moving: (N, 1, D, H, W).
        bins: bins per image, at least 4.
        mask: (1, 1, D, H, W) bool: the voxels that count; None: all.
        normalized: return Studholme's (H(F) + H(M)) / H(F, M), 1 to 2, instead.
        chunk: voxels per chunk.
    Raises:
        ValueError: fewer than 4 bins, or images that differ in shape.
    """
    check_histogram(fixed, moving, bins)
    total = fixed.new_zeros(())
    for f, m in zip(fixed, moving, strict=True):
        f, m = (x.flatten() if mask is None else x[mask[0]] for x in (f, m))
        f, m = (_to_bins(x, bins) for x in (f, m))
        joint = fixed.new_zeros(bins, bins)
        for a, b in zip(f.split(chunk), m.split(chunk), strict=True):
            # Only the windows of the last chunk are kept for the backward pass; the others are recomputed there.
            keep = len(a) < chunk or len(f) == chunk
            part = (
                _joint_histogram(a, b, bins) if keep else checkpoint(_joint_histogram, a, b, bins, use_reentrant=False)
            )
            joint = joint + part
        p = joint / joint.sum()
        h_joint, h_f, h_m = entropy(p), entropy(p.sum(1)), entropy(p.sum(0))
        total = total + ((h_f + h_m) / h_joint.clamp_min(1e-12) if normalized else h_f + h_m - h_joint)
    return total / len(fixed)


def check_histogram(fixed: Tensor, moving: Tensor, bins: int) -> None:
    """Raises ValueError for fewer than 4 bins, or images that differ in shape."""
    if bins < 4:
        raise ValueError(f"Parzen windows need at least 4 bins, got {bins}")
    if fixed.shape != moving.shape:
        raise ValueError(f"fixed {tuple(fixed.shape)} and moving {tuple(moving.shape)} differ in shape")


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy in nats of probabilities of any shape."""
    return -torch.special.xlogy(p, p.clamp_min(1e-30)).sum()


def _to_bins(x: Tensor, bins: int) -> Tensor:
    """Maps intensities to continuous bin positions from 1 to bins - 2, so that all windows lie inside."""
    low, high = x.detach().aminmax()
    return (x - low) / (high - low).clamp_min(1e-12) * (bins - 3) + 1


def _joint_histogram(f: Tensor, m: Tensor, bins: int) -> Tensor:
    return parzen_window(f, bins).T @ parzen_window(m, bins)


def parzen_window(x: Tensor, bins: int) -> Tensor:
    """(V,) -> (V, bins): weight of each bin under a cubic B-spline centered on the value."""
    low = x.detach().floor()
    offsets = torch.arange(-1, 3, device=x.device)  # of the bins that the window covers
    t = ((x - low)[:, None] - offsets).abs()
    weight = torch.where(t < 1, 2 / 3 - t.square() * (1 - t / 2), (2 - t).clamp_min(0).pow(3) / 6)
    index = low.long()[:, None] + offsets
    weight = weight * ((index >= 0) & (index < bins))
    return x.new_zeros(len(x), bins).scatter_add(1, index.clamp(0, bins - 1), weight)


def nmi(fixed: np.ndarray, moving: np.ndarray, bins: int = NMI_BINS) -> float:
    """Studholme's normalized mutual information (H(F) + H(M)) / H(F, M), 1 to 2, of two arrays of equal shape."""
    cells = _binned(fixed, bins) * bins + _binned(moving, bins)
    p = np.bincount(cells, minlength=bins**2).reshape(bins, bins) / cells.size

    def entropy(q: np.ndarray) -> float:
        q = q[q > 0]
        return float(-(q * np.log(q)).sum())

    h_joint = entropy(p)
    return (entropy(p.sum(0)) + entropy(p.sum(1))) / h_joint if h_joint > 0 else 2.0


def _binned(values: np.ndarray, bins: int) -> np.ndarray:
    """(n,): the bin of each value, of bins of equal width from the smallest to the largest value."""
    low, high = float(values.min()), float(values.max())
    scaled = (values.ravel() - low) / (high - low) * bins if high > low else np.zeros(values.size)
    return np.minimum(scaled.astype(np.int64), bins - 1)
