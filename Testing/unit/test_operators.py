"""What a forward pass asks of a GPU: few operations, none that it has to be waited for, and no choice made by the data."""

from dataclasses import replace

import pytest
import torch
from operators import operators
from textures import deformed
from torch.fx.experimental.proxy_tensor import make_fx

from DivRegNetLib import models
from DivRegNetLib.registration import methods
from DivRegNetLib.registration.methods import Images

SHAPE = (48, 48, 48)  # large enough for all levels; the number of operations does not depend on it
MOST_KERNELS = {"variational": 6100, "discrete+variational": 6800, "variational+regnet": 6700}


def images(seed: int, *, masks: bool = False) -> Images:
    moving, fixed, _ = deformed(SHAPE, 1.5, seed=seed)
    measured = torch.ones_like(fixed, dtype=torch.bool)
    measured[..., :3] = False
    mask = torch.zeros_like(measured)
    mask[..., 4:-4, 4:-4, 2:-2] = True
    valid = measured, torch.ones_like(measured)
    return Images(fixed, moving, *((mask, mask) if masks else (None, None)), valid, int(measured.sum()))


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.load(models.DEFAULT)


def deform(model: models.Model, pair: Images, names: str, **settings) -> torch.Tensor:
    return methods.deform(
        pair, tuple(names.split("+")), replace(model.card.variational_settings, **settings), model.regnet
    )


@pytest.mark.parametrize("names", MOST_KERNELS)
def test_a_forward_pass_has_few_operations_and_waits_for_none(model, names):
    pair = images(0, masks=True)
    deform(model, pair, names)  # fills the caches of small matrices
    counted = operators(lambda: deform(model, pair, names))
    assert not counted.waits
    assert 0.9 * MOST_KERNELS[names] < sum(counted.kernels.values()) <= MOST_KERNELS[names]


def test_where_it_is_not_known_how_much_was_measured_that_is_waited_for_once(model):
    pair = replace(images(0), measured=None)
    deform(model, pair, "variational", steps=5)
    counted = operators(lambda: deform(model, pair, "variational", steps=5))
    assert counted.waits == {"_local_scalar_dense": 1}


def test_what_is_waited_for_is_noticed():
    x = torch.arange(4.0)
    assert operators(lambda: x.sum().item()).waits == {"_local_scalar_dense": 1}
    assert operators(lambda: x[x > 2]).waits
    assert operators(lambda: (x > 2).nonzero()).waits
    assert operators(lambda: torch.bincount(x.long())).waits
    assert operators(lambda: x.new_tensor([1.0, 2.0])).waits
    assert not operators(lambda: x[1:] + 2 * x.sum()).waits


@pytest.mark.parametrize("names", ["variational", "variational+regnet"])
def test_the_operations_are_the_same_for_all_images_of_a_shape(model, names):
    """So they can be recorded once, as a CUDA graph is, and played again for other images."""
    first, second = images(1), images(2)

    def run(fixed: torch.Tensor, moving: torch.Tensor, *valid: torch.Tensor) -> torch.Tensor:
        pair = Images(fixed, moving, valid=valid, measured=first.measured)
        return deform(model, pair, names, steps=5, min_voxels=1)

    with torch.no_grad():
        recorded = make_fx(run)(first.fixed, first.moving, *first.valid)
        played = recorded(second.fixed, second.moving, *second.valid)
        torch.testing.assert_close(played, run(second.fixed, second.moving, *second.valid), atol=0, rtol=0)
        assert (played - run(first.fixed, first.moving, *first.valid)).abs().max() > 0.5
