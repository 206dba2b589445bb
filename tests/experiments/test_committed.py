"""All that is committed of the studies is what their committed metrics draw."""

import functools
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from experiments import drawing, engine_gaps, gradients, persistence, rates, study, verdicts
from experiments.study import RESULTS, Study

records = functools.cache(lambda: study.read_records(RESULTS))


def drawing_of(given: Study) -> Callable[[Path], None]:
    return lambda out: drawing.draw(given, study.runs_of(given, records()), out)


DRAWN: dict[str, Callable[[Path], None]] = {
    **{given.name: drawing_of(given) for given in verdicts.STUDIES},
    "rates": lambda out: rates.draw(records(), out),
    **{module.FOLDER.name: module.draw for module in (engine_gaps, gradients, persistence)},
}


@pytest.mark.parametrize("name", DRAWN)
def test_tables_and_pictures_are_drawn_from_the_metrics(name: str, tmp_path: Path) -> None:
    DRAWN[name](tmp_path)
    committed = [path for path in sorted((RESULTS / name).iterdir()) if path.suffix != ".jsonl"]
    assert [path.name for path in committed] == sorted(path.name for path in tmp_path.iterdir())
    for path in committed:
        if path.suffix == ".png":
            assert_alike(path, tmp_path / path.name)
        else:
            assert path.read_text() == (tmp_path / path.name).read_text()


def assert_alike(committed: Path, drawn: Path) -> None:
    """Pictures of equal size, and equal but for rounding where one version of matplotlib drew both."""
    before, now = plt.imread(committed), plt.imread(drawn)
    assert before.shape == now.shape, committed
    if Image.open(committed).info["Software"] == Image.open(drawn).info["Software"]:
        assert (np.abs(before - now) > 0.1).any(-1).mean() < 1e-4, f"{committed} is not what the metrics draw"


def test_verdicts_follow_from_the_metrics() -> None:
    assert verdicts.README.read_text() == verdicts.page(RESULTS)


def test_the_protocol_holds_every_contrast_and_cell() -> None:
    assert verdicts.protocol() in (Path(study.__file__).parent / "PROTOCOL.md").read_text()
