"""The paper's experiments end to end on small data: the files they write and their values."""

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib.similarity.mutual_information import parzen_mi
from training import scoring
from training.benchmarks.cases import FAMILIES
from training.data import phantoms
from training.data.cohort import FORMAT
from training.data.synthesis import Recipe
from training.experiments import comparison, refinement
from training.experiments import similarities as study
from training.experiments.aal_brain import EXPERIMENT as AAL
from training.experiments.liver import EXPERIMENTS, SPLITS

ROOT = Path(__file__).resolve().parents[2]
SIDE = 32


def blobs(seed: int, side: int = SIDE) -> np.ndarray:
    """A smooth texture in [0, 1], (side, side, side)."""
    noise = sitk.GetImageFromArray(np.random.default_rng(seed).normal(size=(side,) * 3).astype(np.float32))
    array = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(noise, 2.0))
    return (array - array.min()) / np.ptp(array)


def run(*arguments: object, home: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, encoding="utf-8", check=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A cohort of one volume in three contrasts, as prepare_head.py --template writes it."""
    folder = tmp_path_factory.mktemp("aal")
    texture = blobs(1)
    z, y, x = np.indices(texture.shape) - (SIDE - 1) / 2
    inside = (x / 11) ** 2 + (y / 12) ** 2 + (z / 10) ** 2 < 1
    images = [inside * (0.1 + 0.9 * c) for c in (texture, 1 - texture, np.abs(2 * texture - 1))]
    np.savez(
        folder / "template.npz",
        images=np.stack(images).astype(np.float16),
        labels=inside.astype(np.uint8),
        brain=inside,
    )
    about = {
        "format": FORMAT, "spacing": 4.0, "shape": [SIDE] * 3, "origin": [0, 0, 0], "normalization": "robust",
        "volumes": [{"name": "template", "subject": "template", "role": "both", "split": "train",
                     "contrasts": ["T1", "T2", "PD"]}],
    }  # fmt: skip
    (folder / "cohort.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def aal(template, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, list[str]]:
    output = tmp_path_factory.mktemp("experiments") / "aal"
    command = [ROOT / "training/experiments/aal_brain.py", "--cohort", template, "--output", output, "--pairs", 1]
    command += ["--tasks", "T1-T2", "--device", "cpu"]
    command += ["--methods", "affine", "RegNet + MI 16", "DivRegNet", "Newton steps alone"]
    return output, run(*command, home=output.parent), command


def test_aal_brain_writes_a_table_with_the_papers_numbers_and_a_figure(aal):
    output, done, _ = aal
    assert done.returncode == 0, done.stderr
    with (output / "aal-brain.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"affine", "RegNet + MI 16", "DivRegNet", "Newton steps alone"}
    assert float(rows["DivRegNet"]["paper Dice"]) == 0.9546
    assert rows["Newton steps alone"]["paper Dice"] == ""
    assert all(0.5 < float(row["Dice"]) <= 1 and float(row["error mm"]) > 0 for row in rows.values())
    assert "--preset" not in done.stdout and "quick" in (output / "aal-brain.md").read_text()
    assert (output / "aal-brain-T1-T2.png").read_bytes().startswith(b"\x89PNG")


def test_registering_a_phantom_brings_it_closer_to_the_known_truth(aal):
    rows = {row["method"]: row for row in json.loads((aal[0] / "aal-brain.json").read_text())["rows"]}
    assert rows["Newton steps alone"]["error mm"] < 0.8 * rows["affine"]["error mm"]


def test_a_second_run_of_an_experiment_computes_nothing(aal):
    output, _, command = aal
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*.pt")} | {
        file: file.stat().st_mtime_ns for file in (output / "rows").iterdir()
    }
    assert before and run(*command, home=output.parent).returncode == 0
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_one_network_can_serve_all_tasks(template, tmp_path):
    command = [ROOT / "training/experiments/aal_brain.py", "--cohort", template, "--output", tmp_path, "--pairs", 1]
    command += ["--methods", "RegNet + MI 16", "--tasks", "T1-T2", "T2-T2", "--device", "cpu", "--joint"]
    assert run(*command, home=tmp_path).returncode == 0
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["T1-T2_PD-T2_T2-T2_RegNet_MI_16"]
    rows = json.loads((tmp_path / "aal-brain.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["T1-T2", "T2-T2"]


def test_networks_are_trained_side_by_side_and_register_as_far_as_they_are(template, tmp_path):
    output, methods = tmp_path / "aal", ("RegNet + MI 16", "DivRegNet")
    command = [ROOT / "training/experiments/aal_brain.py", "--cohort", template, "--output", output, "--pairs", 1]
    command += ["--tasks", "T1-T2", "--device", "cpu", "--methods", *methods]
    done = run(*command, "--jobs", 2, "--train-only", "--override", "steps=4", "validate_every=4", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {f.name for f in (output / "runs").glob("*.log")} == {"T1-T2_RegNet_MI_16.log", "T1-T2_DivRegNet.log"}
    assert not (output / "rows").exists()
    done = run(*command, "--unfinished", "--override", "validate_every=4", home=tmp_path)
    assert done.returncode == 0, done.stderr
    with (output / "aal-brain.csv").open() as file:
        assert [(row["method"], row["steps"]) for row in csv.DictReader(file)] == [(m, "4") for m in methods]
    failed = run(*command, "--jobs", 2, "--train-only", "--override", "steps=5", "learning_rate=1", home=tmp_path)
    assert failed.returncode == 2 and ".log says why" in failed.stderr


def test_the_scores_of_the_true_deformation_are_perfect(template):
    from training.data.cohort import load

    pair = phantoms.phantom(load(template), "T2-T2", phantoms.seed_of("test", 0))
    scores = scoring.of_displacement(pair, pair.truth, 4.0, union=True, surfaces=True)
    assert scores["Dice"] == 1 and scores["error mm"] == 0 and scores["HD mm"] == 0
    nothing = scoring.of_displacement(pair, torch.zeros_like(pair.truth), 4.0)
    assert nothing["error mm"] == pytest.approx(
        4 * pair.truth.norm(dim=1)[pair.fixed_labels[0] > 0].mean().item(), rel=1e-4
    )


def test_a_missing_cohort_is_explained_in_one_line(tmp_path):
    done = run(ROOT / "training/experiments/aal_brain.py", "--cohort", "nowhere", home=tmp_path)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def liver_volume(file: Path, labels: Path, seed: int, contrast: float) -> None:
    """A body with a bright liver, shifted and scaled by the seed, anisotropic and off-center."""
    random = np.random.default_rng(seed)
    z, y, x = np.indices((16, 28, 30)) - np.array([7.5, 13.5, 14.5]).reshape(3, 1, 1, 1)
    body = (x / 13) ** 2 + (y / 12) ** 2 < 1
    cx, cy = random.uniform(-2, 2, 2)
    liver = ((x - 4 - cx) / 5) ** 2 + ((y - cy) / 5) ** 2 + (z / 6) ** 2 < 1
    array = (body * (0.4 + 0.2 * blobs(seed, 32)[:16, :28, :30]) + contrast * liver).astype(np.float32)
    for path, values in ((file, array * 100), (labels, liver.astype(np.uint8))):
        image = sitk.GetImageFromArray(values)
        image.SetSpacing((3.0, 3.0, 5.0))
        image.SetOrigin((-50.0, 20.0, 300.0))
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path))


def test_lits_runs_from_its_own_layout_to_table_3(tmp_path):
    for i in range(5):
        liver_volume(tmp_path / f"lits/volume-{i}.nii", tmp_path / f"lits/segmentation-{i}.nii", i, 0.3)
    command = [
        ROOT / "training/experiments/liver.py",
        "lits",
        "--cohort",
        tmp_path / "lits",
        "--output",
        tmp_path / "out",
    ]
    command += [
        "--spacing",
        5,
        "--align",
        "center",
        "--split",
        "2,2,1",
        "--workers",
        1,
        "--pairs",
        2,
        "--device",
        "cpu",
    ]
    done = run(*command, "--methods", "affine", "DivRegNet", home=tmp_path)
    assert done.returncode == 2 and "test" in done.stderr  # one volume makes no pair
    command[command.index("--split") + 1] = "2,1,2"
    done = run(*command, "--methods", "affine", home=tmp_path)
    assert done.returncode == 2 and "validation" in done.stderr


def test_hospital_registers_mr_to_ct_from_two_folders_to_table_4(tmp_path):
    for i in range(6):
        kind = ("ct", "mr")[i % 2]
        liver_volume(tmp_path / kind / f"{i}.nii.gz", tmp_path / f"{kind}_liver" / f"{i}.nii.gz", i, (0.4, -0.3)[i % 2])
    sides = [f"--{side}{what}" for what in ("", "-labels") for side in ("fixed", "moving")]
    folders = [tmp_path / name for name in ("ct", "mr", "ct_liver", "mr_liver")]
    command = [ROOT / "training/experiments/liver.py", "hospital", "--output", tmp_path / "out", "--device", "cpu"]
    command += [word for pair in zip(sides, folders, strict=True) for word in pair]
    command += ["--spacing", 5, "--align", "center", "--split", "1,1,1", "--workers", 1]
    done = run(*command, "--methods", "affine", "DivRegNet", home=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/hospital-liver.json").read_text())["rows"]
    assert [row["paper Dice"] for row in rows] == [0.8084, 0.8351]
    assert all(0 < row["Dice"] <= 1 and "error mm" not in row for row in rows)
    assert (tmp_path / "out/hospital-liver-MR-CT.png").exists()


def test_volumes_without_a_label_map_are_named(tmp_path):
    for i in range(3):
        liver_volume(tmp_path / f"lits/volume-{i}.nii", tmp_path / f"lits/segmentation-{i}.nii", i, 0.3)
    (tmp_path / "lits/segmentation-1.nii").unlink()
    done = run(ROOT / "training/experiments/liver.py", "lits", "--cohort", tmp_path / "lits", home=tmp_path)
    assert done.returncode == 2 and "volume-1" in done.stderr and "label" in done.stderr


def test_the_papers_numbers_and_cohort_sizes_are_those_of_the_paper():
    assert sum(SPLITS["lits"]) == 131 and sum(SPLITS["hospital"][:3]) == 14 and sum(SPLITS["hospital"][3:]) == 19
    assert sum(phantoms.COUNTS.values()) == 250
    for experiment in (AAL, *EXPERIMENTS.values()):
        for (method, task), (dice, asd, hd) in experiment.paper.items():
            assert method in comparison.METHODS and task in experiment.tasks
            assert 0.7 < dice < 1 and 0 < asd < hd


@pytest.mark.parametrize("experiment", [AAL, *EXPERIMENTS.values()], ids=lambda e: e.name)
def test_every_row_of_every_experiment_has_a_configuration(experiment, tmp_path):
    settings = argparse.Namespace(preset="quick", cohort=tmp_path, overrides=[])
    assert (comparison.SUPERVISED in experiment.methods) == (experiment is AAL)
    for method in set(experiment.methods) & set(comparison.NETWORKS):
        config = comparison._config(experiment, experiment.tasks, method, settings)
        supervised = method == comparison.SUPERVISED
        assert (config.loss.known > 0) == supervised == (config.loss.weight == 0)


@pytest.fixture(scope="module")
def similarities(tmp_path_factory) -> Path:
    """The study of training signals, too short to learn anything."""
    output = tmp_path_factory.mktemp("experiments") / "similarities"
    signals = ["KLDivNet, conditional", "displacement, labels"]
    command = [ROOT / "training/experiments/similarities.py", "--output", output, "--device", "cpu"]
    done = run(*command, "--signals", *signals, "--starts", "the images", home=output.parent)
    assert done.returncode == 0, done.stderr
    return output


def test_the_study_of_similarities_compares_signals_with_an_untrained_network(similarities):
    report = json.loads((similarities / "similarities.json").read_text())
    rows = {row["trained by"]: row for row in report["rows"]}
    assert list(rows) == ["nothing", "KLDivNet, conditional", "displacement, labels"]
    assert all(row["error mm"] > 0 and 0 < row["Dice"] < 1 and row["folded %"] == 0 for row in rows.values())
    assert -1 <= rows["KLDivNet, conditional"]["S and MI"] <= 1 and rows["displacement, labels"]["S and MI"] is None
    assert rows["nothing"]["sd"] is None and rows["displacement, labels"]["sd"] > 0  # of two seeds
    assert rows["nothing"]["gain mm"] == 0
    assert rows["displacement, labels"]["gain mm"] == pytest.approx(
        rows["nothing"]["error mm"] - rows["displacement, labels"]["error mm"], rel=1e-6, abs=1e-9
    )
    assert "of 2 pairs" in report["run"]["steps"]
    assert (similarities / "similarities.png").read_bytes().startswith(b"\x89PNG")


def test_signals_are_tested_on_pairs_that_training_does_not_see():
    source = study.Shapes(Recipe(shapes=1.0), 2, side=32)
    held_out = [pair for _, pair in source.held_out("test")]
    again = [pair for _, pair in source.held_out("test")]
    assert all(
        torch.equal(a.fixed, b.fixed) and torch.equal(a.truth, b.truth) for a, b in zip(held_out, again, strict=True)
    )
    assert not torch.equal(held_out[0].fixed, next(source.held_out("validation"))[1].fixed)
    assert held_out[0].truth is not None and held_out[0].fixed_labels is not None
    changed = [dict(o.split("=") for o in overrides) for overrides in study.SIGNALS.values()]
    assert {key for values in changed for key in values} <= {
        "loss.similarity", "loss.weight", "loss.known", "loss.labels", "kldivnet.context",
    }  # fmt: skip


def test_an_estimate_that_follows_mi_agrees_with_it():
    pairs = [pair for _, pair in study.Shapes(Recipe(shapes=1.0), 3, side=32).held_out("test")]

    def mi(fixed, moving, **_):
        return 0.5 * parzen_mi(fixed, moving, bins=64) - 0.1

    assert study.agreement(mi, pairs) == pytest.approx(1, abs=1e-6)
    assert study.agreement(lambda fixed, moving, **_: -mi(fixed, moving), pairs) == pytest.approx(-1, abs=1e-6)


def test_steps_of_refinement_are_compared_from_one_start_and_scored_as_the_pair_allows(tmp_path):
    pair = FAMILIES["sample pair"].cases["T2 to T1"](tmp_path)
    (none, what, start, _), (some, _, refined, seconds) = refinement.rows(pair, "affine", 8.0, [4])
    assert (none, some, what) == (0, 4, "landmarks mm") and seconds >= 0
    before = np.linalg.norm(pair.landmarks[0] - pair.landmarks[1], axis=1).mean()
    assert start < 0.3 * before and refined < 0.3 * before
    still, shift = sitk.Transform(), sitk.TranslationTransform(3, (3.0, 0.0, 4.0))
    phantom = replace(pair, landmarks=None, truth=shift)
    assert refinement.score(phantom, still) == ("error mm", pytest.approx(5.0))
    same = replace(pair, landmarks=None, moving_labels=pair.fixed_labels)
    assert refinement.score(same, still) == ("Dice", 1.0) and refinement.score(same, shift)[1] < 0.99
