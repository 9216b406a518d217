"""Refinement of one pair: it comes closer, ends by itself, and gives back nothing that is worse than its start."""

import pytest
import torch
from textures import deformed, inner, textured

from DivRegNetLib.core import fields
from DivRegNetLib.errors import Cancelled
from DivRegNetLib.registration import newton
from DivRegNetLib.registration.refine import LEAST_GAIN, PARZEN, SMOOTHNESS, refine

SHAPE = (32, 32, 32)


def judged(fixed, moving, displacement) -> float:
    """What refinement maximizes."""
    coarse = fields.resize(displacement, tuple(n // 2 for n in fixed.shape[2:]))
    _, similarity = newton.Images(fixed, moving, 2, parzen=PARZEN).equations(coarse)
    squared = sum(gradient.square().sum() / gradient[0, 0].numel() for gradient in fields.gradients(coarse))
    return similarity.item() - SMOOTHNESS.elastic / 2 * squared.item()


def test_it_comes_closer_to_the_truth_than_the_forward_pass():
    moving, fixed, truth = deformed(SHAPE, 2.0, seed=11)
    start = fields.resize(newton.approach(fixed, moving, 2, 2), SHAPE)
    refined = refine(fixed, moving, start, steps=12)
    before, after = (inner(u - truth).norm(dim=1).mean() for u in (start, refined))
    assert after < 0.85 * before
    assert judged(fixed, moving, refined) > judged(fixed, moving, start) + LEAST_GAIN
    assert (fields.jacobian_determinant(refined) > 0).all()


@pytest.mark.parametrize("seed", [12, 13, 14])
def test_it_is_never_worse_than_its_start_by_its_own_measure(seed):
    """Of images that have nothing to do with each other, from a start that is as good as any."""
    fixed, moving = textured(SHAPE, seed), textured(SHAPE, seed + 100)
    start = 2 * torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    start = torch.nn.functional.interpolate(start, size=SHAPE, mode="trilinear", align_corners=True)
    assert judged(fixed, moving, refine(fixed, moving, start, steps=4)) >= judged(fixed, moving, start)


def test_it_ends_where_it_no_longer_helps():
    image = textured(SHAPE, 15)
    told = []
    found = refine(image, image, torch.zeros(1, 3, *SHAPE), steps=50, progress=told.append)
    assert found.abs().max() < 0.02
    assert len(told) <= 2 * 8 + 1  # a round that helps a little at most, and one that does not


def test_its_progress_rises_to_the_end_and_can_cancel():
    moving, fixed, _ = deformed(SHAPE, 2.0, seed=16)
    told = []
    refine(fixed, moving, torch.zeros(1, 3, *SHAPE), steps=3, progress=told.append)
    assert told == sorted(told) and told[-1] == 1

    def cancel(fraction: float) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        refine(fixed, moving, torch.zeros(1, 3, *SHAPE), steps=3, progress=cancel)


def test_what_was_not_measured_does_not_count():
    """Rubbish outside the mask changes nothing inside."""
    moving, fixed, _ = deformed(SHAPE, 1.5, seed=17)
    seen = torch.zeros_like(fixed, dtype=torch.bool)
    seen[..., 4:-4, 4:-4, 4:-4] = True
    rubbish = torch.where(seen, fixed, textured(SHAPE, 18))
    start, everywhere = torch.zeros(1, 3, *SHAPE), torch.ones_like(seen)
    a, b = (refine(image, moving, start, steps=4, valid=(seen, everywhere)) for image in (fixed, rubbish))
    torch.testing.assert_close(a, b)
