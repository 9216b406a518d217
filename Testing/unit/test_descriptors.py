"""MIND-SSC: the same in any contrast, known only where its surroundings were measured."""

import torch
from textures import other_contrast, textured

from DivRegNetLib.core import fields
from DivRegNetLib.similarity.descriptors import CHANNELS, believable, mind_ssc


def test_descriptors_have_twelve_channels_from_0_to_1_and_the_largest_is_1():
    found = mind_ssc(textured((20, 24, 28)))
    assert found.shape == (1, CHANNELS, 20, 24, 28)
    assert found.min() >= 0
    assert torch.equal(found.amax(1), torch.ones(1, 20, 24, 28))


def test_descriptors_do_not_change_with_the_scale_of_intensities_nor_with_their_sign():
    image = textured((20, 24, 28))
    for other in (5 * image + 3, 1 - image):
        torch.testing.assert_close(mind_ssc(other), mind_ssc(image), atol=1e-4, rtol=0)


def test_a_channel_compares_two_neighbors_that_are_not_opposite():
    image = torch.rand(1, 1, 9, 9, 9, generator=torch.Generator().manual_seed(0))
    found = mind_ssc(image, radius=0, dilation=2)
    steps = [tuple(sign * 2 if a == axis else 0 for a in range(3)) for axis in range(3) for sign in (1, -1)]
    values = {step: image[0, 0, 4 + step[0], 4 + step[1], 4 + step[2]] for step in steps}
    expected = torch.stack([
        (values[a] - values[b]) ** 2
        for i, a in enumerate(steps)
        for b in steps[i + 1 :]
        if any(p + q for p, q in zip(a, b, strict=True))
    ])  # fmt: skip
    assert len(expected) == CHANNELS
    expected = expected - expected.min()
    expected = (-expected / expected.mean()).exp()
    torch.testing.assert_close(found[0, :, 4, 4, 4].sort().values, expected.sort().values)


def test_the_distance_to_another_contrast_grows_with_every_voxel_of_shift():
    image = textured((32, 32, 32))
    fixed, other = mind_ssc(image), other_contrast(image)
    apart = [(fixed - mind_ssc(fields.shifted(other, s, 0, 0))).square().mean().item() for s in (0, 1, 2, 3)]
    assert apart == sorted(apart)
    assert apart[2] > 1.5 * apart[0]


def test_what_was_not_measured_reaches_no_further_than_radius_and_dilation():
    image, valid = textured((24, 24, 24)), torch.ones(1, 1, 24, 24, 24, dtype=torch.bool)
    valid[..., :6] = False
    other = torch.where(valid, image, 7.0)
    known = believable(valid, radius=1, dilation=2)
    assert known[..., 9:].all() and not known[..., :9].any()
    usual = mind_ssc(image, dilation=2, valid=known)
    torch.testing.assert_close(
        mind_ssc(other, dilation=2, valid=known)[known.expand_as(usual)], usual[known.expand_as(usual)]
    )


def test_a_flat_image_has_finite_descriptors():
    assert mind_ssc(torch.zeros(1, 1, 8, 8, 8)).isfinite().all()
