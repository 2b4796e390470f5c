"""The table, the JSON and the picture of made-up results."""

from __future__ import annotations

import json

import pytest

from kvcore import InvalidArgument
from kvcore.evaluation import Case, plot, report

ROT4 = Case("rot4", "rot4", True, 4, 32)
ROWS = [(ROT4, 4.25, 0.0035, 0.3), (Case("int8", "int8"), 8.25, 0.0006, 0.02)]


def test_table_is_aligned_and_has_every_number(found):
    lines = report.table(found(*ROWS))
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:6] == ["K/V", "raw", "bits", "at 1k", "at 32k", "B/token"]
    assert [row[0] for row in cells[2:]] == ["fp32/fp32", "rot4+bias/rot4", "int8/int8"]
    assert cells[3] == [
        "rot4+bias/rot4", "4+32", "4.25", "5.75", "4.30", "6120", "200", "24.50",
        "-0.25 ± 0.12", "0.003500", "98.5", "+0.300 / 78%", "0.0200", "0.0300", "0.50", "47.0",
    ]  # fmt: skip
    assert cells[4][1] == "-"


def test_without_recall_there_is_no_such_column(found):
    evaluation = found((ROT4, 4.25, 0.0035, None))
    assert "recall" not in report.table(evaluation)[0]
    assert not [line for line in report.summary(evaluation) if "recall" in line]
    assert [line for line in report.summary(found(*ROWS)) if "recall" in line]


def test_json_has_it_all(found):
    data = json.loads(found(*ROWS).to_json())
    assert [result["case"]["name"] for result in data["results"]] == ["rot4+bias/rot4", "int8/int8"]
    first = data["results"][0]
    assert first["case"]["raw_last"] == 32 and first["kl"] == 0.0035
    assert first["sizes"]["bits_per_element"] == 4.25
    assert first["error_largest"] == [0.5, 0.25]
    assert first["texts"]["b"]["perplexity"] == 20.0
    assert data["reference"]["case"]["name"] == "fp32/fp32"


def test_pareto_front():
    points = [(8.0, 0.1), (4.0, 0.5), (5.0, 0.5), (4.0, 0.9), (3.0, 2.0), (9.0, 0.1), (6.0, 0.2)]
    assert plot.pareto_front(points) == [(3.0, 2.0), (4.0, 0.5), (6.0, 0.2), (8.0, 0.1)]


@pytest.mark.parametrize("extra", [0.3, None])
def test_picture(found, tmp_path, extra):
    path = tmp_path / "front.png"
    plot.draw(found((ROT4, 4.25, 0.0, extra), (Case("int8", "int8"), 8.25, 1e-4, extra)), str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidArgument, match="plot: expected a picture's file"):
        plot.draw(found(*ROWS), str(tmp_path / "front.nothing"))
