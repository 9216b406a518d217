"""Linear maps in batches: small steps of a group, rotations spread over all, stretch, and what a map does in words."""

import numpy as np
import torch
from torch import Tensor

GOLDEN = 1.533751168755204288118041  # root of x^4 = x + 4, of super-Fibonacci spirals


def exponential(step: Tensor) -> Tensor:
    """(K, 4, 4): the exponential of affine generators (K, 3, 4); of a fixed number of terms, so that nothing waits."""
    generator = torch.nn.functional.pad(step, (0, 0, 0, 1)) / 16
    term = total = torch.eye(4, dtype=step.dtype).expand(len(step), 4, 4)
    for n in range(1, 9):
        term = term @ generator / n
        total = total + term
    for _ in range(4):
        total = total @ total
    return total


def inverse(matrices: Tensor) -> Tensor:
    """(K, 4, 4): inverses of affine matrices, by cofactors."""
    a, b, c = matrices[:, :3, :3].unbind(1)
    rows = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], 2)
    linear = rows / (a * torch.linalg.cross(b, c)).sum(-1)[:, None, None]
    shift = -(linear @ matrices[:, :3, 3:])
    return torch.cat((torch.cat((linear, shift), 2), matrices[:, 3:]), 1)


def generators(mode: str) -> np.ndarray:
    """(P, 3, 4): the directions in which a map of a kind may be changed, of about unit displacement at radius 1.

    Args:
        mode: ``translation``, ``rigid``, ``similarity`` or ``affine``.
    """
    shifts = [np.eye(3, 4, 3) * 0 for _ in range(3)]
    for axis, shift in enumerate(shifts):
        shift[axis, 3] = 1
    turns, stretches = [], []
    for i, j in ((1, 2), (2, 0), (0, 1)):
        turn, shear = np.zeros((3, 4)), np.zeros((3, 4))
        turn[j, i], turn[i, j] = 1, -1
        shear[j, i] = shear[i, j] = 1
        turns.append(turn)
        stretches.append(shear)
    axes = [np.diag(e) @ np.eye(3, 4) for e in np.eye(3)]
    kinds = {
        "translation": shifts,
        "rigid": shifts + turns,
        "similarity": [*shifts, *turns, np.eye(3, 4)],
        "affine": shifts + turns + axes + stretches,
    }
    return np.stack(kinds[mode])


def log_stretch(linear: Tensor, reference: Tensor) -> Tensor:
    """(K, 3, 3) symmetric: twice the logarithm of the stretch of linear maps (K, 3, 3), in shares of ``reference`` (K,).

    The squared norm of half of it penalizes scale and shear; its derivative along a generator D at L (I + D) is the inner
    product of this matrix and D.
    """
    squares, axes = torch.linalg.eigh(linear.transpose(1, 2) @ linear / reference[:, None, None].square())
    return axes @ (squares.clamp_min(1e-12).log()[:, :, None] * axes.transpose(1, 2))


def rotations(count: int) -> np.ndarray:
    """(count, 3, 3) rotations spread evenly over all. Source: Alexa, "Super-Fibonacci spirals", CVPR 2022."""
    s = np.arange(count) + 0.5
    a, b = 2 * np.pi * s / np.sqrt(2), 2 * np.pi * s / GOLDEN
    r, q = np.sqrt(s / count), np.sqrt(1 - s / count)
    x, y, z, w = r * np.sin(a), r * np.cos(a), q * np.sin(b), q * np.cos(b)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def about(linear: np.ndarray, start, end) -> np.ndarray:
    """(..., 4, 4): maps with linear parts (..., 3, 3) that take points ``start`` to ``end`` (..., 3)."""
    matrix = np.zeros((*linear.shape[:-2], 4, 4))
    matrix[..., :3, :3] = linear
    matrix[..., :3, 3] = end - (linear @ np.asarray(start, float)[..., None])[..., 0]
    matrix[..., 3, 3] = 1
    return matrix
