"""The device that PyTorch computes on, and why a device cannot be used."""

import os

import numpy as np
import torch

from DivRegNetLib.errors import DeviceError, InputError, is_out_of_memory

CPU = torch.device("cpu")


def pick_device(name: str) -> torch.device:
    """The device of a name, ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is CUDA where it works, otherwise the CPU.

    Raises:
        DeviceError: the device, or PyTorch itself, cannot be used; InputError: an unknown name.
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
    """Why a CUDA device cannot be used; None if it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built for the CPU only"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return "the environment variable CUDA_VISIBLE_DEVICES hides every graphics card"
    if not torch.cuda.is_available():
        return "PyTorch finds no graphics card, or no driver that fits"
    count, number = torch.cuda.device_count(), torch.device(device).index or 0
    if number >= count:
        return f"PyTorch finds {count} graphics cards, counted from 0"
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        if "no kernel image" in str(error):
            return (
                f"PyTorch {torch.__version__} does not support this graphics card, which is too old or too new for it"
            )
        if is_out_of_memory(error):
            return "the memory of the graphics card is in use"
        return f"the graphics card does not work ({' '.join(str(error).split())[:200]})"
    return None


def free_memory(device: torch.device) -> float:
    """Bytes that this process can allocate on a CUDA device, its own cache included."""
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
