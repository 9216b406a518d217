"""The calibration of the verdict: what is kept of a registration, and what is observed of it."""

from dataclasses import replace
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


def observation(number: int) -> calibration.Observation:
    """Errors that follow motion where they are large, and how the deformation bends where they are small."""
    random = np.random.default_rng(number)
    large = number % 2 == 1
    errors = (3.0 if large else 0.5) * np.exp(random.normal(0, 0.4, 400))
    cells = {name: np.exp(random.normal(0, 0.4, 400)) for name in calibration.CELLS if name != calibration.EXPECTED}
    cells["motion 1" if large else "bend"] = errors * np.exp(random.normal(0, 0.1, 400))
    numbers = {name: 0.1 for name in calibration.NUMBERS} | {"voxel_mm": 2.0, "diagonal_mm": 200.0}
    numbers["motion 1"] = float(errors.mean())
    return calibration.Observation(
        f"case {number}", "head", "near", False, "", numbers, 2 * errors.mean(), errors, cells
    )  # fmt: skip


def test_what_tells_places_apart_may_depend_on_the_mean_error(monkeypatch):
    monkeypatch.setattr(calibration, "EPOCHS", 300)
    observed = [observation(number) for number in range(40)]
    mean = calibration.fit_mean(observed)
    cell = calibration.fit_cells(observed, mean)
    unseen = [observation(number) for number in range(100, 110)]
    assert calibration.map_scores(unseen, mean, cell).min() > 0.8


def test_green_is_what_is_not_wrong_nineteen_times_in_twenty():
    random = np.random.default_rng(0)
    expected = random.uniform(2, 5, 2000)
    observed = [observation(0)] * len(expected)
    observed = [replace(o, error_mm=mm) for o, mm in zip(observed, expected, strict=True)]
    assert calibration.green_limit(observed, expected) == calibration.WRONG_MM
    times = np.where(random.random(2000) < 0.1, 2.0, 1.0)
    observed = [replace(o, error_mm=mm * t) for o, mm, t in zip(observed, expected, times, strict=True)]
    assert calibration.green_limit(observed, expected) == 2.5


def test_what_is_stated_as_large_is_larger_than_stated_nine_times_in_ten():
    true = np.linspace(0.15, 30.05, 300)  # voxels of 2 mm
    observed = [replace(observation(0), error_mm=2 * voxels) for voxels in true]
    observed += [replace(observation(0), error_mm=None)] * 30
    expected = np.array([2 * voxels for voxels in true] + [50.0] * 30)
    stated = np.array([calibration.is_stated(o, mm) for o, mm in zip(observed, expected, strict=True)])
    assert stated.sum() == 39  # below 4 voxels
    least = calibration.least_voxels(observed, expected)
    large = np.array([o.true_voxels for o in observed])[~stated]
    assert np.mean(large > least) == pytest.approx(0.9, abs=0.01)
