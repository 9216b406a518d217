"""The variational registration: what it finds, what it leaves alone, progress, cancelling, acceptance of steps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from textures import deformed, inner, other_contrast, textured

from DivRegNetLib.core import fields
from DivRegNetLib.errors import Cancelled
from DivRegNetLib.registration.variational import DEFAULT as USUAL
from DivRegNetLib.registration.variational import FAST as DEFAULT
from DivRegNetLib.registration.variational import REFINEMENT, Level, solver
from DivRegNetLib.registration.variational.equations import Equations
from DivRegNetLib.registration.variational.guidance import CHANNELS, guidance
from DivRegNetLib.registration.variational.method import next_step, register
from DivRegNetLib.registration.variational.schedule import schedule

SHAPE = (32, 32, 32)
FIRST, LAST = DEFAULT.first_smoothness, DEFAULT.last_smoothness


def settings(steps: int, stride: int = 2, **values):
    return replace(DEFAULT, steps=steps, stride=stride, **values)


def registered(fixed, moving, steps: int, stride: int = 2, **arguments) -> torch.Tensor:
    """The displacement on the images' grid."""
    displacement = register(fixed, moving, settings(steps, stride), **arguments)
    return fields.upsample(displacement, stride, fixed.shape[2:])


def refined(fixed, moving, start, steps: int, **arguments) -> torch.Tensor:
    """Refinement of a displacement on the images' grid."""
    coarse = fields.coarsen(start, REFINEMENT.stride, REFINEMENT.multiple)
    displacement = register(fixed, moving, replace(REFINEMENT, steps=steps), start=coarse, **arguments)
    return fields.upsample(displacement, REFINEMENT.stride, fixed.shape[2:])


# What it finds


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(32, 32, 32), (32, 40, 24)])
def test_a_smooth_deformation_between_contrasts_is_mostly_recovered(stride, shape):
    moving, fixed, truth = deformed(shape, 2.0, seed=0)
    error = registered(fixed, moving, 8, stride) - truth
    before, after = (inner(e).norm(dim=1).mean() for e in (truth, error))
    assert before > 1.2
    assert after < 0.3 * before


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_between_contrasts_is_found_along_its_axis(axis):
    moving, shape = textured((32, 24, 28), seed=1), (32, 24, 28)
    shift = torch.zeros(1, 3, 1, 1, 1)
    shift[0, axis] = -1.6
    fixed = other_contrast(fields.warp(moving, shift.expand(1, 3, *shape)))
    # A side of 28 voxels is no multiple of 8; the padding is cut off again.
    displacement = registered(fixed, moving, 24)
    torch.testing.assert_close(inner(displacement).mean((0, 2, 3, 4)), shift.flatten(), atol=0.1, rtol=0)


def test_more_steps_come_closer():
    moving, fixed, truth = deformed(SHAPE, 2.5, seed=2)
    errors = [inner(registered(fixed, moving, steps) - truth).norm(dim=1).mean() for steps in (1, 3, 8)]
    assert errors[2] < errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("stride", [1, 2])
def test_momentum_gets_further_where_the_way_is_long(stride):
    moving, fixed, truth = deformed(SHAPE, 4.0, seed=3)

    def error(levels) -> torch.Tensor:
        displacement = register(fixed, moving, settings(24, stride, levels=levels))
        return inner(fields.upsample(displacement, stride, SHAPE) - truth).norm(dim=1).mean()

    without = tuple(replace(level, momentum=0.0) for level in DEFAULT.levels)
    assert error(DEFAULT.levels) < 0.8 * error(without)


def test_no_step_is_too_long_or_too_steep_with_the_momentum_of_the_one_before():
    moving, fixed, _ = deformed(SHAPE, 2.5, seed=12)
    equations = Equations(fixed, moving, settings(1, 1), DEFAULT.levels[-1])
    previous = 5 * textured(SHAPE, seed=13).expand(-1, 3, -1, -1, -1)
    _, step = next_step(equations, None, FIRST, previous=previous)
    assert fields.length(step).max() <= DEFAULT.max_step + 1e-5
    assert max(slope.abs().sum(1).max() for slope in fields.gradients(step)) <= DEFAULT.max_gradient + 1e-5


def test_a_start_is_continued_from():
    moving, fixed, _ = deformed(SHAPE, 2.0, seed=4)
    one_level = settings(3, levels=DEFAULT.levels[-1:])
    start = register(fixed, moving, one_level)
    continued = register(fixed, moving, replace(one_level, steps=1, last_smoothness=FIRST), start=start)
    equations = Equations(fixed, moving, one_level, one_level.levels[-1])
    assert torch.equal(continued, next_step(equations, start, FIRST)[0])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(17, 26, 21), (5, 40, 1)])
def test_images_of_any_size_are_padded_inside(shape, stride):
    fixed, moving = torch.rand(2, 1, 1, *shape, generator=torch.Generator().manual_seed(0))
    displacement = register(fixed, moving, settings(5, stride))
    assert displacement.shape[2:] == tuple(-(-n // (4 * stride)) * 4 for n in shape)
    more = [-n % (4 * stride) for n in shape]
    images = [fields.extended(x, more) for x in (fixed, moving)]
    measured = fields.extended(torch.ones_like(fixed, dtype=torch.bool), more, mode="constant")
    assert torch.equal(register(*images, settings(5, stride)), displacement)
    everywhere = torch.ones_like(fixed, dtype=torch.bool)
    inside = register(fixed, moving, settings(5, stride), valid=(everywhere, everywhere))
    assert torch.equal(register(*images, settings(5, stride), valid=(measured, measured)), inside)


# Levels


@pytest.mark.parametrize(("measured", "levels"), [(10**6, [4, 2, 1]), (50_000, [2, 1]), (1000, [1])])
def test_coarse_levels_are_used_only_where_enough_voxels_were_measured(measured, levels):
    stages = schedule(DEFAULT, measured)
    assert [stage.level.shrink for stage in stages] == levels
    steps = {stage.level.shrink: len(stage.smoothness) for stage in stages}
    assert steps == {n: {4: 8, 2: 9, 1: 7}[n] for n in levels}
    assert all(s == FIRST for stage in stages[:-1] for s in stage.smoothness)
    assert stages[-1].smoothness[0] == FIRST
    assert vars(stages[-1].smoothness[-1]) == pytest.approx(vars(LAST))


@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_are_all_made_at_the_last_level(steps):
    (stage,) = schedule(settings(steps), 10**6)
    assert stage.level.shrink == 1 and len(stage.smoothness) == steps


@pytest.mark.parametrize(("measured", "added"), [(10**6, []), (2 * 10**6, [8]), (2 * 10**7, [16, 8])])
def test_finer_images_start_as_coarse_as_others(measured, added):
    usual, finer = (schedule(DEFAULT, n) for n in (10**6, measured))
    assert [stage.level.shrink for stage in finer] == [*added, *(stage.level.shrink for stage in usual)]
    assert finer[len(added) :] == usual
    assert all(stage.smoothness == usual[0].smoothness for stage in finer[: len(added)])
    assert schedule(replace(DEFAULT, more_voxels=None), measured) == usual


def test_levels_that_are_added_pad_inside_and_take_a_start():
    """A side of 40 voxels is no multiple of 16 times the stride."""
    moving, fixed, truth = deformed((40, 32, 48), 2.0, seed=14)
    more = settings(24, more_voxels=1, min_voxels=0)
    assert [stage.level.shrink for stage in schedule(more, fixed.numel())][:2] == [16, 8]
    start = fields.coarsen(0.5 * truth, more.output_stride, more.multiple)
    displacement = register(fixed, moving, more, start=start)
    assert displacement.shape == start.shape
    nothing = replace(more, levels=REFINEMENT.levels, min_gain=1e6)
    assert register(fixed, moving, nothing, start=start) is start


def test_steps_that_sample_all_voxels_come_nearer():
    moving, fixed, truth = deformed(SHAPE, 2.0, seed=15)
    levels = (*DEFAULT.levels[:2], Level(1, 0.15, 12, 0.6), Level(1, 0.0, 12, 0.6, all_voxels=True))
    errors = {}
    for name, how in (("all", settings(24, levels=levels)), ("one", settings(24))):
        found = register(fixed, moving, how)
        assert found.shape[2:] == tuple(n // 2 for n in SHAPE)
        errors[name] = inner(fields.upsample(found, 2, SHAPE) - truth).norm(dim=1).mean()
    assert errors["all"] < errors["one"]


def test_fast_has_neither_all_voxels_nor_descriptors_and_thorough_twice_the_steps():
    fast = USUAL.with_effort("fast")
    assert not any(level.all_voxels for level in fast.levels) and fast.descriptor_weight == 0
    assert [len(stage.smoothness) for stage in schedule(fast, 10**6)] == [8, 9, 7]
    assert USUAL.levels[-1].all_voxels and [len(s.smoothness) for s in schedule(USUAL, 10**6)] == [8, 9, 7, 5]
    assert USUAL.with_effort("usual") == USUAL
    assert [len(s.smoothness) for s in schedule(USUAL.with_effort("thorough"), 10**6)] == [16, 18, 14, 10]


# What it leaves alone


@given(seed=st.integers(0, 10**6), stride=st.sampled_from((1, 2)))
def test_identical_images_do_not_move(seed, stride):
    image = textured((16, 24, 16), seed)
    assert register(image, image, settings(2, stride)).abs().max() < 1e-3
    assert guidance(image, image, settings(2, stride))[0].abs().max() < 1e-3


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_flat_images_do_not_move(value):
    flat = torch.full((1, 1, 16, 16, 16), value)
    for other in (flat, torch.full_like(flat, 1 - value)):
        assert torch.equal(register(flat, other, settings(2)), torch.zeros(1, 3, 8, 8, 8))
        step, *guides = guidance(flat, other, DEFAULT)
        assert torch.equal(step, torch.zeros(1, 3, 8, 8, 8))
        assert all(torch.isfinite(x).all() for x in guides)


@pytest.mark.parametrize("swap", [False, True])
def test_a_flat_and_a_textured_image_do_not_move(swap):
    images = torch.full((1, 1, 16, 16, 16), 0.5), textured((16, 16, 16))
    fixed, moving = reversed(images) if swap else images
    assert register(fixed, moving, settings(3)).abs().max() < 0.02


def test_what_was_not_measured_neither_pulls_nor_counts():
    """A moving image cut off in the middle: the cut would attract whatever is bright beside it."""
    moving, fixed, truth = deformed(SHAPE, 1.0, seed=9)
    measured = torch.ones_like(moving, dtype=torch.bool)
    measured[..., 14:] = False
    cut = moving * measured
    cases = ((cut, None), (cut, (torch.ones_like(measured), measured)), (moving, None))
    errors = [
        inner(registered(fixed, image, 9, valid=valid) - truth)[..., :10].norm(dim=1).mean() for image, valid in cases
    ]
    assert errors[2] < errors[1] < 0.95 * errors[0]


# Arithmetic


@pytest.mark.parametrize("inference", [False, True])
def test_threads_that_share_parts_change_nothing(inference, monkeypatch):
    moving, fixed, _ = deformed((48, 40, 44), 1.0, seed=6)
    monkeypatch.setattr(fields, "SLAB_VOXELS", 8000)
    monkeypatch.setattr(fields, "SAMPLED_AT_ONCE", 3000)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode(inference):
                found.append(register(fixed, moving, USUAL))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_a_batch_of_two_is_two_batches_of_one():
    pairs = [deformed((16, 24, 16), 1.0, seed)[:2] for seed in (4, 5)]
    moving, fixed = (torch.cat(images) for images in zip(*pairs, strict=True))
    together = register(fixed, moving, settings(3))
    apart = torch.cat([register(f, m, settings(3)) for m, f in pairs])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_the_precision_is_that_of_the_images():
    moving, fixed, _ = deformed((16, 24, 16), 1.0, seed=6)
    single = register(fixed, moving, settings(3))
    double = register(fixed.double(), moving.double(), settings(3))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert all(x.dtype == torch.float64 for x in guidance(fixed.double(), moving.double(), DEFAULT))
    assert (single - double).abs().max() < 0.05  # a voxel may fall into another bin


def test_mixed_precision_changes_nothing():
    moving, fixed, _ = deformed((16, 24, 16), 1.0, seed=6)

    def outputs() -> tuple[torch.Tensor, ...]:
        return register(fixed, moving, settings(2)), *guidance(fixed, moving, DEFAULT)

    with torch.autocast("cpu", torch.bfloat16):
        mixed = outputs()
    assert all(torch.equal(a, b) for a, b in zip(mixed, outputs(), strict=True))


def test_nothing_is_differentiated():
    moving, fixed, _ = deformed((16, 16, 16), 1.0, seed=7)
    moving.requires_grad_()
    assert not register(fixed, moving, settings(1)).requires_grad
    assert not any(x.requires_grad for x in guidance(fixed, moving, DEFAULT))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_and_cuda_agree():
    moving, fixed, _ = deformed(SHAPE, 1.5, seed=8)
    on_cpu = register(fixed, moving, settings(4))
    on_cuda = register(fixed.cuda(), moving.cuda(), settings(4))
    assert on_cuda.device.type == "cuda"
    assert (on_cuda.cpu() - on_cpu).abs().max() < 0.05


# Progress


@pytest.mark.parametrize("steps", [1, 3, 24])
def test_progress_is_reported_after_every_step(steps):
    moving, fixed, _ = deformed((48, 48, 48), 1.0, seed=6)
    reported = []
    register(fixed, moving, settings(steps, min_voxels=1), progress=reported.append)
    assert reported == pytest.approx([(i + 1) / steps for i in range(steps)] + [1.0])


@pytest.mark.parametrize("step", range(1, 7))
@pytest.mark.parametrize("base", [DEFAULT, REFINEMENT], ids=["from the identity", "refinement"])
def test_it_can_be_cancelled_at_every_step(step, base):
    moving, fixed, _ = deformed((16, 16, 16), 1.0, seed=6)
    reported = []

    def progress(fraction: float) -> None:
        reported.append(fraction)
        if len(reported) == step:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        register(fixed, moving, replace(base, steps=6, min_voxels=1), progress=progress)
    assert reported == pytest.approx([(i + 1) / 6 for i in range(step)])


# Guidance


def test_guidance_is_the_next_step_at_two_smoothnesses():
    """For each smoothness a step and how much is known."""
    moving, fixed, _ = deformed((24, 32, 16), 1.0, seed=3)
    step, forward, backward = guidance(fixed, moving, DEFAULT)
    normal = Equations(fixed, moving, DEFAULT, DEFAULT.levels[-1])(None)
    first, last = (solver.step(normal, smoothness, DEFAULT) for smoothness in (FIRST, LAST))
    torch.testing.assert_close(step, last)
    torch.testing.assert_close(forward[:, [0, 1, 2, 4, 5, 6]], torch.cat((first, last), 1))
    torch.testing.assert_close(backward[:, [0, 1, 2, 4, 5, 6]], -torch.cat((first, last), 1))
    torch.testing.assert_close(forward[:, [3, 7]], backward[:, [3, 7]])
    assert 0 <= forward[:, [3, 7]].min() < 0.5 < forward[:, [3, 7]].max() < 1
    assert step.shape == (1, 3, 12, 16, 8) and forward.shape[1] == backward.shape[1] == CHANNELS


@given(seed=st.integers(0, 10**6))
def test_the_guidance_of_the_swapped_pair_is_its_second_half(seed):
    fixed, moving = textured((16, 24, 16), seed), other_contrast(textured((16, 24, 16), seed + 1))
    backward, swapped = guidance(fixed, moving, DEFAULT)[2], guidance(moving, fixed, DEFAULT)[1]
    torch.testing.assert_close(backward, swapped, atol=1e-4, rtol=1e-3)


# Acceptance of steps: the settings of refinement


def objective(fixed, moving, displacement) -> float:
    """What refinement maximizes."""
    coarse = fields.coarsen(displacement, 2, 2)
    information = Equations(fixed, moving, REFINEMENT, REFINEMENT.levels[-1]).objective(coarse)
    squared = sum(gradient.square().sum() / gradient[0, 0].numel() for gradient in fields.gradients(coarse))
    return information.item() - REFINEMENT.last_smoothness.elastic / 2 * squared.item()


def test_refinement_comes_closer_to_the_truth_than_its_start():
    moving, fixed, truth = deformed(SHAPE, 2.0, seed=11)
    start = registered(fixed, moving, 2)
    displacement = refined(fixed, moving, start, 12)
    before, after = (inner(u - truth).norm(dim=1).mean() for u in (start, displacement))
    assert after < 0.85 * before
    assert objective(fixed, moving, displacement) > objective(fixed, moving, start) + REFINEMENT.min_gain
    assert (fields.jacobian_determinant(displacement) > 0).all()


@pytest.mark.parametrize("seed", [12, 13, 14])
def test_refinement_never_lowers_its_objective(seed):
    """Of images that have nothing to do with each other, from a start that is as good as any."""
    fixed, moving = textured(SHAPE, seed), textured(SHAPE, seed + 100)
    start = 2 * torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    start = torch.nn.functional.interpolate(start, size=SHAPE, mode="trilinear", align_corners=True)
    assert objective(fixed, moving, refined(fixed, moving, start, 4)) >= objective(fixed, moving, start)


@pytest.mark.parametrize("base", [REFINEMENT, replace(DEFAULT, min_gain=1e-4)], ids=["one level", "three levels"])
def test_where_no_round_gains_enough_the_start_itself_is_given_back(base):
    moving, fixed, _ = deformed(SHAPE, 2.0, seed=16)
    start = torch.zeros(1, 3, 16, 16, 16)
    assert register(fixed, moving, replace(base, min_gain=1e6), start=start) is start
    assert register(fixed, moving, base, start=start) is not start


def test_refinement_ends_where_it_no_longer_gains():
    image = textured(SHAPE, 15)
    reported = []
    displacement = refined(image, image, torch.zeros(1, 3, *SHAPE), 50, progress=reported.append)
    assert displacement.abs().max() < 0.02
    assert len(reported) <= 2 * 8 + 1  # a round that gains a little at most, and one that does not
    assert reported == sorted(reported) and reported[-1] == 1


def test_refinement_without_a_start_begins_at_the_identity():
    moving, fixed, _ = deformed(SHAPE, 2.0, seed=16)
    zeros = torch.zeros(1, 3, 16, 16, 16)
    assert torch.equal(register(fixed, moving, REFINEMENT), register(fixed, moving, REFINEMENT, start=zeros))


def test_refinement_does_not_count_what_was_not_measured():
    """Rubbish outside the mask changes nothing inside."""
    moving, fixed, _ = deformed(SHAPE, 1.5, seed=17)
    measured = torch.zeros_like(fixed, dtype=torch.bool)
    measured[..., 4:-4, 4:-4, 4:-4] = True
    rubbish = torch.where(measured, fixed, textured(SHAPE, 18))
    start, everywhere = torch.zeros(1, 3, *SHAPE), torch.ones_like(measured)
    a, b = (refined(image, moving, start, 4, valid=(measured, everywhere)) for image in (fixed, rubbish))
    torch.testing.assert_close(a, b)
