"""Identity 9: on an enumerable toy, the token-level gradient equals the sequence-level one at pi = mu, and errors grow
with the orders that the theory says."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import enumerable as e
from experiments import first_order as study

SETTING = e.Setting(vocab=3, length=3, width=4, seeds=2)
RESULTS = Path(__file__).parents[2] / "experiments/results/first_order"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def world_of(setting: e.Setting) -> e.Enumeration:
    tokens, mask = e.enumerate_sequences(setting.vocab, setting.length)
    return e.Enumeration(jnp.asarray(tokens), jnp.asarray(mask), setting.top_k)


def test_every_sequence_once_and_probabilities_add_up() -> None:
    tokens, _ = e.enumerate_sequences(3, 3)
    assert len(tokens) == 1 + 2 + 4 + 8  # stopped at 1, 2, 3, and not at all
    assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)
    world = world_of(SETTING)
    params, _, direction = e.problem(jax.random.key(1), SETTING, world)
    coarse = e.rounded(params, jnp.array(0.2))
    _, routes = world.log_probs(coarse)

    @jax.jit
    def totals(length):
        part = world.up_to(length)
        policies = [part.log_probs(params), part.log_probs(coarse), part.log_probs(params, routes)]
        policies.append(part.log_probs(params, selector=params["router"] + direction))
        return jnp.array([part.probability(log_p).sum() for log_p, _ in policies])

    for length in (1, 2, 3):
        np.testing.assert_allclose(totals(length), 1.0, rtol=1e-12)


def test_the_sequence_level_gradient_is_that_of_the_expected_reward() -> None:
    """Eq. 2 through the package's `sequence_is`, against finite differences of E_pi[R]."""
    world = world_of(SETTING)
    params, rewards, _ = e.problem(jax.random.key(2), SETTING, world)
    log_mu, _ = world.log_probs(e.rounded(params, jnp.array(0.3)))
    _, routes = world.log_probs(params)
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def value(flat):
        log_pi, _ = world.log_probs(unravel(flat), routes)
        return jnp.sum(world.probability(log_pi) * rewards)

    gradient = world.gradients(["sequence"], params, routes, log_mu, world.advantage(rewards, log_mu))["sequence"]
    for direction in np.random.default_rng(0).normal(size=(3, flat.size)):
        slope = (value(flat + 1e-5 * direction) - value(flat - 1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-6, atol=1e-9)


@jax.jit
def _one_gap(cases):
    return e.one_gap(SETTING, world_of(SETTING), jax.random.key(3), cases)


def one_gap(cases: list[list[float]]) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, _one_gap(jnp.asarray(cases, float)))


def test_gradients_are_equal_where_the_theory_says() -> None:
    """At pi = mu, with and without the weight; and with the weight for sequences of one token, whatever the gap."""
    none, short = ({name: v[i] for name, v in one_gap([[0, 0, 0, 3], [0.3, 0, 0, 1]]).items()} for i in (0, 1))
    assert none["gap"] < 1e-14
    assert none["value"] < 1e-14
    assert none["weight_error"] < 1e-12
    assert none["no_weight_error"] < 1e-12
    assert none["length_normalised_error"] > 0.1  # 1/|y| is another objective even here
    assert short["gap"] > 1e-3
    assert short["weight_error"] < 1e-12
    assert short["no_weight_error"] > 1e-3


def test_orders_of_the_errors() -> None:
    """Halving staleness halves the gradient's error and quarters the value's."""
    rows = one_gap([[0, 1e-3, 0, 3], [0, 5e-4, 0, 3]])
    scale = rows["gap"][0] / rows["gap"][1]
    np.testing.assert_allclose(rows["weight_error"][0] / rows["weight_error"][1], scale, rtol=0.01)
    np.testing.assert_allclose(rows["no_weight_error"][0] / rows["no_weight_error"][1], scale, rtol=0.01)
    np.testing.assert_allclose(rows["value"][0] / rows["value"][1], scale**2, rtol=0.02)


def test_replay_table_of_the_paper() -> None:
    """R2 alters nothing in the first mini-batch; total error <= bias + approximation; live routing has no bias."""
    cases = jnp.array([[0.3, 0.0], [0.3, 2.0]])
    setting = e.Setting(vocab=3, length=3, width=4, learning_rate=1.0)
    run = jax.jit(lambda key: e.replay(setting, world_of(setting), key, cases))
    rows = jax.tree.map(np.asarray, run(jax.random.key(4)))
    live, r2, r3 = range(3)
    np.testing.assert_array_equal(rows["bias"][:, live], 0.0)
    np.testing.assert_array_equal(rows["flipped"][0, [live, r2]], 0.0)
    np.testing.assert_allclose(rows["bias"][0, r2], 0.0, atol=1e-12)
    np.testing.assert_allclose(rows["total"][0, r2], rows["total"][0, live], rtol=1e-9)
    assert rows["bias"][0, r3] > 1e-3
    assert (rows["total"] <= rows["bias"] + rows["approximation"] + 1e-12).all()
    assert (rows["flipped"][1, [r2, r3]] > 0).all()


def test_committed_slopes_are_the_theory() -> None:
    with (RESULTS / "slopes.csv").open() as file:
        rows = {(row["gap"], row["quantity"]): row for row in csv.DictReader(file)}
    for gap in ("precision", "staleness"):
        for quantity, order in (("weight_error", 1), ("no_weight_error", 1), ("value", 2)):
            assert abs(float(rows[gap, f"slope of {quantity}"]["median"]) - order) < 0.05


def test_tables_and_picture(tmp_path: Path) -> None:
    """From numbers of the right shape, without the study itself."""
    setting = e.Setting(seeds=3)
    random = np.random.default_rng(0)
    names = ["gap", "value", *(f"{m}_{q}" for m in e.METHODS for q in ("error", "cosine"))]
    gaps = {name: random.uniform(0.01, 0.09, (3, len(study.gap_cases(setting)))) for name in names}
    parts = ("total", "bias", "approximation", "flipped", "gap", "chi_square")
    replayed = {name: random.uniform(size=(3, len(study.replay_cases()), 3)) for name in parts}
    fits = study.slopes(gaps)
    study.write(tmp_path / "slopes.csv", fits)
    study.draw(tmp_path / "picture.png", gaps, replayed, fits)
    assert len(study.replay_table(replayed)) == len(study.replay_cases()) * (3 * len(parts) + 3)
    assert len(study.gap_table(gaps, setting)) == len(study.gap_cases(setting)) * len(names)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
