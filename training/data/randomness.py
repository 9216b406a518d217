"""Random numbers of training data.

All random numbers of a pair come from generators of one seed, so the pairs of a step depend only on the seed and the number of
the step. An interrupted training therefore resumes with the same pairs.
"""

import torch
from torch import Tensor


class Random:
    """Draws random numbers: tensors on a device, and single numbers on the CPU, so that no GPU has to be waited for."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._numbers = self.generator if self.device.type == "cpu" else torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def few(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers on the CPU."""
        return low + (high - low) * torch.rand(shape, generator=self._numbers)

    def number(self, low: float, high: float) -> float:
        return self.few(low, high, 1).item()

    def chance(self, probability: float) -> bool:
        return self.number(0, 1) < probability

    def index(self, count: int) -> int:
        """An integer from 0 to ``count - 1``."""
        return min(int(self.number(0, count - 1e-6)), count - 1)  # float32 may round the largest up

    def choice(self, options):
        return options[self.index(len(options))]
