"""The benchmark on a generated pair with a known deformation; no other method needs to be installed."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from training import benchmark
from training.benchmarks import measure, methods, scaling, tables
from training.benchmarks.cases import (
    AAL,
    FAMILIES,
    MUSE,
    Family,
    Material,
    deformed,
    painted_image,
    prepare_pair,
    relabeled,
)
from training.benchmarks.measure import Settings
from training.data import hippocampus, label_maps

SPACING = 6.0
OURS = ("initial", "affine", "DivRegNet")


@pytest.fixture(scope="module")
def material(paint, phantom, other_contrast, grid_about, landmarks):
    """A deformed head, another contrast of the undeformed head, and labels of dark and bright parts."""
    grid = grid_about((31.0, -47.0, 112.0), (26, 30, 28), (5.0, 4.5, 4.5))
    image, other = paint(grid), paint(grid, contrast=other_contrast)
    array = sitk.GetArrayFromImage(image)
    labels = grid.image(((array > 0.2).astype(np.uint8) + (array > 0.6)).astype(np.uint8))
    return deformed(Material(image, other, labels, labels), seed=3)


@pytest.fixture(scope="module")
def prepared(material, tmp_path_factory):
    return prepare_pair(lambda: material, SPACING, tmp_path_factory.mktemp("pair"), "center")


@pytest.fixture
def settings(tiny_model):
    return Settings(model=tiny_model, device="cpu", threads=1, refine=1)


@pytest.fixture
def families(material):
    cases = {"a": lambda data: material, "b": lambda data: material}
    return {"heads": Family(SPACING, 8.0, "generated", cases, align="center")}


def residual(prepared) -> sitk.Image:
    """The displacement u that makes the true transform together with the alignment A: ``A (p + u) = T(p)``."""
    grid = Grid.of(prepared.fixed)
    k, j, i = np.indices(grid.shape)
    points = grid.to_physical(np.stack([i, j, k], -1))
    back = np.linalg.inv(prepared.initial)
    there = points + sitk.GetArrayFromImage(prepared.truth)
    return grid.image(there @ back[:3, :3].T + back[:3, 3] - points)


def test_the_true_displacement_has_no_error(prepared):
    assert measure.scores(prepared, np.eye(4))["error mm"] > 1.5
    perfect = measure.scores(prepared, prepared.initial, residual(prepared))
    assert perfect["error mm"] < 1e-3
    assert perfect["folded %"] == 0


def test_the_displacement_that_undoes_a_shift_has_perfect_overlap(prepared):
    grid = Grid.of(prepared.fixed)
    shift = sitk.TranslationTransform(3, [-2 * SPACING, 0.0, SPACING])
    shifted = sitk.Resample(prepared.fixed_labels, prepared.fixed_labels, shift, sitk.sitkNearestNeighbor, 0)
    moved = replace(prepared, moving_labels=shifted)
    undone = grid.image(np.broadcast_to([2 * SPACING, 0.0, -SPACING], (*grid.shape, 3)))
    assert measure.scores(moved, np.eye(4))["Dice"] < 0.8
    found = measure.scores(moved, np.eye(4), undone)
    assert found["Dice"] == 1 and found["ASD mm"] == 0 and found["HD95 mm"] == 0


def test_a_label_that_is_lost_has_dice_0(prepared):
    one = prepared.fixed_labels == 1
    same = replace(prepared, moving_labels=sitk.Cast(one, sitk.sitkUInt8))
    assert measure.scores(same, np.eye(4))["Dice"] == pytest.approx(0.5)


def test_labels_outside_the_grid_have_dice_0_and_no_distance(prepared):
    away = np.eye(4)
    away[0, 3] = 1000.0
    found = measure.scores(prepared, away)
    assert found["Dice"] == 0 and "ASD mm" not in found


def test_without_a_shared_frame_the_truth_includes_the_methods_result_on_the_unbent_pair(
    material, settings, tmp_path, monkeypatch
):
    apart = replace(material, truth=None)
    bent = prepare_pair(lambda: deformed(apart, seed=4, one_frame=False), SPACING, tmp_path / "pair", "none")
    grid, bend = Grid.of(bent.fixed), sitk.GetArrayFromImage(bent.truth)
    assert Grid.of(bent.unbent.fixed) == grid and bent.unbent.truth is None
    away = np.array([4.0, -3.0, 12.0])  # the method's result between the two frames

    def run(pair, method, settings, kept):
        found = away if pair.name == "unbent" else bend + away + error
        sitk.WriteImage(grid.image(np.broadcast_to(found, (*grid.shape, 3))), str(kept / "displacement.mha"))
        return {"seconds": 1.0}

    monkeypatch.setattr(measure, "_run", run)
    for error in (0.0, np.array([0.0, 2.0, 0.0])):
        kept = tmp_path / str(error)
        found = measure.row(bent, "DivRegNet", settings, kept)
        assert found["error mm"] == pytest.approx(np.linalg.norm(error), abs=1e-3)
    still = measure.row(bent, "initial", settings, tmp_path / "initial")
    assert still["error mm"] == pytest.approx(np.linalg.norm(bend, axis=-1)[bent.inside].mean(), abs=1e-3)


def test_folds_and_the_inverse_are_measured_in_millimeters(prepared):
    grid = Grid.of(prepared.fixed)
    x = np.indices(grid.shape)[2] * SPACING
    ahead = np.zeros((*grid.shape, 3))
    ahead[..., 0] = 2.0
    shift, back = grid.image(ahead), grid.image(-0.5 * ahead)
    assert measure.scores(prepared, np.eye(4), shift, back)["inverse mm"] == pytest.approx(1.0, abs=1e-4)
    mirrored = np.zeros_like(ahead)
    mirrored[..., 0] = -2 * x
    assert measure.scores(prepared, np.eye(4), grid.image(mirrored))["folded %"] == 100


def test_landmarks_are_mapped_by_the_alignment_and_the_displacement(prepared, landmarks):
    shift = np.full((*Grid.of(prepared.fixed).shape, 3), 3.0)
    start = np.eye(4)
    start[0, 3] = 5.0
    marked = replace(prepared, landmarks=(landmarks, landmarks + np.array([8.0, 3.0, 3.0])))
    found = measure.scores(marked, start, Grid.of(prepared.fixed).image(shift))
    assert found["TRE mm"] == pytest.approx(0, abs=1e-6)


def test_every_method_registers_the_same_two_volumes_on_one_isotropic_grid(prepared, material):
    fixed, moving = (sitk.ReadImage(str(prepared.folder / f"{n}.mha")) for n in ("fixed", "moving"))
    assert Grid.of(fixed) == Grid.of(moving)
    assert fixed.GetSpacing() == (SPACING,) * 3
    assert np.allclose(fixed.GetDirection(), np.eye(3).ravel())
    assert Grid.of(fixed).contains(Grid.of(material.fixed).corners() * 0.999 + Grid.of(fixed).center * 0.001).all()
    assert sitk.GetArrayViewFromImage(moving).max() == 1 and sitk.GetArrayViewFromImage(moving).min() == 0


def test_the_comparison_writes_table_plot_and_pictures_and_reuses_finished_rows(
    families, settings, tmp_path, monkeypatch
):
    rows = benchmark.compare(families, tmp_path, settings, tmp_path / "out", chosen=OURS)
    assert [(r["case"], r["method"]) for r in rows] == [(c, m) for c in "ab" for m in OURS]
    ours = rows[2]
    assert (
        ours["seconds"] > ours["deformation s"] > 0
        and ours["CPU s"] > 0
        and -1 < ours["above start MiB"] < ours["peak MiB"] < 3000
    )
    assert ours["inverse mm"] < 1

    shown = benchmark.write(rows, settings, tmp_path / "out", "full", 0.0, ["Nothing is left out."])
    assert "Nothing is left out." in shown
    written = (tmp_path / "out/benchmark.md").read_text()
    assert "| heads | held back | DivRegNet | 2 |" in written and "threads" in written
    assert len((tmp_path / "out/benchmark-pairs.csv").read_text().splitlines()) == 1 + len(rows)
    for picture in (tmp_path / "out/benchmark.png", tmp_path / "out/6 mm/heads/a/pair.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")

    def never(*_):
        raise AssertionError("registered again")

    monkeypatch.setattr(measure, "_run", never)
    assert benchmark.compare(families, tmp_path, settings, tmp_path / "out", chosen=OURS) == rows
    with pytest.raises(AssertionError, match="registered again"):
        changed = replace(settings, threads=2)
        benchmark.compare(families, tmp_path, changed, tmp_path / "out", chosen=OURS)


def test_the_worst_pairs_are_drawn_with_the_best_other_method(families, settings, tmp_path):
    rows = benchmark.compare(families, tmp_path, settings, tmp_path / "out", chosen=("DivRegNet",))
    family, case = rows[0]["family"], rows[0]["case"]
    folder = benchmark.folder_of(tmp_path / "out", families[family], family, case, False)
    shutil.copytree(folder / "DivRegNet", folder / "elastix")
    worst = [{"family": family, "case": case, "best other": "elastix"}] * 2
    drawn = benchmark.picture_of_worst(worst, families, tmp_path / "out", False)
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles == ["fixed", "affine", "elastix", "DivRegNet"] * 2
    assert all(axes.images for axes in drawn.axes)


def test_quick_takes_one_case_of_a_family_on_its_coarse_grid(families, settings, tmp_path):
    rows = benchmark.compare(families, tmp_path, settings, tmp_path / "out", quick=True, chosen=("initial",))
    assert [r["case"] for r in rows] == ["a"]
    assert (tmp_path / "out/8 mm/heads/a/fixed.mha").exists()


def test_a_method_that_is_not_installed_is_named_and_left_out(families, settings, tmp_path, monkeypatch):
    absent = methods.Method("no-such-package", "none", methods.greedy)
    monkeypatch.setitem(methods.METHODS, "ANTs SyN", absent)
    assert benchmark.left_out(("initial", "ANTs SyN")) == [
        "ANTs SyN is left out: no-such-package is not installed; install it with pip install -e '.[benchmark]'"
    ]
    rows = benchmark.compare(families, tmp_path, settings, tmp_path / "out", True, ("initial", "ANTs SyN"))
    assert [r["method"] for r in rows] == ["initial"]


def test_a_failed_row_has_the_reason_and_is_tried_again(prepared, settings, tmp_path):
    broken = replace(settings, device="cuda:99")
    found = measure.row(prepared, "DivRegNet", broken, tmp_path / "row")
    assert "cuda:99" in found["failed"]
    assert not (tmp_path / "row/row.json").exists()
    row = {"family": "heads", "case": "a", "method": "DivRegNet"} | found
    assert tables.means([row | {"set": "seen"}])[0]["failed"] == 1
    slow = replace(settings, limit=0.01)
    assert "not finished after 0.01 s" in measure.row(prepared, "DivRegNet", slow, tmp_path / "row")["failed"]


def test_the_peak_memory_does_not_include_that_of_the_parent_process():
    held = np.ones(300 * 2**20, np.uint8)
    code = "from training.benchmarks import methods; print(methods.peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.nbytes


def test_the_peak_memory_includes_what_was_freed_again():
    before = methods.reset_peak()
    held = np.ones(200 * 2**20, np.uint8)
    del held
    assert 180 * 2**20 < methods.peak() - before < 400 * 2**20


def measured(method: str, case: str = "a", family: str = "f", seconds: float = 1.0, **scores: float) -> dict:
    """A row without folds; the deformation takes half of the time."""
    times = {"seconds": seconds, "deformation s": seconds / 2, "CPU s": 2 * seconds}
    return {"family": family, "set": "held back", "case": case, "method": method, "folded %": 0.0} | times | scores


def test_scores_are_means_with_standard_errors_and_memory_is_the_maximum():
    rows = [
        measured("DivRegNet", "a", seconds=1.0, Dice=0.8, **{"peak MiB": 100.0}),
        measured("DivRegNet", "b", seconds=3.0, Dice=0.9, **{"peak MiB": 50.0}),
        measured("ANTs SyN", seconds=30.0, Dice=0.86),
    ]
    ours, syn = tables.means(rows)
    assert ours["Dice"] == pytest.approx(0.85) and ours["seconds"] == 2 and ours["peak MiB"] == 100
    assert ours["Dice se"] == pytest.approx(0.05) and ours["pairs"] == 2
    assert syn["Dice se"] is None and syn["pairs"] == 1
    assert "GPU MiB" not in ours
    (row,) = tables.accuracy([ours, syn])
    assert row == {
        "family": "f", "set": "held back", "pairs": 2, "by": "Dice", "DivRegNet": "0.850 ± 0.050", "ANTs SyN": "**0.860**"
    }  # fmt: skip


def test_methods_are_compared_pair_by_pair():
    ours, theirs = {"a": 0.8, "b": 0.9, "c": 0.7}, {"a": 0.7, "b": 0.92, "c": 0.7}
    rows = [measured(m, c, Dice=v) for m, of in (("DivRegNet", ours), ("ANTs SyN", theirs)) for c, v in of.items()]
    rows.append(measured("ANTs SyN", "d", Dice=0.1))  # without ours there is no pair
    row, everything = tables.against(rows)
    gains = [0.1, -0.02, 0.0]
    assert row["pairs"] == 3 and row["gain"] == pytest.approx(np.mean(gains))
    assert row["se"] == pytest.approx(np.std(gains, ddof=1) / 3**0.5)
    assert row["at least as good %"] == everything["at least as good %"] == pytest.approx(200 / 3)
    (aim,) = tables.aims(rows)
    assert aim["families at or above"] == "1 of 1" and aim["90 % of pairs"] == "no"


def test_the_worst_pairs_are_those_with_the_most_error_for_that_of_the_best_other_method():
    rows = [
        *(measured(m, "a", Dice=v) for m, v in {"DivRegNet": 0.6, "ANTs SyN": 0.8, "elastix": 0.5}.items()),  # 2 times
        *(measured(m, "b", Dice=v) for m, v in {"DivRegNet": 0.9, "ANTs SyN": 0.8}.items()),  # half
        *(
            measured(m, "c", family="limb CT to MR", **{"error mm": v})
            for m, v in {"DivRegNet": 3.0, "elastix": 1.0}.items()  # 3 times
        ),
        measured("DivRegNet", "d", Dice=0.1),  # no other method
    ]
    found = tables.worst(rows, 2)
    assert [(w["family"], w["case"], w["best other"]) for w in found] == [
        ("limb CT to MR", "c", "elastix"), ("f", "a", "ANTs SyN")
    ]  # fmt: skip
    assert [w["error, times that of the best other"] for w in found] == pytest.approx([3.0, 2.0])


def test_of_errors_the_smallest_is_the_best():
    errors = {"ANTs SyN": 3.0, "elastix": 1.5, "DivRegNet": 2.0}
    rows = [measured(m, family="limb CT to MR", Dice=0.5, **{"error mm": e}) for m, e in errors.items()]
    (row,) = tables.accuracy(tables.means(rows))
    assert (row["by"], row["elastix"], row["DivRegNet"]) == ("error mm", "**1.50**", "2.00")
    gains = {r["against"]: r.get("gain") for r in tables.against(rows) if r["family"] != tables.ALL}
    assert gains == {"ANTs SyN": 1.0, "elastix": -0.5}


def test_the_plot_has_a_panel_per_family_and_every_method_in_its_legend():
    shown = ("affine", "ANTs SyN", "DivRegNet")
    rows = [measured(m, c, family=f, seconds=2.0, Dice=0.8) for m in shown for c in "ab" for f in "fg"]
    drawn = tables.plot(rows)
    assert [axes.get_title() for axes in drawn.axes[:2]] == ["f, 2 pairs", "g, 2 pairs"]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(shown)
    assert set(tables.COLORS) == set(methods.METHODS)


# What is held back


def test_pairs_are_either_seen_or_held_back():
    for name, family in FAMILIES.items():
        assert set(family.seen) <= set(family.cases)
        assert {tables.set_of(name, case) for case in family.cases} <= {"seen", "held back"}
    held_back = {name for name, family in FAMILIES.items() if set(family.cases) - set(family.seen)}
    assert held_back == {"MS07 phantoms", "IXI015 phantoms", "aligned pairs", "painted heads", "hippocampus"}


def test_painted_heads_that_are_held_back_are_of_test_subjects():
    family = FAMILIES["painted heads"]
    for name, case in family.cases.items():
        splits = {label_maps.HELD_OUT[case.keywords[side]] for side in ("fixed", "moving")}
        assert (name in family.seen) == ("validation" in splits) and splits <= {"validation", "test"}


def test_hippocampus_pairs_are_of_two_of_the_last_crops():
    pairs = hippocampus.pairs()
    assert len(pairs) == len(set(pairs)) == 30
    assert all(a != b and 0 <= a < 20 and 0 <= b < 20 for a, b in pairs)


def test_a_painted_head_has_the_contrast_and_the_seed_it_is_asked_for(grid):
    array = np.zeros(grid.shape, np.uint8)
    array[4:-4, 4:-4, 4:-4] = 2  # white matter
    array[4:-4, 4:-4, 4:9] = 24  # fluid
    labels = grid.image(array)
    first, again, other = (painted_image(labels, "T2", np.random.default_rng(seed)) for seed in (1, 1, 2))
    values = sitk.GetArrayFromImage(first)
    assert values[array == 24].mean() > 1.8 * values[array == 2].mean() and values[array == 0].mean() < 0.2
    assert np.array_equal(values, sitk.GetArrayFromImage(again))
    assert not np.array_equal(values, sitk.GetArrayFromImage(other))
    assert Grid.of(first) == grid


def test_a_preset_that_this_version_does_not_have_is_left_out(monkeypatch):
    unknown = methods.Method(None, "", methods.divregnet, {}, "no such")
    monkeypatch.setitem(methods.METHODS, "DivRegNet, fast", unknown)
    assert methods.missing("DivRegNet, fast") == "this version has no preset no such"
    assert "align" not in methods.METHODS["DivRegNet, thorough"].all_options()
    assert methods.missing("DivRegNet") is None


def test_the_mask_of_elastix_covers_the_foreground(prepared):
    fixed = sitk.ReadImage(str(prepared.folder / "fixed.mha"))
    inside = sitk.GetArrayFromImage(methods.foreground(fixed)) > 0
    labels = sitk.GetArrayFromImage(prepared.fixed_labels) > 0
    assert (inside & labels).sum() > 0.9 * labels.sum() and inside.mean() < 0.8


def test_regions_of_two_atlases_get_the_same_labels():
    assert len(AAL) == len(MUSE) == 14
    labels = sitk.GetImageFromArray(np.arange(120, dtype=np.uint8).reshape(1, 10, 12))
    found = sitk.GetArrayFromImage(relabeled(labels, AAL)).ravel()
    assert found[42] == 1 and found[41] == 2  # amygdala, right and left
    assert set(np.flatnonzero(found == 14)) == set(range(91, 109, 2))
    assert found[0] == found[109] == 0


def test_syn_leaves_out_levels_that_are_too_coarse():
    assert methods.syn_iterations((181, 217, 181), (1.0,) * 3) == (100, 70, 50, 20)
    assert methods.syn_iterations((91, 109, 91), (2.0,) * 3) == (70, 50, 20)
    assert methods.syn_iterations((35, 51, 35), (1.0,) * 3) == (70, 50, 20)
    assert methods.syn_iterations((20, 20, 20), (10.0,) * 3) == (20,)


def test_scaling_stretches_the_pair_over_the_size(settings, tmp_path):
    kept = tmp_path / "32.json"
    row = scaling.row((32, 24, 28), settings, kept)
    assert row["size"] == "32 x 24 x 28" and row["total s"] > 0 and row["peak MiB"] > 50
    assert json.loads(kept.read_text()) == row
    blob = sitk.GaussianSource(sitk.sitkFloat32, [20] * 3, [1.2] * 3, [9.5, 9.5, 4.5], 1000.0)
    large = sitk.GetArrayFromImage(scaling.stretched(blob, (40, 30, 60))).astype(float)
    middle = (np.indices(large.shape) * large).sum((1, 2, 3)) / large.sum()
    assert large.shape == (60, 30, 40) and np.allclose(middle, [14.5, 14.5, 19.5], atol=0.05)
