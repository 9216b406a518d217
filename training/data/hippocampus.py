"""The crops of the hippocampus: which of them are for tests alone."""

from pathlib import Path

HELD_OUT = 20  # the last by name


def names(data: Path) -> list[str]:
    """File names of the crops in the folder ``data``/hippocampus, in order."""
    return sorted(path.name for path in (data / "hippocampus/labels").glob("*.nii.gz"))


def learned(data: Path) -> list[str]:
    """Those that may be learned from."""
    return names(data)[:-HELD_OUT]


def held_out(data: Path) -> list[str]:
    """Those that no training may use."""
    return names(data)[-HELD_OUT:]


def pairs() -> list[tuple[int, int]]:
    """(fixed, moving) numbers of the 30 pairs of held-out crops: each with the next one, and ten with the tenth next."""
    n = HELD_OUT
    return [(i, (i + 1) % n) for i in range(n)] + [(i, i + n // 2) for i in range(n // 2)]
