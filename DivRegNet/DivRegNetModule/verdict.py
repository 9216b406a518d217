"""From a quality card to green, amber or red, with the reason in words, and the card as a table."""

import html
from dataclasses import dataclass

from DivRegNetModule import _

GREEN, AMBER, RED = "green", "amber", "red"
ORDER = (GREEN, AMBER, RED)

BACKGROUND = {GREEN: "#2e7d32", AMBER: "#b35900", RED: "#c62828"}

# Limits of the verdict. Folding as in the Learn2Reg challenges, where a few voxels in a thousand are tolerated.
FOLDED_RED_PERCENT, FOLDED_AMBER_PERCENT = 1.0, 0.1
LOG_JACOBIAN_SD_AMBER = 0.5  # volumes change by more than a factor of e^0.5 = 1.6, typically
INVERSE_AMBER_MM, INVERSE_RED_MM = 0.5, 3.0  # mean of |inverse(forward(x)) - x|
DISPLACEMENT_AMBER_MM = 40.0  # beyond the initial alignment
SIMILARITY_NOISE = 1e-3  # NMI changes less than this for no reason
LITTLE_MM = 0.5


@dataclass(frozen=True)
class Verdict:
    """color: ``green``, ``amber`` or ``red``; headline and reasons: sentences, the gravest first."""

    color: str
    headline: str
    reasons: tuple[str, ...]


def judge(quality: dict) -> Verdict:
    """What a quality card (see :func:`DivRegNetLib.quality.metrics.quality`) means.

    ``dice`` and ``landmark_error_mm``, each ``{"before", "after"}``, count where the card has them. A missing number or
    None does not count.
    """
    found = [
        *_similarity(quality),
        *_folding(quality),
        *_size(quality),
        *_inverse(quality),
        *_reference(quality),
    ]
    color = max((c for c, _reason in found), key=ORDER.index, default=AMBER)
    headline = {
        GREEN: _("Nothing suspicious was found. Look at the result before you use it."),
        AMBER: _("Look closely before you use the result."),
        RED: _("Do not use the result as it is."),
    }[color]
    found.sort(key=lambda item: -ORDER.index(item[0]))
    reasons = tuple(reason for _color, reason in found) or (_("The quality card is empty."),)
    return Verdict(color, headline, reasons)


def _similarity(quality: dict) -> list[tuple[str, str]]:
    nmi = quality.get("nmi") or {}
    before, aligned, after = (nmi.get(k) for k in ("before", "aligned", "after"))
    if before is None or after is None:
        return []
    values = {"before": before, "aligned": aligned if aligned is not None else before, "after": after}
    if after < before - SIMILARITY_NOISE:
        text = _("The images resemble each other less than before (NMI {before:.3f} to {after:.3f}).")
        return [(RED, text.format(**values))]
    if after < values["aligned"] - SIMILARITY_NOISE:
        text = _("The deformation made the alignment worse (NMI {aligned:.3f} before it, {after:.3f} after).")
        return [(RED, text.format(**values))]
    if after <= before + SIMILARITY_NOISE:
        if (quality.get("mean_displacement_mm") or 0) < LITTLE_MM:
            return [(GREEN, _("The images were aligned already, and stayed so (NMI {after:.3f}).").format(**values))]
        text = _("Much was moved, but the images resemble each other no more than before (NMI {after:.3f}).")
        return [(AMBER, text.format(**values))]
    text = _("The images resemble each other more than before (NMI {before:.3f} to {after:.3f}).")
    return [(GREEN, text.format(**values))]


def _folding(quality: dict) -> list[tuple[str, str]]:
    folded, found = quality.get("folded_percent"), []
    if folded is not None:
        color = RED if folded > FOLDED_RED_PERCENT else AMBER if folded > FOLDED_AMBER_PERCENT else GREEN
        text = _("The deformation tears or folds tissue in {percent:.2g} % of the voxels.")
        found.append((color, text.format(percent=folded) if folded else _("The deformation folds nowhere.")))
    spread = quality.get("log_jacobian_sd")
    if spread is not None and spread > LOG_JACOBIAN_SD_AMBER:
        text = _("Volumes change strongly from place to place (SD of log Jacobian {spread:.2f}).")
        found.append((AMBER, text.format(spread=spread)))
    return found


def _size(quality: dict) -> list[tuple[str, str]]:
    largest = quality.get("largest_displacement_mm")
    if largest is None or largest <= DISPLACEMENT_AMBER_MM:
        return []
    text = _("Some tissue is moved by {mm:.0f} mm beyond the initial alignment; is that plausible?")
    return [(AMBER, text.format(mm=largest))]


def _inverse(quality: dict) -> list[tuple[str, str]]:
    mean = (quality.get("inverse_consistency_mm") or {}).get("mean")
    if mean is None or mean <= INVERSE_AMBER_MM:
        return []
    color = RED if mean > INVERSE_RED_MM else AMBER
    return [(color, _("There and back again misses the start by {mm:.2f} mm on average.").format(mm=mean))]


def _reference(quality: dict) -> list[tuple[str, str]]:
    """Segmentations and landmarks, where given: a person's word against the images'."""
    found = []
    for key, sign, better, worse in (
        ("dice", 1, _("The segmentations overlap more"), _("The segmentations overlap less")),
        ("landmark_error_mm", -1, _("The landmarks are closer"), _("The landmarks are further apart")),
    ):
        pair = quality.get(key) or {}
        before, after = pair.get("before"), pair.get("after")
        if before is None or after is None:
            continue
        good = sign * (after - before) >= 0
        unit = " mm" if key.endswith("_mm") else ""
        text = _("{what} than before ({before:.2f}{unit} to {after:.2f}{unit}).")
        values = {"what": better if good else worse, "before": before, "after": after, "unit": unit}
        found.append((GREEN if good else RED, text.format(**values)))
    return found


def as_html(verdict: Verdict) -> str:
    """The verdict for a label: the color as a word on that color, the headline, and the reasons as a list."""
    word = {GREEN: _("GREEN"), AMBER: _("AMBER"), RED: _("RED")}[verdict.color]
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)
    return (
        f"<p><span style='background-color:{BACKGROUND[verdict.color]}; color:white'><b>&nbsp;{word}&nbsp;</b></span> "
        f"<b>{html.escape(verdict.headline)}</b></p><ul style='-qt-list-indent: 0; margin-left: 14px'>{reasons}</ul>"
    )


def rows(quality: dict, seconds: float | None = None, device: str = "") -> list[tuple[str, str]]:
    """The quality card as (what, value) texts, in the order in which they are shown; what is not known is left out."""
    found = []

    def change(label: str, values: dict | None, form: str) -> None:
        if values and values.get("before") is not None and values.get("after") is not None:
            found.append((label, f"{values['before']:{form}} → {values['after']:{form}}"))

    def number(label: str, value: float | None, form: str, unit: str) -> None:
        if value is not None:
            found.append((label, f"{value:{form}}{unit}"))

    change(_("Similarity S (nats)"), quality.get("similarity"), ".3f")
    change(_("NMI"), quality.get("nmi"), ".3f")
    change(_("Dice"), quality.get("dice"), ".3f")
    change(_("Landmark error (mm)"), quality.get("landmark_error_mm"), ".2f")
    number(_("Folded voxels"), quality.get("folded_percent"), ".3g", " %")
    number(_("SD of log Jacobian"), quality.get("log_jacobian_sd"), ".3f", "")
    number(_("Largest displacement"), quality.get("largest_displacement_mm"), ".1f", " mm")
    number(_("Inverse consistency, mean"), (quality.get("inverse_consistency_mm") or {}).get("mean"), ".3f", " mm")
    number(_("Time"), seconds, ".1f", " s")
    if device:
        found.append((_("Device"), device))
    return found


def table(items: list[tuple[str, str]]) -> str:
    """The rows as HTML for a label."""
    cells = "".join(
        f"<tr><td>{html.escape(what)}</td><td style='padding-left:12px'><b>{html.escape(value)}</b></td></tr>"
        for what, value in items
    )
    return f"<table>{cells}</table>"
