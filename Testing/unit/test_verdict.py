"""From quality cards to verdicts, and their sentences."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest

import DivRegNetLib
from DivRegNetLib.quality.verdict import judge

GOOD = {
    "nmi": {"before": 1.05, "aligned": 1.10, "after": 1.15},
    "similarity": {"before": 0.2, "aligned": 0.4, "after": 0.6},
    "folded_percent": 0.0,
    "log_jacobian_sd": 0.1,
    "largest_displacement_mm": 8.0,
    "mean_displacement_mm": 2.0,
    "inverse_consistency_mm": {"mean": 0.05, "largest": 1.0},
}


@pytest.mark.parametrize(
    ("changes", "level", "word"),
    [
        ({}, "green", "more than before"),
        ({"nmi": {"before": 1.10, "aligned": 1.08, "after": 1.05}}, "red", "less than before"),
        ({"nmi": {"before": 1.05, "aligned": 1.15, "after": 1.10}}, "red", "worse"),
        ({"nmi": {"before": 1.1, "aligned": 1.1, "after": 1.1}}, "amber", "no more than before"),
        (
            {"nmi": {"before": 1.1, "aligned": 1.1, "after": 1.1}, "mean_displacement_mm": 0.1},
            "green",
            "aligned already",
        ),
        ({"folded_percent": 0.5}, "amber", "0.5 %"),
        ({"folded_percent": 3.0}, "red", "3 %"),
        ({"log_jacobian_sd": 0.9}, "amber", "0.90"),
        ({"largest_displacement_mm": 60.0}, "amber", "60 mm"),
        ({"inverse_consistency_mm": {"mean": 0.9}}, "amber", "0.90 mm"),
        ({"inverse_consistency_mm": {"mean": 9.0}}, "red", "9.00 mm"),
        ({"dice": {"before": 0.8, "after": 0.6}}, "red", "overlap less"),
        ({"dice": {"before": 0.6, "after": 0.8}}, "green", "overlap more"),
        ({"landmark_error_mm": {"before": 3.0, "after": 5.0}}, "red", "further apart"),
        ({"landmark_error_mm": {"before": 5.0, "after": 3.0}}, "green", "closer"),
    ],
)
def test_the_verdict_has_the_gravest_level_and_gives_the_reasons(changes, level, word):
    verdict = judge(GOOD | changes)
    assert verdict.level == level
    assert word in " ".join(verdict.reasons)
    assert level == "green" or word in verdict.reasons[0]
    assert json.loads(json.dumps(verdict.as_dict())) == verdict.as_dict()


def test_an_empty_quality_card_is_no_green():
    assert judge({}).level == "amber"
    assert judge(dict.fromkeys(GOOD)).level == "amber"


def test_a_sentence_remembers_its_template_and_values_also_when_pickled_or_copied():
    (reason, *_) = judge(GOOD | {"folded_percent": 3.0}).reasons
    for same in (reason, pickle.loads(pickle.dumps(reason)), copy.deepcopy(reason)):
        assert same == "The deformation tears or folds tissue in 3 % of the voxels."
        assert same.template == "The deformation tears or folds tissue in {percent:.2g} % of the voxels."
        assert same.values == {"percent": 3.0}


def test_the_context_of_a_sentence_is_that_of_slicers_translation_tools():
    """Slicer names a context after the folder and the file (Base/Python/slicer/i18n.py, getContext)."""
    root = Path(DivRegNetLib.__file__).parent
    marked = {p: re.search(r"""= marker\("([^"]+)"\)""", p.read_text(encoding="utf-8")) for p in root.rglob("*.py")}
    contexts = {p: m.group(1) for p, m in marked.items() if m and p.name != "words.py"}
    assert contexts == {p: f"{p.parent.name}.{p.stem}" for p in contexts} and len(contexts) > 1
