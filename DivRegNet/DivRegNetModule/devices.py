"""The computation devices that the panel offers, without importing torch into Slicer."""

import shutil
import subprocess
import sys

from DivRegNetModule import _
from DivRegNetModule.first_use import torch_version

QUERY = ["--query-gpu=index,name,memory.free", "--format=csv,noheader,nounits"]
SECONDS = 3.0


def devices() -> list[tuple[str, str]]:
    """(text, name of the device) for each device, the automatic choice first. GPUs are listed if torch can use them."""
    offered = [(_("Automatic (GPU if there is one)"), "auto"), (_("CPU"), "cpu")]
    version = torch_version()
    if version and not version.endswith("+cpu"):
        for index, name, free in _nvidia():
            text = _("{name}, {free:.1f} GB free (GPU {index})").format(name=name, free=free / 1024, index=index)
            offered.append((text, f"cuda:{index}"))
    return offered


def _nvidia() -> list[tuple[int, str, float]]:
    """(index, name, free MiB) of each NVIDIA card, as ``nvidia-smi`` reports them; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    flags = {"creationflags": subprocess.CREATE_NO_WINDOW} if sys.platform == "win32" else {}
    try:
        answer = subprocess.run([tool, *QUERY], capture_output=True, text=True, timeout=SECONDS, check=True, **flags)
        return parse(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def parse(answer: str) -> list[tuple[int, str, float]]:
    """Lines ``0, NVIDIA RTX A4000, 15012`` as (index, name, free MiB).

    Raises:
        ValueError: a line of another form.
    """
    cards = []
    for line in answer.strip().splitlines():
        index, rest = line.split(",", 1)
        name, free = rest.rsplit(",", 1)
        cards.append((int(index), name.strip(), float(free)))
    return cards
