"""Normalized mutual information of two images under many maps at once, and its gradient.

Points are sampled in both images and looked up in the other one, so that neither is favored and neither a shrunk nor a
swollen map gets rid of what does not fit. All is in batches over maps and points. Weights are counted in whole numbers, so
that no sum depends on its order, and few numbers are left to double precision.

Coordinates are *normalized*: LPS, relative to the center of each image's content, in units of a common radius.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from DivRegNetLib.registration.alignment import transforms
from DivRegNetLib.registration.alignment.pyramid import Look
from DivRegNetLib.registration.alignment.settings import AlignmentSettings

UNIT = 2.0**20  # whole numbers in which a weight of 1 is counted
CHUNK = 2**17  # points times maps at a time


@dataclass(frozen=True)
class Frame:
    """Normalized coordinates of one image: ``(p - center) / radius``."""

    center: np.ndarray
    radius: float

    @property
    def matrix(self) -> np.ndarray:
        """(4, 4), normalized -> LPS mm."""
        matrix = np.diag([self.radius] * 3 + [1.0])
        matrix[:3, 3] = self.center
        return matrix


class Side:
    """Points of one image, and the other image in which they are looked up."""

    def __init__(self, source: Look, target: Look, frames: tuple[Frame, Frame], count: int, bins: int, margin):
        index = source.points(count, margin)
        at = (source.grid.to_physical(index) - frames[0].center) / frames[0].radius
        self.points = torch.tensor(np.c_[at, np.ones(len(at))].T, dtype=torch.float32)
        self.count = len(index)
        self.bins = bins
        values = _linear(source.values, index)
        self.own = torch.tensor(np.clip(values * bins, 0, bins - 1).astype(np.int64))
        to_index = target.grid.inverse_matrix @ frames[1].matrix
        to_index[:3, 3] += 1  # of the padded image
        self.to_index = torch.tensor(to_index, dtype=torch.float64)
        padded = np.pad(target.values, 1, "edge")
        self.size = torch.tensor(padded.shape[::-1])
        self.strides = torch.tensor([1, padded.shape[2], padded.shape[2] * padded.shape[1]])
        self.everywhere = bool(target.known.all())
        nearest = np.clip(padded * bins, 0, bins - 1).astype(np.int64)
        nearest[~target.known] = bins
        self.nearest = torch.tensor(nearest).flatten()
        self.corners = _corners(padded * (bins - 3) + 1)
        self.known = None if self.everywhere else _corners(target.known)

    def at(self, maps: Tensor) -> Tensor:
        """(3, K, N) float32 positions in the padded target of the points under maps (K, 4, 4) float64."""
        to = (self.to_index @ maps)[:, :3].to(torch.float32)
        index = (to.reshape(-1, 4) @ self.points).view(len(maps), 3, self.count).transpose(0, 1)
        limit = (self.size - 1).to(index).view(3, 1, 1)
        return torch.minimum(index.clamp_min(0), limit)


class Level:
    """Two images at one resolution under maps from normalized fixed to normalized moving coordinates."""

    def __init__(
        self, fixed: Look, moving: Look, frames: tuple[Frame, Frame], count: int, bins: int,
        settings: AlignmentSettings, power: float = 0.0, both: Callable = map,
    ) -> None:  # fmt: skip
        """
        Args:
            count, bins: points in each image, and bins of each in the joint histogram.
            power: NMI - 1 is multiplied by this power of the share that is inside.
            both: what is done with both images, such as ``map``.
        """
        self.bins, self.settings, self.power, self.both = bins, settings, power, both
        self.forward = Side(fixed, moving, frames, count, bins, settings.margin)
        self.backward = Side(moving, fixed, frames[::-1], count, bins, settings.margin)
        self.voxel = max(*fixed.grid.spacing, *moving.grid.spacing) / frames[0].radius

    def search(self, maps: Tensor, power: float | None = None) -> Tensor:
        """The similarity (K,) of maps (K, 4, 4) with the nearest voxel of each point: cheap, for coarse searches.

        Args:
            power: of the overlap, instead of the level's.
        """
        chunk = max(CHUNK // max(self.forward.count, self.backward.count), 1)
        power = self.power if power is None else power
        return torch.cat([self._search(part, power) for part in maps.split(chunk)])

    def _search(self, maps: Tensor, power: float) -> Tensor:
        def counts(side: Side, there: Tensor) -> Tensor:
            i, j, k = (side.at(there) + 0.5).long().unbind()
            seen = side.nearest[k.mul_(side.strides[2]).add_(j.mul_(side.strides[1])).add_(i)]
            cells = self.bins + 1
            cell = side.own * cells + seen + (torch.arange(len(maps)) * self.bins * cells)[:, None]
            counts = torch.zeros(len(maps) * self.bins * cells, dtype=torch.int64)
            counts.scatter_add_(0, cell.flatten(), torch.ones_like(cell).flatten())
            return counts.view(len(maps), self.bins, cells)[:, :, : self.bins].double()

        sides = self.forward, self.backward
        forward, backward = self.both(counts, sides, (maps, transforms.inverse(maps)))
        most = torch.maximum(*(n.sum((1, 2)) / side.count for n, side in zip((forward, backward), sides, strict=True)))
        score = (_nmi(forward + backward.transpose(1, 2))[0] - 1) * most.pow(power)
        return torch.where(most >= self.settings.overlap, score, score.new_tensor(-1.0))

    def evaluate(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """NMI (K,) and its gradient (K, 3, 4) along generators D of ``map (I + D)``."""
        chunk = max(CHUNK // max(self.forward.count, self.backward.count), 1)
        parts = [self._evaluate(part) for part in maps.split(chunk)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _evaluate(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        inverses = transforms.inverse(maps)
        sides = self.forward, self.backward

        def look_up(side: Side, there: Tensor) -> tuple[tuple, Tensor]:
            at = _look_up(side, there)
            return at, _joint(side, *at[:2])

        looked, joints = zip(*self.both(look_up, sides, (maps, inverses)), strict=True)
        joint = joints[0] + joints[1].transpose(1, 2)
        score, table = _nmi(joint)
        shares = torch.stack([j.sum((1, 2)) / side.count for j, side in zip(joints, sides, strict=True)])
        share = shares.amax(0)
        # Of (NMI - 1) share ** power, whose share grows with the weight of the points of the image that is more inside.
        score, table = (score - 1) * share**self.power, table * (share**self.power)[:, None, None]
        counts = torch.tensor([side.count for side in sides])[:, None]
        more = torch.where(shares == share, self.power * score / share.clamp_min(1e-9) / counts, score.new_zeros(()))

        def gradient(side: Side, at: tuple, own: Tensor, rise: Tensor) -> Tensor:
            pull = _pull(side, (own + rise[:, None, None]).to(torch.float32).contiguous(), *at)  # (3, K, N)
            return (pull.transpose(0, 1) @ side.points.T).double()

        gradients = list(self.both(gradient, sides, looked, (table, table.transpose(1, 2)), more))
        to = self.forward.to_index[:3, :3] @ maps[:, :3, :3]
        forward = to.transpose(1, 2) @ gradients[0]
        backward = -(self.backward.to_index[:3, :3].T @ gradients[1] @ inverses.transpose(1, 2))
        score = torch.where(share >= self.settings.overlap, score, score.new_tensor(-1.0))
        return score, forward + backward


def _corners(volume: np.ndarray) -> Tensor:
    """(8, V) float32: the volume, shifted to each corner of a cell."""
    shifted = [np.roll(volume, (-c, -b, -a), (0, 1, 2)).ravel() for c in (0, 1) for b in (0, 1) for a in (0, 1)]
    return torch.tensor(np.stack(shifted), dtype=torch.float32)


def _linear(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Trilinear values of (D, H, W) at positions (n, 3) i, j, k; the border repeated."""
    last = np.array(array.shape[::-1]) - 1
    index = np.clip(index, 0, last)
    low = np.minimum(index.astype(int), np.maximum(last - 1, 0))
    t, high = index - low, np.minimum(low + 1, last)
    total = 0.0
    for corner in range(8):
        pick = [(corner >> axis) & 1 for axis in range(3)]
        i, j, k = (np.where(pick[a], high[:, a], low[:, a]) for a in range(3))
        weight = np.prod([t[:, a] if pick[a] else 1 - t[:, a] for a in range(3)], 0)
        total = total + weight * array[k, j, i]
    return total


def _look_up(side: Side, maps: Tensor):
    """Values in bins (K, N), weights (K, N) or None, and their gradients (3, K, N) along the axes of the target's voxels."""
    at = side.at(maps)
    low = torch.minimum(at.floor(), (side.size - 2).to(at).view(3, 1, 1))
    x, y, z = at - low
    i, j, k = low.long().unbind()
    base = k.mul_(side.strides[2]).add_(j.mul_(side.strides[1])).add_(i)
    # Beyond the padding nothing changes any more.
    limit = (side.size - 1).to(at).view(3, 1, 1)
    moves = (at > 0) & (at < limit)

    def along(corners: Tensor):
        c = [corner.index_select(0, base.flatten()).view(base.shape) for corner in corners]
        edges = [c[n + 1] - c[n] for n in (0, 2, 4, 6)]
        faces = [c[2 * n] + x * edges[n] for n in range(4)]
        rows = [edges[0] + y * (edges[1] - edges[0]), edges[2] + y * (edges[3] - edges[2])]
        sides = [faces[1] - faces[0], faces[3] - faces[2]]
        near, far = faces[0] + y * sides[0], faces[2] + y * sides[1]
        gradient = torch.stack((torch.lerp(*rows, z), torch.lerp(*sides, z), far - near))
        return near + z * (far - near), gradient * moves

    value, gradient = along(side.corners)
    if side.known is None:
        return value, None, gradient, None
    weight, fading = along(side.known)
    return value, weight, gradient, fading


def _windows(value: Tensor, derivative: bool) -> list[Tensor]:
    """Weights of the four bins from the one below the value's on, of a cubic B-spline, or their derivatives."""
    t = value - value.floor()
    if derivative:
        return [-0.5 * (1 - t) ** 2, 1.5 * t * t - 2 * t, 0.5 + t - 1.5 * t * t, 0.5 * t * t]
    square = t * t
    last = square * t / 6
    third = 1 / 6 + 0.5 * (t + square) - 3 * last
    first = (1 - t) ** 3 / 6
    return [first, 1 - first - third - last, third, last]


def _cells(side: Side, value: Tensor) -> Tensor:
    """Where the first of the four bins of each value is in the flattened histograms (K, bins, bins)."""
    of_map = torch.arange(len(value))[:, None] * side.bins**2
    return (value.long() - 1).clamp_(0, side.bins - 4) + side.own * side.bins + of_map


def _joint(side: Side, value: Tensor, weight: Tensor | None) -> Tensor:
    """(K, bins, bins) float64: joint histogram, the points' own bin first."""
    cells = _cells(side, value)
    counts = torch.zeros(len(value) * side.bins**2, dtype=torch.int64)
    for n, window in enumerate(_windows(value, False)):
        whole = (window * UNIT if weight is None else window * weight * UNIT).long()
        counts.scatter_add_(0, (cells + n).flatten(), whole.flatten())
    return counts.view(len(value), side.bins, side.bins).double() / UNIT


def _nmi(joint: Tensor) -> tuple[Tensor, Tensor]:
    """Studholme's NMI (K,) of joint histograms (K, bins, bins), and its derivative by their entries."""
    total = joint.sum((1, 2), keepdim=True).clamp_min(1e-9)
    p = joint / total
    one, other = p.sum(2, keepdim=True), p.sum(1, keepdim=True)
    logs = [q.clamp_min(1e-30).log() for q in (one, other, p)]
    entropies = [-(q * log).sum((1, 2), keepdim=True) for q, log in zip((one, other, p), logs, strict=True)]
    both = entropies[2].clamp_min(1e-9)
    score = (entropies[0] + entropies[1]) / both
    table = (-logs[0] - logs[1] + score * logs[2].clamp_min(-16)) / both
    mean = (table * p).sum((1, 2), keepdim=True)
    return score[:, 0, 0], (table - mean) / total


def _pull(side: Side, table: Tensor, value, weight, gradient, fading) -> Tensor:
    """(3, K, N): derivative of the similarity by each point's position in the target."""
    cells, table = _cells(side, value), table.flatten()
    near = [table.index_select(0, (cells + n).flatten()).view(value.shape) for n in range(4)]
    slope = sum(t * w for t, w in zip(near, _windows(value, True), strict=True))
    if weight is None:
        return slope * gradient
    height = sum(t * w for t, w in zip(near, _windows(value, False), strict=True))
    return slope * weight * gradient + height * fading
