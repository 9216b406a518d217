"""The preview: checkerboards, windows and the lines of the deformed grid."""

import io

import numpy as np
import pytest
from PIL import Image

from DivRegNetLib.core.intensity import percentile_window, stretch
from DivRegNetLib.quality import preview
from DivRegNetLib.quality.preview import checkerboard


@pytest.mark.parametrize("shape", [(12, 16), (5, 16, 8)])
def test_a_checkerboard_takes_blocks_of_equal_sides_from_both_images_in_turn(shape):
    board = checkerboard(np.zeros(shape), np.ones(shape), squares=4)
    assert board.shape == shape
    index = np.indices(shape) // 4  # the longest side has four blocks
    assert np.array_equal(board, index.sum(0) % 2)


def test_a_checkerboard_can_be_made_in_parts():
    one, other = np.zeros((11, 7, 5)), np.ones((11, 7, 5))
    parts = [checkerboard(one[i : i + 2], other[i : i + 2], side=3, first=i) for i in range(0, 11, 2)]
    assert np.array_equal(np.concatenate(parts), checkerboard(one, other, squares=4))


def test_a_checkerboard_of_unlike_shapes_is_an_error():
    with pytest.raises(ValueError, match="one shape"):
        checkerboard(np.zeros((2, 3)), np.zeros((3, 2)))


def test_a_window_of_percentiles_becomes_zero_to_one():
    values = np.arange(101.0)
    window = percentile_window(values, 10, 90)
    assert window == (10, 90)
    assert stretch(np.array([0.0, 10, 50, 90, 100]), window).tolist() == [0, 0, 0.5, 1, 1]
    assert stretch(np.full(3, 7.0), (7.0, 7.0)).tolist() == [0, 0, 0]


def test_lines_of_the_preview_are_interrupted_where_they_are_not_known():
    nan = [np.nan, np.nan]
    line = np.array([[1.0, 5], [4, 5], nan, nan, [12, 5], [18, 5], nan, [19, 5]])
    picture = preview._drawn(np.full((10, 20), 0.5, np.float32), [line], [(10, 1, "title")], [(1, 9, "plane")])
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    scale = preview.PIXELS / 20
    assert pixels.shape == (10 * scale, preview.PIXELS, 3)
    row = pixels[round(5.5 * scale)].astype(int)
    colored = (row[:, 0] - row[:, 2]) > 60
    assert colored[[round(x * scale) for x in (2, 4, 13, 18)]].all()
    assert not colored[[round(x * scale) for x in (0.5, 6, 11, 19.8)]].any()
    assert (pixels[:, :, 2] > 200).any()  # the texts are white
