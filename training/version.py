"""Which state of the project made a result."""

import subprocess
from importlib import metadata
from pathlib import Path


def version() -> str:
    """The commit (``-dirty`` where files differ from it), or else the installed package's version."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return next((d.version for d in metadata.distributions(name="divregnet")), "unknown")
