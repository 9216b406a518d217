"""ClassNet: what it takes and gives, and that what lies outside the field of view is background."""

import pytest
import torch

from DivRegNetLib.similarity.classes import SHARED, ClassNet, ClassNetConfig, are_known, shared


def network(**values) -> ClassNet:
    torch.manual_seed(0)
    return ClassNet(ClassNetConfig(**{"classes": 4, "channels": (4, 6, 8)} | values)).eval()


@pytest.mark.parametrize("stride", [1, 2])
def test_probabilities_of_any_shape_add_up_to_one(stride):
    image = torch.rand(2, 1, 13, 22, 9)
    probable = network(stride=stride).probabilities(image)
    assert probable.shape == (2, 4, *(-(-n // stride) for n in image.shape[2:]))
    assert probable.dtype == torch.float32 and probable.min() >= 0
    torch.testing.assert_close(probable.sum(1), torch.ones_like(probable[:, 0]))


@pytest.mark.parametrize(("stride", "subvoxel"), [(1, False), (2, False), (2, True)])
def test_outside_the_field_of_view_is_background_whatever_the_image_holds_there(stride, subvoxel):
    inside = torch.ones(1, 1, 16, 16, 16, dtype=torch.bool)
    inside[..., :6] = False
    image, net = torch.rand(1, 1, 16, 16, 16), network(stride=stride, subvoxel=subvoxel)
    probable, stride = net.probabilities(image, inside), net.config.output_stride
    assert (probable[:, 0, ..., : 6 // stride] == 1).all() and (probable[:, 1:, ..., : 6 // stride] == 0).all()
    assert torch.equal(probable, net.probabilities(torch.where(inside, image, 7.0), inside))


def test_a_cell_half_outside_is_half_background():
    inside = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    inside[..., :1] = False
    probable = network(stride=2).probabilities(torch.rand(1, 1, 8, 8, 8), inside)
    assert (probable[:, 0, ..., 0] >= 0.5).all()


def test_the_network_moves_with_the_image():
    """A shift by what the deepest level halves shifts the probabilities: no half voxel is lost on the way."""
    blob = torch.zeros(1, 1, 64, 64, 64)
    blob[..., 24:33, 22:34, 25:30] = torch.rand(9, 12, 5)
    net = network(stride=2, channels=(4, 6))
    here, there = (net.probabilities(x) for x in (blob, blob.roll((4, -4, 8), (2, 3, 4))))
    middle = (..., *[slice(10, 22)] * 3)
    torch.testing.assert_close(here.roll((2, -2, 4), (2, 3, 4))[middle], there[middle], atol=1e-3, rtol=0)


def test_with_subvoxels_the_class_of_every_voxel_is_told_where_it_lies():
    """Of features at every second voxel: the outputs for the eight voxels of a cube lie as these do."""
    net = network(stride=2, subvoxel=True)
    image = torch.rand(2, 1, 13, 22, 9)
    probable = net.probabilities(image)
    assert probable.shape == (2, 4, 13, 22, 9)
    torch.testing.assert_close(probable.sum(1), torch.ones_like(probable[:, 0]))
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.arange(32.0))
        logits = net(torch.rand(1, 1, 32, 32, 32))
    corner = torch.arange(8.0).view(2, 2, 2)
    for number in range(4):
        assert torch.equal(logits[0, number, 6:8, 10:12, 20:22], 8 * number + corner)


def test_classes_fade_where_one_image_has_next_to_none_of_them():
    volumes = torch.tensor([[0.2, 0.3, 0.2], [0.1, 0.3 * SHARED / 2, 0.0]])
    fixed, moving = (torch.cat((1 - v.sum()[None], v)).view(1, 4, 1, 1, 1).expand(1, 4, 6, 6, 6) for v in volumes)
    now = shared(fixed, moving)
    for before, after in zip((fixed, moving), now, strict=True):
        torch.testing.assert_close(after.sum(1), torch.ones(1, 6, 6, 6))
        expected = before[:, 1:] * torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1, 1)
        torch.testing.assert_close(after[:, 1:], expected)
    nothing = torch.tensor([1.0, 0, 0, 0]).view(1, 4, 1, 1, 1).expand(1, 4, 6, 6, 6)
    assert all(torch.equal(x, nothing) for x in shared(nothing, nothing))


def test_its_configuration_survives_json():
    config = ClassNetConfig(classes=3, channels=(2, 3), stride=2)
    assert ClassNetConfig(**config.as_dict()) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"classes": 1}, "2 to 256 classes"),
        ({"stride": 3}, "stride is 1"),
        ({"channels": (4,)}, "2 to 6 levels"),
        ({"channels": (4, 0)}, "1 to 1024 channels"),
        ({"classes": 2.0}, "whole numbers"),
        ({"stride": True}, "whole numbers"),
        ({"subvoxel": 1}, "true or false"),
    ],
)
def test_a_configuration_that_cannot_be_says_why(values, said):
    with pytest.raises(ValueError, match=said):
        ClassNetConfig(**{"classes": 4} | values)


def half(shape, axis: int) -> torch.Tensor:
    """(1, 2, D, H, W): class 1 in one half of the voxels."""
    one = torch.zeros(1, 1, *shape)
    one.narrow(axis + 2, 0, shape[axis] // 2).fill_(1)
    return torch.cat((1 - one, one), 1)


def test_classes_are_known_where_both_images_agree_on_them_by_more_than_chance():
    shape = (8, 10, 12)
    same, across = half(shape, 0), half(shape, 1)
    assert are_known(same, same) and not are_known(same, across)  # the halves overlap as often as by chance
    # Cohen's kappa of a half and itself, of which some of the voxels are taken at random for the other class: 1 - 2 * share.
    for wrong, known in ((0.25, True), (0.35, False)):
        flipped = (1 - wrong) * same + wrong * same.flip(1)
        assert are_known(same, flipped) == known
    nothing = torch.cat((torch.ones(1, 1, *shape), torch.zeros(1, 1, *shape)), 1)
    assert not are_known(nothing, nothing)
