"""The verdict and the quality card as the panel shows them."""

import pytest

pytest.importorskip("slicer")

import DivRegNetModule
from DivRegNetModule import verdict

from DivRegNetLib.quality.verdict import judge, two_digits

QUALITY = {
    "nmi": {"before": 1.05, "aligned": 1.10, "after": 1.15},
    "similarity": {"before": 0.2, "aligned": 0.4, "after": 0.6},
    "folded_percent": 0.0,
    "log_jacobian_sd": 0.1,
    "largest_displacement_mm": 8.0,
    "mean_displacement_mm": 2.0,
    "inverse_consistency_mm": {"mean": 0.05, "largest": 1.0},
}


@pytest.mark.parametrize(("folded", "word"), [(0.0, "GREEN"), (0.5, "AMBER"), (3.0, "RED")])
def test_the_level_is_a_word_and_the_reasons_are_listed(folded, word):
    shown = verdict.as_html(judge(QUALITY | {"folded_percent": folded}))
    assert word in shown and "resemble each other more than before (NMI 1.050 to 1.150)" in shown


def test_the_expected_error_is_beside_the_level_whatever_the_reasons_say():
    numbers = {"motion 1": 0.2, "moved 1": 0.0, "voxel_mm": 2.0, "diagonal_mm": 250.0}
    judgment = judge(QUALITY | {"evidence": numbers, "folded_percent": 3.0})
    shown = verdict.as_html(judgment)
    head, reasons = shown.split("<ul")
    assert f"expected error {two_digits(judgment.expected_error_mm)} mm" in head and "RED" in head
    assert "nine times in ten from" in reasons
    assert "expected error" not in verdict.as_html(judge(QUALITY))


def test_the_librarys_sentences_are_translated_before_their_values_are_filled_in(monkeypatch):
    dictionary = {
        "The deformation tears or folds tissue in {percent:.2g} % of the voxels.": "{percent:.2g} % der Voxel sind gefaltet.",
        "Do not use the result as it is.": "So nicht verwenden {oops}.",
    }
    monkeypatch.setattr(DivRegNetModule, "translate", lambda context, text: dictionary.get(text, text))
    shown = verdict.as_html(judge(QUALITY | {"folded_percent": 3.0}))
    assert "3 % der Voxel sind gefaltet." in shown
    assert "Do not use the result as it is." in shown  # a translation that adds a value is not used


def test_the_table_shows_every_number_of_the_card_and_leaves_out_what_is_none():
    known = verdict.rows(QUALITY | {"dice": {"before": 0.7, "after": 0.9}}, 3.21, "cpu")
    assert len(known) == 9
    assert dict(known)["Dice"] == "0.700 → 0.900"
    assert not any(label == "Similarity S (nats)" for label, _ in verdict.rows(QUALITY | {"similarity": None}))
    assert "&lt;script&gt;" in verdict.table([("a", "<script>")])
