"""Gradients of token-level objectives against Eq. 2's: equal where theory says so, and a run measured end to end."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments import claims, drawing, gradients
from rlstab_jax.models import Precision
from rlstab_jax.training.run import train
from rlstab_jax.types import UserError
from tests.training import tiny_run

CONFIG = dataclasses.replace(
    tiny_run.config(),
    gradient_steps=2,
    minibatches=1,
    learner=dataclasses.replace(tiny_run.config().learner, replay="live"),
    rollout=dataclasses.replace(tiny_run.config().rollout, precision=Precision()),
    evaluation=dataclasses.replace(tiny_run.config().evaluation, every=0),
)
WANTED = {name: gradients.GRADIENTS[name] for name in ("sequence", "token", "permuted", "initial")}


def test_cosines_and_distances() -> None:
    """Of (3, 4), twice that, and (4, -3): parallel, at a distance of 1; and orthogonal, at sqrt 2."""
    vectors = np.array([[3.0, 4.0], [6.0, 8.0], [4.0, -3.0]])
    cosines, distances = gradients.compared(vectors @ vectors.T)
    np.testing.assert_allclose(cosines, [1, 1, 0], atol=1e-12)
    np.testing.assert_allclose(distances, [0, 1, 2**0.5], atol=1e-12)
    np.testing.assert_allclose(gradients.projected(vectors @ vectors.T), [1, 2, 0], atol=1e-12)
    lost = np.array([[1.0, 0.1], [0.1, -0.2]])
    noisy = gradients.compared(lost)
    assert np.isnan([noisy[0][1], noisy[1][1]]).all()  # a squared length below 0 says nothing
    np.testing.assert_allclose(gradients.projected(lost), [1, 0.1])


def test_a_run_is_measured_and_tabled(tmp_path: Path) -> None:
    """Equal engines: at theta_old every ratio is 1 and all gradients are Eq. 2's; after an update they are not. One
    with another token's routes is another policy's, at once."""
    with pytest.raises(UserError, match="holds no run"):
        gradients.measure(CONFIG, tmp_path / "run", wanted=WANTED)
    train(CONFIG, tmp_path / "run", say=lambda line: None)
    found = gradients.measure(CONFIG, tmp_path / "run", batches=2, wanted=WANTED, further=(0, 1))
    places = [(row["point"], row["updates"]) for row in found]
    assert places == [("begin", 0), ("begin", 1), ("end", 0), ("end", 1)]
    for fresh, stale in (found[:2], found[2:]):
        products = np.array(fresh["products"])
        assert not gradients.compared(products)[0][2] > 0.99
        # The routes that the cold start chooses are the live ones while nothing has been learnt.
        same = [0, 1, 3] if fresh is found[0] else [0, 1]
        np.testing.assert_allclose(products[np.ix_(same, same)], products[0, 0], rtol=1e-4)
        assert products[0, 0] != 0
        products = np.array(stale["products"])
        assert abs(products[0, 1] / products[0, 0] - 1) > 1e-3
    rows = gradients.table([{"pair": i, "cold_start": i, "measured": found} for i in range(2)])
    assert [(row["point"], row["updates"], row["gradient"]) for row in rows] == [
        (*place, name) for place in places for name in ("token", "permuted", "initial")
    ]
    assert {row["pairs"] for row in rows} == {2}
    drawing.write_csv(tmp_path / "gradients.csv", rows)
    with pytest.raises(UserError, match="not complete"):
        gradients.measure(dataclasses.replace(CONFIG, gradient_steps=8), tmp_path / "run", wanted=WANTED)


def test_verdict_on_correlation() -> None:
    def row(point: str, low: float, high: float, pairs: int = 10) -> dict[str, object]:
        return {
            "point": point,
            "updates": 0,
            "gradient": "no_is",
            "pairs": pairs,
            "cosine_low": low,
            "cosine_high": high,
        }

    sure, none, wide = row("begin", 0.9, 1.0), row("end", -0.1, 0.3), row("end", 0.4, 0.8)
    assert gradients.correlated([sure, row("end", 0.6, 0.7)], "no_is") == claims.REFUTED
    assert gradients.correlated([none], "no_is") == claims.REPRODUCED
    assert gradients.correlated([sure, none], "no_is") == gradients.correlated([wide], "no_is") == claims.UNDECIDED
    assert gradients.correlated([row("end", 0.9, 1.0, pairs=9)], "no_is") == claims.NOT_YET
    assert gradients.correlated([sure], "length_norm") == claims.NOT_YET
