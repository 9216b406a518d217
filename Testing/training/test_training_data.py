"""Training data: prepared cohorts, pairs, phantoms and generated pairs; deformations against closed forms."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.intensity import normalize
from training import config as configs
from training import scoring
from training.data import cohort as cohorts
from training.data import phantoms
from training.data.free_form import bspline_basis, evaluate, ffd, ffd_transform
from training.data.pairs import Augmentation, Pair, augment, random_affine, transform
from training.data.randomness import Random
from training.data.sources import CohortPairs, OrderedPairs, Phantoms, Synthesis, source_of
from training.data.synthesis import Recipe, make_pair

NO_AUGMENTATION = Augmentation(degrees=0, shift_mm=0)


class Recorded(Random):
    """Random numbers whose normal ones are constant, or recorded."""

    def __init__(self, seed: int = 0, value: float | None = None) -> None:
        super().__init__(seed)
        self.value = value

    def normal(self, *shape: int) -> torch.Tensor:
        self.drawn = super().normal(*shape) if self.value is None else torch.full(shape, self.value)
        return self.drawn


def same_as(first: Pair, second: Pair) -> bool:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(b is None if a is None else torch.equal(a, b) for a, b in pairs)


def dice(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean over the classes of the first."""
    classes = [n for n in first.unique().tolist() if n]
    return sum(
        2 * ((first == n) & (second == n)).sum() / ((first == n).sum() + (second == n).sum()) for n in classes
    ) / len(classes)


def warped_labels(pair: Pair) -> torch.Tensor:
    return fields.warp(pair.moving_labels.float(), pair.truth, mode="nearest", padding="zeros").byte()


# Free-form deformations


def cubic(t: float) -> float:
    """The cubic B-spline, centered on 0."""
    t = abs(t)
    return 2 / 3 - t * t + t**3 / 2 if t < 1 else max(2 - t, 0) ** 3 / 6


@given(spacing=st.floats(1, 12), voxel=st.tuples(*[st.integers(0, 8)] * 3), seed=st.integers(0, 1000))
def test_a_free_form_deformation_is_the_sum_of_its_splines(spacing, voxel, seed):
    """Control point i of an axis lies at (i - 1) spacings, so that one is outside the first voxel."""
    random = Recorded(seed)
    field = ffd((9, 10, 11), spacing, 1.5, random)
    control = 1.5 * random.drawn
    weights = [[cubic(x / spacing - (i - 1)) for i in range(n)] for x, n in zip(voxel, control.shape[1:], strict=True)]
    expected = torch.einsum("cijk,i,j,k->c", control.double(), *(torch.tensor(w, dtype=torch.float64) for w in weights))
    torch.testing.assert_close(field[0, :, voxel[0], voxel[1], voxel[2]].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_deformation_as_a_tensor_is_the_one_that_simpleitk_makes_of_the_same_control_points():
    image = sitk.Image(41, 51, 61, sitk.sitkFloat32)
    image.SetSpacing((2.0, 2.0, 2.0))
    made = ffd_transform(image, seed=3)
    first = made.GetCoefficientImages()[0]
    sides, step = (30, 40, 50), 2.0
    grid = Grid.build(
        sides, (step,) * 3, made.GetTransformDomainOrigin()
    )  # the second control point is at its first voxel
    control = torch.tensor(made.GetParameters()).reshape(3, *first.GetSize()[::-1])
    axes = zip(sides[::-1], first.GetSpacing()[::-1], control.shape[1:], strict=True)
    bases = [torch.zeros(n, controls) for n, _, controls in axes]
    for basis, n, mm in zip(bases, sides[::-1], first.GetSpacing()[::-1], strict=True):
        weights = bspline_basis(n, mm / step, torch.device("cpu"))
        basis[:, : weights.shape[1]] = weights
    expected = np.moveaxis(sitk.GetArrayFromImage(scoring.displacement_on(made, grid)), -1, 0)[None]
    torch.testing.assert_close(evaluate(control, bases), torch.from_numpy(expected).float(), atol=1e-3, rtol=0)
    assert np.abs(expected).max() > 3


@given(value=st.floats(-9, 9), spacing=st.floats(1, 40))
def test_equal_control_points_make_a_shift(value, spacing):
    field = ffd((7, 12, 9), spacing, 1.0, Recorded(value=value))
    torch.testing.assert_close(field, torch.full((1, 3, 7, 12, 9), value), atol=1e-4, rtol=1e-4)
    assert not ffd((7, 12, 9), spacing, 0.0, Random(0)).any()


def test_the_standard_deviation_of_a_deformation_follows_from_that_of_control_points():
    """At each voxel the variance is sd^2 times the sum of squared weights, as control points are independent."""
    drawn = torch.stack([ffd((8, 8, 8), 3.0, 2.0, Random(seed)) for seed in range(300)])
    squared = bspline_basis(8, 3.0, torch.device("cpu")).square().sum(1)
    expected = 2.0 * torch.einsum("i,j,k->ijk", squared, squared, squared).sqrt()
    torch.testing.assert_close(drawn.std((0, 1, 2)), expected, rtol=0.15, atol=0)
    assert drawn.mean().abs() < 0.05


def test_a_deformation_depends_on_the_seed_alone():
    first, again, other = (ffd((8, 8, 8), 4.0, 1.0, Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@given(degrees=st.floats(0, 30), shift=st.floats(0, 9), seed=st.integers(0, 1000))
def test_a_random_rotation_and_shift_stay_within_their_limits(degrees, shift, seed):
    matrix, moved = random_affine(Random(seed), degrees, shift, 0, 0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3), atol=1e-5, rtol=0)
    assert torch.linalg.det(matrix) > 0
    angle = math.degrees(math.acos(min(max((matrix.trace().item() - 1) / 2, -1), 1)))
    assert angle <= degrees * math.sqrt(3) + 0.05  # about three axes
    assert moved.abs().max() <= shift


def test_points_turn_about_the_center():
    center = torch.tensor([2.0, 3.0, 4.0]).view(1, 3, 1, 1, 1)
    matrix, shift = random_affine(Random(0), 20, 0, 0, 0)
    torch.testing.assert_close(transform(center, matrix, shift, center), center)
    moved = transform(center + 1, matrix, torch.tensor([5.0, 0, 0]), center)
    expected = center.flatten() + matrix @ torch.ones(3) + torch.tensor([5.0, 0, 0])
    torch.testing.assert_close(moved.flatten(), expected)


# Augmentation


@given(
    seed=st.integers(0, 10**6),
    degrees=st.floats(0, 15),
    shift=st.floats(0, 8),
    apart=st.floats(0, 8),
    axis=st.integers(0, 2),
)
def test_an_augmented_displacement_leads_to_the_same_anatomy(seed, degrees, shift, apart, axis):
    """The intensity of the moving image is one coordinate of its voxels, that of the fixed image is where the truth leads.

    Both are linear between voxels, so sampling is exact; a pair of constant images shows what came from outside.
    """
    shape = (12, 16, 14)
    truth = ffd(shape, 6.0, 1.0, Random(seed))
    coordinate = fields.identity(shape, like=truth)[:, axis : axis + 1]
    white = torch.ones_like(coordinate)
    turned, seen = (
        augment(Pair(f, m, truth=truth), Augmentation(degrees, shift, apart, apart), 2.0, Random(seed + 1))
        for f, m in ((coordinate + truth[:, axis : axis + 1], coordinate), (white, white))
    )
    landed, whole = (fields.warp(pair.moving, pair.truth, padding="zeros") for pair in (turned, seen))
    inside = (whole > 1 - 1e-5) & (seen.fixed > 1 - 1e-5)
    assert inside.sum() > 20
    torch.testing.assert_close(landed[inside], turned.fixed[inside], atol=1e-2, rtol=0)


def test_a_part_is_the_same_cube_of_all_tensors_of_a_pair():
    image = torch.arange(20.0 * 33 * 48).view(1, 1, 20, 33, 48)
    pair = Pair(image, image + 1, truth=image.repeat(1, 3, 1, 1, 1), moving_labels=image.long())
    places = set()
    for seed in range(20):
        part = pair.part(32, Random(seed))
        first = int(part.fixed[0, 0, 0, 0, 0])
        z, y, x = first // (33 * 48), first // 48 % 33, first % 48
        assert (
            z == 0 and y == 0 and 0 <= x <= 16 and x % 2 == 0
        )  # no longer than the image is, and on whole output voxels
        assert torch.equal(part.fixed, image[..., :32, x : x + 32])
        assert torch.equal(part.moving, part.fixed + 1) and torch.equal(part.truth[:, 1:2], part.fixed)
        assert part.brain is None and torch.equal(part.moving_labels, part.fixed.long())
        places.add(x)
    assert len(places) > 5


def test_augmentation_moves_both_images_alike_and_the_moving_one_in_addition():
    image = torch.rand(1, 1, 12, 16, 14, generator=torch.Generator().manual_seed(0))
    alike = augment(Pair(image, image), Augmentation(10, 8), 2.0, Random(1))
    torch.testing.assert_close(alike.fixed, alike.moving, atol=1e-4, rtol=0)
    assert (alike.fixed - image).abs().mean() > 0.05
    apart = augment(Pair(image, image), Augmentation(0, 0, 5, 5), 2.0, Random(1))
    torch.testing.assert_close(apart.fixed, image, atol=1e-4, rtol=0)
    assert (apart.moving - image).abs().mean() > 0.05


def test_augmentation_keeps_types_and_missing_values():
    pair = Pair(*torch.rand(2, 1, 1, 8, 8, 8))
    bare = augment(pair, Augmentation(), 2.0, Random(0))
    assert (bare.brain, bare.truth, bare.fixed_labels, bare.moving_labels) == (None,) * 4
    labels = torch.randint(0, 4, (2, 1, 1, 8, 8, 8), dtype=torch.uint8)
    turned = augment(Pair(pair.fixed, pair.moving, None, None, *labels), Augmentation(30, 0), 2.0, Random(0))
    assert turned.fixed_labels.dtype == torch.uint8
    assert set(turned.fixed_labels.unique().tolist()) <= {0, 1, 2, 3}


# Phantoms of arXiv 1908.08767


def test_a_phantom_is_its_template_warped_by_the_truth(head_cohort):
    cohort = cohorts.load(head_cohort)
    for number in range(3):
        pair = phantoms.phantom(cohort, "T2-T2", phantoms.seed_of("train", number))
        warped = normalize(fields.warp(pair.moving, pair.truth, padding="zeros"), "robust")
        assert (warped - pair.fixed).abs().mean() < 0.005 < 0.02 < (pair.moving - pair.fixed).abs().mean()
        assert torch.equal(warped_labels(pair), pair.fixed_labels)
        assert torch.equal(pair.moving_labels[0, 0] > 0, cohort.volumes[0].labels[0, 0] > 0)


def test_all_tasks_share_deformations_and_have_the_fixed_contrast_in_their_name(head_cohort):
    cohort = cohorts.load(head_cohort)
    pairs = {task: phantoms.phantom(cohort, task, 900_000) for task in phantoms.TASKS}
    first = pairs["T1-T2"]
    for task, pair in pairs.items():
        assert torch.equal(pair.truth, first.truth)
        assert torch.equal(pair.fixed, first.fixed)  # T2 in all
        template = cohort.volumes[0].images[cohort.volumes[0].contrasts.index(task[:2])][None].float()
        assert torch.equal(pair.moving, normalize(template, "robust"))


def test_the_amplitude_of_phantoms_is_that_of_the_paper(head_cohort):
    """Control points every 20 mm, each component N(0, 6 mm)."""
    cohort = cohorts.load(head_cohort)
    drawn = torch.cat([phantoms.phantom(cohort, "T2-T2", seed).truth for seed in range(20)]) * cohort.spacing
    squared = bspline_basis(32, 20 / cohort.spacing, torch.device("cpu")).square().sum(1).mean()
    assert drawn.std().item() == pytest.approx(6 * squared.item() ** 1.5, rel=0.05)


def test_no_phantom_is_in_two_splits():
    seeds = [phantoms.seed_of(split, number) for split, count in phantoms.COUNTS.items() for number in range(count)]
    assert len(seeds) == len(set(seeds)) == 250
    with pytest.raises(ValueError, match="test has 50 phantoms, there is no number 50"):
        phantoms.seed_of("test", 50)


def test_a_cohort_without_template_is_refused(tiny_cohort):
    config = configs.build({"name": "x", "data": {"cohort": str(tiny_cohort), "pairs": "phantoms"}})
    with pytest.raises(ValueError, match="no volume of several contrasts with labels and brain"):
        source_of(config)


# Synthesis


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_true_displacement_of_a_generated_pair_leads_to_the_same_anatomy(tmp_path, write_cohort, axis):
    """The labels are a coordinate, so that a wrong label is wrong by so many voxels.

    Nearest-neighbor interpolation is used twice, which adds at least half a voxel.
    """
    places = 1 + np.indices((32, 24, 28))[2 - axis].astype(np.uint8)
    volume = {"labels": places, "brain": places > 0, "contrasts": []}
    cohort = cohorts.load(write_cohort(tmp_path, {"map": volume}, 1.0, tissues=["other"] * 33))
    before, after = [], []
    for seed in range(4):
        pair = make_pair(cohort, Recipe(same_subject=1), Random(seed))
        warped = fields.warp(pair.moving_labels.float(), pair.truth, mode="nearest", padding="zeros")
        seen = (pair.fixed_labels > 0) & (pair.moving_labels > 0) & (warped > 0)
        for errors, image in ((before, pair.moving_labels), (after, warped)):
            errors.append((image.float() - pair.fixed_labels)[seen].abs().mean().item())
    assert max(after) < 0.6
    assert sum(after) < 0.5 * sum(before)


def test_generated_pairs_are_normalized_and_have_truth_and_labels_if_known(head_cohort):
    cohort = cohorts.load(head_cohort)
    pairs = [make_pair(cohort, Recipe(same_subject=0.5), Random(seed)) for seed in range(12)]
    for pair in pairs:
        assert all(
            image.min() >= 0 and image.max() <= 1 and torch.isfinite(image).all() for image in (pair.fixed, pair.moving)
        )
        assert pair.fixed.shape == pair.moving.shape == (1, 1, 32, 32, 32)
    assert {pair.truth is None for pair in pairs} == {True, False}
    # Images of several subjects have classes of their own, so labels are compared between label maps alone.
    assert {pair.fixed_labels is None for pair in pairs} == {True, False}


def test_a_generated_pair_depends_on_the_seed_alone(head_cohort):
    cohort = cohorts.load(head_cohort)
    first, again, other = (make_pair(cohort, Recipe(), Random(seed)) for seed in (3, 3, 4))
    assert same_as(first, again)
    assert not torch.equal(first.fixed, other.fixed)


# Sources


@pytest.fixture
def tagged(tmp_path, write_cohort):
    """Volumes that are recognized by their constant intensity; roles differ."""
    roles = {
        "train": ("both", "fixed", "moving", "moving"),
        "validation": ("fixed", "moving", "moving"),
        "test": ("both", "both"),
    }
    listed = [(split, role) for split, roles in roles.items() for role in roles]
    volumes = {
        f"v{i}": {"images": np.full((1, 8, 8, 8), (i + 1) / 16), "split": split, "role": role}
        for i, (split, role) in enumerate(listed)
    }
    return cohorts.load(write_cohort(tmp_path / "tagged", volumes))


def drawn_from(cohort, pair: Pair) -> list:
    """Fixed and moving volume."""
    return [cohort.volumes[round(image[0, 0, 4, 4, 4].item() * 16) - 1] for image in (pair.fixed, pair.moving)]


def test_pairs_are_of_two_volumes_of_one_split_with_fitting_roles(tagged):
    source = CohortPairs(tagged, NO_AUGMENTATION, 100)
    pairs = {split: [pair for _, pair in source.held_out(split)] for split in ("validation", "test")}
    pairs["train"] = [source.draw(Random(seed)) for seed in range(150)]
    for split, found in pairs.items():
        used = [drawn_from(tagged, pair) for pair in found]
        assert all(volume.split == split for two in used for volume in two)
        assert all(fixed is not moving for fixed, moving in used)
        assert all(fixed.role != "moving" and moving.role != "fixed" for fixed, moving in used)
    # All that there are: train both-moving x2, fixed-both, fixed-moving x2; validation fixed-moving x2; test both ways.
    count = {
        split: len({tuple(v.name for v in drawn_from(tagged, p)) for p in found}) for split, found in pairs.items()
    }
    assert count == {"train": 5, "validation": 2, "test": 2}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_pairs_computed_from_their_number_are_those_of_the_list(tagged, split):
    volumes = tagged.split(split)
    listed = [
        (fixed, moving)
        for fixed in volumes
        for moving in volumes
        if fixed is not moving and fixed.role != "moving" and moving.role != "fixed"
    ]
    pairs = OrderedPairs(list(volumes))
    assert len(pairs) == len(listed)
    assert [[v.name for v in pairs[i]] for i in range(len(pairs))] == [[v.name for v in pair] for pair in listed]
    assert not OrderedPairs([]) and not OrderedPairs(list(volumes[:1]))


def test_drawing_from_a_large_cohort_lists_no_pairs(tagged):
    """2,000 volumes have four million pairs."""
    volumes = tuple(
        replace(tagged.volumes[0], name=str(i), split=split) for split in ("train", "validation") for i in range(2000)
    )
    source = CohortPairs(replace(tagged, volumes=volumes), NO_AUGMENTATION, 3)
    assert len(source.pairs["train"]) == 2000 * 1999
    started = time.process_time()
    drawn = [source.draw(Random(seed)) for seed in range(50)]
    assert time.process_time() - started < 1
    assert len(drawn) == 50 and len(list(source.held_out("validation"))) == 3


def test_held_out_pairs_are_the_same_each_time(tiny_cohort):
    for source in (CohortPairs(cohorts.load(tiny_cohort), Augmentation(), 2) for _ in range(2)):
        source.draw(Random(5))
        first, again = list(source.held_out("validation")), list(source.held_out("validation"))
        assert len(first) == 2
        assert all(a[0] == b[0] and same_as(a[1], b[1]) for a, b in zip(first, again, strict=True))


def test_phantoms_are_held_out_by_task_and_count(head_cohort):
    cohort = cohorts.load(head_cohort)
    held_out = list(Phantoms(cohort, Augmentation(), 2, ("T1-T2", "T2-T2")).held_out("validation"))
    assert [task for task, _ in held_out] == ["T1-T2", "T1-T2", "T2-T2", "T2-T2"]
    assert torch.equal(held_out[0][1].truth, held_out[2][1].truth)
    assert not torch.equal(held_out[0][1].truth, held_out[1][1].truth)
    judged = list(Synthesis(cohort, Recipe(), 1).held_out("test"))
    assert [task for task, _ in judged] == list(phantoms.TASKS)


@pytest.mark.parametrize("pairs", ["cohort", "phantoms", "synthesis"])
def test_a_drawn_pair_depends_on_the_seed_alone(pairs, tiny_cohort, head_cohort):
    folder = tiny_cohort if pairs == "cohort" else head_cohort
    source = source_of(configs.build({"name": "x", "data": {"cohort": str(folder), "pairs": pairs}}))
    drawn = [source.draw(Random(seed)) for seed in (1, 1, 2)]
    assert same_as(drawn[0], drawn[1])
    assert not torch.equal(drawn[0].fixed, drawn[2].fixed)
    assert drawn[0].fixed.shape[2:] == source.cohort.shape


def test_a_split_without_a_pair_is_named(tmp_path, write_cohort):
    image = np.zeros((1, 8, 8, 8))
    volumes = {f"v{i}": {"images": image, "role": "fixed", "split": split} for i, split in enumerate(("train",) * 3)}
    with pytest.raises(ValueError, match="'train' has no fixed and moving volume"):
        CohortPairs(cohorts.load(write_cohort(tmp_path, volumes)), NO_AUGMENTATION, 1)
    volumes["v1"]["role"] = "moving"
    with pytest.raises(ValueError, match="'validation' has no fixed and moving volume"):
        CohortPairs(cohorts.load(write_cohort(tmp_path, volumes)), NO_AUGMENTATION, 1)


def test_without_a_cohort_the_error_says_how_to_name_one():
    with pytest.raises(ValueError, match=r"data\.cohort names no folder"):
        source_of(configs.build({"name": "x"}))


# Prepared cohorts


def test_a_cohort_is_read_as_it_was_written(tmp_path, write_cohort, anatomy):
    images, labels, brain = anatomy((8, 9, 10))
    volumes = {
        "both": {
            "images": images,
            "labels": labels,
            "brain": brain,
            "subject": "s",
            "contrasts": ["T1", "T2", "PD"],
            "files": {"images": ["a.nii", "b.nii", "c.nii"]},
        },
        "map": {"labels": labels, "role": "moving", "split": "test", "contrasts": []},
    }
    cohort = cohorts.load(write_cohort(tmp_path, volumes, 2.5, tissues=["background", "white"]))
    assert (cohort.spacing, cohort.shape, cohort.origin, cohort.tissues) == (
        2.5,
        (8, 9, 10),
        (1, -2, 3),
        ("background", "white"),
    )
    both, label_map = cohort.volumes
    assert (both.subject, both.role, both.split, both.contrasts) == ("s", "both", "train", ("T1", "T2", "PD"))
    assert [str(file) for file in both.files] == ["a.nii", "b.nii", "c.nii"]
    assert (both.images.shape, both.images.dtype) == ((3, 1, 8, 9, 10), torch.float16)
    assert np.array_equal(both.images[:, 0].numpy(), images)
    assert np.array_equal(both.labels[0, 0].numpy(), labels)
    assert np.array_equal(both.brain[0, 0].numpy(), brain)
    assert (label_map.images, label_map.brain) == (None, None)
    assert cohort.split("test") == (label_map,)


def test_a_missing_cohort_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cohort.json is missing: prepare the cohort first"):
        cohorts.load(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"format": 1}', "[]"])
def test_an_invalid_listing_is_named(tmp_path, text):
    (tmp_path / "cohort.json").write_text(text)
    with pytest.raises(ValueError, match=r"cohort.json: .*prepare the cohort again"):
        cohorts.load(tmp_path)


def test_a_volume_that_is_missing_or_has_another_shape_is_named(tmp_path, write_cohort):
    write_cohort(tmp_path, {"a": {"images": np.zeros((1, 8, 8, 8))}, "b": {"images": np.zeros((1, 8, 8, 8))}})
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 8, 8, 9)))
    with pytest.raises(ValueError, match=r"b.npz: images has the shape \(8, 8, 9\), but the cohort has \(8, 8, 8\)"):
        cohorts.load(tmp_path)
    (tmp_path / "b.npz").unlink()
    with pytest.raises(ValueError, match=r"b.npz: cannot be read"):
        cohorts.load(tmp_path)


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_volume_is_named(tmp_path_factory, write_cohort, share):
    folder = write_cohort(tmp_path_factory.mktemp("cut"), {"a": {"images": np.zeros((1, 8, 8, 8))}})
    whole = (folder / "a.npz").read_bytes()
    (folder / "a.npz").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"a.npz: cannot be read"):
        cohorts.load(folder)
