"""Determinants of 3x3 matrices, one at every voxel, of NumPy arrays and PyTorch tensors alike. No torch here."""

from collections.abc import Sequence
from typing import TypeVar

Array = TypeVar("Array")


def determinant(rows: Sequence[Sequence[Array]]) -> Array:
    """The determinant of the matrices whose entry of row a and column b is the array ``rows[a][b]``, all of one shape."""
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
