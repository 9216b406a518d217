"""The module's self-tests, which run in Slicer, run here on the stand-in: in any order, with and without testing mode, with
and without torch (fault 3)."""

import sys
import unittest

import pytest
from panel import stand_in


@pytest.fixture
def slicer_module(module, app):
    """The module with its widget, as Slicer has it."""
    import slicer
    from render_panel import make_widget

    widget = make_widget(module)

    class Representation:
        def self(self):
            return widget

    slicer.modules.divregnet.widgetRepresentation = staticmethod(Representation)
    yield module
    widget.cleanup()


def run(module, names) -> unittest.TestResult:
    result = unittest.TestResult()
    unittest.TestSuite(module.DivRegNetTest(name) for name in names).run(result)
    return result


def names(module) -> list[str]:
    found = unittest.TestLoader().getTestCaseNames(module.DivRegNetTest)
    assert len(found) >= 7
    return found


@pytest.mark.parametrize(
    ("testing", "with_torch"),
    [(True, True), (False, False), (True, False)],
    ids=["testing", "no torch", "testing, no torch"],
)
def test_every_self_test_passes_in_either_order_and_opens_no_dialog(
    slicer_module, app, monkeypatch, testing, with_torch
):
    from DivRegNetModule import first_use

    app.testing = testing
    if not with_torch:
        monkeypatch.setattr(first_use, "torch_version", lambda: "")
    every = names(slicer_module)
    order = every if with_torch else every[::-1]
    result = run(slicer_module, order)
    assert not result.errors and not result.failures, (result.errors + result.failures)[0][1]
    assert result.testsRun == len(every)
    assert bool(result.skipped) != with_torch and app.shown == []


def test_a_test_that_fails_does_not_keep_the_others_from_running(slicer_module, monkeypatch):
    kind = slicer_module.DivRegNetTest
    ran = []
    for name in names(slicer_module):
        monkeypatch.setattr(kind, name, lambda self, name=name: ran.append(name))

    def fail(self):
        raise ValueError("on purpose")

    monkeypatch.setattr(kind, names(slicer_module)[0], fail)
    with pytest.raises(AssertionError, match="on purpose"):
        kind().runTest()
    assert len(ran) == len(names(slicer_module)) - 1


def test_registering_sample_data_again_makes_no_second_entry(module):
    import slicer
    from DivRegNetModule import samples

    for _ in range(3):
        module.registerSampleData()
    assert [source.sampleName for source in slicer.modules.sampleDataSources[samples.CATEGORY]] == list(samples.PAIRS)


def test_the_stand_in_compares_sources_as_slicer_does():
    with stand_in():
        from SampleData import SampleDataSource

        def make():
            return SampleDataSource(sampleName="a", customDownloader=lambda source: None)

        kept = [make(), make()]
        assert kept[0] != kept[1] and "SampleData" in sys.modules
