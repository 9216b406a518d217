"""The calibration of the verdict: what is kept of a registration, and what is observed of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from textures import other_contrast, textured

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid
from training.experiments import calibration
from training.experiments.calibration import Registration

SHAPE, SPACING = (40, 44, 36), 2.0


def registration(shift: float) -> Registration:
    """Two contrasts of a texture, registered but for a shift in voxels along x."""
    fixed = textured(SHAPE, 1)
    displacement = torch.zeros(1, 3, *SHAPE)
    displacement[:, 1] = 1.0
    moving = fields.shifted(other_contrast(fixed), shift, -1, 0)
    error = torch.zeros(1, 3, *SHAPE)
    error[:, 0] = -shift * SPACING
    valid = torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    grid = Grid.build(SHAPE[::-1], (SPACING,) * 3, (5.0, 6.0, 7.0))
    return Registration(
        "texture, shifted 0", "shapes", "shifted", False, "v1", grid, fixed, moving, (valid, valid), displacement,
        SPACING * np.eye(3), error, None,
    )  # fmt: skip


def test_a_registration_is_kept_with_all_that_evidence_is_measured_from(tmp_path: Path):
    one = registration(2.0)
    one.save(tmp_path / "one.npz")
    other = Registration.load(tmp_path / "one.npz")
    assert (other.case, other.kind, other.held_out, other.version) == (one.case, one.kind, one.held_out, one.version)
    assert other.grid == one.grid and other.error_mm is None
    for name in ("fixed", "moving", "displacement", "error"):
        assert torch.allclose(getattr(other, name), getattr(one, name), atol=2e-3), name
    assert all(torch.equal(a, b) for a, b in zip(other.valid, one.valid, strict=True))


def test_what_is_observed_has_the_error_that_is_there():
    right = {o.put: o for o in calibration.observe(registration(0.0))}
    assert [*right] == ["", "undeformed", "local", "any"]
    assert right[""].voxels < 0.1
    assert right["undeformed"].voxels == pytest.approx(1, abs=0.1)
    assert right["local"].errors.std() > 0.3  # differs from place to place
    wrong = [*calibration.observe(registration(3.0))]
    assert [o.put for o in wrong] == ["", "undeformed"]
    assert wrong[0].voxels == pytest.approx(3, abs=0.1)
    assert wrong[0].numbers["motion 1"] > right[""].numbers["motion 1"] + 1


def test_evidence_is_kept_until_what_measures_it_changes(tmp_path: Path, monkeypatch):
    registration(0.0).save(tmp_path / "one.npz")
    first, versions = calibration.observations(tmp_path)
    assert versions == ["v1"] and len(first) == 5
    monkeypatch.setattr(calibration, "observe", lambda registration: iter(()))
    assert len(calibration.observations(tmp_path)[0]) == 5
    changed = tmp_path / "evidence.py"
    changed.write_text("# changed")
    monkeypatch.setattr(calibration.evidence, "__file__", str(changed))
    assert calibration.observations(tmp_path)[0] == []
