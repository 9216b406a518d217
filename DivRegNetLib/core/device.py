"""What PyTorch computes on, and why it may not."""

import os

import numpy as np
import torch

from DivRegNetLib.errors import DeviceError, InputError, is_out_of_memory

CPU = torch.device("cpu")


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that can be used; ``auto`` is CUDA where that can, else the CPU.

    Raises:
        DeviceError: it cannot be used, or PyTorch cannot at all; InputError: no such name.
    """
    _check_numpy()
    if name == "auto":
        return CPU if why_not_cuda() else torch.device("cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (reason := why_not_cuda(device)):
        raise DeviceError(f"device {name!r} cannot be used: {reason}; use cpu")
    return device


def why_not_cuda(device: torch.device | str = "cuda") -> str | None:
    """What keeps a CUDA device from being used; None if nothing does."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built for the CPU alone"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return "the environment variable CUDA_VISIBLE_DEVICES hides every graphics card"
    if not torch.cuda.is_available():
        return "PyTorch finds no graphics card, or no driver that fits"
    count, number = torch.cuda.device_count(), torch.device(device).index or 0
    if number >= count:
        return f"it is not there, PyTorch finds {count} graphics cards, which count from 0"
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        if "no kernel image" in str(error):
            return f"this PyTorch {torch.__version__} does not support so old or so new a graphics card"
        if is_out_of_memory(error):
            return "the memory of the graphics card is taken"
        return f"the graphics card does not work ({' '.join(str(error).split())[:200]})"
    return None


def free_memory(device: torch.device) -> float:
    """Bytes on a CUDA device that this process can still take."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _check_numpy() -> None:
    try:
        torch.from_numpy(np.zeros(1))
    except RuntimeError as error:
        raise DeviceError(
            f"PyTorch {torch.__version__} does not work with NumPy {np.__version__} ({error}): install a newer PyTorch, "
            'or an older NumPy, as pip install "numpy<2" does'
        ) from error
