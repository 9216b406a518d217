"""What the class network is trained on: cross entropy and Dice of labels that may be coarse, or of part of the anatomy."""

import torch
from torch import Tensor


def terms(logits: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the sets of classes that are possible, and 1 - Dice of the classes that are certain.

    A voxel whose set holds one class alone has the usual cross entropy. Where a set holds several, their probabilities are
    added up (as the marginal loss of Shi et al., Medical Image Analysis 2021, for partly labeled images), and these voxels do
    not count for the Dice of these classes.

    Args:
        logits: (N, K, D, H, W).
        possible: (N, K, D, H, W), 1 where a class is possible, 0 elsewhere; at least one per voxel.
    Returns:
        Two scalars. Background has no Dice, nor has a class that no voxel of the batch certainly is.
    """
    log = logits.float().log_softmax(1)
    entropy = -torch.logsumexp(log + possible.clamp_min(1e-30).log(), 1).mean()
    certain = possible * (possible.sum(1, keepdim=True) == 1)
    counts = torch.maximum(certain, 1 - possible)  # either it is certainly this class, or certainly not
    p, target = (log.exp() * counts)[:, 1:], certain[:, 1:]
    over = (0, 2, 3, 4)
    size = target.sum(over)
    dice = (2 * (p * target).sum(over) + 1) / (p.sum(over) + size + 1)
    there = (size > 0).float()
    return entropy, ((1 - dice) * there).sum() / there.sum().clamp_min(1)
