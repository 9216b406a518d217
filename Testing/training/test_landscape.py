"""The metric landscape: its optima and capture range; and reports of experiments."""

import csv
import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread

from DivRegNetLib.errors import InputError
from DivRegNetLib.similarity.mutual_information import parzen_mi
from training import report
from training.experiments import landscape
from training.experiments.landscape import Settings

METRICS = ("S, patches shuffled", "S, voxels shuffled", "MI, 64 bins", "LNCC", "Dice")
TINY = Settings(spacing=4, slices=12, reach=8, step=4, steps=100, samples=2048)
X, Y = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 31))
HUMP = np.exp(-4 * (X**2 + Y**2))


# What is counted


def test_one_hump_has_one_optimum_and_every_start_climbs_it():
    assert landscape.local_optima(HUMP) == (1, 0)
    assert landscape.captured(HUMP).all()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_an_egg_crate_has_an_optimum_per_egg(k):
    """Waves with k crests along x and k + 1 along y, all inside."""
    x, y = np.meshgrid(np.arange(60 * k) + 0.5, np.arange(60 * (k + 1)) + 0.5)
    crate = -np.cos(2 * np.pi * x / 60) - np.cos(2 * np.pi * y / 60) + 1e-3 * np.sin(x / 7)
    assert landscape.local_optima(crate[::4, 2::4]) == (k * (k + 1), 0)


def test_a_plateau_is_one_optimum_and_a_terrace_on_a_slope_is_none():
    flat_top = np.minimum(HUMP, 0.6)
    assert (flat_top == 0.6).sum() > 20
    assert landscape.local_optima(flat_top) == (1, 0)
    terraces = np.minimum(HUMP, 0.6) + np.maximum(HUMP, 0.8)  # level between 0.6 and 0.8
    assert landscape.local_optima(terraces) == (1, 0)
    assert not landscape.captured(terraces)[(HUMP > 0.65) & (HUMP < 0.75)].all()


def test_optima_that_touch_the_border_are_counted_apart():
    assert landscape.local_optima(X + 0.1 * Y) == (0, 1)
    assert landscape.local_optima(np.zeros((5, 7))) == (0, 1)
    two_corners = X * Y
    assert landscape.local_optima(two_corners) == (0, 2)
    assert landscape.local_optima(3 * HUMP + X * Y) == (1, 2)


def test_diagonal_neighbors_are_neighbors():
    ridge = np.zeros((7, 7))
    ridge[2, 2], ridge[3, 3], ridge[4, 4] = 1, 2, 3
    assert landscape.local_optima(ridge)[0] == 1


def test_of_two_humps_each_captures_its_own_side_and_the_higher_one_counts():
    two = np.exp(-20 * ((X - 0.5) ** 2 + Y**2)) + 0.8 * np.exp(-20 * ((X + 0.5) ** 2 + Y**2))
    reached = landscape.captured(two)
    assert landscape.local_optima(two) == (2, 0)
    assert reached[:, X[0] > 0.1].all()
    assert not reached[:, X[0] < -0.1].any()


def test_the_capture_range_is_the_distance_of_the_nearest_start_that_climbs_elsewhere():
    settings = Settings(spacing=1, reach=6, step=1)
    x, y = np.meshgrid(settings.offsets, settings.offsets)
    hump = -np.hypot(x, y)
    hump[6, 2] = -2.5  # at x = -4 mm, above its neighbors
    figures = landscape.describe(hump, settings)
    assert figures["local optima"] == 2
    assert figures["capture range mm"] == 4
    assert figures["captured %"] < 100
    assert landscape.describe(-np.hypot(x, y), settings)["capture range mm"] == settings.reach


def test_optima_caused_by_interpolation_vanish_among_whole_voxels():
    settings = Settings(spacing=2, reach=6, step=1)
    x, y = np.meshgrid(settings.offsets, settings.offsets)
    blurred = -np.hypot(x, y) - 2 * ((x % 2 != 0) | (y % 2 != 0))
    figures = landscape.describe(blurred, settings)
    assert figures["local optima"] == 25
    assert figures["local optima, whole voxels"] == 1
    assert (figures["optimum x mm"], figures["optimum y mm"]) == (0, 0)


def test_a_reach_that_is_no_whole_number_of_steps_is_refused():
    for reach, step in ((5, 2), (1, 2)):
        with pytest.raises(ValueError, match=f"{reach} mm in steps of {step} mm"):
            Settings(reach=reach, step=step)


# What moves


def test_a_translated_image_is_zero_outside():
    image = torch.arange(1, 2 * 3 * 5 + 1, dtype=torch.float32).view(1, 1, 2, 3, 5)
    moved = landscape.shifted(image, 2, -1)
    torch.testing.assert_close(moved[..., 1:, :3], image[..., :-1, 2:])
    assert moved[..., 0, :].abs().max() == 0
    assert moved[..., 3:].abs().max() == 0
    halfway = landscape.shifted(image, 0.5, 0)
    torch.testing.assert_close(halfway[..., :-1], (image[..., :-1] + image[..., 1:]) / 2)


@pytest.mark.parametrize("spacing", [2.0, 4.0])
def test_d_is_trained_under_misalignments_of_the_stated_millimeters_whatever_the_voxels(spacing):
    """An image of its own x coordinate, in mm, shows the displacement along x."""
    settings = Settings(spacing=spacing, misalignment=3)
    ramp = spacing * torch.arange(24.0).expand(1, 1, 12, 16, 24)
    generator = torch.Generator().manual_seed(0)
    moved = torch.cat([landscape.misaligned(ramp, settings, generator) - ramp for _ in range(100)])
    x = moved[:, 0, 4:-4, 6:-6, 11:13]  # far from the air outside
    # Translation and control points add up; between control points the average is less varied, (2/3)^3 in the mean.
    assert 3 < x.std().item() < 3 * math.sqrt(2)
    assert abs(x.mean().item()) < 1.2


# Where metrics peak


def tensor(image: sitk.Image) -> torch.Tensor:
    return torch.from_numpy(sitk.GetArrayFromImage(image))[None, None]


@pytest.fixture(scope="module")
def head(grid_about, paint, other_contrast, phantom):
    """An aligned head in two contrasts, and a label: each (1, 1, 12, 28, 26), 4 mm."""
    grid = grid_about((31, -47, 112), (26, 28, 12), (4.0, 4.0, 4.0))
    first, second = tensor(paint(grid)), tensor(paint(grid, contrast=other_contrast))
    return {"T2": first, "T1": second, "labels": (first > 0.4).float()}


@pytest.fixture(scope="module")
def found(head):
    """Landscapes of a pair of the same contrast and a pair of different contrasts."""
    return {
        m: landscape.landscapes(head["T2"], head[m], head["labels"], replace(TINY, refit=16 if m == "T1" else 0))
        for m in ("T2", "T1")
    }


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("moving", ["T2", "T1"])
def test_every_metric_of_an_aligned_pair_peaks_at_no_translation(found, moving, metric):
    figures = landscape.describe(found[moving][metric], TINY)
    assert (figures["optimum x mm"], figures["optimum y mm"]) == (0, 0)
    assert figures["local optima"] == 1
    assert figures["value at optimum"] > figures["value at far corner"] + 0.05


def test_dice_of_labels_moved_by_whole_voxels_is_dice(found, head):
    inside = head["labels"].bool()
    moved = torch.zeros_like(inside)
    moved[..., :-1, :-2] = inside[..., 1:, 2:]  # x = 8 mm, y = 4 mm
    expected = 2 * (inside & moved).sum() / (inside.sum() + moved.sum())
    assert found["T1"]["Dice"][3, 4] == pytest.approx(expected.item(), abs=1e-6)


def test_training_d_further_at_every_translation_raises_s(found):
    fixed_d, refitted = found["T1"]["S, patches shuffled"], found["T1"]["S, patches, refitted"]
    assert (refitted - fixed_d)[fixed_d < fixed_d.max() / 2].mean() > 0.01
    assert np.unravel_index(refitted.argmax(), refitted.shape) == (2, 2)


def test_the_same_seed_gives_the_same_landscape_and_another_one_does_not(head, found):
    short = replace(TINY, reach=4, steps=3)
    one, same, other = (
        landscape.landscapes(head["T2"], head["T1"], head["labels"], s) for s in (short, short, replace(short, seed=1))
    )
    for name in METRICS:
        assert np.array_equal(one[name], same[name])
    assert not np.array_equal(one[METRICS[0]], other[METRICS[0]])
    assert np.array_equal(one["LNCC"], found["T1"]["LNCC"][1:4, 1:4])


def test_s_exceeds_mi_if_voxels_are_shuffled_but_not_if_patches_are():
    """Independent blocks of 2^3 equal voxels: the MI of patches is that of voxels, -log(1 - r^2) / 2."""
    r, settings = 0.8, Settings(misalignment=0, steps=100, samples=2500)
    pairs = []
    for seed in (0, 1):
        a, b = torch.randn(2, 1, 1, 18, 20, 16, generator=torch.Generator().manual_seed(seed))
        pair = (a, r * a + math.sqrt(1 - r**2) * b)
        pairs.append([x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4) for x in pair])
    truth, histogram = -math.log(1 - r**2) / 2, parzen_mi(*pairs[1], bins=64).item()
    s = {
        shuffle: landscape.s_value(landscape.train(*pairs[0], settings, shuffle), *pairs[1], shuffle, 0)
        for shuffle in ("patches", "voxels")
    }
    assert 0.8 * truth < s["patches"] < min(truth, histogram) + 0.05
    assert s["voxels"] > max(truth, histogram) + 0.5


# The whole experiment


@pytest.fixture(scope="module")
def data(tmp_path_factory, grid_about, paint, other_contrast, rigid) -> Path:
    """A template on disk with flipped axes x and y; its T1 is shifted by (8, -4, 0) mm."""
    folder = tmp_path_factory.mktemp("data") / "brain_t1t2pd"
    folder.mkdir()
    grid = grid_about((31, -47, 112), (50, 54, 48), (2.0, 2.0, 2.0), (0, 0, 180))
    head = paint(grid)
    sitk.WriteImage(head, str(folder / "brainweb_T2.nii.gz"))
    sitk.WriteImage(paint(grid, rigid((0, 0, 0), (8, -4, 0)), other_contrast), str(folder / "brainweb_T1.nii.gz"))
    sitk.WriteImage(sitk.Cast(head > 0.4, sitk.sitkUInt8) * 7, str(folder / "aal_labels.nii.gz"))
    return folder.parent


@pytest.fixture(scope="module")
def result(data, tmp_path_factory) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("landscape")
    settings = replace(TINY, reach=12, steps=5, seed=3)
    return output, landscape.run(data, output, settings, preset="tiny")


def test_the_optimum_is_where_the_moving_image_really_is(result):
    """The moving image shows at p what belongs at p + (8, -4, 0), so the optimum is the opposite translation."""
    rows = {(row["pair"], row["metric"]): row for row in result[1]}
    assert len(rows) == len(result[1]) == 10
    for pair, place in (("T1-T2", (-8, 4)), ("T2-T2", (0, 0))):
        row = rows[pair, "MI, 64 bins"]
        assert (row["optimum x mm"], row["optimum y mm"]) == place


def test_table_values_and_figure_of_a_run_agree(result):
    output, rows = result
    assert {file.name for file in output.iterdir()} == {
        f"landscape.{end}" for end in ("md", "csv", "json", "png", "npz")
    }
    assert json.loads((output / "landscape.json").read_text())["rows"] == rows
    with (output / "landscape.csv").open(newline="") as stream:
        assert [float(row["value at optimum"]) for row in csv.DictReader(stream)] == [
            r["value at optimum"] for r in rows
        ]
    with np.load(output / "landscape.npz") as values:
        for row in rows:
            assert values[f"{row['pair']}: {row['metric']}"].max() == row["value at optimum"]
        assert values["offsets_mm"].tolist() == [-12, -8, -4, 0, 4, 8, 12]
    picture = imread(output / "landscape.png")
    assert picture.shape[1] > 2 * picture.shape[0]
    for j in range(2):  # something is drawn in each of the ten places
        for i in range(5):
            place = picture[j * picture.shape[0] // 2 :, i * picture.shape[1] // 5 :][:400, :400, :3]
            assert np.ptp(place, axis=-1).max() > 0.3, (j, i)


def test_a_report_says_how_it_was_made(result):
    text = (result[0] / "landscape.md").read_text()
    run = json.loads((result[0] / "landscape.json").read_text())["run"]
    assert run["seeds"] == [3]
    assert run["preset"] == "tiny"
    assert run["settings"]["steps"] == 5
    assert run["torch"] == torch.__version__
    assert run["threads"] == torch.get_num_threads()
    assert run["seconds"] > 0
    assert report.table(result[1]) in text
    for name, value in run.items():
        assert f"- {name}: `{value}`" in text


def test_a_missing_template_is_named(tmp_path):
    with pytest.raises(InputError, match="aal_labels"):
        landscape.run(tmp_path, tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists()


def test_the_script_runs_from_anywhere(tmp_path):
    help_text = subprocess.run(
        [sys.executable, landscape.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "--preset {quick,paper}" in help_text


# The report


ABOUT = {"preset": "quick", "seeds": [0], "device": "cpu", "seconds": 1.5}


def test_a_table_has_the_columns_of_all_rows_and_no_nan():
    rows = [{"a": 1, "b": 0.123456}, {"a": "x", "c": float("nan")}]
    assert report.table(rows) == "| a | b | c |\n| --- | --- | --- |\n| 1 | 0.1235 |  |\n| x |  |  |"


def test_csv_and_json_keep_every_digit_and_absent_values_absent(tmp_path):
    rows = [{"a": 1, "b": 1 / 3}, {"a": 2, "b": float("inf"), "c": "z"}]
    report.write(tmp_path, "t", rows, ABOUT)
    expected = [{"a": 1, "b": 1 / 3, "c": None}, {"a": 2, "b": None, "c": "z"}]
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == expected
    assert (tmp_path / "t.csv").read_bytes().decode() == f"a,b,c\r\n1,{1 / 3},\r\n2,,z\r\n"


def test_the_command_in_a_report_has_no_folders_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/x.py", "--data", str(tmp_path / "my data"), "--other=1", "../y"])
    report.write(tmp_path, "t", [{"a": 1}], ABOUT)
    run = json.loads((tmp_path / "t.json").read_text())["run"]
    expected = ["python", "training/x.py", "--data", ".../my data", "--other=1", ".../y"]
    assert shlex.split(run["command"]) == expected
    assert str(tmp_path) not in (tmp_path / "t.md").read_text()


@pytest.mark.parametrize("key", report.REQUIRED)
def test_a_report_that_lacks_a_required_key_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match=f"does not say its {key}"):
        report.write(tmp_path, "t", [{"a": 1}], {k: v for k, v in ABOUT.items() if k != key})
    with pytest.raises(ValueError, match="no rows"):
        report.write(tmp_path, "t", [], ABOUT)
    assert not list(tmp_path.iterdir())
