"""Renders the panel of the module to Resources/Screenshots/panel.png, with Slicer's widgets replaced by stand-ins.

    python Testing/tools/render_panel.py RESULT [OUTPUT.png]

RESULT is the folder that ``make demo`` writes; the panel shows the bundled pair and the quality card from there.
"""

import importlib.util
import json
import sys
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


def main(result: Path, output: Path) -> None:
    from DivRegNetLib.quality.verdict import with_references

    running = load_package("slicer_stand_in", ROOT / "Testing" / "helpers" / "slicer_stand_in").running
    report = json.loads((result / "quality.json").read_text(encoding="utf-8"))
    quality = with_references(report["quality"])
    with running() as app:
        import slicer

        from DivRegNetLib import models
        from DivRegNetLib.io import images
        from DivRegNetLib.quality.verdict import judge

        module = load_module(app)
        from DivRegNetModule import verdict

        widget = make_widget(module)
        volumes = []
        for name in ("fixed_T1", "moving_T2"):
            image = images.read_image(ROOT / "Resources" / "SampleData" / f"{name}.nii.gz")
            volumes.append(add_volume(name, image.GetSize(), image.GetSpacing()))
        labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "moving_T2_labels")
        widget.initializeParameterNode()
        p = widget._parameterNode
        p.fixedVolume, p.movingVolume = volumes
        p.alsoApplyTo, p.model = [labels], models.DEFAULT
        widget.ui.verdictLabel.text = verdict.as_html(judge(quality))
        rows = verdict.rows(quality, sum(report["seconds"].values()), report["settings"]["device"])
        widget.ui.qualityLabel.text = verdict.table(rows)
        widget.ui.resultCollapsibleButton.visible = True
        for _ in range(5):
            app.processEvents()
        output.parent.mkdir(parents=True, exist_ok=True)
        widget.parent.adjustSize()
        widget.parent.resize(430, max(widget.parent.sizeHint.height(), 700))
        for _ in range(5):
            app.processEvents()
        widget.parent.grab().save(str(output))
        widget.cleanup()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "Resources" / "Screenshots" / "panel.png"
    )
