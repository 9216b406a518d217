"""From a quality card to a verdict: green, amber or red, with the reasons in words. Without torch, Qt and Slicer.

Sentences are made by :mod:`DivRegNetLib.words`, so that the Slicer module can translate them.
"""

import math
from dataclasses import dataclass

from DivRegNetLib.quality.expected_error import calibration, expected_error_mm
from DivRegNetLib.words import Text, marker

_ = marker("quality.verdict")

GREEN, AMBER, RED = "green", "amber", "red"
LEVELS = (GREEN, AMBER, RED)
"""From the best to the gravest."""

# Limits of the verdict. Folding as in the Learn2Reg challenges, where a few voxels in a thousand are tolerated.
FOLDED_RED_PERCENT, FOLDED_AMBER_PERCENT = 1.0, 0.1
LOG_JACOBIAN_SD_AMBER = 0.5  # volumes change by more than a factor of e^0.5 = 1.6, typically
INVERSE_AMBER_MM, INVERSE_RED_MM = 0.5, 3.0  # mean of |inverse(forward(x)) - x|
DISPLACEMENT_AMBER_MM = 40.0  # beyond the initial alignment
SIMILARITY_NOISE = 1e-3  # smaller differences of NMI mean nothing
SMALL_DISPLACEMENT_MM = 0.5
# Of the evidence, from which on it is mentioned.
MOVED = 0.3  # fraction of the cells
FEW_EDGES = 0.6  # mean squared cosine
PARTLY_COVERED, HARDLY_COVERED = 0.5, 0.15  # fraction of the fixed foreground


@dataclass(frozen=True)
class Verdict:
    """A judgment of a registration.

    level: ``green``, ``amber`` or ``red``.
    headline: what to do, a sentence.
    reasons: sentences, the gravest first.
    expected_error_mm: expected mean distance to the truth over the fixed foreground; None where there is no evidence.
    exceeded_mm: what that distance exceeds nine times in ten, where it is only known to be large and ``expected_error_mm`` is a
        guess; else None.
    """

    level: str
    headline: Text
    reasons: tuple[Text, ...]
    expected_error_mm: float | None = None
    exceeded_mm: float | None = None

    @property
    def error(self) -> str:
        """The expected error as far as it is known: ``1.3 mm``, ``more than 5.6 mm``, or nothing."""
        if self.expected_error_mm is None:
            return ""
        if self.exceeded_mm is None:
            return _("{mm} mm").format(mm=two_digits(self.expected_error_mm))
        return _("more than {mm} mm").format(mm=two_digits(self.exceeded_mm))

    def as_dict(self) -> dict:
        """Plain values, for JSON and tables."""
        return {
            "level": self.level,
            "expected_error_mm": self.expected_error_mm,
            "error": str(self.error),
            "headline": str(self.headline),
            "reasons": [str(r) for r in self.reasons],
        }


HEADLINES = {
    GREEN: _("Nothing suspicious was found. Look at the result before you use it."),
    AMBER: _("Look closely before you use the result."),
    RED: _("Do not use the result as it is."),
}
Reasons = list[tuple[str, Text]]
"""Pairs of a level and a sentence."""


def judge(quality: dict) -> Verdict:
    """What a quality card means.

    Args:
        quality: see :func:`DivRegNetLib.quality.metrics.quality`. ``evidence`` holds the numbers of an
            :class:`~DivRegNetLib.quality.evidence.Evidence`, None where there was nothing to compare; without it, the
            similarity decides. ``dice`` and ``landmark_error_mm``, each ``{"before",
            "after"}``, count where the card has them, as do ``labels`` and ``landmarks_mm`` of ``quality.json``. A
            number that is missing or None does not count.
    """
    quality = with_references(quality)
    expected, exceeded, reasons = _expected(quality)
    reasons += _deformation(quality)
    reasons += [*_similarity(quality), *_folding(quality), *_size(quality), *_inverse(quality), *_reference(quality)]
    level = max((level for level, sentence in reasons), key=LEVELS.index, default=AMBER)
    reasons.sort(key=lambda reason: -LEVELS.index(reason[0]))
    sentences = tuple(sentence for _level, sentence in reasons) or (_("The quality card is empty."),)
    return Verdict(level, HEADLINES[level], sentences, expected, exceeded)


def with_references(quality: dict) -> dict:
    """A quality card with ``dice`` and ``landmark_error_mm`` (means), also where it holds them as ``quality.json`` does."""
    summary = dict(quality)
    if "labels" in quality and "dice" not in quality:
        summary["dice"] = {stage: scores["mean"]["dice"] for stage, scores in quality["labels"].items()}
    if "landmarks_mm" in quality and "landmark_error_mm" not in quality:
        summary["landmark_error_mm"] = {stage: error["mean"] for stage, error in quality["landmarks_mm"].items()}
    return summary


def two_digits(value: float) -> str:
    """A number with two significant digits, without an exponent: 0.61, 2.5, 110."""
    return f"{float(f'{value:.2g}'):.12g}"


def _expected(quality: dict) -> tuple[float | None, float | None, Reasons]:
    """The expected error and what it exceeds (mm), as in :class:`Verdict`, and what the evidence says in words."""
    if "evidence" not in quality:
        return None, None, []
    numbers = quality["evidence"]
    if not numbers:
        text = _("The images have next to nothing in common where the fixed image shows something.")
        return None, None, [(RED, text)]
    # Rounded once, so that whoever states it with two digits says the same.
    known, error = calibration(), float(f"{expected_error_mm(numbers):.3g}")
    green, red = known.limits(numbers)
    level = GREEN if error <= green else RED if error >= red else AMBER
    low, high = known.range_mm(error, numbers)
    if math.isfinite(high):
        text = _("The expected error is {mm} mm on average (nine times in ten from {low} to {high} mm).")
    else:
        text = _("The expected error is more than {low} mm (nine times in ten); how much more is a guess ({mm} mm).")
    values = {"mm": error, "low": low, "high": high}
    reasons: Reasons = [(level, text.format(**{name: two_digits(mm) for name, mm in values.items()}))]
    moved, edges, covered = (numbers.get(name) for name in ("moved 1", "fixed edges 1", "covered"))
    if level != GREEN and moved is not None and moved > MOVED:
        text = _("At {percent:.0f} % of all places the images would fit better if one was shifted.")
        reasons.append((level, text.format(percent=100 * moved)))
    if level != GREEN and edges is not None and edges < FEW_EDGES:
        text = _("Edges hardly have the same directions (mean squared cosine {cosine:.2f}; 0.33 by chance, 1 at best).")
        reasons.append((level, text.format(cosine=edges)))
    if covered is not None and covered < PARTLY_COVERED:
        text = _(
            "Only {percent:.0f} % of what the fixed image shows lies in the moving image; the rest is extrapolated."
        )
        reasons.append((AMBER if covered < HARDLY_COVERED else GREEN, text.format(percent=100 * covered)))
    return error, None if math.isfinite(high) else low, reasons


def _deformation(quality: dict) -> Reasons:
    """That nothing was deformed, or how stiff the deformation is, where that was chosen for the pair."""
    chosen = quality.get("deformation") or {}
    if not chosen.get("scores"):
        return []
    factor = chosen.get("stiffness")
    if factor is None and chosen["chosen"] == "none":
        return [(GREEN, _("No deformation: by the evidence, the images agree best as they were aligned."))]
    if factor in (None, 1):  # the usual
        return []
    return [(GREEN, _("Stiffness chosen: {factor:g} times the model's.").format(factor=factor))]


def _similarity(quality: dict) -> Reasons:
    """What the similarity says, which the registration maximizes; where there is evidence, it does not decide."""
    nmi = quality.get("nmi") or {}
    before, aligned, after = (nmi.get(stage) for stage in ("before", "aligned", "after"))
    if before is None or after is None:
        return []
    aligned = before if aligned is None else aligned
    if quality.get("evidence") and after <= max(before, aligned) + SIMILARITY_NOISE:
        return []
    if after < before - SIMILARITY_NOISE:
        text = _("The images resemble each other less than before (NMI {before:.3f} to {after:.3f}).")
        return [(RED, text.format(before=before, after=after))]
    if after < aligned - SIMILARITY_NOISE:
        text = _("The deformation made the alignment worse (NMI {aligned:.3f} before it, {after:.3f} after).")
        return [(RED, text.format(aligned=aligned, after=after))]
    if after <= before + SIMILARITY_NOISE:
        if (quality.get("mean_displacement_mm") or 0) < SMALL_DISPLACEMENT_MM:
            text = _("The images were aligned already, and stayed so (NMI {after:.3f}).")
            return [(GREEN, text.format(after=after))]
        text = _("Much was moved, but the images resemble each other no more than before (NMI {after:.3f}).")
        return [(AMBER, text.format(after=after))]
    text = _("The images resemble each other more than before (NMI {before:.3f} to {after:.3f}).")
    return [(GREEN, text.format(before=before, after=after))]


def _folding(quality: dict) -> Reasons:
    reasons: Reasons = []
    folded, spread = quality.get("folded_percent"), quality.get("log_jacobian_sd")
    if folded is not None and not folded:
        reasons.append((GREEN, _("The deformation folds nowhere.")))
    elif folded is not None:
        level = RED if folded > FOLDED_RED_PERCENT else AMBER if folded > FOLDED_AMBER_PERCENT else GREEN
        text = _("The deformation tears or folds tissue in {percent:.2g} % of the voxels.")
        reasons.append((level, text.format(percent=folded)))
    if spread is not None and spread > LOG_JACOBIAN_SD_AMBER and not quality.get("evidence"):
        text = _("Volumes change strongly from place to place (SD of log Jacobian {spread:.2f}).")
        reasons.append((AMBER, text.format(spread=spread)))
    return reasons


def _size(quality: dict) -> Reasons:
    largest = quality.get("largest_displacement_mm")
    if largest is None or largest <= DISPLACEMENT_AMBER_MM:
        return []
    text = _("Some tissue is moved by {mm:.0f} mm beyond the initial alignment; is that plausible?")
    return [(AMBER, text.format(mm=largest))]


def _inverse(quality: dict) -> Reasons:
    mean = (quality.get("inverse_consistency_mm") or {}).get("mean")
    if mean is None or mean <= INVERSE_AMBER_MM:
        return []
    level = RED if mean > INVERSE_RED_MM else AMBER
    return [(level, _("Mean inverse-consistency error: {mm:.2f} mm.").format(mm=mean))]


def _reference(quality: dict) -> Reasons:
    """Segmentations and landmarks, where given: a person's word against the images'."""
    texts = {
        ("dice", True): _("The segmentations overlap more than before ({before:.2f} to {after:.2f})."),
        ("dice", False): _("The segmentations overlap less than before ({before:.2f} to {after:.2f})."),
        ("landmark_error_mm", True): _("The landmarks are closer than before ({before:.2f} mm to {after:.2f} mm)."),
        ("landmark_error_mm", False): _(
            "The landmarks are further apart than before ({before:.2f} mm to {after:.2f} mm)."
        ),
    }
    reasons: Reasons = []
    for key in ("dice", "landmark_error_mm"):
        pair = quality.get(key) or {}
        before, after = pair.get("before"), pair.get("after")
        if before is not None and after is not None:
            better = after >= before if key == "dice" else after <= before
            reasons.append((GREEN if better else RED, texts[key, better].format(before=before, after=after)))
    return reasons
