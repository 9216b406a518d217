"""Settings of the variational registration: round trips, and errors that name the key."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from DivRegNetLib.registration.variational import DEFAULT, REFINEMENT, Level, Smoothness, VariationalSettings


@pytest.mark.parametrize(
    "settings",
    [
        DEFAULT,
        REFINEMENT,
        replace(DEFAULT, steps=7, levels=[Level(2, 0.5, 6, 0.1)], last_smoothness=Smoothness(0, 1, 2)),
    ],
)
def test_settings_survive_json(settings):
    assert VariationalSettings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_what_a_dictionary_does_not_say_is_the_default():
    partial = {"steps": 3, "first_smoothness": {"fluid": 1.5}}
    expected = replace(DEFAULT, steps=3, first_smoothness=replace(DEFAULT.first_smoothness, fluid=1.5))
    assert VariationalSettings.from_dict(partial) == expected


def test_every_setting_is_documented():
    for kind in (VariationalSettings, Level, Smoothness):
        for field in fields(kind):
            assert f"    {field.name}: " in kind.__doc__, f"{kind.__name__}.{field.name}"


@pytest.mark.parametrize(("levels", "stride", "multiple"), [((4, 2, 1), 2, 8), ((1,), 2, 2), ((3, 2), 1, 6)])
def test_images_are_padded_to_what_all_levels_divide(levels, stride, multiple):
    levels = tuple(Level(n, 0.5, 8, 0.0) for n in levels)
    assert replace(DEFAULT, levels=levels, stride=stride).multiple == multiple


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "settings: keys and values"),
        ({"stepps": 3}, "unknown key 'stepps'"),
        ({"steps": 0}, "steps: from 1"),
        ({"steps": 2.0}, "steps: a whole number"),
        ({"steps": True}, "steps: a whole number"),
        ({"stride": 3}, "stride: from 1 to 2"),
        ({"bins": "32"}, "bins: a whole number"),
        ({"frequencies": 0}, "frequencies: from 0.01"),
        ({"frequencies": None}, "frequencies: a number"),
        ({"tikhonov": float("nan")}, "tikhonov: from 0"),
        ({"tikhonov": float("inf")}, "tikhonov: from 0"),
        ({"min_gain": -1}, "min_gain: from 0"),
        ({"min_gain": "none"}, "min_gain: a number"),
        ({"masks": "ignore"}, "masks: one of multiply, exclude"),
        ({"levels": []}, "levels: at least one"),
        ({"levels": {}}, "levels: a list"),
        ({"levels": [3]}, r"levels\[0\]: keys and values"),
        ({"levels": [{"shrink": 1}]}, r"levels\[0\]: 'share' is missing"),
        ({"levels": [{"shrink": 0, "share": 1, "block": 8, "momentum": 0}]}, r"levels\[0\].shrink: from 1"),
        ({"levels": [{"shrink": 1, "share": 1, "block": 8, "momentum": 1}]}, r"levels\[0\].momentum"),
        ({"levels": [{"shrink": 1, "share": 1, "block": 1, "momentum": 0}]}, r"levels\[0\].block: at least the stride"),
        ({"first_smoothness": 3}, "first_smoothness: keys and values"),
        ({"first_smoothness": {"sigma": 3}}, "first_smoothness: unknown key 'sigma'"),
        ({"last_smoothness": {"window": -1}}, "last_smoothness.window: from 0"),
    ],
)
def test_invalid_settings_are_refused_by_name(values, says):
    with pytest.raises(ValueError, match=says):
        VariationalSettings.from_dict(values)


def test_settings_need_no_torch():
    code = "import sys; import DivRegNetLib.registration.variational; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
