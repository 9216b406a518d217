"""Renders the panel of the module to Resources/Screenshots/panel.png, with Slicer's widgets replaced by stand-ins.

    python Testing/tools/render_panel.py RESULT [OUTPUT.png] [--width 400] [--height 440] [--font 1.25] [--open]

RESULT is the folder that ``make demo`` writes; the panel shows the bundled pair and the quality card from there.
"""

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_package(name: str, folder: Path):
    """A package of the tests' helpers, which are not installed."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package


def load_module(app):
    """The module DivRegNet as Slicer loads it, with ``slicer.modules.divregnet``."""
    import slicer

    path = ROOT / "DivRegNet" / "DivRegNet.py"
    spec = importlib.util.spec_from_file_location("DivRegNet", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["DivRegNet"] = module
    spec.loader.exec_module(module)
    slicer.modules.divregnet = type("Module", (), {"path": str(path)})
    return module


def make_widget(module):
    """The panel in a window of its own."""
    import slicer
    from PySide6.QtWidgets import QVBoxLayout

    parent = slicer.qMRMLWidget()
    layout = QVBoxLayout(parent)
    layout.setContentsMargins(0, 0, 0, 0)
    widget = module.DivRegNetWidget(parent)
    widget.setup()
    parent.resize(430, 980)
    parent.show()
    return widget


def add_volume(name: str, size=(192, 224, 160), spacing=(1.0, 1.0, 1.2), kind="vtkMRMLScalarVolumeNode"):
    """A volume node of random voxels."""
    import numpy as np
    import slicer

    node = slicer.mrmlScene.AddNewNodeByClass(kind, name)
    slicer.util.updateVolumeFromArray(node, np.random.default_rng(0).integers(0, 900, size[::-1]).astype(np.int16))
    node.SetSpacing(spacing)
    node.CreateDefaultDisplayNodes()
    return node


def show_result(widget, result: Path) -> None:
    """Fills the panel with the bundled pair and the quality card of a registration of it."""
    import slicer

    from DivRegNetLib import models
    from DivRegNetLib.io import images
    from DivRegNetLib.quality.verdict import with_references

    report = json.loads((result / "quality.json").read_text(encoding="utf-8"))
    quality = with_references(report["quality"])
    volumes = []
    for name in ("fixed_T1", "moving_T2"):
        image = images.read_image(ROOT / "Resources" / "SampleData" / f"{name}.nii.gz")
        volumes.append(add_volume(name, image.GetSize(), image.GetSpacing()))
    labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "moving_T2_labels")
    p = widget._parameterNode
    p.fixedVolume, p.movingVolume = volumes
    p.alsoApplyTo, p.model = [labels], models.DEFAULT
    outcome = types.SimpleNamespace(
        fixed=volumes[0],
        moving=volumes[1],
        quality=quality,
        settings=report["settings"],
        seconds=sum(report["seconds"].values()),
        changes=types.SimpleNamespace(added=volumes, overwritten=[]),
        pairs=None,
        error_map=True,  # there is one
    )
    widget._present(outcome)
    widget._undoable = outcome
    widget._refresh()


def settle(app) -> None:
    for _ in range(8):
        app.processEvents()


def main(
    result: Path, output: Path, width: int = 430, height: int = 0, font: float = 1.0, open_all: bool = False
) -> None:
    """Renders the panel.

    Args:
        result: folder that ``make demo`` writes.
        width, height: of the panel in pixels; a height of 0 is as much as it needs.
        font: size relative to the usual one.
        open_all: with all sections open.
    """
    from PIL import Image
    from PySide6.QtCore import Qt
    from PySide6.QtWidgets import QFrame, QScrollArea

    running = load_package("slicer_stand_in", ROOT / "Testing" / "helpers" / "slicer_stand_in").running
    with running() as app:
        usual = app.qt.font()
        scaled = app.qt.font()
        scaled.setPointSizeF(usual.pointSizeF() * font)
        app.qt.setFont(scaled)
        try:
            module = load_module(app)
            widget = make_widget(module)
            show_result(widget, result)
            if open_all:
                for name, control in vars(widget.ui).items():
                    if name.endswith("CollapsibleButton"):
                        control.collapsed = False
            settle(app)
            output.parent.mkdir(parents=True, exist_ok=True)
            area = QScrollArea()  # as Slicer's module panel
            area.setWidgetResizable(True)
            area.setFrameShape(QFrame.NoFrame)
            area.setHorizontalScrollBarPolicy(Qt.ScrollBarAlwaysOff)
            area.setWidget(widget.parent)
            area.resize(width, height or 300)
            area.show()
            settle(app)
            if not height:
                area.setVerticalScrollBarPolicy(Qt.ScrollBarAlwaysOff)
                area.resize(width, widget.parent.layout().totalHeightForWidth(width))
                settle(app)
            area.grab().save(str(output))
            picture = Image.open(output).convert("RGB")
            picture.quantize(128, dither=Image.Dither.NONE).save(output, optimize=True)  # a third of the size
            area.takeWidget()
            area.close()
            widget.cleanup()
        finally:
            app.qt.setFont(usual)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "Resources" / "Screenshots" / "panel.png")
    parser.add_argument("--width", type=int, default=430)
    parser.add_argument("--height", type=int, default=0, help="default: as much as the panel needs")
    parser.add_argument("--font", type=float, default=1.0, help="size of the font relative to the usual one")
    parser.add_argument("--open", action="store_true", help="open all sections")
    args = parser.parse_args()
    main(args.result, args.output, args.width, args.height, args.font, args.open)
