"""The training loop: RegNet and its similarity together, in one stage (arXiv 1908.08767, section 2).

Lightning Fabric takes care of devices, precision, processes and checkpoints. A step depends on the seed, its number and
the state of a checkpoint alone, so a training that was killed goes on as if nothing had happened, and several processes
do what one would do with the same number of pairs per step.
"""

import copy
import csv
import io
import math
import os
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from DivRegNetLib import models
from DivRegNetLib.core import fields
from DivRegNetLib.registration import methods
from DivRegNetLib.registration.variational.method import register
from DivRegNetLib.similarity.mutual_information import parzen_mi
from training.config import Config
from training.data.pairs import Pair, Random
from training.data.sources import Source
from training.losses import TERMS, Batch, Objective
from training.pictures import picture

LAST, BEST = "last.pt", "best.pt"
LOG, BOARD = "log.csv", "tensorboard"
LONGEST_GRADIENT = 5.0
MAY_CHANGE = ("steps", "checkpoint_every", "validate_every", "micro_batch", "card")


class Trainer:
    """All that changes during training, and one step of it."""

    def __init__(self, config: Config, source: Source, fabric: Fabric) -> None:
        """
        Raises:
            ValueError: the batch cannot be shared equally by the processes, or ``config.start`` does not fit.
        """
        if config.batch % fabric.world_size:
            raise ValueError(f"batch is {config.batch}, which {fabric.world_size} processes cannot share equally")
        self.config, self.source, self.fabric = config, source, fabric
        torch.manual_seed(config.seed)
        self.objective = Objective(config)
        if config.start:
            self._start_from(models.load(config.start))
        if config.similarity_start:
            self._similarity_from(models.load(config.similarity_start))
        self.objective.regnet.to(memory_format=torch.channels_last_3d)
        self.optimizer = torch.optim.Adam(
            [
                {"params": part.parameters()}
                for part in (self.objective.regnet, self.objective.kldivnet)
                if part is not None
            ]
        )
        self.wrapped, self.optimizer = fabric.setup(self.objective, self.optimizer)
        self.dtype = next(self.objective.parameters()).dtype
        self.ema = copy.deepcopy(self.objective.regnet).eval().requires_grad_(False)
        self.step_number, self.best, self.log = 0, -math.inf, []
        self._drawn: tuple[int, list[Pair]] = (-1, [])  # the parts of the pair that was drawn last

    def _start_from(self, model: models.Model) -> None:
        try:
            self.objective.regnet.load_state_dict(model.regnet.state_dict())
            if self.objective.kldivnet is not None and model.kldivnet is not None:
                self.objective.kldivnet.load_state_dict(model.kldivnet.state_dict())
        except RuntimeError as error:
            raise ValueError(f"start: model {self.config.start!r} has another architecture than regnet or kldivnet here"
                             ) from error  # fmt: skip

    def _similarity_from(self, model: models.Model) -> None:
        try:
            self.objective.kldivnet.load_state_dict(model.kldivnet.state_dict())
        except (AttributeError, RuntimeError) as error:  # there is none here or there, or it is another
            raise ValueError(
                f"similarity_start: model {self.config.similarity_start!r} has no KLDivNet like kldivnet here"
            ) from error

    def state(self) -> dict:
        return {
            "config": self.config.as_dict(),
            "objective": self.objective.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # how much 16-mixed scales the loss
            "step": self.step_number,
            "best": self.best,
            "log": self.log,
        }

    def restore(self, state: dict) -> None:
        """
        Raises:
            ValueError: the checkpoint is of another configuration; names what differs.
        """
        before, now = state["config"], self.config.as_dict()
        if changed := [k for k in now if k not in MAY_CHANGE and before.get(k) != now[k]]:
            raise ValueError(
                f"the training to resume had another {changed[0]}: {before.get(changed[0])!r}, now {now[changed[0]]!r}; "
                "resume with the same settings, or choose another --output"
            )
        for name in ("objective", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step_number, self.best, self.log = state["step"], state["best"], state["log"]

    @property
    def warming_up(self) -> bool:
        """While only KLDivNet learns."""
        return self.objective.kldivnet is not None and self.step_number < self.config.warmup

    def step(self) -> dict[str, float]:
        """One update of both networks, from ``config.batch`` pairs; returns the terms of the loss.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; the weights are as they were before.
        """
        config, fabric = self.config, self.fabric
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=False):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        mine = config.batch // fabric.world_size
        numbers = [fabric.global_rank * mine + i for i in range(mine)]
        totals = torch.zeros(2, len(TERMS), device=fabric.device)  # sums and counts: not every pair has every term
        for start in range(0, mine, config.micro_batch):
            chunk = numbers[start : start + config.micro_batch]
            last = start + config.micro_batch >= mine
            for name, values in self._accumulate(self._batch(chunk), len(chunk) / mine, last).items():
                totals[:, TERMS.index(name)] += torch.stack((values.detach().sum(), values.new_tensor(len(values))))
        sums, counts = fabric.all_reduce(totals, reduce_op="sum").tolist()
        terms = {name: sums[i] / counts[i] for i, name in enumerate(TERMS) if counts[i]}
        if not math.isfinite(terms["loss"]):
            raise FloatingPointError(f"the loss is {terms['loss']} at step {self.step_number}: {terms}")
        norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=LONGEST_GRADIENT, error_if_nonfinite=False)
        if not torch.isfinite(norm) and config.precision != "16-mixed":  # whose scaler skips such a step by itself
            raise FloatingPointError(f"the gradient of the loss is not finite at step {self.step_number}: {terms}")
        warming_up = self.warming_up
        self.optimizer.step()
        self.step_number += 1
        if not warming_up:
            self._average()
        return terms

    def _batch(self, numbers: list[int]) -> Batch:
        """Pairs of this step by their number in it."""
        return Batch(
            [self._draw(n).to(self.dtype) for n in numbers], [self._seed(self.step_number, n) for n in numbers]
        )

    def _seed(self, step: int, number: int) -> int:
        return (self.config.seed * 1_000_003 + step) * 1009 + number

    def _draw(self, number: int) -> Pair:
        """A pair of this step, or a part of one; the parts of a pair follow each other."""
        data, batch = self.config.data, self.config.batch
        first, part = divmod(self.step_number * batch + number, data.parts)
        if self._drawn[0] != first:
            random = Random(self._seed(*divmod(first * data.parts, batch)), self.fabric.device)
            pair = self.source.draw(random)
            self._drawn = first, [pair.part(data.part, random) for _ in range(data.parts)] if data.part else [pair]
        return self._drawn[1][part]

    def _accumulate(self, batch: Batch, share: float, last: bool) -> dict[str, Tensor]:
        """Gradients of the loss of every pass, each judged on all that has been composed so far."""
        regnet, learning = self.objective.regnet.train(), self.step_number - self.config.warmup
        passes = 1 if self.warming_up or learning < self.config.single_pass else regnet.config.passes
        coarse = None
        if self.config.starts_from_variational and not self.warming_up:
            coarse = register(batch.fixed, batch.moving, self.config.variational)
        for i in range(passes):
            with self.fabric.no_backward_sync(self.wrapped, enabled=not (last and i == passes - 1)):
                loss, terms, coarse = self.wrapped(batch, coarse, self.warming_up)
                self.fabric.backward(loss * share)
            coarse = None if coarse is None else coarse.detach().to(self.dtype)
        return terms

    def _rates(self) -> tuple[float, float]:
        c = self.config
        done = min(max(self.step_number - c.warmup, 0) / max(c.steps - c.warmup, 1), 1.0)
        rate = c.final_learning_rate + (c.learning_rate - c.final_learning_rate) * 0.5 * (1 + math.cos(done * math.pi))
        return rate, c.similarity_learning_rate * rate / c.learning_rate

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average of the weights, quicker in the beginning."""
        done = max(self.step_number - self.config.warmup, 0)
        decay = min(self.config.ema, (1 + done) / (10 + done))
        for mean, now in zip(self.ema.state_dict().values(), self.objective.regnet.state_dict().values(), strict=True):
            mean.lerp_(now, 1 - decay)

    @torch.no_grad()
    def predict(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """Displacement (N, 3, D, H, W) in voxels by the methods of the configuration, with the averaged network."""
        return methods.deform(methods.Images(fixed, moving), self.config.methods, self.config.variational, self.ema)

    @torch.no_grad()
    def judge(self, pair: Pair, displacement: Tensor) -> dict[str, float]:
        """Scores of a displacement (1, 3, D, H, W) in voxels: mean Dice of the labels, error in mm and folded voxels in %,
        and NMI where there are no labels."""
        scores = {}
        if pair.fixed_labels is None:
            warped = fields.warp(pair.moving, displacement)
            scores["NMI"] = parzen_mi(pair.fixed, warped, normalized=True).item()
        else:
            warped = fields.warp(pair.moving_labels.to(displacement), displacement, mode="nearest", padding="zeros")
            scores["Dice"] = mean_dice(pair.fixed_labels, warped)
        if pair.truth is not None:
            inside = torch.ones_like(pair.fixed) > 0 if pair.fixed_labels is None else pair.fixed_labels > 0
            error = fields.length(displacement - pair.truth)[inside]
            scores["mm"] = error.mean().item() * self.source.cohort.spacing
        scores["folded %"] = 100 * (fields.jacobian_determinant(displacement) <= 0).float().mean().item()
        return scores

    @torch.no_grad()
    def validate(self, split: str = "validation", *, start: bool = False) -> dict[str, float]:
        """Means of :meth:`judge` per task over the held-out pairs, by the averaged network.

        Args:
            start: of no deformation at all, to compare with.
        """
        found: dict[str, list[float]] = {}
        for task, pair in self.source.held_out(split):
            pair = pair.to(self.dtype)
            displacement = self.predict(pair.fixed, pair.moving)
            for name, value in self.judge(pair, 0 * displacement if start else displacement).items():
                found.setdefault(f"{task} {name}", []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    @torch.no_grad()
    def example(self, split: str = "validation"):
        """A matplotlib figure of the first held-out pair: fixed, moving, warped, deformed grid."""
        task, pair = next(iter(self.source.held_out(split)))
        pair = pair.to(self.dtype)
        return picture(
            pair.fixed, pair.moving, self.predict(pair.fixed, pair.moving), f"{task}, step {self.step_number}"
        )


def mean_dice(fixed: Tensor, warped: Tensor) -> float:
    """Mean Dice over the labels that are in either of two label maps, 0 being background."""
    labels = [label for label in torch.cat((fixed.unique(), warped.unique())).unique().tolist() if label]
    overlaps = [2 * ((fixed == n) & (warped == n)).sum() / ((fixed == n).sum() + (warped == n).sum()) for n in labels]
    return torch.stack(overlaps).mean().item() if overlaps else math.nan


def fit(config: Config, source: Source, output: Path, fabric: Fabric, *, resume: bool = False) -> Trainer:
    """Trains to the end, or from where a training was interrupted; everything it writes is in ``output``.

    Writes ``last.pt`` and ``best.pt`` (by validation), ``log.csv`` and TensorBoard's scalars and pictures.

    Raises:
        ValueError: ``output`` holds a training and ``resume`` is False, or it had other settings.
        FloatingPointError: the loss is not finite; says which checkpoint is good.
    """
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / LAST
    if checkpoint.exists() and not resume:
        raise ValueError(f"{output}: holds a training already; give --resume to go on with it, or another --output")
    trainer = Trainer(config, source, fabric)
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, map_location=fabric.device, weights_only=True))
        fabric.print(f"resumed at step {trainer.step_number}")
    good = trainer.step_number
    with (
        _board(output, trainer.step_number, fabric) as board,
        tqdm(
            total=config.steps, initial=trainer.step_number, desc=config.name, disable=not fabric.is_global_zero
        ) as bar,
    ):
        terms: dict[str, list[float]] = {}
        while trainer.step_number < config.steps:
            try:
                found = trainer.step()
            except FloatingPointError as error:
                kept = f"{checkpoint} holds step {good}" if checkpoint.exists() else "no checkpoint was written yet"
                raise FloatingPointError(
                    f"{error}; {kept}. Lower learning_rate, or look for odd images in the cohort"
                ) from error
            for name, value in found.items():
                terms.setdefault(name, []).append(value)
            bar.update()
            done, last = trainer.step_number, trainer.step_number == config.steps
            if done % config.checkpoint_every and done % config.validate_every and not last:
                continue
            row = {name: sum(values) / len(values) for name, values in terms.items()}
            terms = {}
            if done % config.validate_every == 0 or last:
                fabric.barrier()
                if fabric.is_global_zero:
                    row |= _judge(trainer, output, board)
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in row.items() if k == "loss" or "Dice" in k))
            trainer.log.append({"step": done} | row)
            for name, value in row.items():
                board.add_scalar(name.replace(" %", " percent"), value, done)
            board.flush()
            save(fabric, trainer.state(), checkpoint)
            good = done
            if fabric.is_global_zero:
                _write_log(trainer.log, output / LOG)
    return trainer


def _judge(trainer: Trainer, output: Path, board) -> dict[str, float]:
    """Validates, draws, and keeps the weights if they are the best so far."""
    scores = trainer.validate()
    board.add_figure("registration", trainer.example(), trainer.step_number)
    judged_by = [v for k, v in scores.items() if k.endswith(("Dice", "NMI"))]
    score = sum(judged_by) / len(judged_by)
    if score > trainer.best or not (output / BEST).exists():  # a score may be NaN
        trainer.best = score
        kept = {
            "objective": trainer.objective.state_dict(),
            "ema": trainer.ema.state_dict(),
            "step": trainer.step_number,
        }
        _replace(lambda part: torch.save(kept, part), output / BEST)
    return scores


def save(fabric: Fabric, state: dict, file: Path) -> None:
    """Writes a checkpoint whole or not at all."""
    part = file.with_suffix(".part")
    fabric.save(part, state)
    if fabric.is_global_zero:
        os.replace(part, file)
    fabric.barrier()


def _replace(write, file: Path) -> None:
    part = file.with_name(file.name + ".part")
    write(part)
    os.replace(part, file)


def _write_log(rows: list[dict], file: Path) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    _replace(lambda part: part.write_text(text.getvalue()), file)


def _board(output: Path, step: int, fabric: Fabric):
    """TensorBoard's writer; one that writes nothing in all processes but the first."""
    if not fabric.is_global_zero:
        return nullcontext(_Silent())
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(output / BOARD), purge_step=step + 1)  # hides what was drawn after the checkpoint


class _Silent:
    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None
