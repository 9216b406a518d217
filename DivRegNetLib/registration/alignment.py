"""Initial linear alignment of two images of any contrast: centers, rigid, affine.

Maximizes normalized mutual information (Studholme et al., Pattern Recognition 1999) of a Parzen-window histogram, on
isotropic grids of 8 and then 4 mm. The start is searched for: centers of the grids and of the contents, and a fan of
rotations; the best few are optimized and the best of those goes on. Scale and shear are held back, as overlap-based
similarity alone is happy to shrink a whole head into a skull-stripped brain. Nothing is drawn at random.
"""

import math
from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid, apply_matrix
from DivRegNetLib.core.intensity import percentile_window, without_padding
from DivRegNetLib.options import ALIGNMENTS
from DivRegNetLib.similarity.mutual_information import parzen_mi

COARSE_MM = 8.0  # of the first level, half of that of the second; less where an image is smaller than SMALL_MM
SMALL_MM = 80.0
ITERATIONS = (25, 40)
BINS = 32
POINTS = 20000  # fixed voxels looked at, a fixed choice
TURNS_DEGREES = (-25.0, 25.0)
STARTS = 4
THINNEST = 4  # voxels along each axis that a rotation takes to be known
RADIUS_MM = 80.0  # where a rotation or a scale of 1/RADIUS_MM moves a point by 1 mm
SCALE_PENALTY = 1.0  # NMI that a log-scale or shear of 1 costs, squared

Progress = Callable[[float], None]


def align(
    fixed: sitk.Image,
    moving: sitk.Image,
    mode: str = "affine",
    *,
    fixed_mask: sitk.Image | None = None,
    moving_mask: sitk.Image | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = lambda fraction: None,
) -> np.ndarray:
    """The linear map from fixed points to moving points.

    Args:
        fixed, moving: 3D scalar images of finite values.
        mode: ``none`` (identity), ``center`` (translation), ``rigid`` or ``affine``. What has fewer than 4 voxels along
            an axis cannot tell how it is turned and is only shifted.
        fixed_mask, moving_mask: where the images count, non-zero inside; on any grid.
        progress: called with a fraction from 0 to 1; may raise to cancel.
    Returns:
        (4, 4) matrix, LPS mm, fixed -> moving.
    Raises:
        ValueError: unknown mode.
    """
    if mode not in ALIGNMENTS:
        raise ValueError(f"the initial alignment is one of {', '.join(ALIGNMENTS)}, got {mode!r}")
    if mode == "none":
        return np.eye(4)
    mm = COARSE_MM * min(_extent(fixed) / SMALL_MM, _extent(moving) / SMALL_MM, 1.0)
    coarse, fine = (
        _Level(fixed, moving, fixed_mask, moving_mask, spacing, iterations, device)
        for spacing, iterations in zip((mm, mm / 2), ITERATIONS, strict=True)
    )
    starts = coarse.centered_starts()
    if mode == "center" or min(*fixed.GetSize(), *moving.GetSize()) < THINNEST:
        return max(starts, key=coarse.similarity)
    turned = [start @ turn for start in starts for turn in _turns(coarse.center)]
    progress(0.05)
    best = []
    for i, start in enumerate(sorted(turned, key=coarse.similarity, reverse=True)[:STARTS]):
        best.append(coarse.optimize(start, rigid=True))
        progress(0.05 + 0.4 * (i + 1) / STARTS)
    found = fine.optimize(max(best, key=coarse.similarity), rigid=True)
    progress(0.7)
    if mode == "affine":
        found = fine.optimize(found, rigid=False)
    progress(1.0)
    return max((found, *starts), key=fine.similarity)


class _Level:
    """Both images at one resolution, and the search there."""

    def __init__(self, fixed, moving, fixed_mask, moving_mask, spacing: float, iterations: int, device) -> None:
        fixed, fixed_inside = _shrink(fixed, fixed_mask, spacing)
        moving, moving_inside = _shrink(moving, moving_mask, spacing)
        self.spacing, self.iterations = spacing, iterations
        self.fixed_grid, self.moving_grid = Grid.of(fixed), Grid.of(moving)
        self.center = _center_of_mass(fixed, fixed_inside)
        self.moving_center = _center_of_mass(moving, moving_inside)
        share = POINTS / max(fixed_inside.sum(), 1)
        chosen = fixed_inside & (np.random.default_rng(0).random(fixed_inside.shape) < share)
        index = np.argwhere(chosen)[:, ::-1]
        self.points = torch.tensor(self.fixed_grid.to_physical(index) - self.center, dtype=torch.float32, device=device)
        self.values = torch.from_numpy(sitk.GetArrayFromImage(fixed)[chosen]).to(device)
        # The last channel tells what lies inside the moving image and its mask.
        stack = np.stack([sitk.GetArrayFromImage(moving), moving_inside.astype(np.float32)])
        self.moving = torch.from_numpy(stack)[None].to(device)
        # A quarter of the smaller of the two must overlap, in points.
        volumes = [
            inside.sum() * np.prod(Grid.of(x).spacing) for x, inside in ((fixed, fixed_inside), (moving, moving_inside))
        ]
        self.needed = 0.25 * len(index) * min(1.0, volumes[1] / max(volumes[0], 1e-12))

    def centered_starts(self) -> list[np.ndarray]:
        """Identity, and the translations that bring together the centers of the grids and those of the contents."""
        shifts = [
            np.zeros(3),
            self.moving_grid.center - self.fixed_grid.center,
            self.moving_center - self.center,
        ]
        return [_shifted(np.eye(4), shift) for shift in shifts]

    def similarity(self, matrix: np.ndarray) -> float:
        """NMI of the images under a (4, 4) map; minus infinity where they overlap by less than a quarter."""
        with torch.no_grad():
            linear = self.points.new_tensor(matrix[:3, :3])
            return self._similarity(linear, self.points.new_tensor(apply_matrix(matrix, self.center))).item()

    def _similarity(self, linear: Tensor, center: Tensor) -> Tensor:
        """NMI where a fixed point p goes to ``linear (p - fixed center) + center``."""
        to_index = self.points.new_tensor(self.moving_grid.inverse_matrix)
        index = (self.points @ linear.T + center) @ to_index[:3, :3].T + to_index[:3, 3]
        sampled = fields.sample(self.moving, index.T[None, :, :, None, None], padding="zeros")[0, :, :, 0, 0]
        inside = sampled[1].detach() > 0.99  # nothing interpolated from beyond
        if inside.sum() < max(self.needed, 8):
            return sampled.new_tensor(-math.inf)
        pair = (x[inside].view(1, 1, 1, 1, -1) for x in (self.values, sampled[0]))
        return parzen_mi(*pair, bins=BINS, normalized=True)

    @torch.enable_grad()
    def optimize(self, start: np.ndarray, *, rigid: bool) -> np.ndarray:
        """The best map near ``start``, never worse than it: Adam on rotation, shift and, if not rigid, scale and shear."""
        device = self.points.device
        base = self.points.new_tensor(start[:3, :3])
        middle = self.points.new_tensor(apply_matrix(start, self.center))
        parameters = torch.zeros(12, device=device, requires_grad=True)  # all in mm at RADIUS_MM
        free = torch.ones(12, device=device)
        if rigid:
            free[6:] = 0
        optimizer = torch.optim.Adam([parameters], lr=self.spacing / 4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations, eta_min=self.spacing / 80)
        best, best_score = start, -math.inf
        for _ in range(self.iterations + 1):
            p = parameters * free
            linear = base @ _linear(p[3:] / RADIUS_MM)
            score = self._similarity(linear, middle + p[:3])
            if not torch.isfinite(score):
                break
            score = score - SCALE_PENALTY * (p[6:] / RADIUS_MM).square().sum()
            if score.item() > best_score:
                matrix = np.eye(4)
                matrix[:3, :3] = linear.detach().cpu().double().numpy()
                matrix[:3, 3] = (middle + p[:3]).detach().cpu().double().numpy() - matrix[:3, :3] @ self.center
                best, best_score = matrix, score.item()
            optimizer.zero_grad()
            (-score).backward()
            optimizer.step()
            schedule.step()
        return best


def _linear(p: Tensor) -> Tensor:
    """(3, 3) matrix: rotation vector p[0:3], then log-scales p[3:6] and symmetric shears p[6:9]."""
    x, y, z = p[:3]
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)
    a, b, c, d, e, f = p[3:]
    stretch = torch.stack([a, d, e, d, b, f, e, f, c]).view(3, 3)
    return torch.linalg.matrix_exp(skew) @ torch.linalg.matrix_exp(stretch)


def _turns(center: np.ndarray) -> list[np.ndarray]:
    """No turn, and turns about each axis through ``center``, (4, 4) each."""
    found = [np.eye(4)]
    for axis in np.eye(3):
        for angle in TURNS_DEGREES:
            turn = np.eye(4)
            turn[:3, :3] = _linear(torch.tensor([*(math.radians(angle) * axis), *[0.0] * 6])).numpy()
            found.append(_shifted(turn, center - turn[:3, :3] @ center))
    return found


def _shifted(matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    moved = matrix.copy()
    moved[:3, 3] += shift
    return moved


def _shrink(image: sitk.Image, mask: sitk.Image | None, spacing: float) -> tuple[sitk.Image, np.ndarray]:
    """Averaged in whole blocks to about ``spacing`` mm (never finer than the image), robust range as [0, 1].

    Returns:
        the image, and which of its voxels lie wholly inside the mask, (D, H, W) bool.
    """
    factors = [
        min(max(int(spacing / s + 0.25), 1), n) for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    coarse = sitk.BinShrink(sitk.Cast(without_padding(image), sitk.sitkFloat32), factors)
    array = sitk.GetArrayFromImage(coarse)
    inside = np.ones(array.shape, bool)
    if mask is not None:
        on_image = sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0) != 0
        whole = sitk.GetArrayFromImage(sitk.BinShrink(sitk.Cast(on_image, sitk.sitkFloat32), factors)) > 0.99
        inside = whole if whole.any() else inside  # a mask thinner than a block says nothing at this resolution
    low, high = percentile_window(array[inside], 0.5, 99.8)
    if high <= low:
        low, high = float(array[inside].min()), float(array[inside].max())
    if high <= low:
        high = low + 1.0
    return Grid.of(coarse).image(np.clip((array - low) / (high - low), 0, 1).astype(np.float32)), inside


def _extent(image: sitk.Image) -> float:
    """Side of a cube as large as an image, mm."""
    return float(np.prod(image.GetSize()) * abs(np.linalg.det(Grid.of(image).matrix[:3, :3]))) ** (1 / 3)


def _center_of_mass(image: sitk.Image, inside: np.ndarray) -> np.ndarray:
    """LPS position of the intensity-weighted middle of what is inside, mm."""
    array = sitk.GetArrayFromImage(image).astype(float) * inside
    total = max(array.sum(), 1e-12)
    index = [array.sum((0, 1)), array.sum((0, 2)), array.sum((1, 2))]
    return Grid.of(image).to_physical([(profile * np.arange(len(profile))).sum() / total for profile in index])
