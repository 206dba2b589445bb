"""The gaps and gradients of several engines at one run's weights: nothing at equal engines, something in fp8."""

from pathlib import Path

import numpy as np
import pytest

from experiments import engine_gaps
from experiments.engine_gaps import ENGINES, EQUAL, GRADIENTS, WEIGHTED
from rlstab_jax.training.run import train
from tests.experiments.test_study_gradients import CONFIG

CHOSEN = {name: ENGINES[name] for name in (EQUAL, "e4m3")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    run = tmp_path_factory.mktemp("engine_gaps") / "run"
    train(CONFIG, run, say=lambda line: None)
    return engine_gaps.measure(CONFIG, run, batches=2, engines=CHOSEN)


def test_equal_engines_have_the_exact_gradient_and_fp8_ones_have_not(measured: list[dict]) -> None:
    assert [(row["point"], row["engines"]) for row in measured] == [(p, e) for p in ("begin", "end") for e in CHOSEN]
    for row in measured:
        cosines, *_ = np.array(list(engine_gaps.distances(row).values())).T
        if row["engines"] == "e4m3":
            assert row["k3"] > 1e-6
            assert row["k3_replayed"] != row["k3"]
            assert row["disagreement"] > 0
            assert np.abs(np.array(list(row["products"].values())) / row["exact"] - 1).min() > 1e-4
        else:  # draws and routes are equal, whichever engine computed them, and so every weight is 1
            assert max(row["k3"], row["k3_replayed"], row["disagreement"]) < 1e-9
            assert row["max_ratio"] < 1 + 1e-4
            np.testing.assert_allclose(list(row["products"].values()), row["exact"], rtol=1e-3)
            np.testing.assert_allclose(cosines, 1, atol=1e-3)
    assert measured[0]["products"][WEIGHTED] == measured[0]["squares"][WEIGHTED] == measured[0]["exact"]


def test_table_and_picture(measured: list[dict], tmp_path: Path) -> None:
    rows = engine_gaps.table([{"pair": i, "cold_start": i, "measured": measured} for i in range(2)])
    assert [row["engines"] for row in rows] == 2 * list(CHOSEN)
    assert {row["pairs"] for row in rows} == {2}
    exact, fp8 = rows[:2]
    assert np.isnan(exact["routing_share"])  # of rounding there is no share
    assert fp8["routing_share"] == pytest.approx(1 - fp8["k3_replayed"] / fp8["k3"])
    assert exact[f"{WEIGHTED}: cosine"] == pytest.approx(1)
    assert all(f"{name}: distance high" in fp8 for name in GRADIENTS)
    engine_gaps.picture(rows, tmp_path / "engine_gaps.png")
    assert (tmp_path / "engine_gaps.png").stat().st_size > 20_000
