"""The script for a person with a Slicer runs on the stand-in, so that it does not fail for reasons of its own."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "run_in_slicer.py"


def test_every_step_of_the_walk_passes_on_the_stand_in(module, app, capsys):
    import slicer
    from render_panel import make_widget

    widget = make_widget(module)

    class Representation:
        def self(self):
            return widget

    slicer.modules.divregnet.widgetRepresentation = staticmethod(Representation)
    module.registerSampleData()
    spec = importlib.util.spec_from_file_location("run_in_slicer", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.Walk.spacing = 10.0
    del script.Walk.self_tests  # has a test of its own
    code = script.main()
    table = capsys.readouterr().out
    widget.cleanup()
    assert code == 0, table
    assert f"{len(script.steps())} of {len(script.steps())} steps passed" in table and len(script.steps()) > 15
