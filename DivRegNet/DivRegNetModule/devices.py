"""The computation devices that the panel offers, without importing torch into Slicer and without waiting for a driver."""

import shutil
import subprocess
import sys
import time

from DivRegNetModule import _
from DivRegNetModule.first_use import torch_version

QUERY = ["--query-gpu=index,name,memory.free", "--format=csv,noheader,nounits"]
SECONDS = 10.0  # after which ``nvidia-smi`` is given up


class Devices:
    """The list of devices. ``nvidia-smi`` is started, and asked later whether it has answered: it can take seconds."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._cards: list[tuple[int, str, float]] = []
        self._started = 0.0

    def offered(self) -> list[tuple[str, str]]:
        """(text, name of the device) for each device known so far, the automatic choice first."""
        devices = [(_("Automatic (GPU if there is one)"), "auto"), (_("CPU"), "cpu")]
        for index, name, free in self._cards:
            text = _("{name}, {free:.1f} GB free (GPU {index})").format(name=name, free=free / 1024, index=index)
            devices.append((text, f"cuda:{index}"))
        return devices

    @property
    def has_gpu(self) -> bool:
        """Whether a graphics card is known that torch can use."""
        return bool(self._cards)

    def ask(self) -> None:
        """Starts to look for graphics cards, if there is a torch that uses them."""
        self.stop()
        tool, version = shutil.which("nvidia-smi"), torch_version()
        if tool is None or not version or version.endswith("+cpu"):
            self._cards = []
            return
        flags = {"creationflags": subprocess.CREATE_NO_WINDOW} if sys.platform == "win32" else {}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            self._process = subprocess.Popen([tool, *QUERY], text=True, **pipes, **flags)
        except OSError:
            self._cards = []
        self._started = time.monotonic()

    def poll(self) -> bool:
        """Whether the list has become complete since the last call; returns at once."""
        process = self._process
        if process is None:
            return False
        if process.poll() is None:
            if time.monotonic() - self._started > SECONDS:
                self.stop()
            return False
        self._process = None
        try:
            self._cards = parse(process.communicate()[0]) if process.returncode == 0 else []
        except (OSError, ValueError):
            self._cards = []
        return True

    @property
    def asking(self) -> bool:
        """Whether ``nvidia-smi`` has not answered yet."""
        return self._process is not None

    def stop(self) -> None:
        """Gives up waiting for an answer."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.stdout.close()
            process.poll()


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
