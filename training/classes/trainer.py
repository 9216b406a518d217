"""The training loop of the class network.

A step depends on the seed, its number and the state of a checkpoint alone, so a training that was killed goes on as if
nothing had happened. Images are made on the training device (:mod:`training.classes.draws`).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from DivRegNetLib.io import atomic
from DivRegNetLib.similarity.classes import ClassNet, ClassNetConfig
from training.classes import draws
from training.classes.config import ClassTraining, Source
from training.classes.loss import certainty, terms
from training.classes.subjects import NoLabelsError, Stock, Subjects, load
from training.data.randomness import Random
from training.report import write_log

LAST, BEST, LOG = "classes-last.pt", "classes-best.pt", "classes-log.csv"
GRADIENT_CLIP_NORM = 1.0
MAY_CHANGE = ("checkpoint_every", "validate_every")


class ClassTrainer:
    """All that changes during training, and one step of it."""

    def __init__(self, config: ClassTraining, subjects: Subjects) -> None:
        self.config, self.subjects, self.device = config, subjects, subjects.sets.device
        self.half = config.precision == "bf16" or (config.precision == "auto" and _fast_at_half(self.device))
        torch.manual_seed(config.seed)
        net = ClassNet(ClassNetConfig(len(subjects.names), tuple(config.channels), config.stride, config.subvoxel))
        self.multiple, self.stride, self.net = net.config.multiple, net.config.output_stride, net.to(self.device)
        if self.device.type == "cuda":
            net.to(memory_format=torch.channels_last_3d)
        self.optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        # Averages over few steps in the beginning, when the weights still change a lot.
        self.ema = AveragedModel(net, multi_avg_fn=self._average, use_buffers=True).eval().requires_grad_(False)
        self.step_number, self.best, self.log = 0, -math.inf, []

    def _average(self, means: list[Tensor], now: list[Tensor], count: Tensor | int) -> None:
        decay = min(self.config.ema, (1 + self.step_number) / (10 + self.step_number))
        get_ema_multi_avg_fn(decay)(means, now, count)

    def state(self) -> dict:
        return {
            "config": self.config.as_dict(),
            "names": list(self.subjects.names),
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_number,
            "best": self.best,
            "log": self.log,
        }

    def weights(self) -> dict:
        """The averaged weights, and what is needed to use them."""
        subjects = self.subjects
        return {
            "net": self.ema.module.state_dict(),
            "classnet": self.ema.module.config.as_dict(),
            "names": list(subjects.names),
            "spacing": [list(stock.spacing) for stock in subjects.stocks],
            "normalization": subjects.normalization,
            "volumes": sum(len(stock.subjects) for stock in subjects.stocks),
            "config": self.config.as_dict(),
            "step": self.step_number,
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
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number, self.best, self.log = state["step"], state["best"], state["log"]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images (N, 1, D, H, W) of the present step, and how much of a voxel of the network's output each set of classes
        covers (N, S, d, h, w)."""
        config, looks = self.config, []
        seed = (config.seed * 1_000_003 + self.step_number) * 1009
        stock = self._chosen(Random(seed))
        shape, (low, high) = self._padded(stock.shape), map(math.log, stock.spacing)
        for i in range(1, config.batch + 1):
            # Another seed than the image's, or subjects and rotations would go together.
            random = Random(2 * (seed + i) + 1)
            subject, spacing = random.choice(stock.subjects), math.exp(random.number(low, high))
            normalization, painting = self.subjects.normalization, config.painting
            looks.append(
                draws.look(subject, shape, spacing, normalization, config.augmentation, painting, 2 * (seed + i))
            )
        image, sets = (torch.cat(x) for x in zip(*looks, strict=True))
        return image, self._fractions(sets)

    def _chosen(self, random: Random) -> Stock:
        """What a step learns from: a source by its share."""
        at = random.number(0, sum(stock.share for stock in self.subjects.stocks))
        for stock in self.subjects.stocks:
            if (at := at - stock.share) < 0:
                break
        return stock

    def _padded(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-math.ceil(n) // self.multiple) * self.multiple for n in shape)

    def _fractions(self, sets: Tensor) -> Tensor:
        """(N, 1, D, H, W) numbers of sets to (N, S, d, h, w), how much of a voxel of the network's output each covers."""
        blocks = sets[:, 0]
        for dim in (3, 2, 1):  # the voxels of an output voxel to one axis
            blocks = blocks.unfold(dim, self.stride, self.stride)
        blocks = blocks.flatten(4).movedim(-1, 1)
        none = torch.zeros(len(sets), len(self.subjects.sets), *blocks.shape[2:], device=sets.device)
        return none.scatter_add_(1, blocks, none.new_full((), 1 / blocks.shape[1]).expand_as(blocks))

    def rate(self) -> float:
        """The learning rate of the present step."""
        c = self.config
        if self.step_number < c.warmup:
            return c.learning_rate * (self.step_number + 1) / c.warmup
        done = (self.step_number - c.warmup) / max(c.steps - c.warmup, 1)
        return c.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1))))

    def step(self) -> Tensor:
        """One update; returns loss, cross entropy and 1 - Dice on the device, (3,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        image, fractions = self.batch()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.net(image)
        entropy, dice = terms(logits, fractions, self.subjects.sets)
        loss = entropy + self.config.dice * dice
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), GRADIENT_CLIP_NORM)
        self.optimizer.step()
        self.step_number += 1
        self.ema.update_parameters(self.net)
        return torch.stack((loss, entropy, dice)).detach()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Dice of each class over the validation subjects as they are, by the averaged network; and the mean of these."""
        hits = torch.zeros(3, len(self.subjects.names), dtype=torch.float64)
        held = [
            (subject, math.prod(stock.spacing) ** 0.5) for stock in self.subjects.stocks for subject in stock.validation
        ]
        for number, (subject, spacing) in enumerate(held):
            shape = self._padded([n * subject.spacing / spacing for n in subject.labels.shape[2:]])
            image, sets = draws.plain(subject, shape, spacing, self.subjects.normalization, number)
            probable = self.ema.module.probabilities(image)
            fractions = F.one_hot(sets[:, 0], len(self.subjects.sets)).movedim(-1, 1).float()
            certain, counts = certainty(fractions, self.subjects.sets)
            if self.stride > 1:
                probable = F.interpolate(probable, size=shape, mode="trilinear", align_corners=False)
            chosen = F.one_hot(probable.argmax(1), len(hits[0])).movedim(-1, 1) * counts
            over = (0, 2, 3, 4)
            hits += torch.stack([x.sum(over) for x in (chosen * certain, chosen, certain)]).double().cpu()
        both, chosen, there = hits[:, 1:].numpy()
        names = self.subjects.names[1:]
        found = {
            f"Dice {n}": float(2 * b / (c + t)) for n, b, c, t in zip(names, both, chosen, there, strict=True) if t
        }
        return {"Dice": float(np.mean(list(found.values()))) if found else math.nan} | found


def _fast_at_half(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # neither public nor in every version of PyTorch


def steps_begun(output: Path) -> int:
    """The steps of the training that a folder holds, of which a part is made; 0 where it holds none."""
    file = output / LAST
    return torch.load(file, map_location="cpu", weights_only=True)["config"]["steps"] if file.exists() else 0


def steps_in(seconds: float, config: ClassTraining, subjects: Subjects) -> int:
    """How many steps this device makes in a time, the validations among them left out; tried on a trainer that is dropped."""
    trainer, tried = ClassTrainer(config, subjects), 20
    for number in range(tried + 5):
        if number == 5:  # the first steps are slow
            started = time.perf_counter()
        trainer.step().tolist()
    return max(int(seconds * tried / (time.perf_counter() - started)), 1)


def fit(config: ClassTraining, subjects: Subjects, output: Path, *, resume: bool = False) -> ClassTrainer:
    """Trains to the end, or on from where a training was interrupted, on the device of the subjects.

    Writes to the folder ``output`` ``classes-last.pt``, ``classes-best.pt`` (the averaged weights, by validation) and
    ``classes-log.csv``.

    Raises:
        ValueError: there are no steps to make, or ``output`` holds a training and ``resume`` is False, or that had other
            settings.
        FloatingPointError: the loss is not finite.
    """
    if not config.steps:
        raise ValueError("steps is at least 1 to train a class network")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / LAST
    if checkpoint.exists() and not resume:
        raise ValueError(f"{output}: holds a training already; give --resume to go on with it, or another --output")
    trainer = ClassTrainer(config, subjects)
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, map_location=trainer.device, weights_only=True))
        # A process that was killed may have written the checkpoint and not yet its log.
        write_log(trainer.log, output / LOG)
        print(f"resumed at step {trainer.step_number}")
    sums, count = torch.zeros(3, device=trainer.device), 0
    with tqdm(total=config.steps, initial=trainer.step_number, desc=config.name, mininterval=10) as bar:
        while trainer.step_number < config.steps:
            sums += trainer.step()
            count += 1
            bar.update()
            done, last = trainer.step_number, trainer.step_number == config.steps
            if done % config.checkpoint_every and done % config.validate_every and not last:
                continue
            row = dict(zip(("loss", "cross entropy", "1 - Dice"), (sums / count).tolist(), strict=True))
            sums, count = torch.zeros_like(sums), 0
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"the loss is {row['loss']} before step {done}; lower learning_rate, or look for odd images"
                )
            if done % config.validate_every == 0 or last:
                row |= trainer.validate()
                if row["Dice"] > trainer.best or not (output / BEST).exists():
                    trainer.best = row["Dice"]
                    kept = trainer.weights() | {"scores": row}
                    atomic.write_atomically(output / BEST, partial(torch.save, kept))
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in row.items() if k in ("loss", "Dice")))
            trainer.log.append({"step": done} | row)
            atomic.write_atomically(checkpoint, partial(torch.save, trainer.state()))
            write_log(trainer.log, output / LOG)
    return trainer


def fit_to_cohort(
    config: ClassTraining, cohort: Path, output: Path, device: torch.device, *, resume: bool
) -> dict | None:
    """What a training on the labels of a prepared cohort came to, see :meth:`ClassTrainer.weights`.

    None where the configuration asks for no class network, or where the cohort has no labels.

    Args:
        cohort: what is learned from where the configuration names no sources.
        output, resume: as in :func:`fit`.
    """
    if not config.steps:
        return None
    if not config.sources:
        config = replace(config, sources=[Source(cohort=str(cohort))])
    try:
        read = load(config, device)
    except NoLabelsError as error:
        print(f"no class network is trained: {error}")
        return None
    fit(config, read, output, resume=resume)
    return torch.load(output / BEST, map_location="cpu", weights_only=True)
