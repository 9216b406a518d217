"""Gauss-Newton terms of features: they are the derivative of their energy, fair to both images, and bring like to like."""

import pytest
import torch

from DivRegNetLib.core import fields
from DivRegNetLib.registration.variational.features import FeatureEquations, Features, normal_equations, resized
from DivRegNetLib.registration.variational.method import register
from DivRegNetLib.registration.variational.settings import VariationalSettings


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return fields.smooth(noise, 2.0) * 4


def test_the_force_is_minus_the_derivative_of_the_energy():
    features, direction = smooth(1, 3, 16, 18, 20), torch.tensor([0.7, -0.4, 0.2])
    shift = direction.view(1, 3, 1, 1, 1).expand(1, 3, 16, 18, 20)
    inner = (..., *[slice(4, -4)] * 3)

    def energy(length: float) -> float:
        warped = fields.warp(features, 0.5 * shift + length * shift)
        return 10 / 2 * (features - warped).square().sum(1)[inner].sum().item()

    normal = normal_equations(features, fields.warp(features, 0.5 * shift), 10.0)
    along = (normal[0, 6:] * direction.view(3, 1, 1, 1)).sum(0)[inner].sum().item()
    derivative = (energy(1e-2) - energy(-1e-2)) / 2e-2
    assert -along == pytest.approx(derivative, rel=0.1)


def test_the_swapped_pair_has_the_opposite_force_and_the_same_information():
    fixed, moving = smooth(2, 4, 8, 9, 10), smooth(2, 4, 8, 9, 10, seed=1)
    forward, backward = normal_equations(fixed, moving, 3.0), normal_equations(moving, fixed, 3.0)
    torch.testing.assert_close(forward[:, :6], backward[:, :6])
    torch.testing.assert_close(forward[:, 6:], -backward[:, 6:])


def test_information_is_positive_semidefinite_and_in_proportion_to_the_weight():
    fixed, moving = smooth(1, 2, 8, 9, 10), smooth(1, 2, 8, 9, 10, seed=1)
    one, ten = (normal_equations(fixed, moving, w) for w in (1.0, 10.0))
    torch.testing.assert_close(ten, 10 * one)
    xx, yy, zz, xy, xz, yz = one[0, :6].flatten(1)
    matrix = torch.stack((xx, xy, xz, xy, yy, yz, xz, yz, zz), -1).view(-1, 3, 3)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-5


def test_what_was_not_measured_in_both_images_says_nothing():
    fixed, moving = smooth(1, 2, 8, 8, 8), smooth(1, 2, 8, 8, 8, seed=1)
    here, there = (torch.ones(1, 1, 8, 8, 8, dtype=torch.bool) for _ in range(2))
    here[..., :3], there[:, :, 6:] = False, False
    terms = FeatureEquations(Features(fixed, moving, 5.0), (8, 8, 8), (here, there))
    normal, energy = terms(None), terms.energy(None)
    both = (here & there)[:, 0]
    assert (normal[0, :, ~both[0]] == 0).all() and normal[0, :, both[0]].abs().sum() > 0
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
    found = register(flat, flat, VariationalSettings(), features=[features])
    found = fields.upsample(found, 2, (32, 32, 32))
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
