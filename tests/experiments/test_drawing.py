"""What is drawn of runs, and what is left out."""

import dataclasses
import math
from pathlib import Path

import pytest

from experiments import drawing
from experiments.study import Cell, Panel, Study
from tests.experiments.test_studies import SMALL, cell_of


def study_of(*panels: Panel) -> Study:
    return dataclasses.replace(SMALL, cells=tuple(map(Cell, "abc")), panels=panels, picture=None)


def test_a_mean_of_few_cold_starts_has_no_interval() -> None:
    """Five pairs of four cold starts are few; of five the interval stays between 0 and 1."""
    finals = [0.3, 0.9, 0.3, 0.9, 0.3]
    few = [dataclasses.replace(run, cold_start=run.pair % 4) for run in cell_of(finals)]
    assert math.isnan(drawing.mean_of(few, "final").low)
    assert math.isnan(drawing.interval(few, "final")["final_high"])
    found = drawing.mean_of(cell_of(finals), "final")
    assert 0 <= found.low < found.mean < found.high <= 1
    page = drawing.page(study_of(), {"a": few, "b": cell_of(finals), "c": []}, [])
    assert "| a | 0.54 |  | 0 | 0 | 5 | 0–4 |" in page
    assert "| b | 0.54 | [" in page


def test_a_panel_without_a_cell_of_its_own_is_left_out() -> None:
    """In the second panel b stands for comparison with c, which has run the first ten pairs alone."""
    study = study_of(Panel("first", ("a", "b")), Panel("second", ("b", "c")))
    runs = {"a": cell_of([0.7] * 20), "b": cell_of([0.7] * 20), "c": cell_of([0.7] * 10)}
    found = [
        (panel.title, block.pairs, [*block.runs]) for panel, block in drawing.shown_panels(study, study.panels, runs)
    ]
    assert found == [("first", "0–19", ["a", "b"]), ("second", "0–9", ["b", "c"])]


def test_no_two_lines_look_alike() -> None:
    looks = [drawing.look(i) for i in range(2 * len(drawing.COLOURS))]
    assert len(set(map(str, looks))) == len(looks)
    first, again = looks[0], looks[len(drawing.COLOURS)]
    assert first["color"] == again["color"]
    assert "marker" in again.keys() - first.keys()


def test_runs_of_several_lines_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines begin in a; c has run nothing, so its line would be no more than that."""
    drawn = []
    monkeypatch.setattr(drawing, "_points", lambda _, points, marked, style: drawn.append((points, marked, style)))
    runs = {"a": cell_of([0.7] * 2), "b": cell_of([0.7] * 2), "c": []}
    lines = {"first": {1.0: "a", 2.0: "b"}, "second": {1.0: "a", 2.0: "c"}}
    drawing.by_level(lines, runs, "level", tmp_path / "a.png")
    assert [(marked, style.get("label")) for _, marked, style in drawn] == [([1], "first"), ([0], None)]
    assert [at for at, _ in drawn[0][0]] == [0, 0.955]
    assert [at for at, _ in drawn[1][0]] == [0]
    drawing.by_level(lines, runs, "level", tmp_path / "b.png", fewest=3)
    assert drawn[2:] == drawn[:2]  # no row has three pairs: all are there


def test_a_row_of_few_pairs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(drawing, "_points", lambda _, points, *more: drawn.append([len(done) for _, done in points]))
    later = [dataclasses.replace(run, pair=run.pair + 20) for run in cell_of([0.7] * 3)]
    runs = {"a": cell_of([0.7] * 2), "b": later}
    drawing.by_level({"line": {1.0: "a", 2.0: "b"}}, runs, "level", tmp_path / "a.png")
    assert drawn == [[2, 0], [0, 3]]
    drawing.by_level({"line": {1.0: "a", 2.0: "b"}}, runs, "level", tmp_path / "a.png", fewest=3)
    assert drawn[2:] == [[0, 3]]
