"""From quality cards to verdicts, and their sentences."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
from evidence_numbers import RIGHT, WRONG

import DivRegNetLib
from DivRegNetLib.quality.verdict import judge, two_digits

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


def test_evidence_decides_whether_the_similarity_rose_or_not():
    fell = {"nmi": {"before": 1.10, "aligned": 1.20, "after": 1.05}}
    for nmi in ({}, fell):
        right, wrong = (judge(GOOD | nmi | {"evidence": numbers}) for numbers in (RIGHT, WRONG))
        assert (right.level, wrong.level) == ("green", "red")
        assert right.expected_error_mm < 2 < 10 < wrong.expected_error_mm
        assert "expected error" in wrong.reasons[0]
    assert "80 % of all places" in " ".join(wrong.reasons) and "cosine 0.50" in " ".join(wrong.reasons)
    assert wrong.as_dict()["expected_error_mm"] == pytest.approx(wrong.expected_error_mm, rel=0.01)
    assert judge(GOOD).expected_error_mm is None


def test_a_range_is_told_only_where_the_size_of_the_error_can_be():
    told, large = (judge(GOOD | {"evidence": numbers}) for numbers in (RIGHT, WRONG))
    assert "nine times in ten from" in told.reasons[0] and "guess" not in told.reasons[0]
    assert "is more than" in large.reasons[0] and "a guess" in large.reasons[0]
    assert told.error == f"{two_digits(told.expected_error_mm)} mm" and told.exceeded_mm is None
    assert (
        large.error == f"more than {two_digits(large.exceeded_mm)} mm" and large.exceeded_mm < large.expected_error_mm
    )
    assert judge(GOOD).error == "" and json.loads(json.dumps(large.as_dict()))["error"] == large.error


@pytest.mark.parametrize(("value", "text"), [(0.6066, "0.61"), (2.49, "2.5"), (107.9, "110"), (20.0, "20")])
def test_millimeters_have_two_digits_and_no_exponent(value, text):
    assert two_digits(value) == text


def test_images_without_anything_in_common_are_red():
    verdict = judge(GOOD | {"evidence": None})
    assert verdict.level == "red" and "next to nothing in common" in verdict.reasons[0]


@pytest.mark.parametrize(("covered", "level"), [(1.0, "green"), (0.3, "green"), (0.1, "amber")])
def test_what_is_extrapolated_is_told(covered, level):
    verdict = judge(GOOD | {"evidence": RIGHT | {"covered": covered}})
    assert verdict.level == level
    assert any("extrapolated" in reason for reason in verdict.reasons) == (covered < 0.5)


def test_what_a_person_has_drawn_comes_before_the_evidence():
    verdict = judge(GOOD | {"evidence": RIGHT, "dice": {"before": 0.8, "after": 0.6}})
    assert verdict.level == "red" and "overlap less" in verdict.reasons[0]


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


@pytest.mark.parametrize(
    ("deformation", "words"),
    [
        ({"chosen": "none", "stiffness": None, "scores": {"none": {}}}, "No deformation"),
        ({"chosen": "stiffness 1", "stiffness": 1.0, "scores": {"none": {}}}, ""),
        ({"chosen": "stiffness 3", "stiffness": 3.0, "scores": {"none": {}}}, "Stiffness chosen: 3 times the model's."),
        ({"chosen": "stiffness 3", "stiffness": 3.0, "scores": {}}, ""),
    ],
)
def test_how_stiff_the_deformation_is_is_said_where_it_was_chosen(deformation, words):
    reasons = " ".join(map(str, judge({"folded_percent": 0.0, "deformation": deformation}).reasons))
    assert words in reasons and ("tiffness" in reasons or "No deformation" in reasons) == bool(words)


def test_whoever_states_the_expected_error_with_two_digits_says_the_same(monkeypatch):
    """0.4449 is 0.44, and 0.445, which the card holds, is 0.45."""
    monkeypatch.setattr("DivRegNetLib.quality.verdict.expected_error_mm", lambda numbers: 0.4449)
    verdict = judge(GOOD | {"evidence": {"diagonal_mm": 200.0, "voxel_mm": 2.0}})
    stated = two_digits(verdict.as_dict()["expected_error_mm"])
    assert f"The expected error is {stated} mm" in " ".join(map(str, verdict.reasons))
