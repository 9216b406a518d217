"""Files in which Linux reports what a process may use. No torch here."""

import os
from pathlib import Path


def read_kernel_file(path: Path) -> str:
    """The text of a file of the kernel, whatever the encoding of the process. Raises OSError."""
    return os.fsdecode(path.read_bytes())


def control_groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and those above it, of either version; empty where there are none.

    Args:
        root: of the file system.
        controller: of version 1, such as ``memory``; in version 2 all are in one folder.
    """
    try:
        lines = read_kernel_file(root / "proc/self/cgroup").splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "" or controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = mount / path.lstrip("/")
            groups += [mount, *(g for g in (group, *group.parents) if mount in g.parents)]
    return groups
