"""The monitor on made-up runs: silent while all is well, one remark for each thing that goes wrong, exactly resumed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rlstab_jax.metrics import describe
from rlstab_jax.stability.monitor import (
    BASELINE,
    CHECKS,
    Check,
    GapCheck,
    Monitor,
    MonitorConfig,
    review,
)
from rlstab_jax.types import UserError

STEPS, BREAKS = 40, 20
GAPS = ("held_out", "reward")
CONFIG = MonitorConfig(
    baseline_steps=64,
    spreads=2.0,
    patience=2,
    ratios=Check(3.0),
    largest_ratio=Check(10.0),
    routing=Check(2.0),
    gradient=Check(3.0),
    length=Check(1.5),
    entropy=Check(4.0),
    healthy_kl=Check(2.0),
    held_out=GapCheck(0.2),
    reward=GapCheck(math.inf),
)


def healthy(seed: int = 0) -> dict[str, np.ndarray]:
    """A run that learns: every quantity wavers by a tenth, reward and accuracy rise, entropy falls a little."""
    noise = np.random.default_rng(seed)
    run = {name: np.exp(0.1 * noise.standard_normal(STEPS)) for name in BASELINE}
    time = np.linspace(0, 1, STEPS)
    run["reward/mean"] = 0.3 + 0.4 * time
    run["eval/accuracy_training"] = np.where(np.arange(STEPS) % 2 == 1, 0.3 + 0.4 * time, math.nan)
    run["policy/entropy"] = 0.5 * (1 - 0.4 * time)
    run["weight/truncated"] = 0.001 * run["weight/truncated"]
    run["progress/gradient_steps"] = 8.0 * np.arange(1, STEPS + 1)
    return run


def with_fault(name: str, factor: float) -> dict[str, np.ndarray]:
    run = healthy()
    run[name][BREAKS:] *= factor
    return run


def said(run: dict[str, np.ndarray], config: MonitorConfig = CONFIG) -> list[tuple[str, int]]:
    return [(remark.check, remark.step) for remark in review(run, config)]


def test_every_metric_it_reads_is_defined():
    assert all(describe(name) for name in BASELINE)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_learns_is_left_in_peace(seed):
    assert said(healthy(seed)) == []
    assert said({"reward/mean": healthy()["reward/mean"], "progress/gradient_steps": np.arange(STEPS)}) == []


@pytest.mark.parametrize(
    ("check", "metric", "factor"),
    [
        ("ratios", "discrepancy/f2", 6.0),
        ("ratios", "weight/truncated", 50.0),
        ("largest_ratio", "staleness/max_ratio", 30.0),
        ("largest_ratio", "discrepancy/max_ratio", 30.0),
        ("routing", "routing/old_vs_target", 3.0),
        ("routing", "routing/rollout_vs_old", 3.0),
        ("gradient", "learner/grad_norm", 6.0),
        ("length", "response/length", 2.0),
        ("length", "response/truncated", 3.0),
        ("entropy", "policy/entropy", 0.1),
    ],
)
def test_each_fault_is_one_remark_once_it_has_lasted(check, metric, factor):
    (remark,) = review(with_fault(metric, factor), CONFIG)
    # Row BREAKS is gradient step 8 (BREAKS + 1), and the check waits for the second excess.
    assert (remark.check, remark.step, remark.action) == (check, 8 * (BREAKS + 2), "warn")
    assert remark.advice in remark.line()
    assert "\n" not in remark.line()


def test_the_message_gives_the_numbers():
    run = with_fault("learner/grad_norm", 1.0)
    run["learner/grad_norm"][:BREAKS], run["learner/grad_norm"][BREAKS:] = 2.0, 14.0
    (remark,) = review(run, CONFIG)
    assert remark.message == "the gradient norm before clipping is 14, 7 times the 2 of the first 8 global steps."


def test_one_excess_alone_is_noise_unless_patience_is_one():
    run = healthy()
    run["learner/grad_norm"][BREAKS] *= 100
    assert said(run) == []
    assert said(run, replace(CONFIG, patience=1)) == [("gradient", 8 * (BREAKS + 1))]


def test_a_check_speaks_again_only_when_the_quantity_has_come_back():
    run = healthy()
    for rows in (slice(12, 16), slice(17, 20), slice(26, 30)):  # the first pause of one row is too short to count
        run["learner/grad_norm"][rows] *= 20
    assert said(run) == [("gradient", 8 * 14), ("gradient", 8 * 28)]


def test_what_is_below_the_threshold_has_not_come_back_yet():
    """Twice as large is log 2 / log 3 = 0.63 of the way to the threshold: no excess, and no calm."""
    run = healthy()
    run["learner/grad_norm"][:] = 1.0
    for rows, size in ((slice(20, 22), 20), (slice(22, 26), 2), (slice(26, 30), 20)):
        run["learner/grad_norm"][rows] = size
    assert said(run) == [("gradient", 8 * 22)]


def test_an_early_spread_that_is_wide_raises_the_threshold():
    run = with_fault("learner/grad_norm", 6.0)
    run["learner/grad_norm"][:8] = [0.1, 1, 10, 0.1, 1, 10, 0.1, 10]
    assert said(run) == []
    assert said(run, replace(CONFIG, spreads=0.0)) == [("gradient", 8 * (BREAKS + 2))]


def test_a_gradient_that_is_not_finite_is_an_excess():
    run = healthy()
    run["learner/grad_norm"][BREAKS:] = math.nan
    (remark,) = review(run, CONFIG)
    assert remark.message == "the gradient norm before clipping is not finite."


def test_a_gradient_that_never_was_finite_is_an_excess_too():
    run = with_fault("learner/grad_norm", math.nan)
    run["learner/grad_norm"][:] = math.nan
    assert said(run) == [("gradient", 80)]


def test_a_best_reward_of_zero_is_remembered():
    monitor = Monitor(CONFIG)
    for step, reward in enumerate((-0.5, 0.0, -0.25)):
        monitor.observe({"reward/mean": reward, "progress/gradient_steps": 8.0 * step})
    assert monitor.state.best_reward == 0


def test_entropy_and_reward_fall_while_the_kl_looks_healthy():
    run = healthy()
    run["policy/entropy"][BREAKS:] *= 0.4
    assert said(run) == []  # the reward rises: the policy has learnt
    run["reward/mean"][BREAKS:] = 0.4
    assert said(run) == [("healthy_kl", 8 * (BREAKS + 2))]
    run["discrepancy/k3"][BREAKS:] *= 5
    assert said(run) == []  # now the KL is an alarm itself


def test_a_reward_that_falls():
    run = healthy()
    run["reward/mean"][BREAKS:] -= 0.3
    config = replace(CONFIG, reward=GapCheck(0.05), held_out=GapCheck(math.inf))
    (remark,) = review(run, config)
    assert (remark.check, remark.step) == ("reward", 8 * (BREAKS + 2))
    assert remark.message == "the reward is 0.215 after 0.495."


def test_reward_without_held_out_gain():
    run = healthy()
    run["eval/accuracy_training"][np.isfinite(run["eval/accuracy_training"])] = 0.3
    (remark,) = review(run, CONFIG)
    assert remark.check == "held_out"
    assert "held-out accuracy from 0.300 to 0.300" in remark.message


@pytest.mark.parametrize("cut", [1, 7, 8, BREAKS + 1, STEPS - 1])
def test_a_monitor_restored_from_json_goes_on_exactly(cut):
    config = replace(CONFIG, gradient=Check(3.0, "lower"), largest_ratio=Check(5.0, "skip"))
    run = with_fault("learner/grad_norm", 6.0)
    run["learner/grad_norm"][30:34] /= 6.0
    run["staleness/max_ratio"][BREAKS + 1] *= 50
    rows = [{name: float(column[i]) for name, column in run.items()} for i in range(STEPS)]
    whole = Monitor(config)
    expected = [(whole.discards(row), whole.observe(row)) for row in rows]
    first = Monitor(config)
    got = [(first.discards(row), first.observe(row)) for row in rows[:cut]]
    second = Monitor(config, json.loads(json.dumps(first.saved())))
    assert got + [(second.discards(row), second.observe(row)) for row in rows[cut:]] == expected
    assert second.saved() == whole.saved()
    assert whole.learning_rate_scale == 0.25  # it spoke twice
    assert [i for i, (discarded, _) in enumerate(expected) if discarded] == [BREAKS + 1]


@pytest.mark.parametrize(
    ("check", "metric", "discarded"),
    [
        ("gradient", "learner/grad_norm", [BREAKS, BREAKS + 1]),
        ("ratios", "weight/truncated", [BREAKS, BREAKS + 1]),
        # Before any update: the next step would have it again.
        ("ratios", "discrepancy/f2", []),
        ("largest_ratio", "discrepancy/max_ratio", []),
        ("routing", "routing/rollout_vs_old", []),
    ],
)
def test_no_run_is_discarded_for_ever(check, metric, discarded):
    """What lasts until the check speaks is not cured by discarding, and parameters that stand still would keep it."""
    config = replace(CONFIG, **{check: replace(getattr(CONFIG, check), policy="skip")})
    run, monitor, got, remarks = with_fault(metric, 100.0), Monitor(config), [], []
    for i in range(STEPS):
        row = {name: float(column[i]) for name, column in run.items()}
        got += [i] if monitor.discards(row) else []
        remarks += monitor.observe(row)
    assert got == discarded
    (remark,) = remarks
    assert (remark.check, remark.action) == (check, "skip")
    assert "updates are no longer discarded for it" in remark.message


@pytest.mark.parametrize("check", CHECKS)
def test_what_cannot_be_meant_is_refused(check):
    off = GapCheck(math.inf) if check in GAPS else Check(math.inf)
    Monitor(replace(CONFIG, **{check: off}))
    wrong = GapCheck(0.0) if check in GAPS else Check(1.0)
    with pytest.raises(UserError, match=f"monitor.{check}"):
        Monitor(replace(CONFIG, **{check: wrong}))


def test_a_skip_that_would_cure_nothing_is_refused():
    with pytest.raises(UserError, match="does not undo"):
        Monitor(replace(CONFIG, entropy=Check(4.0, "skip")))
    with pytest.raises(UserError, match="lower_by"):
        Monitor(replace(CONFIG, lower_by=1.0))
