"""Renders the panel of the module to Resources/Screenshots/panel.png, with Slicer's widgets replaced by stand-ins.

    python Testing/render_panel.py [OUTPUT.png]

The volumes, the model and the quality card shown are examples.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUALITY = {
    "nmi": {"before": 1.092, "aligned": 1.128, "after": 1.171},
    "similarity": {"before": 0.412, "aligned": 0.655, "after": 0.913},
    "folded_percent": 0.0,
    "log_jacobian_sd": 0.148,
    "largest_displacement_mm": 9.7,
    "mean_displacement_mm": 2.4,
    "inverse_consistency_mm": {"mean": 0.06, "largest": 1.4},
    "landmark_error_mm": {"before": 21.45, "after": 2.31},
}


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


def main(output: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from slicer_stand_in import running

    with running() as app:
        import slicer

        from DivRegNetLib import models

        module = load_module(app)
        from DivRegNetModule import verdict

        widget = make_widget(module)
        fixed, moving = add_volume("Patient 12 T1"), add_volume("Patient 12 T2", (180, 180, 24), (1.1, 1.1, 6.6))
        labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "T2 lesions")
        widget.initializeParameterNode()
        p = widget._parameterNode
        p.fixedVolume, p.movingVolume, p.alsoApplyTo, p.model = fixed, moving, [labels], models.DEFAULT
        widget.ui.verdictLabel.text = verdict.as_html(verdict.judge(QUALITY))
        widget.ui.qualityLabel.text = verdict.table(verdict.rows(QUALITY, 6.8, "cuda:0"))
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
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "Resources" / "Screenshots" / "panel.png")
