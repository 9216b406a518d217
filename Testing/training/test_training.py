"""Training: losses, steps, files of a run, kill and resume, several processes, and the exported model."""

import csv
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from DivRegNetLib import models
from DivRegNetLib.core import fields
from DivRegNetLib.registration.pipeline import register
from DivRegNetLib.registration.regnet import SwitchableNorm
from DivRegNetLib.run import cli
from training import config as configs
from training import export as exports
from training import train
from training.data.pairs import Pair
from training.data.sources import source_of
from training.losses import TERMS, Batch, Objective
from training.trainer import Trainer, fit

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "name": "tiny",
    "steps": 6,
    "warmup": 2,
    "ema": 0.9,
    "checkpoint_every": 2,
    "validate_every": 2,
    "data": {"held_out": 1},
    "loss": {"samples": 256, "bins": 16, "window": 5},
    "methods": ["variational", "regnet"],
    "variational": {"steps": 2},
    "regnet": {"channels": [2, 2, 2, 2], "guided": True, "integration_steps": 2},
    "kldivnet": {"channels": 4, "frequencies": 1},
}


def tiny(cohort: Path, **values) -> configs.Config:
    """A configuration for a very short training; dictionaries update those of TINY."""
    updated = {k: TINY[k] | v if isinstance(v, dict) and k in TINY else v for k, v in values.items()}
    updated["data"] = updated.get("data", TINY["data"]) | {"cohort": str(cohort)}
    return configs.build(TINY | updated)


def run(config: configs.Config, output: Path, *, resume: bool = False) -> Trainer:
    return fit(config, source_of(config), output, fabric(config), resume=resume)


def trainer_of(config: configs.Config) -> Trainer:
    return Trainer(config, source_of(config), fabric(config))


def fabric(config: configs.Config) -> Fabric:
    made = Fabric(accelerator="cpu", devices=1, precision=config.precision)
    made.launch()
    return made


def checkpoint(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def flat(values, name: str = "") -> dict:
    """Nested dictionaries and lists as one dictionary."""
    if not isinstance(values, dict | list | tuple):
        return {name: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {k: v for key, value in items for k, v in flat(value, f"{name}/{key}").items()}


def differing(first, second) -> list[str]:
    """Names of the values that are not bitwise the same."""
    a, b = flat(first), flat(second)
    return sorted(a.keys() ^ b.keys()) + [
        name
        for name in a.keys() & b.keys()
        if not (torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name])
    ]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums are bitwise the same only with the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Losses


@pytest.fixture(scope="module")
def shifted() -> Pair:
    """A pair of labeled blobs, the fixed one 4 voxels along x and -2 along z from the moving one, of the same contrast."""
    moving = torch.rand(1, 1, 5, 7, 6, generator=torch.Generator().manual_seed(0))
    moving = F.interpolate(moving, size=(16, 32, 32), mode="trilinear")
    truth = torch.zeros(1, 3, 16, 32, 32)
    truth[:, 0], truth[:, 2] = 4, -2
    labels = (moving * 4).floor()
    warped = fields.warp(labels, truth, mode="nearest")
    return Pair(fields.warp(moving, truth), moving, None, truth, warped.byte(), labels.byte())


@pytest.mark.parametrize("similarity", ["kldiv", "mi", "lncc"])
def test_every_term_decreases_as_the_displacement_approaches_a_known_shift(shifted, similarity):
    pair = shifted if similarity == "lncc" else Pair(**vars(shifted) | {"fixed": (3.0 * shifted.fixed).sin()})
    loss = {"similarity": similarity, "known": 1.0, "labels": 1.0, "samples": 2048}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = Objective(tiny(Path(), loss=loss, regnet={"guided": False}, kldivnet={"channels": 16}))
    if similarity == "kldiv":
        learning = torch.optim.Adam(objective.kldivnet.parameters(), 2e-2)
        for seed in range(60):
            learning.zero_grad()
            objective(Batch([pair], [seed]), None, True)[0].backward()
            learning.step()
    torch.nn.init.zeros_(objective.regnet.head.weight)
    found = []
    for share in (0, 0.5, 1):
        # One voxel of the network's grid is two of the images.
        objective.regnet.head.bias.data = share * torch.tensor([2.0, 0.0, -1.0])
        with torch.no_grad():
            total, terms, coarse = objective(Batch([pair], [1]), None)
        found.append({name: values.item() for name, values in terms.items()})
        assert total.item() == pytest.approx(found[-1]["loss"])
        torch.testing.assert_close(fields.resize(coarse, (16, 32, 32)), share * pair.truth, atol=1e-5, rtol=0)
    far, half, there = found
    assert set(far) == set(TERMS)
    assert far["similarity"] < half["similarity"] < there["similarity"]
    for name in ("loss", "known", "labels"):
        assert far[name] > half[name] > there[name], name
    assert there["known"] < 0.02
    assert far["diffusion"] == there["diffusion"] == 0


@pytest.mark.parametrize("similarity", ["kldiv", "mi", "lncc"])
def test_the_similarity_ignores_the_margin(shifted, similarity):
    edges = F.pad(torch.zeros(1, 1, 8, 24, 24), [4] * 6, value=1.0)
    odd = shifted.moving.lerp(1 - shifted.moving, edges)
    for margin in (4, 3):
        loss = {"similarity": similarity, "margin": margin, "samples": 2048}
        objective = Objective(tiny(Path(), loss=loss, kldivnet={"channels": 16}))
        found = [
            objective.similarity(shifted.fixed, moving, torch.Generator().manual_seed(1)).item()
            for moving in (shifted.moving, odd)
        ]
        assert (found[0] == found[1]) == (margin == 4)


def test_with_parts_training_sees_cubes_and_validation_whole_images(tiny_cohort):
    whole, parts = (trainer_of(tiny(tiny_cohort, data={"held_out": 1, "part": part})) for part in (0, 16))
    seen = [trainer._batch([0]).fixed.shape[2:] for trainer in (whole, parts)]
    assert max(seen[0]) > 16 and seen[1] == (16, 16, 16)
    parts.step()
    assert parts.validate(start=True) == whole.validate(start=True)
    with pytest.raises(ValueError, match="part is a multiple of 16"):
        tiny(tiny_cohort, data={"part": 24})


def test_the_parts_of_a_pair_follow_each_other_over_steps_and_batches(tiny_cohort):
    trainer = trainer_of(tiny(tiny_cohort, batch=2, data={"held_out": 1, "part": 16, "parts": 3}))
    drawn, draw = [], trainer.source.draw

    class Counted:
        def draw(self, random):
            drawn.append(draw(random))
            return drawn[-1]

    trainer.source = Counted()
    seen = []
    for trainer.step_number in range(3):
        seen += trainer._batch([0, 1]).pairs
    assert len(drawn) == 2 and len({pair.fixed.sum().item() for pair in seen}) > 2
    for i, pair in enumerate(seen):
        cubes = drawn[i // 3].fixed[0, 0].unfold(0, 16, 2).unfold(1, 16, 2).unfold(2, 16, 2).flatten(0, 2)
        assert (cubes == pair.fixed[0, 0]).flatten(1).all(1).any()
    trainer.step_number, trainer._drawn = 1, (-1, [])  # as after --resume
    again = trainer._batch([0, 1]).pairs
    assert torch.equal(again[0].fixed, seen[2].fixed) and torch.equal(again[1].moving, seen[3].moving)


def test_without_supervision_the_loss_has_no_supervised_terms(shifted):
    _, terms, _ = Objective(tiny(Path(), loss={"similarity": "mi"}))(Batch([shifted], [1]), None)
    assert set(terms) == {"loss", "similarity", "diffusion"}


def test_in_a_batch_each_term_counts_for_the_pairs_that_have_it(shifted):
    """The loss is the mean over the pairs, whatever is known about them."""
    bare = Pair(shifted.moving, shifted.fixed)
    objective = Objective(tiny(Path(), loss={"similarity": "mi", "known": 1.0})).eval()
    with torch.no_grad():
        alone = [objective(Batch([pair], [1]), None)[1] for pair in (shifted, bare)]
        total, together, _ = objective(Batch([shifted, bare], [1, 1]), None)
    assert {name: len(values) for name, values in together.items()} == {
        "loss": 2,
        "similarity": 2,
        "diffusion": 2,
        "known": 1,
    }
    torch.testing.assert_close(total, (alone[0]["loss"] + alone[1]["loss"])[0] / 2)


# A whole run, in this process


@pytest.fixture(scope="module")
def trained(tiny_cohort, tmp_path_factory) -> tuple[configs.Config, Path]:
    """A finished run and its folder, which must not be changed."""
    config = tiny(tiny_cohort)
    output = tmp_path_factory.mktemp("trained") / "run"
    run(config, output)
    return config, output


@pytest.fixture
def again(trained, tmp_path) -> tuple[configs.Config, Path]:
    """A copy of the finished run, which can be continued."""
    return trained[0], Path(shutil.copytree(trained[1], tmp_path / "again"))


def board(output: Path) -> EventAccumulator:
    return EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_a_run_leaves_checkpoints_and_a_log_and_no_incomplete_file(trained):
    _, output = trained
    assert sorted(file.name for file in output.iterdir()) == ["best.pt", "last.pt", "log.csv", "tensorboard"]
    rows = list(csv.DictReader((output / "log.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    logged = checkpoint(output / "last.pt")["log"]
    for row, kept in zip(rows, logged, strict=True):
        assert {name: float(value) for name, value in row.items() if value} == pytest.approx(kept, rel=1e-5)
    assert {"loss", "similarity", "diffusion", "cohort Dice", "cohort folded %"} <= set(rows[-1])
    assert rows[0]["diffusion"] == ""  # while KLDivNet warms up there is no deformation


def test_tensorboard_shows_what_the_log_says_and_a_picture_at_each_validation(trained):
    _, output = trained
    shown = board(output)
    for row in checkpoint(output / "last.pt")["log"]:
        for name, value in row.items():
            if name == "step":
                continue
            values = {event.step: event.value for event in shown.Scalars(name.replace(" %", " percent"))}
            assert values[row["step"]] == pytest.approx(value, rel=1e-5)
    pictures = shown.Images("registration")
    assert [picture.step for picture in pictures] == [2, 4, 6]
    assert all(picture.width > picture.height > 100 for picture in pictures)


def test_the_best_checkpoint_is_that_of_the_best_validation(trained):
    config, output = trained
    best, last = checkpoint(output / "best.pt"), checkpoint(output / "last.pt")
    scores = {row["step"]: row["cohort Dice"] for row in last["log"]}
    assert last["best"] == max(scores.values()) == scores[best["step"]]
    trainer = trainer_of(config)
    trainer.ema.load_state_dict(best["ema"])
    assert trainer.validate()["cohort Dice"] == scores[best["step"]]


def test_a_worse_validation_does_not_replace_the_best(again):
    """The run continues with a damaged average; the best checkpoint stays as it was."""
    config, output = again
    before, state = checkpoint(output / "best.pt"), checkpoint(output / "last.pt")
    state["average"]["module.head.bias"] += 40
    state["best"] = 2.0  # no Dice is better
    torch.save(state, output / "last.pt")
    run(configs.build(config.as_dict() | {"steps": 8}), output, resume=True)
    assert not differing(checkpoint(output / "best.pt"), before)
    assert checkpoint(output / "last.pt")["log"][-1]["cohort Dice"] < state["log"][-1]["cohort Dice"] - 0.05


def test_a_log_that_was_not_written_before_a_kill_is_completed(again):
    """A process that is killed between the last checkpoint and its log has no step left that would write it."""
    config, output = again
    whole = (output / "log.csv").read_text()
    (output / "log.csv").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    run(config, output, resume=True)
    assert (output / "log.csv").read_text() == whole


def test_a_finished_run_continues_to_more_steps_and_keeps_its_log(again):
    config, output = again
    before = checkpoint(output / "last.pt")["log"]
    run(configs.build(config.as_dict() | {"steps": 8}), output, resume=True)
    after = checkpoint(output / "last.pt")
    assert after["step"] == 8
    assert after["log"][:3] == before
    assert [row["step"] for row in after["log"]] == [2, 4, 6, 8]
    assert [event.step for event in board(output).Scalars("loss")] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 0.5}, "another learning_rate: 0.001, now 0.5"),
        ({"seed": 2}, "another seed: 1, now 2"),
        ({"regnet": {**TINY["regnet"], "passes": 2}}, "another regnet"),
        ({"loss": {**TINY["loss"], "diffusion": 9.0}}, "another loss"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(trained, changed, named):
    config, output = trained
    before = (output / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=named):
        run(configs.build(config.as_dict() | changed), output, resume=True)
    assert (output / "last.pt").read_bytes() == before


def test_a_run_is_not_overwritten(trained):
    config, output = trained
    with pytest.raises(ValueError, match=r"run: holds a training already; resume it with --resume"):
        run(config, output)


def test_resuming_without_a_checkpoint_starts_a_training(tiny_cohort, tmp_path):
    assert run(tiny(tiny_cohort, steps=1, validate_every=9), tmp_path / "new", resume=True).step_number == 1


def test_the_exported_model_is_the_average_of_the_best_validation(trained, tmp_path, monkeypatch, capsys):
    config, output = trained
    monkeypatch.setattr(sys, "argv", ["export.py", "--run", str(output), "--models", str(tmp_path)])
    assert exports.main() == 0
    assert "tried on a held-out pair" in capsys.readouterr().out
    model, best = models.load(str(tmp_path / "tiny.json")), checkpoint(output / "best.pt")
    assert not differing(dict(model.regnet.state_dict()), best["ema"])
    kept = {name.removeprefix("kldivnet."): t for name, t in best["objective"].items() if name.startswith("kldivnet.")}
    assert not differing(dict(model.kldivnet.state_dict()), kept)
    card = model.card
    assert (card.spacing_mm, card.normalization, card.modalities) == (4.0, "robust", ["T1", "T2"])
    assert card.training["volumes"] == {"train": 3, "validation": 2, "test": 2}
    assert card.training["scores of"] == "test"
    assert {"cohort Dice", "cohort Dice at the start"} <= set(card.scores)
    assert card.training["configuration"]["loss"]["samples"] == config.loss.samples
    assert card.training["steps"] == best["step"] and "steps" not in card.training["configuration"]


# Steps


def test_during_the_warm_up_regnet_and_its_average_do_not_change(tiny_cohort):
    trainer = trainer_of(tiny(tiny_cohort))
    before = {k: v.clone() for k, v in trainer.objective.state_dict().items()}
    assert set(trainer.step()) == {"loss", "similarity"}
    now = trainer.objective.state_dict()
    assert {name.split(".")[0] for name in differing(dict(now), before)} == {"/kldivnet"}
    assert not differing(dict(trainer.ema.state_dict()), dict(trainer.objective.regnet.state_dict()))
    trainer.step()
    trainer.step()
    changed = differing(dict(trainer.objective.state_dict()), before)
    assert {name.split(".")[0] for name in changed} == {"/kldivnet", "/regnet"}


def test_kldivnet_alone_learns_at_its_own_rate_and_becomes_a_model_without_regnet(tiny_cohort, tmp_path):
    output = tmp_path / "alone"
    config = tiny(tiny_cohort, methods=["variational"], steps=6, warmup=4, similarity_learning_rate=5e-2)
    run(replace(config, steps=2), output)
    trainer = run(config, output, resume=True)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.5 * (5e-2 + 5e-3)])
    assert not differing(dict(trainer.objective.state_dict()), checkpoint(output / "best.pt")["objective"])
    unbroken = run(config, tmp_path / "unbroken")
    assert not differing(dict(trainer.objective.state_dict()), dict(unbroken.objective.state_dict()))
    model = models.load(str(exports.export_model(trainer, output, tmp_path)))
    assert model.regnet is None and model.card.regnet is None and model.card.methods == ["variational"]
    assert not differing(dict(model.kldivnet.state_dict()), dict(trainer.objective.kldivnet.state_dict()))


def test_the_decay_of_the_average_rises_to_the_one_in_the_configuration(tiny_cohort):
    trainer = trainer_of(tiny(tiny_cohort, loss={"similarity": "mi"}, warmup=0, ema=0.25))
    expected = {k: v.clone() for k, v in trainer.objective.regnet.state_dict().items()}
    for decay in (0, 2 / 11, 3 / 12, 0.25):  # the weights themselves, then (1 + n) / (10 + n) up to the decay asked for
        trainer.step()
        now = trainer.objective.regnet.state_dict()
        expected = {k: decay * v + (1 - decay) * now[k] for k, v in expected.items()}
    for name, value in trainer.ema.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert differing(dict(trainer.ema.state_dict()), dict(now))


def test_the_learning_rate_falls_by_a_cosine_from_the_end_of_the_warm_up(tiny_cohort):
    trainer = trainer_of(
        tiny(tiny_cohort, steps=6, learning_rate=1e-2, final_learning_rate=2e-3, similarity_learning_rate=5e-2)
    )
    rates = []
    for _ in range(6):
        trainer.step()
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    cosine = [1.0, 1.0, 1.0, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5]
    assert [rate for rate, _ in rates] == pytest.approx([2e-3 + 8e-3 * c for c in cosine])
    assert all(of_kldivnet == pytest.approx(5 * rate) for rate, of_kldivnet in rates)


def test_gradients_accumulated_over_micro_batches_are_those_of_the_batch(tiny_cohort):
    """Without batch statistics, and in double precision."""
    states = []
    for micro_batch in (1, 2, 4):
        values = {
            "loss": {"similarity": "mi"},
            "batch": 4,
            "micro_batch": micro_batch,
            "precision": "64-true",
            "warmup": 0,
        }
        trainer = trainer_of(tiny(tiny_cohort, **values))
        for module in trainer.objective.modules():
            if isinstance(module, SwitchableNorm):
                module.mean_mix.data, module.var_mix.data = torch.tensor([[90.0, 0, 0]] * 2).double()
        terms = [trainer.step() for _ in range(2)]
        states.append((terms, {k: v.clone() for k, v in trainer.objective.state_dict().items() if "running" not in k}))
    for terms, state in states[1:]:
        assert [t["loss"] for t in terms] == pytest.approx([t["loss"] for t in states[0][0]], rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][1][name], atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("similarity", ["kldiv", "mi", "lncc"])
def test_mixed_precision_trains_and_keeps_weights_in_single_precision(tiny_cohort, similarity):
    values = {"loss": {"similarity": similarity}, "precision": "bf16-mixed", "warmup": 1}
    mixed, full = (trainer_of(tiny(tiny_cohort, **v)) for v in (values, values | {"precision": "32-true"}))
    # oneDNN's gradient of a convolution in bfloat16 is noise where an image has two voxels left along an axis, as here.
    with torch.backends.mkldnn.flags(enabled=False):
        for _ in range(3):
            found, expected = mixed.step()["loss"], full.step()["loss"]
            assert found == pytest.approx(expected, abs=0.05)
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in mixed.objective.state_dict().values())


def test_a_checkpoint_keeps_the_scale_of_the_loss_of_16_bit_training(tiny_cohort):
    """On a CPU Fabric trains in bfloat16 without a scaler, so only the scaler is tested here."""
    first, second = (trainer_of(tiny(tiny_cohort)) for _ in range(2))
    for trainer in (first, second):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        trainer.fabric.strategy.precision = MixedPrecision("16-mixed", "cpu", scaler)
    scale, weight = first.fabric.strategy.precision.scaler, torch.nn.Parameter(torch.ones(1))
    for gradient in (1.0, math.inf):  # the second makes it halve the scale
        scale.scale(weight * gradient).backward()
        scale.step(torch.optim.SGD([weight], 0.1))
        scale.update()
    second.restore(first.state())
    restored = second.fabric.strategy.precision.scaler
    assert restored.get_scale() == scale.get_scale() == 2.0**15
    assert restored.state_dict() == scale.state_dict()


@pytest.mark.parametrize(("passes", "single_pass"), [(2, 0), (2, 1)])
def test_passes_follow_each_other_after_the_steps_with_a_single_pass(tiny_cohort, passes, single_pass):
    """The number of passes is 1 until ``single_pass`` steps are done."""
    regnet = {"passes": passes, "guided": False}
    trainer = trainer_of(tiny(tiny_cohort, warmup=0, single_pass=single_pass, methods=["regnet"], regnet=regnet))
    norm = trainer.objective.regnet.encoders[0][1]
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(trainer.step_number))
    for _ in range(2):
        trainer.step()
    assert seen == [0] * (1 if single_pass else 2) + [1] * 2


# Errors


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_last_checkpoint(tiny_cohort, tmp_path):
    """One of three training volumes is not finite, so sooner or later a pair is not."""
    folder = Path(shutil.copytree(tiny_cohort, tmp_path / "spoilt"))
    volume = dict(np.load(folder / "v1.npz"))
    volume["images"][:, 8, 8, 8] = np.nan
    np.savez(folder / "v1.npz", **volume)
    config = tiny(folder, seed=4, steps=50, checkpoint_every=1, validate_every=50, loss={"similarity": "mi"}, warmup=0)
    with pytest.raises(FloatingPointError, match="the loss is nan at step") as caught:
        run(config, tmp_path / "run")
    step, kept = re.search(r"at step (\d+): .*last\.pt holds step (\d+)", str(caught.value)).groups()
    assert step == kept != "0"
    good = checkpoint(tmp_path / "run" / "last.pt")
    assert good["step"] == len(good["log"]) == int(step)
    assert all(torch.isfinite(t).all() for t in [*good["objective"].values(), *good["average"].values()])
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 1 + int(step)
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_diverging_run_ends_before_a_checkpoint_is_written(tiny_cohort, tmp_path):
    config = tiny(tiny_cohort, learning_rate=1e30, checkpoint_every=50, validate_every=50, warmup=0, steps=50)
    with pytest.raises(FloatingPointError, match=r"not finite|nan|inf.*no checkpoint was written yet.*learning_rate"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a --name for the model, or the --config of an experiment"),
        (["--name", "x"], "data.cohort names no folder"),
        (["--name", "x", "data.cohort=nowhere"], "cohort.json is missing"),
        (["--name", "x", "stepps=5"], "stepps: Key 'stepps' not in"),
        (["--name", "x", "--preset", "slow"], "has no preset 'slow'"),
        (["--name", "x", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--name", "a/b"], "name becomes a file name"),
        (["--name", "x", "--from", "nobody"], "no model 'nobody'"),
        (["--name", "x", "--images", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_the_command_explains_an_error_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--device", "cpu"])
    assert train.main() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: ")
    assert said in error


def test_a_batch_that_cannot_be_divided_among_processes_is_refused(tiny_cohort):
    config = tiny(tiny_cohort, batch=3)

    class OfTwo:
        world_size = 2

    with pytest.raises(ValueError, match="batch is 3, which 2 processes cannot share equally"):
        Trainer(config, source_of(config), OfTwo())


# Fine-tuning


def test_a_training_can_start_from_a_model(tiny_cohort, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parser().parse_args(
        ["--name", "tuned", "--from", tiny_model, "--steps", "1", f"data.cohort={tiny_cohort}"]
    )
    config = train.configuration(args)
    model = models.load(tiny_model)
    assert (config.regnet, config.kldivnet) == (model.regnet.config, model.kldivnet.config)
    trainer = trainer_of(config)
    assert not differing(dict(trainer.objective.regnet.state_dict()), dict(model.regnet.state_dict()))
    assert not differing(dict(trainer.objective.kldivnet.state_dict()), dict(model.kldivnet.state_dict()))
    other = configs.build(config.as_dict() | {"regnet": {"channels": [3, 3, 3, 3]}})
    with pytest.raises(ValueError, match="start: the model 'tiny' has another architecture"):
        trainer_of(other)


# From raw volumes to a listed model, as a user does it


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", models.ENVIRONMENT: str(folder), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def raw(sample_data, tmp_path_factory) -> Path:
    """T1 and T2 of four subjects with labels: the bundled pair in four rotations, at 6 mm."""
    folder = tmp_path_factory.mktemp("raw")
    for kind, name in (("fixed", "fixed_T1"), ("moving", "moving_T2")):
        for what, suffix, interpolator in (("", "", sitk.sitkLinear), ("_labels", "_labels", sitk.sitkNearestNeighbor)):
            image = sitk.ReadImage(str(sample_data / f"{name}{suffix}.nii.gz"))
            (folder / f"{kind}{what}").mkdir()
            size = [int(n * s / 6) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
            for i in range(4):
                turn = sitk.Euler3DTransform([0.0, 0.0, 20.0], 0.03 * i, -0.05 * i, 0.04 * (-1) ** i)
                small = sitk.Resample(
                    image, size, turn, interpolator, image.GetOrigin(), [6.0] * 3, image.GetDirection()
                )
                sitk.WriteImage(small, str(folder / f"{kind}{what}" / f"subject{i}.nii.gz"))
    return folder


@pytest.fixture(scope="module")
def command_line_run(raw, tmp_path_factory):
    """A run of ``train.py`` that was killed and resumed: its folder, its arguments, the folder of models, and its output."""
    folder = tmp_path_factory.mktemp("command_line")
    output, known = folder / "run", folder / "models"
    arguments = ["--name", "mine", "--output", str(output), "--steps", "20", "--device", "cpu"]
    for side in ("fixed", "moving"):
        arguments += [f"--{side}", str(raw / side), f"--{side}-labels", str(raw / f"{side}_labels")]
    arguments += ["--spacing", "12", "--align", "center", "--workers", "1", "--split", "2,1,1"]
    arguments += ["warmup=3", "checkpoint_every=2", "validate_every=10", "data.held_out=1", "loss.samples=256"]
    arguments += ["regnet.channels=[2,2,2,2]", "variational.steps=2", "kldivnet.channels=4", "classes.steps=0"]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *arguments]
    log = folder / "log.txt"
    with log.open("w") as stream:
        killed = subprocess.Popen(command, env=environment(known), stdout=stream, stderr=stream)
        while not (output / "last.pt").exists() and killed.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random().uniform(0, 0.5))
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, log.read_text()
        at = checkpoint(output / "last.pt")["step"]
        resumed = subprocess.run(
            [*command, "--resume"], env=environment(known), stdout=stream, stderr=stream, check=False
        )
    said = log.read_text()
    assert resumed.returncode == 0, said
    assert f"resumed at step {at}" in said
    return output, arguments, known, said


def test_a_killed_and_resumed_run_has_bitwise_the_result_of_an_uninterrupted_one(command_line_run, tmp_path):
    output, arguments, _, _ = command_line_run
    config = train.configuration(train.parser().parse_args(arguments))
    config = replace(config, data=replace(config.data, cohort=str(output / "cohort")))
    run(config, tmp_path / "alone")
    for file in ("last.pt", "best.pt"):
        assert not differing(checkpoint(output / file), checkpoint(tmp_path / "alone" / file))
    assert (output / "log.csv").read_text() == (tmp_path / "alone" / "log.csv").read_text()
    assert not list(output.rglob("*.part"))


def test_the_model_is_in_the_list_and_registers_a_pair(command_line_run, raw, monkeypatch, capsys):
    output, _, known, said = command_line_run
    assert "tried on a held-out pair" in said
    assert str(known / "mine.json") in said
    monkeypatch.setenv(models.ENVIRONMENT, str(known))
    assert models.card_files()["mine"] == known / "mine.json"
    assert cli.main(["models"]) == 0
    assert "mine" in capsys.readouterr().out
    model = models.load("mine")
    assert not differing(dict(model.regnet.state_dict()), checkpoint(output / "best.pt")["ema"])
    assert model.card.training["volumes"] == {"train": 4, "validation": 2, "test": 2}
    fixed, moving = (sitk.ReadImage(str(raw / side / "subject3.nii.gz")) for side in ("fixed", "moving"))
    result = register(fixed, moving, model=model, align="center", device="cpu")
    assert result.warped.GetSize() == fixed.GetSize()
    assert result.quality["nmi"]["after"] > result.quality["nmi"]["before"]


# Several processes


def test_processes_wait_for_the_one_that_prepares_a_large_cohort(monkeypatch):
    """The default of PyTorch ends the others after minutes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(Fabric, "launch", lambda self: None)
    assert train.fabric_of("cpu", "32-true").strategy._timeout >= timedelta(days=1)


def test_two_processes_have_the_result_of_one_with_the_same_pairs_per_step(head_cohort, tmp_path):
    """Warm-up and after, with terms that not every pair has; in double precision, where only D's bound is single.

    Each process has one of the two pairs, so the one process takes two at a time: batch statistics are of both.
    """
    values = {
        "seed": 3, "steps": 4, "warmup": 1, "batch": 2, "micro_batch": 1, "precision": "64-true",
        "data": {"pairs": "synthesis", "held_out": 1, "recipe": {"same_subject": 0.5, "real": 0.3}},
        "loss": {**TINY["loss"], "known": 1.0, "labels": 1.0}, "regnet": {**TINY["regnet"], "symmetric": True},
        "checkpoint_every": 1, "validate_every": 4,
    }  # fmt: skip
    config = tiny(head_cohort, **values)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.as_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "training" / "train.py"), "--config", str(file), "--device", "cpu"]
    command += ["--output", str(tmp_path / "two")]
    ended = subprocess.run(command, env=environment(tmp_path / "models"), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "models" / "tiny.json").exists()
    run(configs.build(config.as_dict() | {"micro_batch": 2}), tmp_path / "one")
    two, one = (checkpoint(tmp_path / name / "last.pt") for name in ("two", "one"))
    known = [{"known", "labels"} & set(row) for row in one["log"]]
    assert set() in known[:1]
    assert {"known"} in known[1:] or {"known", "labels"} in known[1:]
    for row_two, row_one in zip(two["log"], one["log"], strict=True):
        assert row_two == pytest.approx(row_one, rel=1e-4, abs=1e-5)
    torch.manual_seed(config.seed)
    began = Objective(config).double().state_dict()
    for part in ("objective", "average"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, atol=2e-6, rtol=0, msg=name)
    moved = max((value - began[name]).abs().max() for name, value in one["objective"].items())
    assert moved > 1e-3, "nothing was learned that could differ"
