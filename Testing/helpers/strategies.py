"""What hypothesis draws: numbers, and grids of every kind."""

import numpy as np
import SimpleITK as sitk
from hypothesis import strategies as st

from DivRegNetLib.core.grid import Grid


def numbers(low: float, high: float, count: int = 3):
    return st.tuples(*[st.floats(low, high, width=32)] * count)


@st.composite
def grids(draw, least: int = 1, most: int = 12, shear: float = 0.5) -> Grid:
    """Rotated, flipped, with exchanged axes, sheared, anisotropic and off-center."""
    euler = sitk.Euler3DTransform()
    euler.SetRotation(*draw(numbers(-3.0, 3.0)))
    permuted = np.eye(3)[draw(st.permutations(range(3)))] * draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    sheared = np.eye(3)
    sheared[np.triu_indices(3, 1)] = draw(numbers(-shear, shear))
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(euler.GetMatrix(), (3, 3)) @ permuted @ sheared * draw(numbers(0.25, 8.0))
    matrix[:3, 3] = draw(numbers(-500, 500))
    return Grid(draw(st.tuples(*[st.integers(least, most)] * 3)), matrix)
