"""The one table of options: what it holds, what it refuses, and that the command line and the defaults follow it."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.errors import InputError
from DivRegNetLib.options import Option, Options, table
from DivRegNetLib.run.cli import _parser


def test_every_option_is_described_by_a_sentence():
    assert list(table()) == [f.name for f in dataclasses.fields(Options)]
    for option in table().values():
        assert option.help[0].isupper() and option.help.endswith("."), option.name
        assert option.default is not None or option.default_help, f"{option.name}: what does None stand for?"


def test_the_command_line_has_every_option():
    args = _parser().parse_args(["register", "fixed.nii", "moving.nii", "--output", "out"])
    assert all(getattr(args, name) is None for name in table()), "what is not given is left to the preset and the table"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"refine": -1}, "refine is a whole number of at least 0, got -1"),
        ({"refine": 1.5}, "refine is a whole number of at least 0, got 1.5"),
        ({"refine": True}, "refine is a whole number of at least 0, got True"),
        ({"spacing": 0.05}, "spacing is a number from 0.1 to 50 mm, got 0.05"),
        ({"spacing": float("nan")}, "spacing is a number from 0.1 to 50 mm, got nan"),
        ({"memory": 0}, "memory is a number of at least 0.001 GB, got 0"),
        ({"default_value": float("inf")}, "default_value is a number, got inf"),
        ({"interpolation": "cubic"}, "interpolation is one of linear, nearest, bspline, got 'cubic'"),
        ({"method": "newton"}, "method is one of auto, .*, got 'newton'"),
        ({"align": "centre"}, "align is one of none, center, rigid, affine or a transform, got 'centre'"),
        ({"align": 3}, "align is one of none, center, rigid, affine or a SimpleITK transform, got 3"),
        ({"align": sitk.Euler2DTransform()}, "linear and three-dimensional"),
        ({"align": sitk.AffineTransform((0.0,) * 9, (0.0,) * 3)}, "cannot be inverted"),
        ({"model": ""}, "model is the name of"),
        ({"device": None}, "device is"),
        ({"color": "red"}, "unknown option 'color'; options are model, method"),
    ],
)
def test_an_invalid_value_is_refused_with_what_is_valid(values, message):
    with pytest.raises(InputError, match=message):
        Options.of(**values)


def test_numbers_at_the_limits_are_taken():
    options = Options(spacing=0.1, memory=0.001, refine=0, default_value=-3)
    assert (options.spacing, options.memory) == (0.1, 0.001)
    assert Option("x", float, None, "X.", low=1, high=2).check(2) is None


def test_records_hold_plain_values_and_the_matrix_of_a_transform():
    shift = sitk.TranslationTransform(3, (1.0, 2.0, 3.0))
    record = Options(align=shift).as_dict()
    np.testing.assert_array_equal(np.array(record["align"])[:3, 3], (1, 2, 3))
    assert Options().as_dict()["align"] == "affine"


def test_options_and_result_are_there_without_torch():
    code = "import sys; from DivRegNetLib import Options, Result; Options(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
