"""How good is a registration: overlap and surface distances of labels, landmark error, the field itself, similarity.

Distances are in mm. numpy and SimpleITK alone, but for what needs a network.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from DivRegNetLib.similarity.kldivnet import KLDivNet

PATCHES = 4096  # that S is estimated from


def dice(fixed: np.ndarray, warped: np.ndarray) -> float:
    """Dice coefficient of two boolean arrays; NaN where both are empty."""
    total = int(fixed.sum()) + int(warped.sum())
    return 2 * int((fixed & warped).sum()) / total if total else float("nan")


def surface_distances(fixed: np.ndarray, warped: np.ndarray, grid: Grid) -> dict[str, float]:
    """``asd``, ``hd`` and ``hd95`` (mm) between the surfaces of two boolean arrays (D, H, W) on a grid.

    A surface voxel is one with a face neighbor outside. Distances go both ways: ASD is the mean of all of them, HD the
    largest, HD95 the larger of the two directions' 95th percentiles. NaN where one is empty.
    """
    if not fixed.any() or not warped.any():
        return {"asd": float("nan"), "hd": float("nan"), "hd95": float("nan")}
    inside = np.argwhere(fixed | warped)
    box = tuple(slice(max(a - 1, 0), b + 2) for a, b in zip(inside.min(0), inside.max(0), strict=True))
    surfaces = [_surface(np.pad(x[box], 1)) for x in (fixed, warped)]
    one_way = []
    for here, there in (surfaces, surfaces[::-1]):
        image = sitk.GetImageFromArray(there.astype(np.uint8))
        image.SetSpacing(grid.spacing)
        distance = sitk.Abs(sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True))
        one_way.append(sitk.GetArrayViewFromImage(distance)[here])
    both = np.concatenate(one_way)
    return {
        "asd": float(both.mean()),
        "hd": float(both.max()),
        "hd95": float(max(np.percentile(d, 95) for d in one_way)),
    }


def _surface(region: np.ndarray) -> np.ndarray:
    core = region.copy()
    for axis in range(3):
        for step in (-1, 1):
            core &= np.roll(region, step, axis)
    return region & ~core


def label_overlap(fixed: sitk.Image, warped: sitk.Image) -> dict:
    """Dice and surface distances of every label, and their means.

    Args:
        fixed, warped: label maps on one grid, 0 is background.
    Returns:
        ``{"labels": {"3": {"dice", "asd", "hd", "hd95"}, ...}, "mean": {...}, "union": {...}}``; the mean is over labels
        present in both, ``union`` takes all labels as one. NaN as None.
    Raises:
        InputError: the grids differ, or there is no label.
    """
    grid = Grid.of(fixed)
    if grid != Grid.of(warped):
        raise InputError("label maps can only be compared on one grid; apply the transform first")
    f, w = sitk.GetArrayViewFromImage(fixed), sitk.GetArrayViewFromImage(warped)
    labels = sorted({int(v) for x in (f, w) for v in np.unique(x)} - {0})
    if not labels:
        raise InputError("the label maps hold no label (all voxels are 0)")
    scores = {str(n): _overlap(f == n, w == n, grid) for n in labels}
    common = [s for s in scores.values() if all(np.isfinite(v) for v in s.values())]
    mean = {
        k: float(np.mean([s[k] for s in common])) if common else float("nan") for k in ("dice", "asd", "hd", "hd95")
    }
    found = {"labels": scores, "mean": mean, "union": _overlap(f != 0, w != 0, grid)}
    return _without_nan(found)


def _overlap(fixed: np.ndarray, warped: np.ndarray, grid: Grid) -> dict[str, float]:
    return {"dice": dice(fixed, warped)} | surface_distances(fixed, warped, grid)


def landmark_error(fixed: np.ndarray, moving: np.ndarray, transform: sitk.Transform | None = None) -> np.ndarray:
    """Target registration error of each pair of landmarks, mm: distance of ``T(fixed)`` to ``moving``, (n,).

    Args:
        fixed, moving: (n, 3) LPS mm, in the same order.
        transform: fixed -> moving points; None: identity, the error before registration.
    Raises:
        InputError: the numbers of landmarks differ.
    """
    if len(fixed) != len(moving):
        raise InputError(f"{len(fixed)} fixed landmarks but {len(moving)} moving ones: they must be pairs in one order")
    mapped = fixed if transform is None else np.array([transform.TransformPoint(p) for p in fixed.tolist()])
    return np.linalg.norm(np.reshape(mapped, (-1, 3)) - moving, axis=1)


def jacobian_statistics(displacement: "Tensor") -> dict[str, float]:
    """Folding of ``x -> x + u(x)``: per cent of voxels with det J <= 0, and the SD of log det J over the others.

    Args:
        displacement: (1, 3, D, H, W) in voxels.
    """
    from DivRegNetLib.core import fields

    determinant = fields.jacobian_determinant(displacement).cpu().numpy()
    positive = determinant[determinant > 0]
    return {
        "folded_percent": 100.0 * float((determinant <= 0).mean()),
        "log_jacobian_sd": float(np.log(positive).std()) if positive.size else float("nan"),
    }


def inverse_consistency(displacement: "Tensor", inverse: "Tensor", spacing: float) -> dict[str, float]:
    """``mean`` and ``largest`` distance (mm) from x to ``inverse(forward(x))``.

    Of every second voxel along each axis; those that the deformation carries out of the grid have no inverse there and do
    not count.

    Args:
        displacement, inverse: (1, 3, D, H, W) in voxels of ``spacing`` mm.
    """
    from DivRegNetLib.core import fields

    displacement, shape = displacement[..., ::2, ::2, ::2], displacement.shape[2:]
    points = 2 * fields.identity(displacement.shape[2:], like=displacement) + displacement
    limits = points.new_tensor(shape[::-1]).view(1, 3, 1, 1, 1) - 1
    stays = ((points >= 0) & (points <= limits)).all(1)
    error = (fields.length(displacement + fields.sample(inverse, points))[:, 0] * spacing)[stays]
    return {"mean": error.mean().item(), "largest": error.max().item() if error.numel() else float("nan")}


def quality(
    fixed: "Tensor",
    unaligned: "Tensor",
    aligned: "Tensor",
    displacement: "Tensor",
    inverse: "Tensor",
    spacing: float,
    kldivnet: "KLDivNet | None",
    mask: "Tensor | None" = None,
) -> dict:
    """The quality card of a registration, measured on the working grid.

    Args:
        fixed, unaligned, aligned: (1, 1, D, H, W) normalized: fixed image, moving image as it came, and after the
            initial alignment (the same where there was none).
        displacement, inverse: (1, 3, D, H, W) in voxels; forward after the initial alignment, and its inverse.
        spacing: mm of the isotropic working grid.
        kldivnet: for S; without one S is None.
        mask: (1, 1, D, H, W) bool: where similarity counts.
    Returns:
        ``nmi`` and ``similarity`` (S, nats), each ``{"before", "aligned", "after"}``; ``folded_percent``,
        ``log_jacobian_sd``; ``largest_displacement_mm`` and ``mean_displacement_mm`` of the deformation without the
        initial alignment; ``inverse_consistency_mm`` ``{"mean", "largest"}`` of ``inverse(forward(x)) - x``.
    """
    import torch

    from DivRegNetLib.core import fields
    from DivRegNetLib.similarity.mutual_information import nmi

    def seen(image: "Tensor") -> np.ndarray:
        return (image if mask is None else image[mask]).cpu().numpy()

    def similarity(moving: "Tensor") -> float:
        generator = torch.Generator().manual_seed(0)
        return kldivnet(fixed, moving, mask=mask, samples=PATCHES, generator=generator).item()

    def stages(measure: Callable[["Tensor"], float]) -> dict[str, float]:
        before = measure(unaligned)
        return {
            "before": before,
            "aligned": before if aligned is unaligned else measure(aligned),
            "after": measure(warped),
        }

    reference, warped = seen(fixed), fields.warp(aligned, displacement)
    found: dict = {"nmi": stages(lambda moving: nmi(reference, seen(moving)))}
    found["similarity"] = None if kldivnet is None else stages(similarity)
    found |= jacobian_statistics(displacement)
    length = fields.length(displacement) * spacing
    found["largest_displacement_mm"] = length.max().item()
    found["mean_displacement_mm"] = length.mean().item()
    found["inverse_consistency_mm"] = inverse_consistency(displacement, inverse, spacing)
    return _without_nan(found)


def _without_nan(value):
    """JSON has no NaN: None instead, in dictionaries of any depth."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
