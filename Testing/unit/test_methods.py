"""Methods one after the other: order, grids, masks, progress."""

from dataclasses import replace

import pytest
import torch
from textures import deformed, textured

from DivRegNetLib.core import fields
from DivRegNetLib.errors import Cancelled
from DivRegNetLib.registration import methods
from DivRegNetLib.registration.methods import Images, deform, refine
from DivRegNetLib.registration.regnet import RegNet, RegNetConfig
from DivRegNetLib.registration.variational import FAST as DEFAULT
from DivRegNetLib.registration.variational import REFINEMENT
from DivRegNetLib.registration.variational.features import Features
from DivRegNetLib.registration.variational.method import register
from DivRegNetLib.similarity.classes import ClassNetConfig

SHAPE = (24, 32, 20)
BOTH = ("variational", "regnet")
FEW = replace(DEFAULT, steps=4)


@pytest.fixture
def images() -> Images:
    moving, fixed, _ = deformed(SHAPE, 1.5, seed=0)
    return Images(fixed, moving)


def network(**config) -> RegNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = RegNet(RegNetConfig(channels=(2, 2, 2, 2), **config))
        torch.nn.init.normal_(net.head.weight, std=0.05)
    return net.eval().requires_grad_(False)


def masks() -> list[torch.Tensor]:
    mask = torch.zeros(2, 1, 1, *SHAPE, dtype=torch.bool)
    mask[0, ..., 4:-4], mask[1, ..., 4:-6, :] = True, True
    return list(mask)


def test_one_method_alone_is_that_method(images):
    variational = deform(images, ("variational",), FEW, None)
    alone = fields.upsample(register(images.fixed, images.moving, FEW), 2, SHAPE)
    torch.testing.assert_close(variational, alone)
    net = network()
    torch.testing.assert_close(deform(images, ("regnet",), FEW, net), net(images.fixed, images.moving))


def test_each_method_starts_where_the_one_before_ended(images):
    net = network(guided=True)
    start = register(images.fixed, images.moving, FEW)
    torch.testing.assert_close(deform(images, BOTH, FEW, net), net(images.fixed, images.moving, start))


@pytest.mark.parametrize("names", [BOTH, BOTH[::-1], ("variational", "variational")])
@pytest.mark.parametrize("strides", [(2, 1), (1, 2), (2, 2)])
def test_any_order_and_any_output_grid(images, names, strides):
    settings = replace(FEW, stride=strides[0])
    displacement = deform(images, names, settings, network(stride=strides[1]))
    assert displacement.shape == (1, 3, *SHAPE) and displacement.is_contiguous()
    assert displacement.abs().max() > 0.3


def test_progress_rises_over_all_methods_and_can_cancel(images):
    reported = []
    deform(images, BOTH, FEW, network(), reported.append)
    assert reported == sorted(reported) and reported[-1] == 1 and len(reported) >= 6

    def cancel(fraction: float) -> None:
        raise Cancelled("enough")

    for names in (BOTH, ("regnet",)):
        with pytest.raises(Cancelled):
            deform(images, names, FEW, network(), cancel)
    with pytest.raises(Cancelled):
        refine(images, torch.zeros(1, 3, *SHAPE), REFINEMENT, cancel)


@pytest.mark.parametrize("names", [(), ("newton",), ("variational", "")])
def test_unknown_methods_are_refused(images, names):
    with pytest.raises(ValueError, match="methods: one or more of discrete, variational, regnet"):
        deform(images, names, FEW, network())


def test_regnet_needs_a_network(images):
    with pytest.raises(ValueError, match="needs a network"):
        deform(images, BOTH, FEW, None)


# Masks


def test_images_are_multiplied_by_their_masks_for_the_first_methods(images):
    """What lies outside is 0 and counted as such."""
    masked = replace(images, fixed_mask=masks()[0], moving_mask=masks()[1])
    black = Images(images.fixed * masks()[0], images.moving * masks()[1])
    for names, net in ((("variational",), None), (("regnet",), network()), (BOTH, network(guided=True))):
        assert torch.equal(deform(masked, names, FEW, net), deform(black, names, FEW, net))


@pytest.mark.parametrize("measured", [True, False])
def test_excluding_masks_are_ignored_voxels(images, measured):
    valid = tuple(torch.ones(1, 1, *SHAPE, dtype=torch.bool) for _ in range(2)) if measured else None
    masked = replace(images, fixed_mask=masks()[0], moving_mask=masks()[1], valid=valid)
    outside = replace(images, valid=tuple(masks()))
    settings, start = replace(REFINEMENT, steps=4), torch.zeros(1, 3, *SHAPE)
    assert torch.equal(refine(masked, start, settings), refine(outside, start, settings))
    excluding = replace(FEW, masks="exclude")
    assert torch.equal(deform(masked, ("variational",), excluding, None), deform(outside, ("variational",), FEW, None))


# Refinement


def test_refinement_gives_back_the_very_displacement_where_it_gains_nothing():
    image = textured(SHAPE, 15)
    displacement = torch.full((1, 3, *SHAPE), 0.123)
    images = Images(image, image)
    assert refine(images, displacement, replace(REFINEMENT, min_gain=1e6)) is displacement


@pytest.mark.parametrize("shape", [(24, 32, 20), (23, 31, 21)])
def test_refinement_takes_images_of_any_size(shape):
    moving, fixed, _ = deformed(shape, 1.5, seed=0)
    displacement = refine(Images(fixed, moving), torch.zeros(1, 3, *shape), replace(REFINEMENT, steps=8))
    assert displacement.shape == (1, 3, *shape) and displacement.abs().max() > 0.3


def test_the_methods_are_those_that_a_card_may_name():
    assert list(methods.METHODS) == ["discrete", *BOTH]


def test_the_variational_method_goes_on_from_a_discrete_start(images):
    shape = (48, 52, 56)
    moving, fixed, _ = deformed(shape, 3.0, seed=0)
    pair = Images(fixed, moving)
    start = fields.coarsen(methods.discrete_start(pair), FEW.output_stride, FEW.multiple)
    assert start.abs().max() > 1
    expected = fields.upsample(register(fixed, moving, FEW, start=start), 2, shape)
    torch.testing.assert_close(deform(pair, ("discrete", "variational"), FEW, None), expected)
    alone = deform(pair, ("discrete",), FEW, None)
    torch.testing.assert_close(alone, fields.upsample(start, 2, shape))


def ball(center: tuple[float, float, float]) -> torch.Tensor:
    """A bright ball of 6 voxels' radius at x, y, z on a dark ground."""
    at = fields.identity(SHAPE, like=torch.empty(0)) - torch.tensor(center).view(1, 3, 1, 1, 1)
    return torch.sigmoid(2 * (6 - fields.length(at)))


class BrightIsOne(torch.nn.Module):
    """Stands for a class network that takes what is bright for class 1."""

    config = ClassNetConfig(classes=2)

    def probabilities(self, image, inside):
        bright = image if inside is None else image * inside
        return torch.cat((1 - bright, bright), 1)


def test_classes_bring_together_what_intensities_do_not():
    """Images in which nothing can be told from intensities, as their histograms are of noise; the network can."""
    balls = ball((8.0, 16.0, 12.0)), ball((12.0, 15.0, 12.0))
    noise = torch.rand(2, 1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    classes = methods.with_classes(Images(*balls), BrightIsOne()).classes
    pair, settings = Images(*noise, classes=classes), replace(DEFAULT, class_weight=300.0)

    def apart(displacement) -> float:
        return (fields.warp(balls[1], displacement) - balls[0]).abs().mean().item()

    still = apart(torch.zeros(1, 3, *SHAPE))
    assert apart(deform(pair, ("variational",), settings, None)) < 0.2 * still
    without = deform(pair, ("variational",), replace(settings, class_weight=0.0), None)
    assert torch.equal(without, deform(Images(*noise), ("variational",), settings, None))
    assert apart(without) > 0.5 * still


def test_classes_that_are_unknown_in_both_images_change_nothing_but_the_settings(images):
    """A network that finds nothing in the images: everything is background, which pulls nowhere."""
    nothing = torch.cat((torch.ones(1, 1, *SHAPE), torch.zeros(1, 3, *SHAPE)), 1)
    pair = replace(images, classes=Features(nothing, nothing))
    for window in (0.5, 1.0):
        settings = replace(DEFAULT, class_window=window)
        plain = deform(images, ("variational",), settings.with_classes(), None)
        torch.testing.assert_close(deform(pair, ("variational",), settings, None), plain, atol=1e-4, rtol=0)
    assert settings.with_classes() == settings.with_effort("fast")
    narrow = replace(DEFAULT, class_window=0.5).with_classes()
    assert narrow.first_smoothness.window == 0.5 * DEFAULT.first_smoothness.window


def test_a_class_that_one_image_alone_has_moves_nothing():
    """A network that takes the bright ball of one image for class 1, and finds nothing in the other, which is dark."""
    bright, dark = ball((10.0, 15.0, 12.0)), torch.zeros(1, 1, *SHAPE)
    for pair in (bright, dark), (dark, bright):
        classes = methods.with_classes(Images(*pair), BrightIsOne()).classes
        assert classes is None


def test_noise_instead_of_classes_folds_nothing(images):
    """What a network may see where it knows no anatomy."""
    random = torch.Generator().manual_seed(0)
    noise = [torch.rand(1, 5, *SHAPE, generator=random).mul(9).softmax(1) for _ in range(2)]
    found = deform(replace(images, classes=Features(*noise)), ("variational",), DEFAULT, None)
    assert torch.isfinite(found).all() and fields.jacobian_determinant(found).min() > 0


def test_a_refinement_that_classes_do_not_gain_by_is_undone():
    """Classes that fit already hold images back which only look as if they were to move."""
    moving, fixed, _ = deformed(SHAPE, 1.5, seed=0)
    one = torch.rand(1, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    start = torch.zeros(1, 3, *SHAPE)
    held = Images(fixed, moving, classes=Features(one, one))
    assert not torch.equal(refine(Images(fixed, moving), start, REFINEMENT), start)
    assert torch.equal(refine(held, start, replace(REFINEMENT, class_weight=1e5)), start)


def test_outside_masks_and_fields_of_view_everything_is_background():
    image, (mask, _) = torch.ones(1, 1, *SHAPE), masks()
    other = mask.clone()
    other[..., :4, :] = False
    valid = torch.ones(1, 1, *SHAPE, dtype=torch.bool), other
    pair = methods.with_classes(Images(image, image, mask, None, valid), BrightIsOne())
    assert torch.equal(pair.classes.fixed[:, 1:] > 0, mask) and torch.equal(pair.classes.moving[:, 1:] > 0, other)
