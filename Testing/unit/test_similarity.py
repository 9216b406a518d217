"""KLDivNet, Parzen-window MI and LNCC against what is known in closed form."""

import math

import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib.similarity.kldivnet import SHUFFLES, KLDivNet, KLDivNetConfig, donsker_varadhan, patches
from DivRegNetLib.similarity.lncc import lncc
from DivRegNetLib.similarity.mutual_information import parzen_mi

SIDES = (24, 32, 28)


def gaussian_pair(correlation: float, seed: int = 0, shape=SIDES) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of independent voxels whose intensities correlate, (1, 1, D, H, W)."""
    a, b = torch.randn(2, 1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    return a, correlation * a + math.sqrt(1 - correlation**2) * b


def gaussian_mi(correlation: float) -> float:
    """Mutual information of two Gaussians, nats."""
    return -0.5 * math.log(1 - correlation**2)


def blocky_pair(correlation: float, seed: int = 0, patch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of Gaussians whose voxels are alike within a patch: each patch is one draw, in both images."""
    pair = gaussian_pair(correlation, seed, (18, 20, 16))
    return tuple(x.repeat_interleave(patch, 2).repeat_interleave(patch, 3).repeat_interleave(patch, 4) for x in pair)


def fitted(
    pair, config: KLDivNetConfig | None = None, *, steps: int = 200, shuffle: str = "patches", seed: int = 0
) -> KLDivNet:
    """D brought to a pair by itself, as in a training's warm-up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = KLDivNet(config or KLDivNetConfig(patch=1))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-net(*pair, samples=3000, shuffle=shuffle, generator=generator)).backward()
        optimizer.step()
    return net.requires_grad_(False)


def judged(net: KLDivNet, pair, shuffle: str = "patches") -> float:
    """S over all patches."""
    return net(*pair, samples=10**6, shuffle=shuffle, generator=torch.Generator().manual_seed(9)).item()


# Donsker-Varadhan bound


def test_the_bound_is_the_mean_minus_the_log_of_the_mean_exponential():
    joint, product = torch.tensor([[0.5, 1.5], [2.0, 4.0]]), torch.tensor([[0.1, -0.3, 0.6], [1.0, 2.0, 0.0]])
    expected = joint.mean(-1) - product.exp().mean(-1).log()
    torch.testing.assert_close(donsker_varadhan(joint, product), expected)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_the_bound_stays_finite_for_huge_values_of_d(value):
    joint = torch.full((5,), value, requires_grad=True)
    product = torch.full((5,), value, requires_grad=True)
    bound = donsker_varadhan(joint, product)
    assert bound.item() == pytest.approx(0, abs=1e-2)
    bound.backward()
    torch.testing.assert_close(joint.grad, torch.full((5,), 0.2))
    torch.testing.assert_close(product.grad, torch.full((5,), -0.2), rtol=1e-3, atol=0)


def test_the_bound_is_computed_in_single_precision_from_half():
    joint = torch.tensor([300.0, 301.0], dtype=torch.float16)
    bound = donsker_varadhan(joint, joint)
    assert bound.dtype == torch.float32
    assert bound.item() == pytest.approx(300.5 - (301 + math.log((1 + math.exp(-1)) / 2)), abs=1e-3)


# KLDivNet


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_a_fitted_kldivnet_bounds_the_mi_of_gaussians_from_below_and_reaches_most_of_it(correlation):
    net = fitted(gaussian_pair(correlation, seed=0))
    unseen = judged(net, gaussian_pair(correlation, seed=1))
    truth = gaussian_mi(correlation)
    assert unseen < truth + 0.02
    assert unseen > 0.9 * truth


def test_a_fitted_kldivnet_finds_nothing_in_independent_images():
    net = fitted(gaussian_pair(0.0, seed=0))
    assert abs(judged(net, gaussian_pair(0.0, seed=1))) < 0.02


def test_s_does_not_change_with_scale_and_offset_of_the_intensities():
    net, (fixed, moving) = KLDivNet(), gaussian_pair(0.8)
    assert judged(net, (fixed, moving)) == pytest.approx(judged(net, (300 + 50 * fixed, 7 * moving - 4)), abs=1e-5)


def test_s_is_the_same_for_the_same_generator_and_a_mean_over_the_batch():
    net = KLDivNet()
    (f1, m1), (f2, m2) = gaussian_pair(0.8, seed=0), gaussian_pair(0.3, seed=1)
    one, two = (net(*p, generator=torch.Generator().manual_seed(3)).item() for p in ((f1, m1), (f2, m2)))
    both = net(torch.cat((f1, f2)), torch.cat((m1, m2)), generator=torch.Generator().manual_seed(3)).item()
    assert both == pytest.approx((one + two) / 2, abs=1e-6)
    assert one == net(f1, m1, generator=torch.Generator().manual_seed(3)).item()


def test_chosen_patches_are_those_of_all():
    image = torch.arange(2 * 5 * 8 * 7.0).view(2, 1, 5, 8, 7)  # a voxel remains at the far end of two axes
    every, chosen = patches(image, 2), torch.tensor([17, 0, 23, 5])
    assert every.shape == (2, 2 * 4 * 3, 8)
    assert torch.equal(every[0, 4], image[0, 0, :2, 2:4, 2:4].flatten())
    assert torch.equal(patches(image, 2, chosen), every[:, chosen])


def test_only_patches_wholly_inside_the_mask_count():
    fixed, moving = (x.clone().requires_grad_() for x in gaussian_pair(0.8, shape=(8, 10, 12)))
    mask = torch.zeros(1, 1, 8, 10, 12, dtype=torch.bool)
    mask[..., 3:8, 2:7, 1:9] = True  # patches of 2: whole ones are 4:8, 2:6, 2:8
    KLDivNet()(fixed, moving, mask=mask).backward()
    whole = torch.zeros_like(mask)
    whole[..., 4:8, 2:6, 2:8] = True
    assert torch.equal(fixed.grad != 0, whole)
    assert torch.equal(moving.grad != 0, whole)


def test_what_lies_outside_the_mask_does_not_change_s():
    net, (fixed, moving) = KLDivNet(), gaussian_pair(0.8)
    mask = torch.zeros(1, 1, *SIDES, dtype=torch.bool)
    mask[..., 4:20, 6:24, 8:20] = True
    disturbed = torch.where(mask, moving, 1e3)
    one, other = (net(fixed, m, mask=mask, generator=torch.Generator().manual_seed(0)) for m in (moving, disturbed))
    assert torch.equal(one, other)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_the_summary_of_the_pair_never_sees_the_half_that_d_is_judged_on(shuffle):
    """Which voxels reach the context, and which reach S by any other way: two halves that share nothing."""
    net = KLDivNet(KLDivNetConfig(channels=8, patch=2, context=4))
    shape = (8, 10, 12)
    fixed, moving = (x.clone().requires_grad_() for x in gaussian_pair(0.8, shape=shape))

    def reached(with_context: bool) -> list[torch.Tensor]:
        contexts = []
        handle = net.summary.register_forward_hook(lambda module, inputs, output: contexts.append(output))
        s = net(fixed, moving, shuffle=shuffle, generator=torch.Generator().manual_seed(0))
        handle.remove()
        target = contexts[0].sum() if with_context else s
        return [g != 0 for g in torch.autograd.grad(target, (fixed, moving))]

    seen = reached(with_context=True)
    with torch.no_grad():
        net.joined[0][0].weight[:, 16:] = 0  # the context's columns: now S depends on what D is judged on alone
    judged_on = reached(with_context=False)
    for summary, rest in zip(seen, judged_on, strict=True):
        assert not (summary & rest).any()
        assert (summary | rest).all()
        assert summary.sum() == rest.sum() == math.prod(shape) // 2


def test_one_conditional_kldivnet_serves_contrasts_that_a_plain_one_cannot():
    """Of two pairs with opposite contrast the average joint distribution is all that a plain D can learn."""
    pairs = tuple(torch.cat(x) for x in zip(gaussian_pair(0.9, seed=0), gaussian_pair(-0.9, seed=1), strict=True))
    plain = fitted(pairs)
    conditional = fitted(pairs, KLDivNetConfig(patch=1, context=8))
    for correlation in (0.9, -0.9):
        unseen = gaussian_pair(correlation, seed=2)
        assert judged(plain, unseen) < 0.65 * gaussian_mi(0.9)
        assert 0.85 * gaussian_mi(0.9) < judged(conditional, unseen) < gaussian_mi(0.9) + 0.05


def test_shuffling_voxels_runs_past_the_mi_of_textured_images_and_shuffling_patches_does_not():
    config = KLDivNetConfig(patch=2)
    pair, unseen = blocky_pair(0.8, seed=0), blocky_pair(0.8, seed=1)
    by_patches = judged(fitted(pair, config, steps=100), unseen)
    voxels = judged(fitted(pair, config, steps=100, shuffle="voxels"), unseen, "voxels")
    assert 0.8 * gaussian_mi(0.8) < by_patches < gaussian_mi(0.8) + 0.05
    assert voxels > gaussian_mi(0.8) + 0.5


def test_patches_of_one_voxel_make_both_shuffles_agree():
    pair = gaussian_pair(0.8)
    net = fitted(pair, steps=100)
    assert judged(net, pair) == pytest.approx(judged(net, pair, "voxels"), abs=0.02)


def test_kldivnet_refuses_what_it_cannot_compare():
    net, (fixed, moving) = KLDivNet(), gaussian_pair(0.5, shape=(8, 8, 8))
    with pytest.raises(ValueError, match="shuffle"):
        net(fixed, moving, shuffle="slices")
    with pytest.raises(ValueError, match="shape"):
        net(fixed, moving[..., :-1])
    mask = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    mask[..., :2, :2, :6] = True
    with pytest.raises(ValueError, match="3 patches"):
        net(fixed, moving, mask=mask)


# Parzen-window MI


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8, -0.8])
def test_parzen_mi_equals_the_mi_of_gaussians(correlation):
    pair = gaussian_pair(correlation, shape=(64, 64, 48))
    assert parzen_mi(*pair, bins=64).item() == pytest.approx(gaussian_mi(correlation), abs=0.02)


def test_parzen_mi_of_a_cubic_spline_window_blurs_as_predicted():
    """The window adds its variance, a third of a squared bin width, to both images."""
    fixed, moving = gaussian_pair(0.9, shape=(64, 64, 48))
    for bins in (16, 32):
        widths = [((x.max() - x.min()) / (bins - 3)).item() for x in (fixed, moving)]
        blurred = 0.9 / math.sqrt(math.prod(1 + w**2 / 3 for w in widths))
        assert parzen_mi(fixed, moving, bins=bins).item() == pytest.approx(gaussian_mi(blurred), abs=0.01)


def test_parzen_mi_has_the_right_gradient():
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([-0.1, 1.1], dtype=torch.float64)  # the range is not part of the gradient: hold it
    fixed, moving = (torch.rand(16, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def value(f, m, normalized):
        f, m = (torch.cat((x, ends)).view(1, 1, 1, 1, -1) for x in (f, m))
        return parzen_mi(f, m, bins=8, normalized=normalized, chunk=5)

    for normalized in (False, True):
        assert torch.autograd.gradcheck(lambda f, m, n=normalized: value(f, m, n), (fixed, moving))


def test_parzen_mi_is_symmetric_and_blind_to_scale_and_offset():
    fixed, moving = (x.double() for x in gaussian_pair(0.7))
    expected = parzen_mi(fixed, moving).item()
    assert parzen_mi(moving, fixed).item() == pytest.approx(expected, rel=1e-9)
    assert parzen_mi(300 + 50 * fixed, -7 * moving).item() == pytest.approx(expected, rel=1e-9)


def test_parzen_mi_in_chunks_is_parzen_mi_with_the_same_gradient():
    values, grads = [], []
    for chunk in (10**6, 1000):
        fixed, moving = (x.double().requires_grad_() for x in gaussian_pair(0.7))
        mi = parzen_mi(fixed, moving, chunk=chunk)
        values.append(mi.item())
        grads.append(torch.autograd.grad(mi, (fixed, moving)))
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    for whole, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_parzen_mi_does_not_keep_bins_times_voxels_for_the_backward_pass():
    fixed, moving = (x.requires_grad_() for x in gaussian_pair(0.7))
    bins, kept = 64, 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        parzen_mi(fixed, moving, bins=bins, chunk=512).backward()
    assert kept < bins * fixed.numel() / 2
    assert moving.grad.abs().max() > 0


def test_parzen_mi_looks_inside_the_mask_alone():
    fixed, moving = gaussian_pair(0.7)
    mask = torch.zeros(1, 1, *SIDES, dtype=torch.bool)
    mask[..., 4:20, 6:24, 8:20] = True
    cropped = (x[..., 4:20, 6:24, 8:20] for x in (fixed, moving))
    assert parzen_mi(fixed, moving, mask=mask).item() == pytest.approx(parzen_mi(*cropped).item(), rel=1e-5)


def test_parzen_mi_of_a_batch_is_the_mean():
    pairs = [gaussian_pair(0.9, seed=0), gaussian_pair(0.2, seed=1)]
    mean = sum(parzen_mi(*p).item() for p in pairs) / 2
    assert parzen_mi(*(torch.cat(x) for x in zip(*pairs, strict=True))).item() == pytest.approx(mean, rel=1e-5)


def test_normalized_mi_is_one_for_independent_and_larger_for_dependent_images():
    assert parzen_mi(*gaussian_pair(0.0), normalized=True).item() == pytest.approx(1, abs=0.01)
    assert 1.1 < parzen_mi(*gaussian_pair(0.95), normalized=True).item() <= 2


def test_parzen_mi_refuses_few_bins_and_unlike_shapes():
    fixed, moving = gaussian_pair(0.5, shape=(4, 4, 4))
    with pytest.raises(ValueError, match="at least 4 bins"):
        parzen_mi(fixed, moving, bins=3)
    with pytest.raises(ValueError, match="shape"):
        parzen_mi(fixed, moving[..., :-1])


# LNCC


def test_lncc_of_linearly_related_images_is_one():
    fixed, _ = gaussian_pair(0.0)
    for moving in (2 * fixed + 100, -0.5 * fixed + 3):
        assert lncc(fixed, moving).item() == pytest.approx(1, abs=1e-3)


def test_lncc_of_unrelated_images_is_what_chance_gives():
    fixed, moving = gaussian_pair(0.0)
    assert lncc(fixed, moving, window=5).item() == pytest.approx(1 / (5**3 - 1), rel=0.35)


def test_lncc_is_a_mean_of_squared_correlations_over_windows():
    fixed, moving = gaussian_pair(0.6, shape=(9, 10, 11))
    mask = torch.zeros(1, 1, 9, 10, 11, dtype=torch.bool)
    mask[..., 4, 5, 6] = True
    window = torch.stack([x[0, 0, 2:7, 3:8, 4:9].flatten() for x in (fixed, moving)])
    expected = torch.corrcoef(window)[0, 1].square().item()
    assert lncc(fixed, moving, window=5, mask=mask).item() == pytest.approx(expected, rel=1e-3)


def test_flat_windows_count_nothing_and_give_finite_gradients():
    fixed, moving = torch.zeros(1, 1, 9, 10, 11), torch.zeros(1, 1, 9, 10, 11, requires_grad=True)
    value = lncc(fixed, moving)
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(moving.grad).all()


@pytest.mark.parametrize("window", [0, 4, -3])
def test_lncc_refuses_a_window_without_a_middle(window):
    with pytest.raises(ValueError, match="odd"):
        lncc(*gaussian_pair(0.5, shape=(4, 4, 4)), window=window)


# The curve of each over growing misalignment


@pytest.mark.parametrize("name", ["kldivnet", "parzen", "parzen normalized", "lncc"])
def test_similarity_of_a_multi_contrast_pair_falls_with_growing_translation(
    name, grid_about, paint, other_contrast, rigid
):
    grid = grid_about((31, -47, 112), (28, 30, 26), (4.0, 4.0, 4.0))

    def tensor(image) -> torch.Tensor:
        return torch.from_numpy(sitk.GetArrayFromImage(image))[None, None]

    fixed, aligned = tensor(paint(grid)), tensor(paint(grid, contrast=other_contrast))
    if name == "kldivnet":
        net = fitted((fixed, aligned), KLDivNetConfig(patch=2), steps=150)
    similarity = {
        "kldivnet": lambda f, m: judged(net, (f, m)),
        "parzen": lambda f, m: parzen_mi(f, m).item(),
        "parzen normalized": lambda f, m: parzen_mi(f, m, normalized=True).item(),
        "lncc": lambda f, m: lncc(f, m).item(),
    }[name]
    for axis in range(3):
        for sign in (-1, 1):
            curve = []
            for millimeters in (0, 3, 6, 10, 15):
                shift = [0.0, 0.0, 0.0]
                shift[axis] = float(sign * millimeters)
                curve.append(similarity(fixed, tensor(paint(grid, rigid((0, 0, 0), shift), other_contrast))))
            assert curve == sorted(curve, reverse=True), curve
            assert curve[0] > curve[-1] + 0.05, curve
