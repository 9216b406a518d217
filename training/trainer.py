"""The training loop: RegNet and its similarity are trained together, in one stage (arXiv 1908.08767, section 2).

Lightning Fabric takes care of devices, precision, processes and the TensorBoard log, and
``torch.optim.swa_utils.AveragedModel`` of the averaged weights. A step depends only on the seed, its number and the state in
a checkpoint. So a training that was killed and resumed has the same result as one that was not, bit by bit on a CPU, and
several processes have the same result as one process with as many pairs per step.

``log.csv`` is not written by Fabric's CSVLogger, which appends to its file and removes it when a run is resumed: here the
file is replaced as a whole by the log in the checkpoint, so that it is complete at any moment and agrees with the checkpoint.
"""

import math
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from torch import Tensor, distributed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from DivRegNetLib import models
from DivRegNetLib.core import fields
from DivRegNetLib.io import atomic
from DivRegNetLib.registration import methods
from DivRegNetLib.registration.regnet import RegNet
from DivRegNetLib.similarity.classes import ClassNet
from training import scoring
from training.config import Config
from training.data.pairs import Pair
from training.data.randomness import Random
from training.data.sources import Source
from training.losses import TERMS, Batch, Objective
from training.pictures import picture
from training.report import write_log

LAST, BEST = "last.pt", "best.pt"
LOG, BOARD = "log.csv", "tensorboard"
GRADIENT_CLIP_NORM = 5.0
CHANGEABLE = ("steps", "checkpoint_every", "validate_every", "micro_batch", "card")
"""Keys of the configuration that may change when a training is resumed."""


class Trainer:
    """Networks, optimizer and averaged weights of a training, one step of it, and its validation."""

    def __init__(self, config: Config, source: Source, fabric: Fabric, classnet: ClassNet | None = None) -> None:
        """
        Args:
            classnet: a trained class network, which takes part in the variational registration; it is not changed.
        Raises:
            ValueError: the batch cannot be divided among the processes, or the model ``config.start`` has another
                architecture.
        """
        if config.batch % fabric.world_size:
            raise ValueError(f"batch is {config.batch}, which {fabric.world_size} processes cannot share equally")
        self.config, self.source, self.fabric = config, source, fabric
        self.classnet = None if classnet is None else classnet.to(fabric.device)
        torch.manual_seed(config.seed)
        self.objective = Objective(config)
        if config.start:
            self._start_from(models.load(config.start))
        if self.objective.regnet is not None:
            self.objective.regnet.to(memory_format=torch.channels_last_3d)
        parts = {"regnet": self.objective.regnet, "kldivnet": self.objective.kldivnet}
        groups = [{"params": p.parameters(), "name": name} for name, p in parts.items() if p is not None]
        self.optimizer = torch.optim.Adam(groups)
        self.wrapped, self.optimizer = fabric.setup(self.objective, self.optimizer)
        self.dtype = next(self.objective.parameters()).dtype
        self.average = self._averaged(self.objective.regnet)
        self.step_number, self.best, self.log = 0, -math.inf, []
        self._drawn: tuple[int, list[Pair]] = (-1, [])  # number and parts of the pair that was drawn last

    def _averaged(self, regnet: RegNet | None) -> AveragedModel | None:
        if regnet is None:
            return None
        average = AveragedModel(regnet, multi_avg_fn=self._exponential_average, use_buffers=True)
        return average.eval().requires_grad_(False)

    @property
    def ema(self) -> RegNet | None:
        """RegNet with the averaged weights; None if KLDivNet is trained alone."""
        return None if self.average is None else self.average.module

    def _start_from(self, model: models.Model) -> None:
        try:
            if self.objective.regnet is not None and model.regnet is not None:
                self.objective.regnet.load_state_dict(model.regnet.state_dict())
            if self.objective.kldivnet is not None and model.kldivnet is not None:
                self.objective.kldivnet.load_state_dict(model.kldivnet.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"start: the model {self.config.start!r} has another architecture than regnet or kldivnet say"
            ) from error

    def state(self) -> dict:
        """All that a checkpoint holds."""
        return {
            "config": self.config.as_dict(),
            "objective": self.objective.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the scale of the loss in 16-mixed
            "step": self.step_number,
            "best": self.best,
            "log": self.log,
        }

    def restore(self, state: dict) -> None:
        """Continues from a checkpoint.

        Raises:
            ValueError: the checkpoint was written with another configuration; names the key.
        """
        before, now = state["config"], self.config.as_dict()
        if changed := [k for k in now if k not in CHANGEABLE and before.get(k) != now[k]]:
            raise ValueError(
                f"the training to resume had another {changed[0]}: {before.get(changed[0])!r}, now {now[changed[0]]!r}; "
                "resume with the same settings, or choose another --output"
            )
        for name in ("objective", "average", "optimizer"):
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(state[name])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step_number, self.best, self.log = state["step"], state["best"], state["log"]

    @property
    def warming_up(self) -> bool:
        """True while only KLDivNet learns."""
        alone = self.objective.regnet is None
        return self.objective.kldivnet is not None and (alone or self.step_number < self.config.warmup)

    def step(self) -> dict[str, float]:
        """Updates the networks with ``config.batch`` pairs, and returns the mean terms of the loss.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; the weights are unchanged.
        """
        config, fabric = self.config, self.fabric
        rates = self._rates()
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        self.optimizer.zero_grad(set_to_none=True)
        mine = config.batch // fabric.world_size
        numbers = [fabric.global_rank * mine + i for i in range(mine)]
        totals = torch.zeros(
            2, len(TERMS), device=fabric.device
        )  # sums and counts, as some terms are of some pairs only
        for start in range(0, mine, config.micro_batch):
            chunk = numbers[start : start + config.micro_batch]
            last = start + config.micro_batch >= mine
            for name, values in self._accumulate(self._batch(chunk), len(chunk) / mine, last).items():
                totals[0, TERMS.index(name)] += values.detach().sum()
                totals[1, TERMS.index(name)] += len(values)
        sums, counts = fabric.all_reduce(totals, reduce_op="sum").tolist()
        terms = {name: sums[i] / counts[i] for i, name in enumerate(TERMS) if counts[i]}
        if not math.isfinite(terms["loss"]):
            raise FloatingPointError(f"the loss is {terms['loss']} at step {self.step_number}: {terms}")
        norm = fabric.clip_gradients(
            self.wrapped, self.optimizer, max_norm=GRADIENT_CLIP_NORM, error_if_nonfinite=False
        )
        if not torch.isfinite(norm) and config.precision != "16-mixed":  # its scaler skips such a step
            raise FloatingPointError(f"the gradient of the loss is not finite at step {self.step_number}: {terms}")
        warming_up = self.warming_up
        self.optimizer.step()
        self.step_number += 1
        if not warming_up:
            self.average.update_parameters(self.objective.regnet)
        return terms

    def _exponential_average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        """For AveragedModel: a moving average whose decay rises to its limit, so that it soon forgets its start."""
        n = int(self.average.n_averaged)  # as ``count``, which is on the device and would have to be waited for
        get_ema_multi_avg_fn(min(self.config.ema, (1 + n) / (10 + n)))(averaged, current, n)

    def _batch(self, numbers: list[int]) -> Batch:
        """The pairs with these numbers in the current step."""
        return Batch(
            [self._draw(n).to(self.dtype) for n in numbers], [self._seed(self.step_number, n) for n in numbers]
        )

    def _seed(self, step: int, number: int) -> int:
        return (self.config.seed * 1_000_003 + step) * 1009 + number

    def _draw(self, number: int) -> Pair:
        """A pair of the current step, or the next part of the pair that was drawn last."""
        data, batch = self.config.data, self.config.batch
        first, part = divmod(self.step_number * batch + number, data.parts)
        if self._drawn[0] != first:
            random = Random(self._seed(*divmod(first * data.parts, batch)), self.fabric.device)
            pair = self.source.draw(random)
            self._drawn = first, [pair.part(data.part, random) for _ in range(data.parts)] if data.part else [pair]
        return self._drawn[1][part]

    def _accumulate(self, batch: Batch, share: float, last: bool) -> dict[str, Tensor]:
        """Adds up the gradients of the losses of all passes; the loss of a pass is that of the composed displacement."""
        regnet, learning = self.objective.train().regnet, self.step_number - self.config.warmup
        passes = 1 if self.warming_up or learning < self.config.single_pass else regnet.config.passes
        coarse = None
        if self.config.starts_from_variational and not self.warming_up:
            fine = methods.deform(
                self._images(batch.fixed, batch.moving), ("variational",), self.config.variational, None
            )
            coarse = fields.coarsen(fine, regnet.config.stride, regnet.config.multiple)
        for i in range(passes):
            with self.fabric.no_backward_sync(self.wrapped, enabled=not (last and i == passes - 1)):
                loss, terms, coarse = self.wrapped(batch, coarse, self.warming_up)
                self.fabric.backward(loss * share)
            coarse = None if coarse is None else coarse.detach().to(self.dtype)
        return terms

    def _rates(self) -> dict[str, float]:
        """Learning rates of both networks at the current step."""
        c = self.config
        done = min(max(self.step_number - c.warmup, 0) / max(c.steps - c.warmup, 1), 1.0)
        rate = c.final_learning_rate + (c.learning_rate - c.final_learning_rate) * 0.5 * (1 + math.cos(done * math.pi))
        return {"regnet": rate, "kldivnet": c.similarity_learning_rate * rate / c.learning_rate}

    @torch.no_grad()
    def predict(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """Displacement (N, 3, D, H, W) in voxels by the methods of the configuration, with the averaged network."""
        images = self._images(fixed, moving)
        return methods.deform(images, self.config.methods, self.config.variational, self.ema)

    def _images(self, fixed: Tensor, moving: Tensor) -> methods.Images:
        images = methods.Images(fixed, moving)
        return images if self.classnet is None else methods.with_classes(images, self.classnet)

    @torch.no_grad()
    def validate(self, split: str = "validation", *, start: bool = False) -> dict[str, float]:
        """Mean scores (:func:`training.scoring.of_displacement`) of the averaged network per task, over the held-out pairs.

        The processes divide the pairs among them, so all of them have to call this.

        Args:
            start: score the images as they are, without a deformation, for comparison.
        """
        own = []
        for number, (task, pair) in enumerate(self.source.held_out(split)):
            if number % self.fabric.world_size == self.fabric.global_rank:
                pair = pair.to(self.dtype)
                displacement = pair.fixed.new_zeros(1, 3, *pair.fixed.shape[2:])
                if not start:
                    displacement = self.predict(pair.fixed, pair.moving)
                own.append((number, task, scoring.of_displacement(pair, displacement, self.source.cohort.spacing)))
        values: dict[str, list[float]] = {}
        for _, task, scores in sorted(self._from_all_processes(own), key=lambda scored: scored[0]):
            for name, value in scores.items():
                values.setdefault(f"{task} {name}", []).append(value)
        return {name: sum(found) / len(found) for name, found in values.items()}

    def _from_all_processes(self, own: list) -> list:
        """The lists of all processes, joined."""
        if self.fabric.world_size == 1:
            return own
        lists: list[list] = [[] for _ in range(self.fabric.world_size)]
        distributed.all_gather_object(lists, own)
        return [item for one in lists for item in one]

    @torch.no_grad()
    def example(self, split: str = "validation"):
        """A matplotlib figure of the first held-out pair: fixed, moving and warped image, and the deformed grid."""
        task, pair = next(iter(self.source.held_out(split)))
        pair = pair.to(self.dtype)
        return picture(
            pair.fixed, pair.moving, self.predict(pair.fixed, pair.moving), f"{task}, step {self.step_number}"
        )


def fit(
    config: Config,
    source: Source,
    output: Path,
    fabric: Fabric,
    *,
    classnet: ClassNet | None = None,
    resume: bool = False,
) -> Trainer:
    """Trains until ``config.steps``, from the beginning or from the last checkpoint.

    Writes ``last.pt``, ``best.pt`` (the weights with the best validation), ``log.csv``, and scalars and pictures for
    TensorBoard to the folder ``output``.

    Raises:
        ValueError: ``output`` holds a training and ``resume`` is False, or that training had other settings.
        FloatingPointError: the loss or its gradient is not finite; names the last checkpoint.
    """
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / LAST
    if checkpoint.exists() and not resume:
        raise ValueError(f"{output}: holds a training already; resume it with --resume, or choose another --output")
    trainer = Trainer(config, source, fabric, classnet)
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, map_location=fabric.device, weights_only=True))
        if fabric.is_global_zero:  # a process that was killed may have written the checkpoint and not yet its log
            write_log(trainer.log, output / LOG)
        fabric.print(f"resumed at step {trainer.step_number}")
    saved = trainer.step_number
    # TensorBoard hides what was logged after the checkpoint.
    board = TensorBoardLogger(output, name=BOARD, version="", purge_step=trainer.step_number + 1)
    with tqdm(
        total=config.steps, initial=trainer.step_number, desc=config.name, disable=not fabric.is_global_zero
    ) as bar:
        terms: dict[str, list[float]] = {}
        while trainer.step_number < config.steps:
            try:
                for name, value in trainer.step().items():
                    terms.setdefault(name, []).append(value)
            except FloatingPointError as error:
                kept = f"{checkpoint} holds step {saved}" if checkpoint.exists() else "no checkpoint was written yet"
                raise FloatingPointError(
                    f"{error}; {kept}. Lower learning_rate, or look for unusual images in the cohort"
                ) from error
            bar.update()
            done, last = trainer.step_number, trainer.step_number == config.steps
            if done % config.checkpoint_every and done % config.validate_every and not last:
                continue
            row = {name: sum(values) / len(values) for name, values in terms.items()}
            terms = {}
            if done % config.validate_every == 0 or last:
                row |= _validated(trainer, output, board)
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in row.items() if k == "loss" or "Dice" in k))
            trainer.log.append({"step": done} | row)
            board.log_metrics({name.replace(" %", " percent"): value for name, value in row.items()}, done)
            board.save()
            if fabric.is_global_zero:
                _save(trainer.state(), checkpoint)
                write_log(trainer.log, output / LOG)
            fabric.barrier()
            saved = done
    board.finalize("success")
    return trainer


def _validated(trainer: Trainer, output: Path, board: TensorBoardLogger) -> dict[str, float]:
    """Scores of the validation; draws a picture, and keeps the weights if they are the best so far."""
    scores = trainer.validate()
    if not trainer.fabric.is_global_zero:
        return scores
    board.experiment.add_figure("registration", trainer.example(), trainer.step_number)
    ranked = [value for name, value in scores.items() if name.endswith(("Dice", "NMI"))]
    score = sum(ranked) / len(ranked)
    # Of equal scores the last, since KLDivNet alone does not change them. A score may be NaN.
    if score >= trainer.best or not (output / BEST).exists():
        trainer.best = score
        kept = {
            "objective": trainer.objective.state_dict(),
            "ema": None if trainer.ema is None else trainer.ema.state_dict(),
            "step": trainer.step_number,
        }
        _save(kept, output / BEST)
    return scores


def _save(state: dict, file: Path) -> None:
    """Writes a checkpoint atomically."""
    atomic.write_atomically(file, lambda part: torch.save(state, part))
