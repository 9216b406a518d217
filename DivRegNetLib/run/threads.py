"""Threads that cost what the share of a busy or limited machine costs. No torch here: this must come before its import.

By default the threads of OpenMP, which torch computes with, wait for each other by spinning. On a machine with other work
every wait then lasts a time slice of the scheduler.
"""

import contextlib
import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from DivRegNetLib.core.control_groups import control_groups, read_kernel_file

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def prepare_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables that OpenMP, MKL and ITK read when they are loaded, unless the user has set them.

    Threads wait passively, and where the process may use a part of the processors only, there are as many as it may use.

    Args:
        environment: of this process, before torch and ITK are imported, or of one that is about to be started.
    """
    if environment is os.environ and "torch" in sys.modules:
        return
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    usable = usable_processors()
    if usable < (os.cpu_count() or 1):
        for name in COUNTS:
            environment.setdefault(name, environment.get("OMP_NUM_THREADS", str(usable)))


def usable_processors(root: Path = Path("/")) -> int:
    """Processors that this process may use, by its affinity and the quota of its control group, at least 1.

    Args:
        root: of the file system in which the kernel reports this.
    """
    with contextlib.suppress(AttributeError, OSError):
        return max(min(len(os.sched_getaffinity(0)), _quota(root)), 1)
    return os.cpu_count() or 1


def _quota(root: Path) -> int:
    """Processors that the control group and those above it may use, rounded up."""
    quotas = [math.inf]
    for group in control_groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = read_kernel_file(group / "cpu.max").split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int(read_kernel_file(group / f"cpu.cfs_{n}_us")) for n in ("quota", "period"))
            quotas.append(quota / period if quota > 0 else math.inf)
    smallest = min(quotas)
    return sys.maxsize if math.isinf(smallest) else max(math.ceil(smallest - 1e-6), 1)
