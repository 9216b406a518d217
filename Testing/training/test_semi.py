"""FFD+SEMI: local mutual information against its definition, and known deformations."""

import itertools
import math

import pytest
import torch

from DivRegNetLib.core import fields
from DivRegNetLib.similarity.mutual_information import parzen_mi
from training.data.free_form import ffd
from training.data.randomness import Random
from training.experiments.semi import SemiSettings, local_mi, register

SIDES = (28, 36, 32)
QUICK = SemiSettings(shrink=(2, 1), steps=(30, 15))


def blobs(shape=SIDES, seed: int = 0) -> torch.Tensor:
    """Smooth blobs of about six voxels that fill [0, 1], (1, 1, D, H, W)."""
    image = ffd(shape, 6, 1, Random(seed))[:, :1]
    return (image - image.min()) / (image.max() - image.min())


def tissues(shape=SIDES, seed: int = 0) -> torch.Tensor:
    """Five tissues with edges about a voxel wide, as anatomy has; 0 to 1, (1, 1, D, H, W)."""
    image = blobs(shape, seed)
    image = (image - image.mean()) / image.std()
    return sum((8 * (image - edge)).sigmoid() for edge in (-1.2, -0.3, 0.5, 1.2)) / 4


def recolor(image: torch.Tensor) -> torch.Tensor:
    """Another contrast: dark, medium and bright become dark, bright and gray."""
    return 0.8 * (math.pi * image).sin() + 0.2 * image


def shifted(image: torch.Tensor, voxels: float, component: int = 0) -> torch.Tensor:
    shift = torch.zeros(1, 3, *image.shape[2:])
    shift[:, component] = voxels
    return fields.warp(image, shift)


# Local MI


def spline(distance: float) -> float:
    d = abs(distance)
    return 2 / 3 - d**2 + d**3 / 2 if d < 1 else max(2 - d, 0) ** 3 / 6


def defined_local_mi(fixed: torch.Tensor, moving: torch.Tensor, window: int, bins: int) -> float:
    """Window after window, voxel after voxel along each axis, as the definition says."""
    f, m = (x[0, 0] * (bins - 3) + 1 for x in (fixed, moving))
    one_bin = torch.nn.functional.one_hot(f.round().long(), bins).double()
    distances = (m[..., None] - torch.arange(bins)).flatten().tolist()
    parzen = torch.tensor([spline(d) for d in distances], dtype=torch.float64).view(*m.shape, bins)
    total, mass = 0.0, 0.0
    weights = [
        [
            torch.tensor([spline((v - center) / window) for v in range(n)])
            for center in range(-window, n + 2 * window, window)
        ]
        for n in f.shape
    ]
    for z, y, x in itertools.product(*weights):
        kernel = z[:, None, None] * y[:, None] * x
        joint = (kernel[..., None] * one_bin).flatten(0, 2).T @ parzen.flatten(0, 2)
        if joint.sum() > 0:
            p = joint / joint.sum()
            ratio = p / (p.sum(0) * p.sum(1, keepdim=True)).clamp_min(1e-300)
            total += joint.sum().item() * torch.special.xlogy(p, ratio.clamp_min(1e-300)).sum().item()
            mass += joint.sum().item()
    assert mass == pytest.approx(f.numel())  # the windows' splines add up to one
    return total / mass


def test_local_mi_is_the_mean_mi_of_spline_windows():
    fixed, moving = blobs((9, 11, 10), seed=0), blobs((9, 11, 10), seed=1)
    assert local_mi(fixed, moving, window=4, bins=8).item() == pytest.approx(
        defined_local_mi(fixed, moving, 4, 8), rel=1e-4
    )


def test_blocks_approximate_wide_windows():
    fixed, moving = blobs((20, 26, 22)), shifted(recolor(blobs((20, 26, 22))), 1)
    assert local_mi(fixed, moving, window=12, bins=16).item() == pytest.approx(
        defined_local_mi(fixed, moving, 12, 16), rel=0.02
    )


@pytest.mark.parametrize("voxels", [0, 1, 3])
def test_one_window_that_covers_everything_gives_the_mi_of_the_whole_images(voxels):
    """For distinct fixed values the spread of a value over bins does not matter, so both are the same number."""
    fixed = (4 * blobs()).round() / 4
    moving = shifted(recolor(blobs()), voxels)
    moving = (moving - moving.min()) / (moving.max() - moving.min())
    whole = parzen_mi(fixed, moving, bins=32).item()
    assert local_mi(fixed, moving, window=math.inf, bins=32).item() == pytest.approx(whole, rel=1e-4)


def test_local_mi_has_the_right_gradient():
    generator = torch.Generator().manual_seed(0)
    fixed, moving = 0.05 + 0.9 * torch.rand(2, 1, 1, 3, 4, 3, generator=generator, dtype=torch.float64)
    moving.requires_grad_()
    for window in (2.0, math.inf):
        assert torch.autograd.gradcheck(lambda m, w=window: local_mi(fixed, m, window=w, bins=6), moving)


def test_local_mi_falls_with_growing_translation_of_another_contrast():
    fixed = blobs((24, 28, 26))
    for component in range(3):
        for sign in (-1, 1):
            curve = [local_mi(fixed, shifted(recolor(fixed), sign * n, component), window=8).item() for n in range(4)]
            assert curve == sorted(curve, reverse=True), curve
            assert curve[0] > 1.3 * curve[-1], curve


def test_a_bias_field_costs_local_mi_less_than_global_mi():
    """The difference between aligned and shifted by three voxels, with and without a bias field in the moving image."""
    fixed = blobs((40, 40, 40))
    moving = recolor(fixed)
    bias = torch.linspace(0.2, 1, 40)

    def margin(similarity, factor) -> float:
        aligned, apart = (similarity(fixed, shifted(moving, n) * factor).item() for n in (0, 3))
        return aligned - apart

    kept = {
        name: margin(similarity, bias) / margin(similarity, 1)
        for name, similarity in {
            "global": lambda f, m: parzen_mi(f, m),
            "local": lambda f, m: local_mi(f, m, window=8),
        }.items()
    }
    assert kept["local"] > 1.3 * kept["global"], kept


def test_intensities_outside_the_range_are_clamped():
    fixed, moving = blobs((8, 8, 8), 0), blobs((8, 8, 8), 1)
    beyond = 3 * moving - 1
    torch.testing.assert_close(local_mi(fixed, beyond, window=4), local_mi(fixed, beyond.clamp(0, 1), window=4))


def test_local_mi_refuses_few_bins_and_unlike_shapes():
    fixed = blobs((6, 6, 6))
    with pytest.raises(ValueError, match="at least 4 bins"):
        local_mi(fixed, fixed, window=4, bins=3)
    with pytest.raises(ValueError, match="shape"):
        local_mi(fixed, fixed[..., :-1], window=4)


# Registration


def test_a_known_deformation_between_two_contrasts_is_found_to_a_fraction_of_a_voxel():
    truth = ffd(SIDES, 12, 2.5, Random(4))
    image = tissues()
    found = register(fields.warp(image, truth), recolor(image), QUICK)
    assert found.shape == (1, 3, *SIDES)
    inside = (..., slice(4, -4), slice(4, -4), slice(4, -4))
    before, after = (x[inside].norm(dim=1).mean().item() for x in (truth, found - truth))
    assert before > 1
    assert after < 0.25, after
    assert after < before / 5
    assert (fields.jacobian_determinant(found) > 0).all()


@pytest.mark.parametrize("contrast", [lambda x: x, recolor])
def test_aligned_images_stay_where_they_are(contrast):
    image = tissues()
    assert register(image, contrast(image), QUICK).norm(dim=1).mean() < 0.2


def test_more_bending_weight_gives_a_smoother_field():
    image = tissues((24, 28, 26))
    moving = recolor(fields.warp(image, ffd((24, 28, 26), 12, 2.5, Random(3))))
    found = [register(image, moving, SemiSettings(shrink=(1,), steps=(15,), bending=b)) for b in (1.0, 100.0)]
    loose, stiff = (fields.bending(displacement).item() for displacement in found)
    assert stiff < 0.5 * loose


def test_progress_rises_to_one_and_may_cancel():
    image = tissues((12, 14, 13))
    seen = []
    register(image, image, SemiSettings(shrink=(2, 1), steps=(3, 2)), seen.append)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])

    def cancel(fraction: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        register(image, image, QUICK, cancel)


def test_the_numbers_of_levels_and_steps_must_agree():
    with pytest.raises(ValueError, match="one per level"):
        SemiSettings(shrink=(4, 2, 1), steps=(10, 10))
