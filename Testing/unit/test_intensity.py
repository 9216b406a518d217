"""Normalized intensities: their range and order, and that only what was measured decides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from DivRegNetLib.core.intensity import SCHEMES, normalize

schemes = pytest.mark.parametrize("scheme", list(SCHEMES))


def image(seed: int, shape: tuple[int, int, int] = (9, 10, 11)) -> torch.Tensor:
    """Half of it background, the rest of any brightness."""
    values = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    return values.clamp_min(0) * 40 + 7


@schemes
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_what_is_brighter_stays_so_between_0_and_1_in_any_unit(scheme, seed, scale, shift):
    # A value at the edge of a bin may be counted in the next one in another precision. That moves a rank by a quarter of one
    # over the number of voxels, so there have to be many.
    before = image(seed, (28, 29, 30))
    after = normalize(before, scheme)
    assert after.min() == 0
    assert after.max() == pytest.approx(1, abs=1e-5)
    order = before.flatten().argsort()
    assert (after.flatten()[order].diff() >= -1e-5).all()
    torch.testing.assert_close(normalize(before.double() * scale + shift, scheme), after.double(), atol=1e-4, rtol=0)


@schemes
@given(seed=st.integers(0, 10**6), outside=st.floats(-1e4, 1e4))
def test_what_was_not_measured_does_not_decide(scheme, seed, outside):
    small = image(seed)
    padded = torch.nn.functional.pad(small, (3, 2, 1, 4, 0, 5), value=outside)
    measured = torch.nn.functional.pad(torch.ones_like(small, dtype=torch.bool), (3, 2, 1, 4, 0, 5))
    found = normalize(padded, scheme, measured)
    torch.testing.assert_close(found[measured], normalize(small, scheme).flatten())
    assert 0 <= found.min() <= found.max() <= 1 + 1e-5


@schemes
def test_where_nothing_was_measured_all_decides(scheme):
    nothing = torch.zeros_like(image(0), dtype=torch.bool)
    assert torch.equal(normalize(image(0), scheme, nothing), normalize(image(0), scheme))


@schemes
def test_a_flat_image_stays_flat(scheme):
    flat = normalize(torch.full((1, 1, 4, 4, 4), 3.0), scheme)
    assert flat.min() == flat.max()
    assert torch.isfinite(flat).all()


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="'magic', known are robust, balanced"):
        normalize(image(0), "magic")
