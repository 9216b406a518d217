"""Gauss-Newton terms of features: they are the derivative of their energy, fair to both images, and bring like to like."""

from dataclasses import replace

import pytest
import torch
from textures import deformed
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational import DEFAULT, Level, solver
from DivRegNetLib.registration.variational.equations import Equations
from DivRegNetLib.registration.variational.features import (
    USUAL_DIFFERENCE,
    FeatureEquations,
    Features,
    descriptors,
    resized,
)
from DivRegNetLib.registration.variational.method import register
from DivRegNetLib.registration.variational.settings import VariationalSettings
from DivRegNetLib.similarity.descriptors import mind_ssc


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return fields.smooth(noise, 2.0) * 4


def normal_equations(fixed: torch.Tensor, moving: torch.Tensor, weight: float) -> torch.Tensor:
    return FeatureEquations(Features(fixed, moving, weight), fixed.shape[2:])(None)


def test_the_force_is_minus_the_derivative_of_the_energy():
    features, direction = smooth(1, 3, 16, 18, 20), torch.tensor([0.7, -0.4, 0.2])
    shift = direction.view(1, 3, 1, 1, 1).expand(1, 3, 16, 18, 20)
    inner = (..., *[slice(4, -4)] * 3)

    def energy(length: float) -> float:
        warped = fields.warp(features, 0.5 * shift + length * shift)
        return 10 / 2 * (features - warped).square().sum(1)[inner].sum().item()

    normal = normal_equations(features, fields.warp(features, 0.5 * shift), 10.0)
    along = (solver.parts(normal)[1][0] * direction.view(3, 1, 1, 1)).sum(0)[inner].sum().item()
    derivative = (energy(1e-2) - energy(-1e-2)) / 2e-2
    assert -along == pytest.approx(derivative, rel=0.1)


def test_the_swapped_pair_has_the_opposite_force_and_the_same_information():
    fixed, moving = smooth(2, 4, 8, 9, 10), smooth(2, 4, 8, 9, 10, seed=1)
    forward, backward = normal_equations(fixed, moving, 3.0), normal_equations(moving, fixed, 3.0)
    opposite(forward, backward)


def opposite(forward: torch.Tensor, backward: torch.Tensor, **tolerance: float) -> None:
    """The same information, and the opposite force."""
    (information, force), (other, back) = solver.parts(forward), solver.parts(backward)
    torch.testing.assert_close(information, other, **tolerance)
    torch.testing.assert_close(force, -back, **tolerance)


def test_information_is_positive_semidefinite_and_in_proportion_to_the_weight():
    fixed, moving = smooth(1, 2, 8, 9, 10), smooth(1, 2, 8, 9, 10, seed=1)
    one, ten = (normal_equations(fixed, moving, w) for w in (1.0, 10.0))
    torch.testing.assert_close(ten, 10 * one)
    matrix = solver.parts(one)[0][0].flatten(2).permute(2, 0, 1)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-5


def test_what_was_not_measured_in_both_images_says_nothing():
    fixed, moving = smooth(1, 2, 8, 8, 8), smooth(1, 2, 8, 8, 8, seed=1)
    here, there = (torch.ones(1, 1, 8, 8, 8, dtype=torch.bool) for _ in range(2))
    here[..., :3], there[:, :, 6:] = False, False
    terms = FeatureEquations(Features(fixed, moving, 5.0), (8, 8, 8), (here, there))
    normal, energy = terms(None), terms.energy(None)
    both = (here & there)[:, 0]
    assert (normal[0, :, ~both[0]] == 0).all() and normal[0, :, both[0]].abs().sum() > 0
    both[..., 3], both[:, 5] = False, False  # whose neighbors were not measured
    expected = 2.5 * (fixed - moving).square().sum(1)[both].mean()
    torch.testing.assert_close(energy[0], expected)


@pytest.mark.parametrize(("shape", "other"), [((8, 12, 4), (4, 6, 2)), ((4, 6, 2), (8, 12, 4)), ((6, 6, 6), (6, 6, 6))])
def test_features_keep_their_place_on_another_grid(shape, other):
    ramp = fields.identity(shape, like=torch.empty(0)) + 0.5
    there = resized(ramp, other)
    ratio = torch.tensor([n / m for n, m in zip(shape, other, strict=True)][::-1]).view(1, 3, 1, 1, 1)
    inner = (..., *[slice(1, -1)] * 3)
    expected = (fields.identity(other, like=ramp) + 0.5) * ratio
    torch.testing.assert_close(there[inner], expected[inner])


def test_features_alone_bring_images_together_that_say_nothing():
    """Two flat images; a class that lies at another place in the moving one."""
    flat = torch.full((1, 1, 32, 32, 32), 0.5)
    at = fields.identity((32, 32, 32), like=flat)

    def ball(x: float) -> torch.Tensor:
        center = torch.tensor([x, 16.0, 15.0]).view(1, 3, 1, 1, 1)
        inside = torch.sigmoid(2 * (8 - fields.length(at - center)))
        return torch.cat((1 - inside, inside), 1)

    fixed, moving = ball(14.0), ball(18.0)
    features = Features(fixed, moving, 100.0)
    found = fields.upsample(register(flat, flat, VariationalSettings(), features=[features]), 2, (32, 32, 32))
    before, after = (moving - fixed).square().mean(), (fields.warp(moving, found) - fixed).square().mean()
    assert after < 0.02 * before
    assert fields.jacobian_determinant(found).min() > 0
    nothing = register(flat, flat, VariationalSettings())
    assert fields.length(nothing).max() < 0.05


@pytest.mark.parametrize("stride", [1, 2])
def test_features_of_images_of_any_size_stay_where_they_are(stride):
    """Padding inside the registration does not move them."""
    shape = (21, 26, 23)
    image = fields.smooth(torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)), 1.5)
    at = fields.identity(shape, like=image)
    inside = torch.sigmoid(2 * (6 - fields.length(at - torch.tensor([11.0, 12.0, 10.0]).view(1, 3, 1, 1, 1))))
    even = [-n % stride for n in shape]
    features = torch.nn.functional.avg_pool3d(fields.extended(inside, even), stride)
    found = register(image, image, VariationalSettings(), features=[Features(features, features, 100.0, stride)])
    assert fields.length(found).max() < 1e-3


def test_probabilities_of_classes_are_sharpened_by_a_low_temperature():
    fixed, moving = (torch.rand(2, 4, 5, 6, 7, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    given = Features(fixed / fixed.sum(1, keepdim=True), moving / moving.sum(1, keepdim=True), stride=2)
    same = given.of_classes(weight=7.0, temperature=1.0)
    assert torch.equal(same.fixed, given.fixed) and (same.weight, same.stride) == (7.0, 2)
    sharp, sharpest = given.of_classes(7.0, 0.5), given.of_classes(7.0, 1e-3)
    for before, now, last in (
        (given.fixed, sharp.fixed, sharpest.fixed),
        (given.moving, sharp.moving, sharpest.moving),
    ):
        torch.testing.assert_close(now, before.square() / before.square().sum(1, keepdim=True))
        assert torch.equal(last.argmax(1), before.argmax(1)) and last.amax(1).mean() > 0.99
    certain = Features(torch.eye(4).view(1, 4, 4, 1, 1), torch.eye(4).view(1, 4, 4, 1, 1)).of_classes(1.0, 0.01)
    assert torch.isfinite(certain.fixed).all()


# Descriptors


def test_the_step_of_descriptor_terms_is_that_of_a_dense_solution():
    """A quadratic energy per voxel, plus diffusion, solved by one matrix of all voxels. All regions count alike."""
    moving, fixed, _ = deformed((8, 10, 12), 1.0, seed=0)
    settings = VariationalSettings(
        frequencies=1.0, cg_iterations=200, descriptor_weight=2.0, descriptor_parts=1, descriptor_trust=0.0
    )
    terms = descriptors(fixed.double(), moving.double(), settings, settings.levels[-1])
    normal, shape, weight = terms(None), (4, 5, 6), 0.7
    assert normal.shape == (1, 12, *shape)
    # By hand: channels of both images, their mean gradient by central differences, outer products.
    f, m = (F.avg_pool3d(mind_ssc(x.double(), floor=settings.descriptor_floor), 2)[0] for x in (fixed, moving))
    slopes = torch.zeros(3, *f.shape, dtype=torch.float64)
    for axis, dim in enumerate((3, 2, 1)):
        n = f.shape[dim]
        both = (f + m) / 2
        slopes[axis].narrow(dim, 1, n - 2).copy_((both.narrow(dim, 2, n - 2) - both.narrow(dim, 0, n - 2)) / 2)
    edges = slopes.square().sum((0, 1))
    weight_of_pair = 2.0 * (edges * (f - m).square().mean(0)).sum() / edges.sum() / USUAL_DIFFERENCE
    matrix = (
        weight_of_pair * torch.einsum("ackji,bckji->kjiab", slopes, slopes) + settings.tikhonov * torch.eye(3).double()
    )
    force = weight_of_pair * torch.einsum("ackji,ckji->kjia", slopes, f - m)
    count = f[0].numel()
    left = torch.block_diag(*matrix.reshape(count, 3, 3))
    number = torch.arange(count).view(shape)
    for dim in range(3):
        n = shape[dim] - 1
        for a, b in zip(number.narrow(dim, 0, n).flatten(), number.narrow(dim, 1, n).flatten(), strict=True):
            for c in range(3):
                i, j = 3 * a + c, 3 * b + c
                left[i, i] += weight
                left[j, j] += weight
                left[i, j] -= weight
                left[j, i] -= weight
    expected = torch.linalg.solve(left, force.reshape(-1)).view(*shape, 3).permute(3, 0, 1, 2)[None]
    step = solver.solve(normal, None, torch.tensor(weight).double().view(1, 1, 1, 1, 1), 0.0, settings)
    torch.testing.assert_close(step, expected, atol=1e-8, rtol=1e-5)


def test_regions_where_descriptors_disagree_count_less():
    """Half of the moving image shows something else: the descriptors of the other half take over their share of the weight."""
    moving, fixed, _ = deformed((16, 16, 64), 0.5, seed=1)
    moving[..., 32:] = deformed((16, 16, 64), 0.5, seed=8)[0][..., 32:]
    settings = VariationalSettings(descriptor_weight=2.0, descriptor_region=3.0)
    level = settings.levels[-1]

    def shares(trust: float) -> tuple[torch.Tensor, torch.Tensor]:
        terms = descriptors(fixed, moving, replace(settings, descriptor_trust=trust), level)
        information = solver.parts(terms(None))[0].diagonal(dim1=1, dim2=2).sum(-1)  # (N, D, H, W)
        return information[..., :12].sum(), information[..., 20:].sum()

    (right, wrong), (trusted, distrusted) = shares(0.0), shares(3.0)
    assert distrusted < 0.2 * wrong and trusted > 1.5 * right
    torch.testing.assert_close(trusted + distrusted, right + wrong, rtol=0.2, atol=0)


def test_descriptors_weigh_more_the_more_is_left_to_agree_on():
    """And what is left depends on the displacement that a level begins with; equal images have no weight."""
    moving, fixed, truth = deformed((16, 20, 24), 1.0, seed=4)
    settings = VariationalSettings(descriptor_weight=2.0)
    level, coarse = settings.levels[-1], fields.resize(truth, (8, 10, 12))
    terms = {
        name: descriptors(fixed, moving, settings, level, None, start)
        for name, start in (("before", None), ("after", coarse))
    }
    weights = {name: term.trust.mean() for name, term in terms.items()}
    assert 0 < weights["after"] < 0.7 * weights["before"]
    terms["before"].trust_regions(coarse, settings.descriptor_trust, settings.descriptor_region)  # of the next level
    assert torch.equal(terms["before"](coarse), terms["after"](coarse))
    for image in (fixed, torch.zeros_like(fixed)):
        nothing = descriptors(image, image, settings, level)
        assert (nothing(None) == 0).all() and (nothing.energy(None) == 0).all()


def test_steps_take_the_parts_of_the_channels_in_turn():
    moving, fixed, _ = deformed((16, 16, 16), 1.0, seed=1)
    whole, halves = (
        descriptors(fixed, moving, VariationalSettings(descriptor_weight=2.0, descriptor_parts=n), Level(1, 1, 8, 0))
        for n in (1, 2)
    )
    torch.testing.assert_close((halves(None, 0) + halves(None, 1)) / 2, whole(None))
    assert not torch.allclose(halves(None, 0), halves(None, 1))
    assert torch.equal(halves(None, 0), halves(None, 2))
    assert torch.equal(halves.energy(None), whole.energy(None))


def test_on_the_whole_grid_descriptors_say_the_same_as_on_half_of_it():
    """The same force and information per length of the images, for each voxel."""
    moving, fixed, truth = deformed((16, 20, 24), 1.0, seed=4)
    settings = VariationalSettings(descriptor_weight=2.0)
    half, whole = (descriptors(fixed, moving, replace(settings, stride=n), Level(1, 1, 8, 0)) for n in (2, 1))
    coarse = half(fields.resize(truth, (8, 10, 12)))
    fine = F.avg_pool3d(whole(truth), 2)
    (fine_information, fine_force), (information, force) = solver.parts(fine), solver.parts(coarse)
    torch.testing.assert_close(4 * fine_information, information)
    torch.testing.assert_close(2 * fine_force, force)
    torch.testing.assert_close(half.energy(None), whole.energy(None))


def test_descriptors_that_reach_beyond_what_was_measured_say_nothing():
    moving, fixed, _ = deformed((16, 16, 16), 1.0, seed=1)
    here, there = (torch.ones(1, 1, 16, 16, 16, dtype=torch.bool) for _ in range(2))
    here[..., :4] = False
    settings = VariationalSettings(descriptor_weight=2.0)
    normal = descriptors(fixed, moving, settings, settings.levels[-1], (here, there))(None)
    assert (normal[..., :3] == 0).all() and normal[..., 3:].abs().sum() > 0  # two voxels of the images are one


def test_without_weight_there_are_no_descriptors():
    moving, fixed, _ = deformed((16, 24, 16), 1.0, seed=2)
    without = replace(DEFAULT, steps=9, descriptor_weight=0.0)
    nowhere = replace(
        without, descriptor_weight=5.0, levels=tuple(replace(level, descriptors=0.0) for level in DEFAULT.levels)
    )
    everywhere = replace(without, descriptor_weight=5.0)
    assert torch.equal(register(fixed, moving, without), register(fixed, moving, nowhere))
    assert not torch.equal(register(fixed, moving, without), register(fixed, moving, everywhere))


def test_the_swapped_pair_with_descriptors_takes_the_opposite_step():
    moving, fixed, _ = deformed((16, 24, 16), 1.0, seed=3)
    settings = VariationalSettings(descriptor_weight=5.0)
    level = settings.levels[-1]
    forward, backward = (
        Equations(*pair, settings, level, None, [descriptors(*pair, settings, level)])(None)
        for pair in ((fixed, moving), (moving, fixed))
    )
    opposite(forward, backward, atol=1e-3, rtol=1e-4)
