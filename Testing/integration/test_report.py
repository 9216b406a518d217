"""``divregnet report``: one page that holds everything."""

import base64
import json
import re
import struct
import zlib

import numpy as np
import pytest

from DivRegNetLib.quality.report import _segments, encode_png
from DivRegNetLib.quality.verdict import two_digits
from DivRegNetLib.run.cli import main


def decode_png(data: bytes) -> np.ndarray:
    """An RGB picture without filters."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    columns, rows = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    lines = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + length]), np.uint8).reshape(rows, -1)
    return lines[:, 1:].reshape(rows, columns, 3)


def test_a_picture_is_encoded_as_png():
    picture = np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)
    assert np.array_equal(decode_png(encode_png(picture)), picture)


@pytest.fixture(scope="module")
def results(sample_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    pair = [str(sample_data / f"{name}.nii.gz") for name in ("fixed_T1", "moving_T2")]
    marks = [str(sample_data / f"{name}.mrk.json") for name in ("fixed_T1", "moving_T2")]
    landmarks = ["--fixed-landmarks", marks[0], "--moving-landmarks", marks[1]]
    quick = ["--device", "cpu", "--spacing", "5", "--output", str(folder)]
    assert main(["register", *pair, *landmarks, *quick, "--json"]) == 0
    return folder


def test_the_page_holds_verdict_numbers_settings_landmarks_and_pictures_and_needs_nothing_else(
    results, tmp_path, capsys
):
    assert main(["report", str(results), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    content = json.loads((results / "quality.json").read_text(encoding="utf-8"))
    quality, verdict = content["quality"], content["verdict"]
    assert f"{verdict['level'].upper()}</span> expected error {two_digits(verdict['expected_error_mm'])} mm" in page
    assert "nine times in ten from" in page
    assert re.search("GREEN|AMBER|RED", page) and "Registration of moving_T2.nii.gz to fixed_T1.nii.gz" in page
    assert f"{quality['nmi']['after']:.3f}" in page and "align" in page and "Hippocampus" in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)  # nothing is fetched
    pictures = [decode_png(base64.b64decode(data)) for data in re.findall(r"base64,([^']+)'", page)]
    assert len(pictures) == 18
    fixed, *_, deformation = pictures[:6]
    assert (np.ptp(fixed, axis=-1) == 0).all() and fixed.std() > 20
    assert (np.ptp(deformation.astype(int), axis=-1) > 100).mean() > 0.05  # the colored lines of the grid


def test_segments_and_labels_are_listed_the_worst_first():
    segments = {"liver": {"before": 0.5, "after": 0.9}, "spleen": {"before": 0.4, "after": 0.6}}
    assert _segments({"segments": segments}) == [("spleen", "0.400", "0.600"), ("liver", "0.500", "0.900")]
    labels = {s: {"labels": {"1": {"dice": d}, "2": {"dice": None}}} for s, d in (("before", 0.25), ("after", 0.75))}
    assert _segments({"labels": labels}) == [("label 1", "0.250", "0.750")] and _segments({}) == []


def test_without_results_the_report_says_so(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no results of divregnet register" in capsys.readouterr().err
