"""The table of results of a cohort: one row per pair, from the report of its registration or from its error."""

import math

QUALITY = "quality.json"
"""The report of a registration, the last file that is written to its folder."""

TABLE = "results.csv"
TABLE_COLUMNS = (
    "name", "status", "verdict", "expected_error_mm", "dice_before", "dice_after", "tre_mm_before", "tre_mm_after",
    "nmi_before", "nmi_after", "folded_percent", "seconds", "message",
)  # fmt: skip


def row_of(name: str, report: dict) -> dict:
    """The row of a pair with these contents of ``quality.json``."""
    quality, verdict = report["quality"], report.get("verdict", {})
    labels, landmarks = quality.get("labels"), quality.get("landmarks_mm")
    return {
        "name": name,
        "status": "ok",
        "verdict": verdict.get("level", ""),
        "expected_error_mm": _number(verdict.get("expected_error_mm")),
        "dice_before": _number(labels and labels["before"]["mean"]["dice"]),
        "dice_after": _number(labels and labels["after"]["mean"]["dice"]),
        "tre_mm_before": _number(landmarks and landmarks["before"]["mean"]),
        "tre_mm_after": _number(landmarks and landmarks["after"]["mean"]),
        "nmi_before": _number(quality["nmi"]["before"]),
        "nmi_after": _number(quality["nmi"]["after"]),
        "folded_percent": _number(quality["folded_percent"]),
        "seconds": _number(sum(report["seconds"].values())),
        "message": " ".join(report["warnings"]),
    }


def failed_row(name: str, message: str) -> dict:
    """The row of a pair that failed."""
    return dict.fromkeys(TABLE_COLUMNS, "") | {"name": name, "status": "failed", "message": message}


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV with a header."""
    lines = [",".join(TABLE_COLUMNS)]
    for row in rows:
        cells = [str(row[c]).replace('"', '""').replace("\n", " ") for c in TABLE_COLUMNS]
        lines.append(",".join(f'"{c}"' if any(x in c for x in ',"') else c for c in cells))
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"
