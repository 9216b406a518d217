"""Alignment by landmarks recovers known transforms, and says why it cannot."""

import numpy as np
import pytest

from DivRegNetLib.core.grid import apply_matrix
from DivRegNetLib.errors import InputError
from DivRegNetLib.registration.landmark_alignment import align_landmarks

POINTS = np.array([[10.0, -40, 33], [52, 7, -20], [-31, 18, 60], [4, 66, 5], [-12, -9, -48]])


def transform(kind: str, rigid) -> np.ndarray:
    matrix = rigid((150, -20, 75), (30, -200, 14))
    if kind == "similarity":
        matrix[:3, :3] *= 1.3
    if kind == "affine":
        matrix[:3, :3] = matrix[:3, :3] @ [[1.1, 0.2, 0], [0, 0.9, -0.1], [0.05, 0, 1.2]]
    return matrix


@pytest.mark.parametrize("kind", ["rigid", "similarity", "affine"])
def test_a_known_transform_is_found(kind, rigid):
    expected = transform(kind, rigid)
    assert align_landmarks(POINTS, apply_matrix(expected, POINTS), kind) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["rigid", "similarity"])
def test_three_pairs_are_enough_and_give_no_mirror_image(kind, rigid):
    expected = transform(kind, rigid)
    found = align_landmarks(POINTS[:3], apply_matrix(expected, POINTS[:3]), kind)
    assert found == pytest.approx(expected, abs=1e-9)
    mirrored = POINTS * (-1, 1, 1)
    assert np.linalg.det(align_landmarks(POINTS, mirrored, kind)[:3, :3]) > 0


def test_noise_is_averaged(rigid):
    expected = rigid((20, 10, -30), (5, 6, 7))
    random = np.random.default_rng(0)
    fixed = random.uniform(-80, 80, (200, 3))
    moving = apply_matrix(expected, fixed) + random.normal(0, 2, fixed.shape)
    assert (
        np.abs(apply_matrix(align_landmarks(fixed, moving, "rigid") @ np.linalg.inv(expected), moving) - moving).max()
        < 1
    )


@pytest.mark.parametrize(
    ("count", "kind", "words"),
    [(2, "rigid", "at least 3 pairs"), (3, "affine", "at least 4 pairs"), (5, "bent", "rigid, similarity, affine")],
)
def test_too_few_pairs_or_an_unknown_kind_are_refused(count, kind, words):
    with pytest.raises(InputError, match=words):
        align_landmarks(POINTS[:count], POINTS[:count], kind)


def test_lists_of_unlike_length_and_points_on_a_line_or_in_a_plane_are_refused():
    with pytest.raises(InputError, match="5 fixed landmarks but 4 moving ones"):
        align_landmarks(POINTS, POINTS[:4])
    line = np.arange(5.0)[:, None] * [1, 2, 3]
    with pytest.raises(InputError, match="fixed landmarks lie on a line"):
        align_landmarks(line, POINTS)
    with pytest.raises(InputError, match="moving landmarks lie in a plane"):
        align_landmarks(POINTS, POINTS * (1, 1, 0), "affine")
