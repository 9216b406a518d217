"""Models with a class network: what the network sees in a registration is what it saw in training."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib import models
from DivRegNetLib.core.device import pick_device
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.options import Options
from DivRegNetLib.registration import pipeline
from DivRegNetLib.registration.resources import Resources
from DivRegNetLib.similarity import classes
from DivRegNetLib.similarity.classes import ClassNet, ClassNetConfig


@pytest.fixture(params=[False, True], ids=["coarse", "subvoxel"])
def model(tiny_model, request, monkeypatch) -> models.Model:
    """The tiny model with a class network of random weights, which registers by the variational method. Its classes take part
    however little the images agree on them."""
    monkeypatch.setattr(classes, "AGREEMENT", -1.0)
    loaded = models.load(tiny_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ClassNet(ClassNetConfig(3, (4, 6), stride=2, subvoxel=request.param)).eval().requires_grad_(False)
        torch.nn.init.normal_(net.head.weight)
    names = ["background", "one", "two"]
    card = replace(loaded.card, methods=["variational"], classnet=net.config.as_dict(), classes=names)
    return replace(loaded, card=card, classnet=net)


def stored(image: sitk.Image, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> sitk.Image:
    """The same voxels at the same places, stored along other axes and in other directions."""
    return sitk.Flip(sitk.PermuteAxes(image, axes), flips)


def sampled(fixed: sitk.Image, moving: sitk.Image, model: models.Model) -> pipeline.Sampled:
    options = Options.of(device="cpu", align="none")
    inputs = pipeline.check(fixed, moving, None, None, options)
    resources = Resources.choose(options, inputs.fixed, inputs.moving, model)
    assert resources.device == pick_device("cpu")
    return pipeline.sample(inputs, np.eye(4), resources, progress=lambda fraction: None)


@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, -1, 1, 0, 0, 0, -1, 0)])
def test_the_network_sees_canonical_axes_however_a_volume_is_stored(model, paint, direction):
    grid = Grid.of(paint_on(paint, direction))
    fixed, moving = paint(grid), paint(grid)
    other = stored(moving, (2, 0, 1), (True, False, True))
    same, turned = (sampled(fixed, m, model).images for m in (moving, other))
    torch.testing.assert_close(turned.moving, same.moving, atol=1e-4, rtol=0)
    torch.testing.assert_close(turned.classes.moving, same.classes.moving, atol=1e-2, rtol=0)
    assert same.classes.moving.std() > 0.01
    # Axes of the working grid are those of patient space, whatever the fixed image's are.
    assert np.allclose(
        sampled(stored(fixed, (1, 2, 0), (False, True, False)), moving, model).grid.direction, np.eye(3).ravel()
    )


def paint_on(paint, direction) -> sitk.Image:
    image = sitk.Image((30, 26, 28), sitk.sitkFloat32)
    image.SetSpacing((6.0, 6.5, 7.0))
    image.SetDirection(direction)
    middle = np.array(image.TransformContinuousIndexToPhysicalPoint([14.5, 12.5, 13.5]))
    image.SetOrigin((np.array(image.GetOrigin()) - middle).tolist())
    return image


def test_outside_the_moving_image_and_its_mask_is_background(model, paint):
    """What a smaller moving image does not cover on the working grid, as it is padding to the network."""
    grid = Grid.of(paint_on(paint, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    fixed = paint(grid)
    images = sampled(fixed, fixed[4:22, 3:20, 5:21], model).images
    outside = ~images.valid[1]
    seen = torch.nn.functional.interpolate(images.classes.moving, size=outside.shape[2:], mode="nearest")
    inner = torch.nn.functional.avg_pool3d(outside.float(), 3, 1, 1) == 1
    assert inner.any() and (seen[:, :1][inner] == 1).all()
    assert (images.classes.fixed[:, 1:] > 0).any()


def test_a_network_of_crops_is_not_asked_about_larger_fields_of_view(model, paint):
    fixed = paint(Grid.of(paint_on(paint, (1, 0, 0, 0, 1, 0, 0, 0, 1))))  # 30 * 26 * 28 voxels of 273 mm^3: 5963 ml
    for ml, asked in ((20_000.0, True), (1_000.0, False), (0.0, True)):
        of_crops = replace(model, card=replace(model.card, classes_up_to_ml=ml))
        assert (sampled(fixed, fixed, of_crops).images.classes is not None) == asked
