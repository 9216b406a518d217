"""Measures of a registration: overlap and surface distances of labels, landmark error, folding, inverse consistency,
similarity.

Distances are in mm. Only functions of tensors import torch.
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

PATCHES = 4096  # from which S is estimated
LARGEST_LOOKUP = 1 << 20  # difference of labels up to which a table is looked up instead of sorting all voxels
LARGEST_TABLE = 250_000  # distances between two small surfaces that are computed one by one


def dice(fixed: np.ndarray, warped: np.ndarray) -> float:
    """Dice coefficient of two boolean arrays; NaN where both are empty."""
    return dice_of_counts(int((fixed & warped).sum()), int(fixed.sum()), int(warped.sum()))


def dice_of_counts(common: int, fixed: int, warped: int) -> float:
    """Dice coefficient of two regions by their numbers of voxels, in common and of each; NaN where both are empty."""
    return float(2 * common / (fixed + warped)) if fixed + warped else float("nan")


def surface_distances(fixed: np.ndarray, warped: np.ndarray, grid: Grid) -> dict[str, float]:
    """``asd``, ``hd`` and ``hd95`` (mm) between the surfaces of two boolean arrays (D, H, W) on a grid.

    A surface voxel is one with a face neighbor outside. Distances go both ways: ASD is the mean of all of them, HD the
    largest, HD95 the larger of the two directions' 95th percentiles. NaN where one is empty.
    """
    if not fixed.any() or not warped.any():
        return _summary([])
    inside = np.argwhere(fixed | warped)
    box = tuple(slice(max(a - 1, 0), b + 2) for a, b in zip(inside.min(0), inside.max(0), strict=True))
    return _summary(_one_way_distances(*(_surface(np.pad(x[box], 1)) for x in (fixed, warped)), grid))


def _one_way_distances(fixed: np.ndarray, warped: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """Distances (mm) of each voxel of one surface to the other surface, in both directions; boolean arrays (D, H, W)."""
    distances = []
    for here, there in ((fixed, warped), (warped, fixed)):
        image = sitk.GetImageFromArray(there.astype(np.uint8))
        image.SetSpacing(grid.spacing)
        distance = sitk.Abs(sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True))
        distances.append(sitk.GetArrayViewFromImage(distance)[here])
    return distances


def _summary(one_way: list[np.ndarray]) -> dict[str, float]:
    """Mean, largest and 95th percentile of distances in both directions; NaN where there are none."""
    if not one_way:
        return {"asd": float("nan"), "hd": float("nan"), "hd95": float("nan")}
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
    labels, f_numbers, w_numbers = _numbered(f, w)
    if not labels.any():
        raise InputError("the label maps hold no label (all voxels are 0)")
    sizes = [np.bincount(n.ravel(), minlength=len(labels)) for n in (f_numbers, w_numbers)]
    common_sizes = np.bincount(f_numbers[f_numbers == w_numbers], minlength=len(labels))
    surfaces = [_surface_points(n, labels) for n in (f_numbers, w_numbers)]
    scores = {}
    for n, label in enumerate(labels.tolist()):
        if label != 0:
            overlap = {"dice": dice_of_counts(common_sizes[n], sizes[0][n], sizes[1][n])}
            scores[str(int(label))] = overlap | _distances(*(points[n] for points in surfaces), grid)
    common = [s for s in scores.values() if all(np.isfinite(v) for v in s.values())]
    mean = {
        k: float(np.mean([s[k] for s in common])) if common else float("nan") for k in ("dice", "asd", "hd", "hd95")
    }
    inside = f != 0, w != 0
    union = {"dice": dice(*inside)} | surface_distances(*inside, grid)
    return _without_nan({"labels": scores, "mean": mean, "union": union})


def _numbered(*maps: np.ndarray) -> tuple[np.ndarray, ...]:
    """The labels of all maps in ascending order, and each map with the number of the label at each voxel."""
    low, high = min(int(m.min()) for m in maps), max(int(m.max()) for m in maps)
    if high - low >= LARGEST_LOOKUP:
        labels = np.unique(np.concatenate([np.unique(m) for m in maps]))
        return labels, *(np.searchsorted(labels, m).astype(np.int32) for m in maps)
    offsets = [(m.astype(np.int64) - low).astype(np.int32) for m in maps]
    present = sum(np.bincount(o.ravel(), minlength=high - low + 1) for o in offsets) > 0
    number = (np.cumsum(present) - 1).astype(np.int32)
    return np.flatnonzero(present) + low, *(number[o] for o in offsets)


def _surface_points(numbers: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """For each label the voxels (n, 3) of its surface, as indices k, j, i, from one pass over the voxels.

    Args:
        numbers: (D, H, W), of the label at each voxel.
        labels: by number.
    """
    surface = np.zeros(numbers.shape, bool)
    for axis in range(3):
        along, marked = np.moveaxis(numbers, axis, 0), np.moveaxis(surface, axis, 0)
        differs = along[1:] != along[:-1]
        marked[1:] |= differs
        marked[:-1] |= differs
        marked[[0, -1]] = True  # beyond the image there is no label
    voxels = np.flatnonzero(surface & (labels != 0)[numbers])
    of = numbers.ravel()[voxels]
    order = np.argsort(of, kind="stable")
    points = np.stack(np.unravel_index(voxels[order], numbers.shape), 1)
    return np.split(points, np.searchsorted(of[order], np.arange(1, len(labels))))


def _distances(fixed: np.ndarray, warped: np.ndarray, grid: Grid) -> dict[str, float]:
    """:func:`surface_distances` of two surfaces, each given by its voxels (n, 3) as k, j, i."""
    if not len(fixed) or not len(warped):
        return _summary([])
    if len(fixed) * len(warped) <= LARGEST_TABLE:
        squares = sum(
            np.square((fixed[:, None, axis] - warped[None, :, axis]) * spacing)
            for axis, spacing in enumerate(grid.spacing[::-1])
        )
        return _summary([np.sqrt(squares.min(1)), np.sqrt(squares.min(0))])
    low = np.minimum(fixed.min(0), warped.min(0))
    shape = np.maximum(fixed.max(0), warped.max(0)) - low + 1
    masks = np.zeros((2, *shape), bool)
    for mask, points in zip(masks, (fixed, warped), strict=True):
        mask[tuple((points - low).T)] = True
    return _summary(_one_way_distances(*masks, grid))


def landmark_error(fixed: np.ndarray, moving: np.ndarray, transform: sitk.Transform | None = None) -> np.ndarray:
    """Target registration error of each pair of landmarks, mm: distance of ``T(fixed)`` to ``moving``, (n,).

    Args:
        fixed, moving: (n, 3) LPS mm, in the same order.
        transform: maps fixed points to moving points; None: identity, which gives the error before registration.
    Raises:
        InputError: the numbers of landmarks differ.
    """
    if len(fixed) != len(moving):
        raise InputError(f"{len(fixed)} fixed landmarks but {len(moving)} moving ones: they must be pairs in one order")
    mapped = fixed if transform is None else np.array([transform.TransformPoint(p) for p in fixed.tolist()])
    return np.linalg.norm(np.reshape(mapped, (-1, 3)) - moving, axis=1)


def jacobian_statistics(displacement: "Tensor") -> dict[str, float]:
    """Folding of ``x -> x + u(x)``: percentage of voxels with det J <= 0, and the standard deviation of log det J over the
    others.

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

    Every second voxel along each axis is used, without voxels that the deformation moves out of the grid, where the inverse
    is not defined.

    Args:
        displacement, inverse: (1, 3, D, H, W) in voxels of ``spacing`` mm.
    """
    from DivRegNetLib.core import fields

    displacement, shape = displacement[..., ::2, ::2, ::2], displacement.shape[2:]
    points = 2 * fields.identity(displacement.shape[2:], like=displacement) + displacement
    limits = points.new_tensor(shape[::-1]).view(1, 3, 1, 1, 1) - 1
    inside = ((points >= 0) & (points <= limits)).all(1)
    error = (fields.length(displacement + fields.sample(inverse, points))[:, 0] * spacing)[inside]
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
        fixed, unaligned, aligned: (1, 1, D, H, W) normalized: the fixed image, and the moving image
            before and after the initial alignment (the same tensor where there was none).
        displacement, inverse: (1, 3, D, H, W) in voxels; forward after the initial alignment, and its inverse.
        spacing: mm of the isotropic working grid.
        kldivnet: the network that estimates S; without one, S is None.
        mask: (1, 1, D, H, W) bool: the voxels that similarities are computed from.
    Returns:
        ``nmi`` and ``similarity`` (S, nats), each ``{"before", "aligned", "after"}``; ``folded_percent``,
        ``log_jacobian_sd``; ``largest_displacement_mm`` and ``mean_displacement_mm`` of the deformation without the
        initial alignment; ``inverse_consistency_mm`` ``{"mean", "largest"}`` of ``inverse(forward(x)) - x``.
    """
    import torch

    from DivRegNetLib.core import fields
    from DivRegNetLib.similarity.mutual_information import nmi

    def masked(image: "Tensor") -> np.ndarray:
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

    reference, warped = masked(fixed), fields.warp(aligned, displacement)
    card: dict = {"nmi": stages(lambda moving: nmi(reference, masked(moving)))}
    card["similarity"] = None if kldivnet is None else stages(similarity)
    card |= jacobian_statistics(displacement)
    length = fields.length(displacement) * spacing
    card["largest_displacement_mm"] = length.max().item()
    card["mean_displacement_mm"] = length.mean().item()
    card["inverse_consistency_mm"] = inverse_consistency(displacement, inverse, spacing)
    return _without_nan(card)


def _without_nan(value):
    """NaN, which JSON does not have, replaced by None in dictionaries of any depth."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
