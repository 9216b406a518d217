"""What the class network is trained on: cross entropy and Dice of labels that may be coarse, or of part of the anatomy."""

import torch
from torch import Tensor

LEAST = 1e-9  # probability of a set of classes whose logarithm is taken


def terms(logits: Tensor, fractions: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the sets of classes that are possible, and 1 - Dice of the classes that are certain.

    Where a set holds one class alone this is the usual cross entropy. Where it holds several, their probabilities are added
    up (the marginal loss of Shi et al., Medical Image Analysis 2021, for partly labeled images), and such voxels do not count
    for the Dice of these classes.

    Args:
        logits: (N, K, D, H, W).
        fractions: (N, S, D, H, W): how much of a voxel each set covers; they add up to 1.
        sets: (S, K), 1 where a set holds a class, 0 elsewhere.
    Returns:
        Two scalars. Background has no Dice, nor has a class that is certain nowhere in the batch.
    """
    log = logits.float().log_softmax(1)
    p, single = log.exp(), sets.sum(1) == 1
    of_set = torch.einsum("nkdhw,sk->nsdhw", p, sets).clamp_min(LEAST).log()
    of_set = torch.where(single.view(1, -1, 1, 1, 1), torch.einsum("nkdhw,sk->nsdhw", log, sets), of_set)
    entropy = -(fractions * of_set).sum(1).mean()
    certain, counts = certainty(fractions, sets)
    p, target, over = (p * counts)[:, 1:], certain[:, 1:], (0, 2, 3, 4)
    size = target.sum(over)
    dice = (2 * (p * target).sum(over) + 1) / ((p.square() + target.square()).sum(over) + 1)
    there = (size > 0).to(p.dtype)
    return entropy, ((1 - dice) * there).sum() / there.sum().clamp_min(1)


def certainty(fractions: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a voxel certainly is each class; and of how much it is known whether it is. Both (N, K, D, H, W)."""
    single = (sets * (sets.sum(1, keepdim=True) == 1)).to(fractions.dtype)
    known = torch.maximum(single, 1 - sets)
    return torch.einsum("nsdhw,sk->nkdhw", fractions, single), torch.einsum("nsdhw,sk->nkdhw", fractions, known)
