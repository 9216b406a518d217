"""The sample pairs that come with the extension, for Slicer's Sample Data module. They load offline."""

from pathlib import Path

import slicer
import slicer.util

from DivRegNetModule import _

CATEGORY = "DivRegNet"
THUMBNAIL = "DivRegNetHeadT1T2.png"
LABELS, LANDMARKS = "_labels.nii.gz", ".mrk.json"
PAIRS = {"DivRegNetHeadT1T2": ("fixed_T1.nii.gz", "moving_T2.nii.gz")}
"""Name in Sample Data -> fixed and moving image; segmentation and landmarks lie beside each, if there are any."""


def folder(module_folder: Path) -> Path:
    """Where the sample data are: beside the module in an installed extension, one level up in a checkout."""
    candidates = (module_folder / "Resources" / "SampleData", module_folder.parent / "Resources" / "SampleData")
    return next((c for c in candidates if any((c / f).is_file() for p in PAIRS.values() for f in p)), candidates[0])


def register(module_folder: Path) -> None:
    """Adds the pairs whose files are there to the Sample Data module, each once.

    Sample Data itself compares sources by ``str()`` (SampleData.py, SampleDataSource.__eq__), which differs between two
    that are made alike, since it contains the address of the function that loads them.
    """
    import SampleData

    logic = SampleData.SampleDataLogic
    if hasattr(logic, "registerCustomSampleDataCategory"):  # since Slicer 5.11
        logic.registerCustomSampleDataCategory(CATEGORY, title=_("DivRegNet"))
    registered = {source.sampleName for source in getattr(slicer.modules, "sampleDataSources", {}).get(CATEGORY, [])}
    here = folder(module_folder)
    for name, files in PAIRS.items():
        paths = [here / file for file in files]
        if name not in registered and all(path.is_file() for path in paths):
            logic.registerCustomSampleDataSource(
                category=CATEGORY,
                sampleName=name,
                thumbnailFileName=str(module_folder / "Resources" / "Icons" / THUMBNAIL),
                uris=[path.as_uri() for path in paths],
                fileNames=list(files),
                nodeNames=[_stem(file) for file in files],
                customDownloader=lambda source, name=name: load(module_folder, name),
            )


def load(module_folder: Path, name: str = "DivRegNetHeadT1T2") -> list:
    """Loads a pair with segmentations and landmarks into the scene.

    Returns:
        fixed and moving volume node, then whatever else was loaded.
    """
    here, volumes, others = folder(module_folder), [], []
    for file in PAIRS[name]:
        stem = _stem(file)
        volumes.append(slicer.util.loadVolume(str(here / file), {"name": stem}))
        if (labels := here / (stem + LABELS)).is_file():
            others.append(slicer.util.loadSegmentation(str(labels), {"name": f"{stem} labels"}))
        if (landmarks := here / (stem + LANDMARKS)).is_file():
            others.append(slicer.util.loadMarkups(str(landmarks)))
            others[-1].SetName(f"{stem} landmarks")
    for node in others:
        node.GetDisplayNode().SetVisibility(False)
    slicer.util.setSliceViewerLayers(background=volumes[0], foreground=volumes[1], foregroundOpacity=0.5, fit=True)
    return volumes + others


def _stem(file: str) -> str:
    return file.split(".")[0]
