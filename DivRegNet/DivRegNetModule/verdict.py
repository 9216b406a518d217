"""Verdict and quality card as HTML for the panel; the judgment itself is :mod:`DivRegNetLib.quality.verdict`."""

import html

from DivRegNetLib.quality.verdict import AMBER, GREEN, RED, Verdict
from DivRegNetModule import _, translated

NAME = 22  # characters of a volume's name
BACKGROUND = {GREEN: "#2e7d32", AMBER: "#b35900", RED: "#c62828"}


def word(verdict: Verdict) -> str:
    """The level of a verdict."""
    return {GREEN: _("GREEN"), AMBER: _("AMBER"), RED: _("RED")}[verdict.level]


def as_html(verdict: Verdict) -> str:
    """The verdict for a label: the level as a word on its color, the expected error, the headline, and the reasons as a
    list."""
    reasons = "".join(f"<li>{html.escape(translated(reason))}</li>" for reason in verdict.reasons)
    color, level = BACKGROUND[verdict.level], word(verdict)
    error = _("expected error {mm}.").format(mm=translated(verdict.error)) if verdict.error else ""
    return (
        f"<p style='margin: 0'><span style='background-color:{color}; color:white'><b>&nbsp;{level}&nbsp;</b></span> "
        f"{html.escape(error)} "
        f"<b>{html.escape(translated(verdict.headline))}</b></p>"
        f"<ul style='-qt-list-indent: 0; margin: 2px 0 0 14px'>{reasons}</ul>"
    )


def pair(moving: str, fixed: str, *, shortened: bool = True) -> str:
    """Which volumes a result is of; long names are shortened in the middle, as what tells them apart is often at the end."""
    if shortened:
        moving, fixed = (n if len(n) <= NAME else f"{n[: NAME // 2]}…{n[-NAME // 2 :]}" for n in (moving, fixed))
    return _("{moving} to {fixed}").format(moving=moving, fixed=fixed)


def rows(quality: dict, seconds: float | None = None, device: str = "") -> list[tuple[str, str]]:
    """The quality card as (label, value) texts, in the order in which they are shown; unknown values are left out."""
    shown = []

    def change(label: str, values: dict | None, form: str) -> None:
        if values and values.get("before") is not None and values.get("after") is not None:
            shown.append((label, f"{values['before']:{form}} → {values['after']:{form}}"))

    def number(label: str, value: float | None, form: str, unit: str) -> None:
        if value is not None:
            shown.append((label, f"{value:{form}}{unit}"))

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
        shown.append((_("Device"), device))
    return shown


def table(items: list[tuple[str, str]]) -> str:
    """The rows as HTML for a label."""
    cells = "".join(
        f"<tr><td>{html.escape(label)}</td><td style='padding-left:12px'><b>{html.escape(value)}</b></td></tr>"
        for label, value in items
    )
    return f"<table>{cells}</table>"
