"""RegNet: shapes, what it starts from, normalization, passes, symmetry, configuration."""

from dataclasses import replace

import pytest
import torch

from DivRegNetLib.core import fields
from DivRegNetLib.registration.regnet import RegNet, RegNetConfig, SqueezeExcitation, SwitchableNorm
from DivRegNetLib.registration.variational import DEFAULT
from DivRegNetLib.registration.variational.guidance import guidance
from DivRegNetLib.registration.variational.method import register

TINY = (2, 3, 4, 5)


def pair(shape=(17, 26, 21), batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Two smooth random images, (N, 1, D, H, W), 0 to 1."""
    coarse = torch.rand(2, batch, 1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    return tuple(torch.nn.functional.interpolate(x, size=shape, mode="trilinear") for x in coarse)


def network(head: float | None = None, **config) -> RegNet:
    """A RegNet of fixed random weights; ``head``: standard deviation of the last layer's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = RegNet(RegNetConfig(**{"channels": TINY} | config))
        if head is not None:
            torch.nn.init.normal_(net.head.weight, std=head)
    return net.eval()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("velocity", [True, False])
@pytest.mark.parametrize("shape", [(17, 26, 21), (16, 32, 48), (5, 40, 1)])
def test_any_size_gives_a_field_of_that_size(stride, velocity, shape):
    with torch.no_grad():
        field = network(0.1, stride=stride, velocity=velocity)(*pair(shape, batch=2))
    assert field.shape == (2, 3, *shape)
    assert torch.isfinite(field).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_the_network_predicts_on_its_own_grid(stride):
    with torch.no_grad():
        field = network(stride=stride).predict(*pair((16, 32, 48)))
    assert field.shape == (1, 3, 16 // stride, 32 // stride, 48 // stride)


@pytest.mark.parametrize("velocity", [True, False])
def test_an_untrained_network_is_the_identity(velocity):
    with torch.no_grad():
        assert network(velocity=velocity)(*pair()).abs().max() < 1e-2


def test_half_resolution_fields_are_in_voxels_of_the_images():
    net = network(stride=2, velocity=False)
    torch.nn.init.zeros_(net.head.weight)
    net.head.bias.data = torch.tensor([1.0, -2.0, 0.5])  # voxels of the half-resolution grid
    with torch.no_grad():
        field = net(*pair((17, 26, 21)))
    torch.testing.assert_close(field, torch.tensor([2.0, -4.0, 1.0]).view(1, 3, 1, 1, 1).expand_as(field))


def test_padding_does_not_move_the_field():
    """A side that is no multiple is padded at its far end, so what is known at the near end stays in its place."""
    net = network(0.1, stride=2, velocity=False)
    fixed, moving = pair((32, 32, 32))
    padded = [torch.nn.functional.pad(x[..., :25], (0, 7, 0, 0, 0, 0), mode="replicate") for x in (fixed, moving)]
    with torch.no_grad():
        torch.testing.assert_close(net(fixed[..., :25], moving[..., :25]), net(*padded)[..., :25])


def test_every_parameter_gets_a_gradient():
    net = network(0.1, passes=2).train()
    fixed, moving = pair()
    (fields.warp(moving, net(fixed, moving)) - fixed).square().mean().backward()
    unreached = [n for n, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not unreached
    assert all(p.grad.abs().max() > 0 for n, p in net.named_parameters() if n.endswith(("0.weight", "head.weight")))


def test_evaluation_is_deterministic_and_leaves_the_network_as_it_is():
    net = network(0.1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        first, second = net(*pair()), net(*pair())
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_pass_more_is_the_same_network_on_the_warped_image_composed():
    """Stride 1 and sides that need no padding, so that every step can be followed by hand."""
    once, twice = network(0.2, stride=1), network(0.2, stride=1, passes=2)
    fixed, moving = pair((16, 24, 32))
    with torch.no_grad():
        first = once(fixed, moving)
        second = once(fixed, fields.warp(moving, first))
        expected = fields.compose(first, second)
        assert second.abs().max() > 0.1
        torch.testing.assert_close(twice(fixed, moving), expected)


def test_several_passes_run_at_half_resolution_on_odd_sides():
    with torch.no_grad():
        field = network(0.1, passes=3)(*pair())
    assert field.shape == (1, 3, 17, 26, 21)
    assert torch.isfinite(field).all()


def test_velocity_fields_do_not_fold_where_the_same_displacement_does():
    """Both networks share their weights."""
    flow, plain = network(3.0, channels=(8, 8, 8, 8)), network(3.0, channels=(8, 8, 8, 8), velocity=False)
    images = pair((32, 40, 24))
    with torch.no_grad():
        scale = 0.4 / fields.diffusion(plain.predict(*images)).sqrt()  # moderate: up to two voxels, but rough
        for net in (flow, plain):
            net.head.weight.mul_(scale)
        displacement, deformation = plain.advance(*images), flow.advance(*images)
    assert (fields.jacobian_determinant(displacement) <= 0).any(), "not a hard case"
    assert (fields.jacobian_determinant(deformation) > 0).all()


def test_the_integration_steps_are_those_of_the_configuration():
    with torch.no_grad():
        for steps in (0, 3):
            net = network(0.2, integration_steps=steps)
            expected = fields.integrate(net.predict(*pair((16, 16, 16))), steps)
            torch.testing.assert_close(net.advance(*pair((16, 16, 16))), expected)


# A network that is guided by the variational method


def test_a_guided_network_adds_to_the_step_that_would_be_next():
    """With a head of nought each pass is a step of the variational method."""
    net = network(0.0, guided=True, stride=1, velocity=False)
    fixed, moving = pair((16, 24, 32))
    settings = replace(DEFAULT, steps=3, stride=1)
    with torch.no_grad():
        start = register(fixed, moving, settings)
        warped = fields.warp(moving, start)
        expected = fields.compose(start, guidance(fixed, warped, settings)[0])
        assert start.abs().max() > 0.5
        torch.testing.assert_close(net(fixed, moving, start), expected)


def test_the_guidance_has_the_settings_that_the_network_is_given():
    settings = replace(DEFAULT, last_smoothness=replace(DEFAULT.last_smoothness, elastic=1.0))
    fixed, moving = pair((16, 24, 32))
    net = RegNet(RegNetConfig(channels=TINY, guided=True, velocity=False, stride=1), settings)
    torch.nn.init.zeros_(net.head.weight)
    with torch.no_grad():
        expected = guidance(fixed, moving, replace(settings, stride=1))[0]
        torch.testing.assert_close(net(fixed, moving), expected)


def test_only_a_guided_network_reads_guidance():
    assert not [n for n in network().state_dict() if n.startswith("reader")]
    assert [n for n in network(guided=True).state_dict() if n.startswith("reader")]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(17, 26, 21), (5, 40, 1)])
def test_such_a_network_takes_any_size_and_learns(symmetric, shape):
    net = network(0.1, guided=True, passes=2, symmetric=symmetric).train()
    field = net(*pair(shape), register(*pair(shape), replace(DEFAULT, steps=2)))
    assert field.shape == (1, 3, *shape)
    field.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    into_reader = net.reader[0].weight.grad
    assert (into_reader.abs().amax((0, 2, 3, 4)) > 0).all(), "a part of the guidance is not read"


@pytest.mark.parametrize("guided", [True, False])
def test_a_symmetric_network_predicts_the_opposite_for_the_swapped_pair_and_nothing_for_one_image(guided):
    net = network(0.1, symmetric=True, guided=guided)
    fixed, moving = pair((16, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(net.predict(fixed, moving), -net.predict(moving, fixed), atol=1e-5, rtol=1e-4)
        assert net.predict(fixed, moving).abs().max() > 1e-3
        assert net(fixed, fixed).abs().max() < 1e-3


# Switchable normalization


def mixed(kind: int | None, channels: int = 5) -> SwitchableNorm:
    """All weight on instance (0), layer (1) or batch (2) statistics."""
    norm = SwitchableNorm(channels)
    with torch.no_grad():
        for mix in (norm.mean_mix, norm.var_mix):
            mix[kind] = 50.0
        norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
    return norm


def features() -> torch.Tensor:
    x = torch.randn(3, 5, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    return x * torch.arange(1, 6).view(1, 5, 1, 1, 1) + torch.arange(3).view(3, 1, 1, 1, 1)


@pytest.mark.parametrize("training", [True, False])
def test_switchable_norm_can_be_instance_norm(training):
    norm, x = mixed(0).train(training), features()
    expected = torch.nn.functional.instance_norm(x, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_switchable_norm_can_be_layer_norm(training):
    norm, x = mixed(1).train(training), features()
    expected = torch.nn.functional.group_norm(x, 1, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected, atol=1e-4, rtol=1e-4)


def test_switchable_norm_can_be_batch_norm_and_remembers_its_statistics():
    norm, x = mixed(2).train(), features()
    mean, var = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4), correction=0)
    expected = torch.nn.functional.batch_norm(x, mean, var, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected, atol=1e-4, rtol=1e-4)
    for _ in range(200):
        norm(x)
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, var, atol=1e-4, rtol=1e-4)
    single = norm.eval()(x[:1])
    torch.testing.assert_close(single, expected[:1], atol=1e-3, rtol=1e-3)


def test_switchable_norm_starts_as_an_even_mixture():
    norm, x = SwitchableNorm(5), features()
    instance, whole = x.mean((2, 3, 4), keepdim=True), x.mean((1, 2, 3, 4), keepdim=True)
    batch = x.mean((0, 2, 3, 4), keepdim=True)
    variances = (
        x.var((2, 3, 4), correction=0, keepdim=True)
        + x.var((1, 2, 3, 4), correction=0, keepdim=True)
        + x.var((0, 2, 3, 4), correction=0, keepdim=True)
    ) / 3
    expected = (x - (instance + whole + batch) / 3) / (variances + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected, atol=1e-4, rtol=1e-4)


def test_squeeze_and_excitation_weighs_whole_channels_between_nought_and_one():
    x = features().abs() + 1
    ratio = SqueezeExcitation(5)(x) / x
    assert ((ratio > 0) & (ratio < 1)).all()
    torch.testing.assert_close(ratio, ratio[..., :1, :1, :1].expand_as(ratio))


# Configuration


def test_a_configuration_survives_its_dictionary():
    config = RegNetConfig(channels=(1, 2, 3, 4), stride=1, velocity=False, integration_steps=3, passes=2, guided=True)
    assert RegNetConfig(**config.as_dict()) == config
    assert isinstance(config.as_dict()["channels"], list)


@pytest.mark.parametrize(("stride", "multiple"), [(1, 4), (2, 8)])
def test_sides_are_padded_as_the_variational_method_pads_them(stride, multiple):
    assert RegNetConfig(stride=stride).multiple == replace(DEFAULT, stride=stride).multiple == multiple


@pytest.mark.parametrize("guided", [True, False])
def test_sides_that_the_levels_cannot_halve_are_padded_inside_with_what_the_border_shows(guided):
    net, images = network(0.1, guided=guided), pair((24, 40, 24))
    padded = [torch.nn.functional.pad(x, (0, 8) * 3, mode="replicate") for x in images]
    with torch.no_grad():
        here, there = net.predict(*images), net.predict(*padded)
    assert here.shape == (1, 3, 12, 20, 12)
    if not guided:  # guidance would count the padding
        torch.testing.assert_close(here, there[:, :, :12, :20, :12])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"channels": (8, 8, 8)}, "channels"),
        ({"channels": (8, 8, 8, 0)}, "channels"),
        ({"channels": (8, 8, 8, 4096)}, "channels"),
        ({"channels": (8, 8, 8, 8.0)}, "channels"),
        ({"stride": 3}, "stride"),
        ({"stride": True}, "stride"),
        ({"velocity": 1}, "velocity"),
        ({"symmetric": "yes"}, "symmetric"),
        ({"guided": 1}, "guided"),
        ({"integration_steps": -1}, "integration_steps"),
        ({"integration_steps": 17}, "integration_steps"),
        ({"passes": 0}, "passes"),
        ({"passes": "2"}, "passes"),
    ],
)
def test_an_impossible_configuration_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        RegNetConfig(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_and_cuda_agree():
    net = network(0.1, passes=2)
    with torch.no_grad():
        cpu = net(*pair())
        cuda = net.cuda()(*(x.cuda() for x in pair()))
    assert (cuda.cpu() - cpu).abs().max() < 1e-2  # voxels; TF32 convolutions
