"""Trains RegNet and KLDivNet together, in one stage, without labels or with what the cohort knows.

    python training/train.py --config training/configs/head-mr.yaml --output build/training/head-mr

Writes ``log.csv``, ``last.pt`` (resumed from when the same command is given again) and, at the end, the model and its
card into ``--models`` (default: the output folder). See training/README.md.
"""

import argparse
import copy
import csv
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from DivRegNetLib import fields
from DivRegNetLib.regnet import RegNet
from DivRegNetLib.similarity import KLDivNet
from training import cohort as cohorts
from training import config as configs
from training import synthesis

TASKS = (("T1", "T2"), ("PD", "T2"), ("T2", "T2"))  # moving, fixed (arXiv 1908.08767, Table 2)


class Trainer:
    """All that changes during training, and one step of it."""

    def __init__(self, config: configs.Config, cohort: cohorts.Cohort, device: torch.device) -> None:
        self.config, self.cohort, self.device = config, cohort, device
        torch.manual_seed(config.seed)
        self.regnet = RegNet(config.regnet).to(device, memory_format=torch.channels_last_3d)
        self.kldivnet = KLDivNet(config.kldivnet).to(device)
        self.ema = copy.deepcopy(self.regnet).eval()
        self.optimiser = torch.optim.Adam(
            [
                {"params": self.regnet.parameters(), "lr": config.learning_rate},
                {"params": self.kldivnet.parameters(), "lr": config.similarity_learning_rate},
            ]
        )
        self.step_number = 0

    def state(self) -> dict:
        return {
            "config": self.config.as_dict(),
            "regnet": self.regnet.state_dict(),
            "kldivnet": self.kldivnet.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step_number,
        }

    def restore(self, state: dict) -> None:
        for name in ("regnet", "kldivnet", "ema", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.step_number = state["step"]

    @property
    def warming_up(self) -> bool:
        """While only KLDivNet learns, from unaligned pairs."""
        return self.step_number < self.config.warmup

    def step(self) -> dict[str, float]:
        """One pair, one update of both networks; returns what the log shows.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        random = synthesis.Random(self.config.seed * 1_000_003 + self.step_number, self.device)
        torch.manual_seed(self.config.seed * 1_000_003 + self.step_number)
        pair = synthesis.make_pair(self.cohort, self.config.recipe, random)
        for group, rate in zip(self.optimiser.param_groups, self._rates(), strict=True):
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        terms = self._warm_up(pair) if self.warming_up else self._descend(pair)
        torch.nn.utils.clip_grad_norm_(self.regnet.parameters(), 5.0)
        self.optimiser.step()
        self.step_number += 1
        if not self.warming_up:
            self._average()
        return {name: term.item() for name, term in terms.items()}

    def _backward(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        if not torch.isfinite(loss):
            values = {name: term.item() for name, term in terms.items()}
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step_number}: {values}")
        loss.backward()

    def _rates(self) -> tuple[float, float]:
        c = self.config
        done = min(max(self.step_number - c.warmup, 0) / max(c.steps - c.warmup, 1), 1.0)
        falling = 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())
        rate = c.final_learning_rate + (c.learning_rate - c.final_learning_rate) * falling
        return rate, c.similarity_learning_rate * rate / c.learning_rate

    def _similarity(self, fixed: Tensor, moving: Tensor) -> Tensor:
        return self.kldivnet(fixed, moving, samples=self.config.samples)

    def _warm_up(self, pair: synthesis.Pair) -> dict[str, Tensor]:
        """Gradients of KLDivNet alone, on images partly aligned where it can be, so that D sees all it will be asked."""
        moving = pair.moving
        if pair.truth is not None:
            moving = fields.warp(moving, pair.truth * torch.rand(1, device=self.device))
        terms = {"S": self._similarity(pair.fixed, moving)}
        self._backward(-terms["S"], terms)
        return terms

    def _descend(self, pair: synthesis.Pair) -> dict[str, Tensor]:
        """Gradients of the loss of every pass, each judged on all that has been composed so far."""
        self.regnet.train()
        fixed, moving = (x.contiguous(memory_format=torch.channels_last_3d) for x in (pair.fixed, pair.moving))
        learning = self.step_number - self.config.warmup
        passes = 1 if learning < self.config.single_pass else self.config.regnet.passes
        coarse = None
        for _ in range(passes):
            coarse = self.regnet.advance(fixed, moving, coarse)
            loss, terms = self._loss(pair, coarse)
            self._backward(loss, terms)
            coarse = coarse.detach()
        return {"loss": loss} | terms

    def _loss(self, pair: synthesis.Pair, coarse: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a displacement on the network's output grid, and its terms."""
        weights, stride = self.config.weights, self.config.regnet.stride
        displacement = fields.resize(coarse, pair.fixed.shape[2:])
        similarity = self._similarity(pair.fixed, fields.warp(pair.moving, displacement))
        terms = {"S": similarity, "diffusion": fields.diffusion(coarse)}
        smoothness = weights.diffusion if pair.truth is None else weights.diffusion_known
        loss = -weights.similarity * similarity + smoothness * terms["diffusion"]
        if pair.truth is not None and weights.known:
            terms["known"] = known_distance(coarse, pair, stride)
            loss = loss + weights.known * terms["known"]
        if pair.fixed_labels is not None and weights.labels:
            terms["labels"] = label_distance(coarse, pair, stride)
            loss = loss + weights.labels * terms["labels"]
        return loss, terms

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average of the weights, quicker in the beginning."""
        done = self.step_number - self.config.warmup
        decay = min(self.config.ema, (1 + done) / (10 + done))
        for mean, now in zip(self.ema.state_dict().values(), self.regnet.state_dict().values(), strict=True):
            mean.lerp_(now, 1 - decay)

    @torch.no_grad()
    def validate(self, count: int = 4) -> dict[str, float]:
        """Dice of the union of labels and error (mm, inside it) of the averaged network, on phantoms never trained on."""
        results = {}
        for moving, fixed in TASKS:
            scores = []
            for i in range(count):
                pair = synthesis.phantom(self.cohort, moving, fixed, seed=900_000 + i)
                displacement = self.ema(pair.fixed, pair.moving)
                inside = pair.fixed_labels > 0
                warped = fields.warp(pair.moving_labels.float(), displacement, mode="nearest", padding="zeros") > 0
                dice = 2 * (inside & warped).sum() / (inside.sum() + warped.sum())
                error = (displacement - pair.truth).norm(dim=1, keepdim=True)[inside].mean() * self.cohort.spacing
                folded = (fields.jacobian_determinant(displacement) <= 0).float().mean()
                scores.append(torch.stack([dice, error, 100 * folded]))
            means = torch.stack(scores).mean(0).tolist()
            results |= dict(zip((f"{moving}-{fixed} {k}" for k in ("Dice", "mm", "folded %")), means, strict=True))
        return results


def known_distance(coarse: Tensor, pair: synthesis.Pair, stride: int) -> Tensor:
    """Mean distance to the true displacement in fine voxels, the brain counting five times as much as the rest."""
    truth, weight = (F.avg_pool3d(x, stride) for x in (pair.truth, 0.2 + 0.8 * pair.brain))
    distance = ((coarse * stride - truth).square().sum(1, keepdim=True) + 1e-4).sqrt()
    return (distance * weight).sum() / weight.sum()


def label_distance(coarse: Tensor, pair: synthesis.Pair, stride: int, most: int = 8) -> Tensor:
    """1 - mean soft Dice of up to ``most`` classes at random, on the network's output grid."""
    classes = pair.fixed_labels.unique()
    classes = classes[classes > 0]
    classes = classes[torch.randperm(len(classes))[:most]].view(1, -1, 1, 1, 1)
    fixed, moving = (F.avg_pool3d((x == classes).float(), stride) for x in (pair.fixed_labels, pair.moving_labels))
    warped = fields.warp(moving, coarse)
    overlap = 2 * (fixed * warped).sum((2, 3, 4)) / (fixed.square() + warped.square()).sum((2, 3, 4)).clamp_min(1e-6)
    return 1 - overlap.mean()


def save(state: dict, file: Path) -> None:
    """Writes a checkpoint whole or not at all."""
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)


def train(config: configs.Config, output: Path, device: torch.device) -> Trainer:
    """Runs or resumes a training; everything it writes is in ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, cohorts.load(Path(config.cohort), device), device)
    checkpoint, log = output / "last.pt", output / "log.csv"
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, map_location=device, weights_only=True))
        tqdm.write(f"resumed at step {trainer.step_number}")
    started = time.time()
    with tqdm(total=config.steps, initial=trainer.step_number, desc=config.name, mininterval=5) as bar:
        means: dict[str, list[float]] = {}
        while trainer.step_number < config.steps:
            for name, value in trainer.step().items():
                means.setdefault(name, []).append(value)
            bar.update()
            done = trainer.step_number
            last = done == config.steps
            if done % config.checkpoint_every == 0 or last:
                row = {name: sum(values) / len(values) for name, values in means.items()}
                means = {}
                if done % config.validate_every == 0 or last:
                    row |= trainer.validate()
                bar.write(f"{done} " + " ".join(f"{k}={v:.4f}" for k, v in row.items()))
                append(log, {"step": done, "seconds": round(time.time() - started)} | row)
                save(trainer.state(), checkpoint)
    return trainer


COLUMNS = ["step", "seconds", "loss", "S", "diffusion", "known", "labels"]
COLUMNS += [f"{m}-{f} {k}" for m, f in TASKS for k in ("Dice", "mm", "folded %")]


def append(log: Path, row: dict) -> None:
    """Adds a row to a CSV file, with its header where it is new."""
    new = not log.exists()
    with log.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="where the model and its card go (default: --output)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        config = configs.load(args.config)
        trainer = train(config, args.output, torch.device(args.device))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    from training.export import export

    print(export(trainer, args.models or args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
