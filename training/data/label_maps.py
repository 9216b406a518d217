"""Whole-head label maps (FreeSurfer's classes), their tissues, and the subjects that are kept for tests."""

from pathlib import Path

# https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/AnatomicalROI/FreeSurferColorLUT
WHITE = {2, 7, 13, 16, 28, 41, 46, 52, 60, 85}
GRAY = {3, 8, 10, 11, 12, 17, 18, 26, 42, 47, 49, 50, 51, 53, 54, 58}
FLUID = {4, 5, 14, 15, 24, 43, 44, 72}
BRAIN = WHITE | GRAY | FLUID | {25, 30, 57, 62}
HELD_OUT = {"training_seg_13": "validation", "training_seg_14": "test", "training_seg_15": "test"}
"""Name -> split of the subjects that no training may use. Those for tests must not influence a choice of settings either."""


def tissue(label: int) -> str:
    """The tissue of a class: white, gray, fluid, other or background."""
    if label == 0:
        return "background"
    return "white" if label in WHITE else "gray" if label in GRAY else "fluid" if label in FLUID else "other"


def file_of(data: Path, name: str) -> Path:
    """The file of a subject in the data folder."""
    return data / "brain_labelmaps" / f"{name}.nii.gz"
