"""The discrete start: shifts that the plain start does not get to, and what must hold whatever the images."""

from dataclasses import replace

import pytest
import torch
from operators import operators
from textures import deformed, other_contrast, to_unit

from DivRegNetLib.core import fields
from DivRegNetLib.registration import discrete
from DivRegNetLib.registration.discrete import DEFAULT, shift_length
from DivRegNetLib.registration.variational import FAST as VARIATIONAL
from DivRegNetLib.registration.variational.method import register

SHAPE = (64, 68, 72)
WIDE = replace(DEFAULT, reach=0.2)  # 8 voxels in either direction, also here


def fine(seed: int) -> torch.Tensor:
    """Blobs of three voxels, which coarse levels do not show."""
    noise = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return to_unit(fields.smooth(noise, 1.5))


def middle(field: torch.Tensor) -> torch.Tensor:
    return field[..., 12:-12, 12:-12, 12:-12]


def test_a_shift_of_six_voxels_is_found_where_the_plain_start_fails():
    moving, shift = fine(0), torch.tensor([6.0, 0.0, -4.0]).view(1, 3, 1, 1, 1)
    fixed = other_contrast(fields.shifted(moving, *shift.flatten().tolist()))

    def error(displacement: torch.Tensor) -> float:
        return fields.length(middle(displacement) - shift).mean().item()

    plain = fields.upsample(register(fixed, moving, VARIATIONAL), 2, SHAPE)
    start = discrete.register(fixed, moving, WIDE)
    coarse = fields.coarsen(start, VARIATIONAL.stride, VARIATIONAL.multiple)
    both = fields.upsample(register(fixed, moving, VARIATIONAL, start=coarse), 2, SHAPE)
    assert error(plain) > 3
    assert error(start) < 1
    assert error(both) < 0.8


def test_the_result_is_the_same_at_every_run():
    moving, fixed, _ = deformed(SHAPE, 3.0, seed=1)
    assert torch.equal(discrete.register(fixed, moving), discrete.register(fixed, moving))


def test_a_smooth_deformation_is_found_to_about_a_voxel():
    moving, fixed, truth = deformed(SHAPE, 3.0, seed=2)
    displacement = discrete.register(fixed, moving, WIDE)
    assert fields.length(middle(displacement - truth)).mean() < 0.5 * fields.length(middle(truth)).mean()
    assert fields.jacobian_determinant(displacement).min() > 0


def test_the_reach_follows_the_field_of_view():
    assert [shift_length((n, n, n)) for n in (12, 35, 60, 70, 200)] == [0, 1, 1, 2, 2]
    small = torch.rand(1, 1, 8, 9, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(discrete.register(small, small), torch.zeros(1, 3, 8, 9, 10))


def test_large_images_are_averaged_first():
    moving, fixed, _ = deformed(SHAPE, 3.0, seed=3)
    averaged = [torch.nn.functional.avg_pool3d(x, 2) for x in (fixed, moving)]
    whole = discrete.register(fixed, moving, replace(WIDE, voxels=50_000))
    half = discrete.register(*averaged, replace(WIDE, voxels=50_000))
    inner = (..., *[slice(12, -12)] * 3)
    torch.testing.assert_close(whole[inner], fields.resize(half, SHAPE)[inner], atol=0.3, rtol=0)


def test_what_was_not_measured_has_no_part_in_it():
    moving, fixed, _ = deformed(SHAPE, 3.0, seed=4)
    here, there = (torch.ones(1, 1, *SHAPE, dtype=torch.bool) for _ in range(2))
    here[..., :20], there[:, :, 50:] = False, False
    noise = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = discrete.register(fixed, moving, valid=(here, there))
    other = discrete.register(torch.where(here, fixed, noise), torch.where(there, moving, noise), valid=(here, there))
    torch.testing.assert_close(other, expected, atol=1e-3, rtol=0)


def test_flat_images_and_equal_images_stay():
    moving, _, _ = deformed(SHAPE, 3.0, seed=5)
    assert discrete.register(moving, moving).abs().max() < 0.05
    flat = torch.full_like(moving, 0.5)
    assert discrete.register(flat, flat).abs().max() < 0.05


def test_a_batch_of_two_is_two_batches_of_one():
    pairs = [deformed(SHAPE, 3.0, seed)[:2] for seed in (6, 7)]
    moving, fixed = (torch.cat(images) for images in zip(*pairs, strict=True))
    apart = torch.cat([discrete.register(f, m) for m, f in pairs])
    torch.testing.assert_close(discrete.register(fixed, moving), apart, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(35, 51, 37), (64, 30, 90)])
def test_images_of_any_size(shape):
    moving, fixed, _ = deformed(shape, 2.0, seed=8)
    assert discrete.register(fixed, moving).shape == (1, 3, *shape)


def test_nothing_waits_for_a_device():
    moving, fixed, _ = deformed((40, 44, 48), 2.0, seed=9)
    measured = (torch.ones_like(fixed, dtype=torch.bool),) * 2
    discrete.register(fixed, moving, valid=measured)  # fills the caches of small matrices
    assert not operators(lambda: discrete.register(fixed, moving, valid=measured)).waits


def test_progress_rises_and_can_end_the_registration():
    moving, fixed, _ = deformed((40, 44, 48), 2.0, seed=9)
    reported = []
    discrete.register(fixed, moving, progress=reported.append)
    assert reported == sorted(reported) and reported[-1] == 1 and len(reported) > 3

    def cancel(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discrete.register(fixed, moving, progress=cancel)
