"""Expected errors: the regression's parts, the calibration that ships, and the map."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from evidence_numbers import RIGHT, WRONG

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.quality import expected_error
from DivRegNetLib.quality.expected_error import EXPECTED, Network, Regression, Term, calibration, expected_error_mm


def test_a_term_is_the_logarithm_or_the_value_itself_within_the_range_of_the_fit():
    term = Term("motion 1", 0.1, np.log(0.2), np.log(2.0), 0.5, 3.0)
    assert term.of(0.9) == pytest.approx(0.0)
    assert term.of(50.0) == pytest.approx(3 * np.log(2.0))
    assert term.of(0.0) == pytest.approx(3 * np.log(0.2))
    assert term.of(None) == term.of(float("nan")) == 1.5
    assert Term("moved 1", None, 0.0, 1.0, 0.5, 2.0).of(0.25) == 0.5


def test_a_regression_takes_numbers_and_arrays():
    regression = Regression(1.0, (Term("a", None, 0, 9, 0, 1.0), Term("b", 1.0, 0, 9, 0, 2.0)))
    assert regression.of({"a": 2.0, "b": 1.0}) == pytest.approx(np.exp(3) * 4)
    both = regression.of({"a": np.array([0.0, 2.0]), "b": np.array([0.0, 1.0])})
    assert both == pytest.approx([np.exp(1), np.exp(3) * 4])


def test_a_network_tells_by_the_mean_error_what_counts_at_a_place():
    terms = Term("a", None, -9, 9, 0.5, 1.0), Term(EXPECTED, 0.0, -9, 9, 0, 2.0)
    network = Network(terms, np.array([[1.0, 0.5], [-1.0, 0.0]]), np.array([0.1, 0.2]), np.array([2.0, 1.0]))
    values = network.of({"a": np.array([0.0, 1.0]), EXPECTED: np.e})
    assert values == pytest.approx([np.exp(2 * np.tanh(a + 1.1) + np.tanh(0.2 - a)) for a in (0, 1)])
    assert network.of({EXPECTED: 1.0}) == pytest.approx(np.exp(2 * np.tanh(0.6) + np.tanh(-0.3)))


def test_the_map_that_ships_is_higher_where_more_is_left_to_move():
    places = {term.name: np.full(2, term.missing) for term in calibration().cell.terms if term.offset is None}
    places |= {
        term.name: np.full(2, np.exp(term.missing) - term.offset)
        for term in calibration().cell.terms
        if term.offset is not None and term.name != EXPECTED
    }
    for voxels in (0.5, 1.0, 2.0):
        more = {name: places[name] * [0.5, 2] for name in ("motion 1", "soft motion 1", "wide motion 1")}
        low, high = calibration().cell.of(places | more | {EXPECTED: voxels})
        assert high > 1.3 * low, voxels


def test_the_calibration_that_ships_expects_more_where_more_is_left_to_move():
    assert expected_error_mm(RIGHT) < 2 < 10 < expected_error_mm(WRONG)
    for name in ("motion 1", "moved 1", "moved 2", "bend"):
        assert expected_error_mm(RIGHT | {name: WRONG[name]}) > expected_error_mm(RIGHT), name


def test_the_expected_error_is_in_units_of_the_image():
    tenth = {"voxel_mm": 0.2, "diagonal_mm": 28.0}
    assert expected_error_mm(RIGHT | tenth) == pytest.approx(expected_error_mm(RIGHT) / 10)
    small, large = (calibration().limits(RIGHT | about) for about in (tenth, {}))
    assert large == (calibration().green_mm, calibration().red_mm)
    assert small[0] < 0.5 * large[0] and small[1] / small[0] == pytest.approx(large[1] / large[0])


def test_the_range_of_an_error_is_around_it_or_a_least_one_where_it_is_only_known_to_be_large():
    known = calibration()
    for mm in (0.5, 2.0):
        low, high = known.range_mm(mm, {"voxel_mm": 1.0})
        assert low * known.factor == pytest.approx(mm) and high == pytest.approx(mm * known.factor)
        assert known.range_mm(10 * mm, {"voxel_mm": 10.0}) == pytest.approx((10 * low, 10 * high))
    assert known.range_mm(1e3, {"voxel_mm": 2.0}) == (2 * known.least_voxels, np.inf)
    assert 1 < known.least_voxels <= known.largest_voxels


def test_a_number_that_is_missing_changes_little():
    without = {k: v for k, v in RIGHT.items() if not k.endswith(" 2")}
    assert 0.3 < expected_error_mm(without) / expected_error_mm(RIGHT) < 6


def test_another_format_is_refused(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=f"format {expected_error.FORMAT} is expected, got 99"):
        calibration(file)


def test_the_map_has_the_expected_error_as_its_mean_and_nothing_in_air():
    shape = (6, 8, 7)
    random = np.random.default_rng(0)
    cells = {
        name: random.uniform(0.1, 2, shape).astype(np.float32)
        for name in (term.name for term in calibration().cell.terms)
        if name != EXPECTED
    }
    inside = np.ones(shape, np.float32)
    inside[:, :, :2] = 0
    cell_grid = Grid.build(shape[::-1], (8.0, 8.0, 8.0), (1.0, 2.0, 3.0))
    fine = Grid.build([4 * n for n in shape[::-1]], (2.0, 2.0, 2.0), (-2.0, -1.0, 0.0))
    image = expected_error.error_map(RIGHT, cells | {"inside": inside}, cell_grid, fine)
    values = sitk.GetArrayFromImage(image)
    assert image.GetPixelID() == sitk.sitkFloat32 and Grid.of(image) == fine
    known = values[8:-8, 8:-8, 12:-4]
    assert known.mean() == pytest.approx(expected_error_mm(RIGHT), rel=0.25)
    assert known.std() > 0.05 * known.mean()
    assert not values[:, :, :6].any() and (known > 0).all()
    larger = expected_error.on_grid(image, sitk.Image(100, 100, 100, sitk.sitkUInt8))
    assert larger.GetSize() == (100, 100, 100) and larger.GetPixelID() == sitk.sitkFloat32
