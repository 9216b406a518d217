"""Presets are valid options, and can be told from each other."""

import pytest

from DivRegNetLib.errors import InputError
from DivRegNetLib.options import Options
from DivRegNetLib.presets import PRESETS, VARIED, matching, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_is_recognized_by_its_values(name):
    chosen = preset(name)
    options = Options.of(**chosen.options)
    assert matching({option: getattr(options, option) for option in VARIED}) is chosen
    assert chosen.label and chosen.help.endswith(".")


def test_other_values_match_no_preset_and_an_unknown_name_is_refused():
    assert matching({"align": "center", "refine": 7, "method": "auto", "effort": "usual"}) is None
    with pytest.raises(InputError, match="presets are general, same-contrast"):
        preset("best")
