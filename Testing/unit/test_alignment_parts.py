"""The parts of the initial alignment: linear maps in batches, the similarity and its gradient, ascent, words."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbers

from DivRegNetLib.core.grid import Grid, apply_matrix
from DivRegNetLib.registration.alignment import AlignmentSettings, pyramid, search, transforms, words
from DivRegNetLib.registration.alignment.correlation import Correlation
from DivRegNetLib.registration.alignment.evidence import Edges
from DivRegNetLib.registration.alignment.optimization import optimize
from DivRegNetLib.registration.alignment.similarity import Frame, Level

SETTINGS = AlignmentSettings()


@pytest.fixture(scope="module")
def looks(grid_about, paint, other_contrast, rigid):
    """The phantom in two contrasts on unlike grids, the moving one's top cut off, at 5 mm, and their frames."""
    fixed = paint(grid_about((33, -48, 113), (30, 28, 33), (5.0, 5.0, 4.5), (10, -5, 20)))
    moving = paint(grid_about((30, -46, 95), (27, 31, 20), (4.5, 5.0, 5.0), (-10, 15, 5)), None, other_contrast)
    pair = [pyramid.look(*pyramid.prepare(image, None), 5.0, SETTINGS) for image in (fixed, moving)]
    return *pair, tuple(Frame(look.centers[1], 45.0) for look in pair)


def random_maps(count: int, size: float, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    steps = torch.einsum(
        "kp,pij->kij",
        size * torch.randn(count, 12, generator=random, dtype=torch.float64),
        torch.tensor(transforms.generators("affine")),
    )
    return transforms.exponential(steps)


@given(numbers(-1.0, 1.0, 12))
def test_the_exponential_of_a_generator_is_that_of_the_matrix_and_its_inverse_that_of_the_negative(step):
    generator = torch.tensor(step, dtype=torch.float64).view(1, 3, 4)
    expected = torch.linalg.matrix_exp(torch.nn.functional.pad(generator, (0, 0, 0, 1)))
    np.testing.assert_allclose(transforms.exponential(generator), expected, atol=1e-9)
    np.testing.assert_allclose(transforms.inverse(expected), torch.linalg.inv(expected), atol=1e-9)


@pytest.mark.parametrize(("mode", "free"), [("translation", 3), ("rigid", 6), ("similarity", 7), ("affine", 12)])
def test_a_kind_of_map_changes_what_it_may_and_nothing_else(mode, free):
    basis = transforms.generators(mode)
    assert np.linalg.matrix_rank(basis.reshape(len(basis), -1)) == len(basis) == free
    linear = transforms.exponential(torch.tensor(basis * 0.3))[:, :3, :3].numpy()
    squares = np.swapaxes(linear, 1, 2) @ linear
    if mode != "affine":
        scales = np.trace(squares, axis1=1, axis2=2) / 3
        np.testing.assert_allclose(squares, scales[:, None, None] * np.eye(3), atol=1e-9)
    if mode in ("translation", "rigid"):
        np.testing.assert_allclose(squares, np.broadcast_to(np.eye(3), squares.shape), atol=1e-9)


@given(numbers(-0.375, 0.375, 6), st.floats(0.5, 2.0))
def test_stretch_is_penalized_by_its_logarithm_whatever_the_rotation(stretch, reference):
    symmetric = np.zeros((3, 3))
    symmetric[np.triu_indices(3)] = stretch
    symmetric = torch.tensor(symmetric + np.triu(symmetric, 1).T)
    turn = torch.tensor(transforms.rotations(7)[3])
    linear = (turn @ torch.linalg.matrix_exp(symmetric) * reference)[None]
    found = transforms.log_stretch(linear, torch.tensor([reference], dtype=torch.float64))
    np.testing.assert_allclose(found[0], 2 * symmetric, atol=1e-6)


@pytest.mark.parametrize(("count", "degrees"), [(500, 38), (4000, 20)])
def test_no_rotation_is_far_from_one_of_those_that_are_tried(count, degrees):
    tried, asked = transforms.rotations(count), transforms.rotations(997)
    np.testing.assert_allclose(tried @ np.swapaxes(tried, 1, 2), np.broadcast_to(np.eye(3), tried.shape), atol=1e-9)
    traces = np.einsum("nij,mij->nm", tried, asked)
    apart = np.degrees(np.arccos(np.clip((traces.max(0) - 1) / 2, -1, 1)))
    assert apart.max() < degrees


def test_the_rotations_that_take_axes_to_axes_are_24_and_the_first_turns_nothing():
    turns = search.cube_rotations()
    np.testing.assert_array_equal(turns[0], np.eye(3))
    assert len({tuple(t.ravel()) for t in turns}) == 24
    np.testing.assert_allclose(np.linalg.det(turns), 1)


def assert_gradient_of_differences(level: Level | Correlation, maps: torch.Tensor, mode: str) -> None:
    """The gradient of what is optimized agrees with finite differences along what may change."""
    basis, step = torch.tensor(transforms.generators(mode)), 1e-3
    gradient = torch.einsum("kij,pij->kp", level.evaluate(maps)[1], basis)
    for p, generator in enumerate(basis):
        ahead, behind = (level.evaluate(maps @ transforms.exponential(s * generator[None]))[0] for s in (step, -step))
        np.testing.assert_allclose(gradient[:, p], (ahead - behind) / (2 * step), atol=0.01)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_gradient_of_the_similarity_is_that_of_finite_differences(looks, power):
    """The moving image is cut, so that points leave and enter what is known."""
    fixed, moving, frames = looks
    assert not moving.known.all()
    level = Level(fixed, moving, frames, 3000, 24, SETTINGS, power)
    assert_gradient_of_differences(level, random_maps(5, 0.04), "affine")


def test_the_similarity_favors_neither_image(looks):
    """Exchanged images under inverse maps: the same points, each looked up in the other image."""
    fixed, moving, frames = looks
    maps = random_maps(5, 0.05)
    there = Level(fixed, moving, frames, 3000, 24, SETTINGS).evaluate(maps)[0]
    back = Level(moving, fixed, frames[::-1], 3000, 24, SETTINGS).evaluate(transforms.inverse(maps))[0]
    np.testing.assert_allclose(there, back, atol=1e-6)


def test_many_maps_at_once_have_the_similarities_of_each_alone(looks):
    level = Level(*looks, 2000, 16, SETTINGS)
    maps = random_maps(6, 0.1)
    together, alone = level.evaluate(maps), [level.evaluate(m[None]) for m in maps]
    np.testing.assert_allclose(together[0], torch.cat([x[0] for x in alone]), atol=1e-7)
    # A point that rounding moves from one cell to the next has another gradient there.
    np.testing.assert_allclose(together[1], torch.cat([x[1] for x in alone]), atol=1e-3)
    np.testing.assert_array_equal(level.search(maps), torch.cat([level.search(m[None]) for m in maps]))


def test_ascent_converges_to_one_place_from_different_starts(looks):
    fixed, moving, frames = looks
    level = Level(fixed, moving, frames, 6000, 32, SETTINGS)
    header = np.linalg.inv(frames[1].matrix) @ frames[0].matrix
    starts = torch.tensor(header)[None] @ random_maps(4, 0.03)
    starts = optimize(level, starts, "affine", 0, 0.1, SETTINGS)[0]
    found, scores = optimize(level, starts, "affine", 80, 0.1, SETTINGS)
    assert (scores > level.evaluate(starts)[0]).all()
    points = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 3**0.5
    ends = np.array([apply_matrix(m, points) for m in found.numpy()]) * frames[0].radius
    assert np.abs(ends - ends.mean(0)).max() < 0.1


def test_edges_agree_where_the_images_are_aligned_and_not_where_they_are_turned(looks, rigid):
    fixed, moving, frames = looks
    edges = Edges(fixed, moving, frames, SETTINGS)
    header = torch.tensor(np.linalg.inv(frames[1].matrix) @ frames[0].matrix)
    turned = torch.tensor(transforms.about(np.diag([1.0, -1.0, -1.0]), np.zeros(3), np.zeros(3)))
    aligned, apart = edges.agreement(torch.stack((header, header @ turned))).tolist()
    assert aligned > apart + 0.02
    fewer = edges.agreement(torch.stack((header, header @ turned)), every=3).tolist()
    np.testing.assert_allclose(fewer, (aligned, apart), atol=0.03)
    assert fewer != [aligned, apart]


class Preferring:
    """Edges that agree at the maps whose rotation is near one."""

    def __init__(self, rotation: torch.Tensor) -> None:
        self.rotation, self.asked = rotation, []

    def agreement(self, maps: torch.Tensor, every: int = 1) -> torch.Tensor:
        self.asked.append(len(maps))
        return ((maps[:, :3, :3] - self.rotation).norm(dim=(1, 2)) < 0.8).double()


def test_of_the_rough_starts_those_survive_whose_edges_agree_though_others_are_more_similar(grid_about, paint):
    image = paint(grid_about((31, -47, 112), (32, 28, 30), (5.0, 5.0, 5.0)))
    problem = search.Problem(*[pyramid.prepare(image, None)] * 2, SETTINGS)
    starts = search.turned_starts(problem, 50)
    right, turned = torch.eye(3, dtype=torch.float64), torch.tensor(transforms.rotations(50)[20])
    for wanted, other in ((right, turned), (turned, right)):
        edges = problem.__dict__["edges"] = Preferring(wanted)
        (best,) = search.survivors(problem, starts, ((60, 2), (20, 2)), 1).maps[:, :3, :3]
        assert (best - wanted).norm() < (best - other).norm()
        assert edges.asked == [60, 20]


class Agreeing:
    """Edges of which it is given how well they agree after each map."""

    def __init__(self, agreements: list[float]) -> None:
        self.agreements = torch.tensor(agreements, dtype=torch.float64)

    def agreement(self, maps: torch.Tensor, every: int = 1) -> torch.Tensor:
        return self.agreements[(maps[:, 0, 3] / 2).round().long()]  # maps are 2 apart


@pytest.mark.parametrize(
    ("agreements", "shifts", "stands_out"),
    [
        ([0.6, 0.59, 0.3], [0, 2, 4], True),  # edges agree
        ([0.5, 0.42, 0.3], [0, 2, 4], True),  # they agree less, but nowhere else nearly as well
        ([0.5, 0.47, 0.3], [0, 2, 4], False),  # another place is as good
        ([0.5, 0.3], [0, 0.1, 2], True),  # of the same place there may be several maps
        ([0.5], [0, 0.1], False),  # there is no other place to compare with
        ([], [], False),
    ],
)
def test_a_place_stands_out_if_its_edges_agree_well_or_better_than_elsewhere(
    agreements, shifts, stands_out, grid_about, paint
):
    image = paint(grid_about((31, -47, 112), (16, 14, 15), (10.0, 10.0, 10.0)))
    problem = search.Problem(*[pyramid.prepare(image, None)] * 2, SETTINGS)
    problem.__dict__["edges"] = edges = Agreeing(agreements)
    maps = torch.eye(4, dtype=torch.float64).repeat(len(shifts), 1, 1)
    maps[:, 0, 3] = torch.tensor(shifts, dtype=torch.float64)
    candidates = search.Candidates(maps, torch.ones(len(maps)))
    assert search.stands_out(problem, candidates, edges.agreement(maps)) == stands_out


def test_a_small_crop_counts_by_its_own_edges_though_hardly_any_of_the_whole_image_lie_in_it(grid_about, paint):
    whole, crop = (
        pyramid.look(*pyramid.prepare(paint(grid_about(center, size, (2.5, 2.5, 2.5))), None), 2.5, SETTINGS)
        for center, size in (((31, -47, 112), (56, 56, 56)), ((45, -30, 120), (14, 13, 12)))
    )
    frames = tuple(Frame(look.centers[1], 20.0) for look in (whole, crop))
    header = torch.tensor(np.linalg.inv(frames[1].matrix) @ frames[0].matrix)[None]
    edges = Edges(whole, crop, frames, SETTINGS)
    assert float(edges.sides[0].look_up(header)[1].mean()) < 0.1
    assert float(edges.agreement(header)) > 0.9


@pytest.fixture(scope="module", params=[False, True], ids=["whole to piece", "piece to whole"])
def piece(request, grid_about):
    """Edges of a texture and of a turned piece of it in another contrast, either of them fixed, and the map between them."""
    noise = np.random.default_rng(3).normal(size=(44, 48, 46)).astype(np.float32)
    grid = grid_about((31, -47, 112), (46, 48, 44), (2.5, 2.5, 2.5), (8, -5, 12))
    whole = sitk.SmoothingRecursiveGaussian(grid.image(noise), 5.0)
    target = grid_about((45, -30, 125), (22, 20, 18), (2.5, 2.5, 2.5), (100, 20, -60)).empty_image()
    images = [whole, 1 - sitk.Resample(whole, target, sitk.Transform(), sitk.sitkLinear)]
    fixed, moving = (
        pyramid.look(*pyramid.prepare(x, None), 2.5, SETTINGS) for x in images[:: -1 if request.param else 1]
    )
    frames = tuple(Frame(look.centers[1], SETTINGS.radius * 50) for look in (fixed, moving))
    header = torch.tensor(np.linalg.inv(frames[1].matrix) @ frames[0].matrix)
    return Edges(fixed, moving, frames, SETTINGS), header


def test_a_piece_is_found_in_a_whole_by_the_directions_of_edges(piece):
    """At the true rotation the best shift is the true one, and no other rotation fits better."""
    edges, truth = piece
    turns = torch.tensor(np.concatenate([search.cube_rotations(), transforms.rotations(100)]))
    correlation = Correlation(edges, 8.0, SETTINGS)
    maps, scores = correlation.best_shifts(turns)
    assert int(scores.argmax()) == 0
    assert float((maps[0] - truth).abs().max()) < correlation.voxel
    np.testing.assert_allclose(maps[:, :3, :3], turns)


def test_the_gradient_of_the_correlation_is_that_of_finite_differences(piece):
    edges, truth = piece
    turns = torch.tensor(transforms.rotations(40)[::8])
    maps = truth @ torch.tensor(transforms.about(turns.numpy(), np.zeros(3), np.full(3, 0.05)))
    assert_gradient_of_differences(Correlation(edges, 12.0, SETTINGS), maps, "rigid")


def test_the_correlation_of_a_map_is_the_same_from_all_shifts_and_by_itself(piece):
    edges, _ = piece
    level = Correlation(edges, 8.0, SETTINGS)
    maps, scores = level.best_shifts(torch.tensor(transforms.rotations(20)))
    # Of points that lie in the middle of a cell in one of the two, and anywhere in it in the other.
    assert np.corrcoef(level.evaluate(maps)[0], scores)[0, 1] > 0.9
    np.testing.assert_allclose(level.evaluate(maps)[0], scores, atol=0.1)


def test_contents_of_equal_spread_include_the_true_stretch(grid_about, paint):
    """An image and the same with slices half as far apart, turned by the header."""
    image = paint(grid_about((31, -47, 112), (32, 28, 30), (5.0, 5.0, 5.0)))
    grid = Grid.of(image)
    truth = matrix_of(75, (1, 2, 0.5), (1.0, 1.0, 0.6))
    moved = Grid(grid.size, truth @ grid.matrix).stamp(sitk.Image(image))
    problem = search.Problem(pyramid.prepare(image, None), pyramid.prepare(moved, None), SETTINGS)
    starts = problem.physical(search.alike_starts(problem).maps)
    apart = np.linalg.norm(starts[:, :3, :3] - truth[:3, :3], axis=(1, 2))
    assert apart.min() < 0.4
    stretches = np.linalg.svd(starts[:, :3, :3], compute_uv=False)
    assert (stretches.min() > 1 / SETTINGS.most_stretch) & (stretches.max() < SETTINGS.most_stretch)


def test_an_image_that_ends_in_air_is_taken_to_go_on_and_one_that_is_cut_is_not(grid_about, paint):
    whole, cut = (
        pyramid.look(*pyramid.prepare(paint(grid_about(center, size, (5.0, 5.0, 5.0))), None), 5.0, SETTINGS)
        for center, size in (((31, -47, 112), (32, 32, 32)), ((31, -47, 112), (32, 32, 10)))
    )
    assert whole.known.all()
    assert not cut.known[0].any()
    assert not cut.known[-1].any()
    assert cut.known[1:-1, 0].all()
    assert whole.box[0].min() > 2
    np.testing.assert_array_equal(cut.box[:, 2], (0, 9))


def test_points_lie_where_the_image_is_known_and_counts(grid_about, paint):
    image = paint(grid_about((31, -47, 112), (32, 28, 30), (5.0, 5.0, 5.0)))
    mask = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    mask.CopyInformation(image)
    mask[10:20, 8:20, 5:25] = 1
    look = pyramid.look(*pyramid.prepare(image, mask), 5.0, SETTINGS)
    points = look.points(800, 0.1)
    assert 600 < len(points) <= 800
    assert (points > np.array([9.4, 7.4, 4.4])).all()
    assert (points < np.array([19.6, 19.6, 24.6])).all()


def matrix_of(degrees: float, axis, scales=(1.0, 1.0, 1.0)) -> np.ndarray:
    versor = sitk.VersorTransform(np.asarray(axis, float).tolist(), float(np.radians(degrees)))
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(versor.GetMatrix(), (3, 3)) @ np.diag(scales)
    return matrix


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (matrix_of(178, (0, 0, 1)), "turned by 178 degrees about the head-foot axis"),
        (matrix_of(90, (-1, 0, 0)), "turned by 90 degrees about the left-right axis"),
        (matrix_of(180, (0.1, 0.99, 0.05)), "turned by 180 degrees about the front-back axis"),
        (matrix_of(120, (1, 1, 1)), "about an oblique axis"),
        (matrix_of(10, (1, 0, 0), (0.8, 0.8, 0.8)), "1.2 times as large as its header says"),
        (matrix_of(0, (1, 0, 0), (1.5, 1.5, 1.5)), "0.67 times as large as its header says"),
        (matrix_of(5, (1, 0, 0), (1.0, 1.0, 0.7)), "by a factor of 1.4 along the head-foot axis"),
    ],
)
def test_what_a_header_should_not_be_wrong_by_is_said_in_words(matrix, said):
    (sentence,) = words.remarks(matrix, 60, 1.2)
    assert said in sentence


def test_nothing_is_said_of_an_ordinary_alignment():
    assert words.remarks(matrix_of(40, (1, 2, 0), (0.9, 1.1, 1.0)), 60, 1.2) == []


def test_a_grid_of_any_scale_is_treated_alike(grid_about, paint):
    """Levels, points and centers in voxels, of an image and of the same a thousand times smaller."""
    image = paint(grid_about((31, -47, 112), (32, 28, 30), (5.0, 5.0, 5.0)))
    small = sitk.Image(image)
    grid = Grid.of(image)
    Grid(grid.size, np.diag([1e-3, 1e-3, 1e-3, 1]) @ grid.matrix).stamp(small)
    problems = [search.Problem(pyramid.prepare(x, None), pyramid.prepare(x, None), SETTINGS) for x in (image, small)]
    assert problems[0].extent == pytest.approx(1000 * problems[1].extent)
    np.testing.assert_array_equal(problems[0].coarse[0].values, problems[1].coarse[0].values)
    np.testing.assert_allclose(problems[0].centers, problems[1].centers, atol=1e-9)
