"""The loss of training: a similarity, the smoothness of the displacement, and supervised terms where more is known."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from DivRegNetLib.core import fields
from DivRegNetLib.registration.regnet import RegNet
from DivRegNetLib.similarity.kldivnet import KLDivNet
from DivRegNetLib.similarity.lncc import lncc
from DivRegNetLib.similarity.mutual_information import parzen_mi
from training.config import Config, Loss
from training.data.pairs import Pair

TERMS = ("loss", "similarity", "diffusion", "known", "labels")


class Batch:
    """Pairs that go through the network together. Not a dataclass, because Fabric would convert the tensors in its fields.

    fixed, moving: (N, 1, D, H, W).
    seeds: one per pair, for the random numbers in its loss, which so do not depend on the other pairs of the batch.
    """

    def __init__(self, pairs: list[Pair], seeds: list[int]) -> None:
        self.pairs, self.seeds = pairs, seeds
        self.fixed, self.moving = (
            torch.cat(images).contiguous(memory_format=torch.channels_last_3d)
            for images in zip(*((p.fixed, p.moving) for p in pairs), strict=True)
        )


class Objective(nn.Module):
    """RegNet (if it is trained), the KLDivNet that it is trained with (if any), and the loss of a batch. All parameters are
    trained."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.loss = config.loss
        self.regnet = RegNet(config.regnet, config.variational) if config.trains_regnet else None
        self.kldivnet = KLDivNet(config.kldivnet) if config.loss.similarity == "kldiv" else None

    def forward(
        self, batch: Batch, coarse: Tensor | None, warming_up: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Applies the network once more and computes the loss of the composed displacement.

        Args:
            coarse: (N, 3, d, h, w) displacement before this pass, see :meth:`RegNet.advance`.
            warming_up: only KLDivNet learns, from images that are unaligned or partly aligned.
        Returns:
            The loss (a scalar, the mean over the pairs), its terms by name (see TERMS; each has one value for each pair that
            has this term), and the displacement after the pass.
        """
        if not warming_up:
            coarse = self.regnet.advance(batch.fixed, batch.moving, coarse)
        terms: dict[str, list[Tensor]] = {}
        for i, (pair, seed) in enumerate(zip(batch.pairs, batch.seeds, strict=True)):
            random = torch.Generator().manual_seed(seed)
            added = self._warm_up(pair, random) if warming_up else self._terms(pair, coarse[i : i + 1], random)
            for name, value in added.items():
                terms.setdefault(name, []).append(value)
        stacked = {name: torch.stack(values) for name, values in terms.items()}
        return stacked["loss"].mean(), stacked, coarse

    def similarity(self, fixed: Tensor, warped: Tensor, random: torch.Generator | None = None) -> Tensor:
        """The similarity of two images (1, 1, D, H, W), a scalar that training maximizes."""
        if edge := self.loss.margin:
            fixed, warped = (x[..., edge:-edge, edge:-edge, edge:-edge] for x in (fixed, warped))
        if self.loss.similarity == "mi":
            with torch.autocast(fixed.device.type, enabled=False):  # 16 bits are too few to count voxels
                chosen = torch.randperm(fixed.numel(), generator=random)[: self.loss.samples].to(fixed.device)
            fixed, warped = (x.flatten()[chosen].view(1, 1, -1, 1, 1) for x in (fixed, warped))
            return parzen_mi(fixed, warped, bins=self.loss.bins)
        if self.loss.similarity == "lncc":
            return lncc(fixed, warped, window=self.loss.window)
        return self.kldivnet(fixed, warped, samples=self.loss.samples, generator=random)

    def _warm_up(self, pair: Pair, random: torch.Generator) -> dict[str, Tensor]:
        """The loss of KLDivNet alone; pairs whose deformation is known are partly aligned by a random share of it."""
        moving = pair.moving
        if pair.truth is not None:
            moving = fields.warp(moving, pair.truth * torch.rand(1, generator=random).item())
        value = self.similarity(pair.fixed, moving, random)
        return {"loss": -value, "similarity": value}

    def _terms(self, pair: Pair, coarse: Tensor, random: torch.Generator) -> dict[str, Tensor]:
        weights: Loss = self.loss
        stride = self.regnet.config.stride
        displacement = fields.resize(coarse, pair.fixed.shape[2:])
        value = self.similarity(pair.fixed, fields.warp(pair.moving, displacement), random)
        terms = {"similarity": value, "diffusion": fields.diffusion(coarse)}
        supervised = pair.truth is not None and weights.known > 0
        smoothness = weights.diffusion_known if supervised else weights.diffusion
        loss = -weights.weight * value + smoothness * terms["diffusion"]
        if supervised:
            terms["known"] = known_distance(coarse, pair, stride)
            loss = loss + weights.known * terms["known"]
        if pair.fixed_labels is not None and weights.labels > 0:
            terms["labels"] = label_distance(coarse, pair, stride, random)
            loss = loss + weights.labels * terms["labels"]
        return {"loss": loss} | terms


def known_distance(coarse: Tensor, pair: Pair, stride: int) -> Tensor:
    """Mean distance to the true displacement in voxels of the images; voxels inside a known brain have five times the weight.

    Args:
        coarse: (1, 3, D/stride, H/stride, W/stride), voxels of the output grid.
    """
    inside = torch.ones_like(pair.fixed) if pair.brain is None else 0.2 + 0.8 * pair.brain
    truth, weight = (F.avg_pool3d(x, stride) for x in (pair.truth, inside))
    distance = ((coarse * stride - truth).square().sum(1, keepdim=True) + 1e-4).sqrt()
    return (distance * weight).sum() / weight.sum()


def label_distance(coarse: Tensor, pair: Pair, stride: int, random: torch.Generator, most: int = 8) -> Tensor:
    """1 - mean soft Dice of up to ``most`` random classes, on the network's output grid.

    Args:
        coarse: (1, 3, D/stride, H/stride, W/stride), voxels of the output grid.
    """
    classes = pair.fixed_labels.unique()
    classes = classes[classes > 0]
    if len(classes) == 0:
        return coarse.new_zeros(())
    chosen = torch.randperm(len(classes), generator=random)[:most].to(classes.device)
    classes = classes[chosen].view(1, -1, 1, 1, 1)
    fixed, moving = (
        F.avg_pool3d((x == classes).to(coarse.dtype), stride) for x in (pair.fixed_labels, pair.moving_labels)
    )
    warped = fields.warp(moving, coarse)
    overlap = 2 * (fixed * warped).sum((2, 3, 4)) / (fixed.square() + warped.square()).sum((2, 3, 4)).clamp_min(1e-6)
    return 1 - overlap.mean()
