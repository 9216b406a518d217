"""A registration on one page: verdict, numbers, settings and pictures, as a single HTML file that needs nothing else.

Pictures are encoded here (PNG, zlib): matplotlib is not part of 3D Slicer.
"""

import base64
import html
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib import __version__
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.io import atomic
from DivRegNetLib.quality.preview import COLUMNS, GRID_MM, Plane, cut_planes
from DivRegNetLib.quality.verdict import AMBER, GREEN, RED, judge, with_references

LINE = np.array([255, 192, 77], np.uint8)
FINER = 2  # pixels of the picture of the deformation to one of the others, so that its lines are thin
BACKGROUND = {GREEN: "#2e7d32", AMBER: "#b35900", RED: "#c62828"}
STYLE = """
body { font-family: system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 1.6em; }
.verdict { border-left: 0.6em solid; padding: 0.3em 1em; }
.level { color: white; padding: 0.1em 0.5em; font-weight: bold; }
table { border-collapse: collapse; } td, th { padding: 0.15em 1.2em 0.15em 0; text-align: left; vertical-align: top; }
.pictures { background: black; color: white; display: grid; gap: 4px; padding: 6px; }
.pictures img { width: 100%; image-rendering: pixelated; align-self: center; } .pictures div { font-size: 0.8em; }
@media print { body { margin: 0; } .pictures, .level { print-color-adjust: exact; } }
"""


@dataclass(frozen=True)
class Registration:
    """What a report is made of.

    fixed, moving, warped: images, LPS.
    displacement, initial: as of :func:`DivRegNetLib.quality.preview.cut_planes`.
    quality: the quality card.
    settings, seconds: as in ``quality.json``.
    warnings: sentences.
    names: of the fixed and the moving image.
    landmarks: (label, mm before, mm after) of each pair.
    """

    fixed: sitk.Image
    moving: sitk.Image
    warped: sitk.Image
    displacement: Callable[[Grid], np.ndarray]
    initial: np.ndarray
    quality: dict
    settings: dict
    seconds: dict
    warnings: tuple[str, ...] = ()
    names: tuple[str, str] = ("fixed", "moving")
    landmarks: list[tuple[str, float, float]] = field(default_factory=list)


def write_report(registration: Registration, path: Path) -> None:
    """Writes the page, all at once or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    atomic.write_text(as_html(registration), path)


def as_html(registration: Registration) -> str:
    """The page as text."""
    r = registration
    verdict = judge(r.quality)
    color = BACKGROUND[verdict.level]
    error = f"expected error {verdict.error}" if verdict.error else ""
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)
    planes, spacing = cut_planes(r.fixed, r.moving, r.warped, r.displacement, r.initial)
    warnings = "".join(f"<li>{html.escape(warning)}</li>" for warning in r.warnings)
    landmarks = [(label, f"{before:.2f}", f"{after:.2f}") for label, before, after in r.landmarks]
    segments = _segments(r.quality)
    parts = [
        f"<h1>Registration of {html.escape(r.names[1])} to {html.escape(r.names[0])}</h1>",
        f"<div class='verdict' style='border-color: {color}'><p><span class='level' style='background: {color}'>"
        f"{verdict.level.upper()}</span> {error}<br><b>{html.escape(verdict.headline)}</b></p><ul>{reasons}</ul></div>",
        f"<h2>Warnings</h2><ul>{warnings}</ul>" if warnings else "",
        "<h2>Pictures</h2>",
        _pictures(planes, max(round(GRID_MM / spacing), 2)),
        f"<p>Slices through the middle of the fixed image. The grid lines are {GRID_MM:g} mm apart.</p>",
        "<h2>Quality</h2>",
        _table([("", "before", "aligned", "after"), *_stages(r.quality)]),
        _table(_numbers(r.quality)),
        f"<h2>Segments (Dice)</h2>{_table([('', 'before', 'after'), *segments])}" if segments else "",
        f"<h2>Landmarks (error in mm)</h2>{_table([('', 'before', 'after'), *landmarks])}" if landmarks else "",
        "<h2>Settings</h2>",
        _table([(name, _shown(value)) for name, value in r.settings.items()]),
        f"<h2>Time</h2>{_table([(stage, f'{s:.2f} s') for stage, s in r.seconds.items()])}" if r.seconds else "",
        f"<p>DivRegNet {__version__}, {time.strftime('%Y-%m-%d %H:%M')}. A research tool, not a medical device.</p>",
    ]
    title = html.escape(f"{r.names[1]} to {r.names[0]}")
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style></head>\n"
        "<body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def _stages(quality: dict) -> list[tuple[str, ...]]:
    """The rows of what was measured before, after the initial alignment, and after all."""
    quality, rows = with_references(quality), []
    labels = (("dice", "Dice"), ("landmark_error_mm", "Landmark error, mm"), ("nmi", "NMI"), ("similarity", "S, nats"))
    for key, label in labels:
        values = quality.get(key) or {}
        if values.get("before") is not None:
            numbers = (values.get(stage) for stage in ("before", "aligned", "after"))
            rows.append((label, *("" if n is None else f"{n:.3f}" for n in numbers)))
    return rows


def _segments(quality: dict) -> list[tuple[str, str, str]]:
    """(name, Dice before, Dice after) of each segment or label, the worst first."""
    each = {name: (dice["before"], dice["after"]) for name, dice in quality.get("segments", {}).items()}
    if "labels" in quality:
        stages = [quality["labels"][stage]["labels"] for stage in ("before", "after")]
        each |= {f"label {name}": tuple(s[name]["dice"] for s in stages) for name in stages[1] if name in stages[0]}
    known = [(name, *dice) for name, dice in each.items() if None not in dice]
    return [(name, f"{a:.3f}", f"{b:.3f}") for name, a, b in sorted(known, key=lambda row: row[2])]


def _numbers(quality: dict) -> list[tuple[str, str]]:
    rows = [
        ("Folded voxels", quality.get("folded_percent"), "{:.3g} %"),
        ("SD of log Jacobian", quality.get("log_jacobian_sd"), "{:.3f}"),
        ("Largest displacement", quality.get("largest_displacement_mm"), "{:.1f} mm"),
        ("Mean displacement", quality.get("mean_displacement_mm"), "{:.2f} mm"),
        ("Mean inverse-consistency error", (quality.get("inverse_consistency_mm") or {}).get("mean"), "{:.3f} mm"),
    ]
    return [(label, form.format(value)) for label, value, form in rows if value is not None]


def _shown(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "transform"
    return (
        "x".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _pictures(planes: list[Plane], every: int) -> str:
    cells = [f"<div>{html.escape(title)}</div>" for title in COLUMNS]
    for plane in planes:
        images = [np.repeat((255 * image).astype(np.uint8)[..., None], 3, -1) for image in plane.images]
        images[-1] = images[-1].repeat(FINER, 0).repeat(FINER, 1)
        _draw_grid(images[-1], (plane.positions + 0.5) * FINER - 0.5, every)
        for title, image in zip(COLUMNS, images, strict=True):
            data = base64.b64encode(encode_png(image)).decode()
            cells.append(f"<img alt='{plane.name}, {html.escape(title)}' src='data:image/png;base64,{data}'>")
    columns = f"grid-template-columns: repeat({len(COLUMNS)}, 1fr)"
    return f"<div class='pictures' style='{columns}'>{''.join(cells)}</div>"


def _draw_grid(picture: np.ndarray, positions: np.ndarray, every: int) -> None:
    """Draws the deformed grid into an RGB picture: lines join the positions of every n-th row and column."""
    rows, columns = picture.shape[:2]
    for line in (*positions[:, ::every].swapaxes(0, 1), *positions[::every]):
        steps = np.nanmax(np.abs(np.diff(line, axis=0)), initial=1.0)
        count = int(np.ceil(steps)) + 1
        fractions = np.linspace(0, 1, count)[:, None, None]
        points = (line[:-1] + fractions * np.diff(line, axis=0)).reshape(-1, 2)
        points = np.rint(points[np.isfinite(points).all(1)]).astype(int)
        x, y = points[(points >= 0).all(1) & (points < (columns, rows)).all(1)].T
        picture[y, x] = LINE


def encode_png(picture: np.ndarray) -> bytes:
    """An RGB picture, (rows, columns, 3) uint8, as PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = picture.shape[:2]
    lines = np.concatenate((np.zeros((rows, 1), np.uint8), picture.reshape(rows, -1)), 1)  # 0: no filter
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes()))
        + chunk(b"IEND", b"")
    )
