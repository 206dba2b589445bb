"""The global step: who is fed what, in which order, and what is measured."""

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlstab_jax.inference import prepare
from rlstab_jax.inference.sampler import sample_batch
from rlstab_jax.learner import init_state, score, update
from rlstab_jax.learner.loss_scale import BEGIN
from rlstab_jax.metrics import METRICS, OPTIONAL, describe
from rlstab_jax.models import Precision
from rlstab_jax.objectives.config import RecipeName
from rlstab_jax.rundir import read_metrics
from rlstab_jax.tasks import prompt_iterator
from rlstab_jax.training import loop, measure
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import Engines, build, initial_params
from rlstab_jax.training.run import Progress, train
from rlstab_jax.types import RoutingReplay
from tests.training import tiny_run

FLOAT32, HALF = Precision(), Precision(dtype="float16")


def configured(**changes: Any) -> RunConfig:
    """The tiny run with changes; those of a room as a dict. No remat: it compiles faster."""
    config = tiny_run.config()
    changes["learner"] = {"remat": "none", **changes.get("learner", {})}
    for name, change in changes.items():
        room = getattr(config, name)
        value = dataclasses.replace(room, **change) if isinstance(change, dict) else change
        config = dataclasses.replace(config, **{name: value})
    return config


def fresh_state(engines: Engines) -> loop.RunState:
    params = initial_params(engines.training, 0)
    # Larger than at initialisation, so that two engines of different precision choose different experts at times.
    scale = 1 if engines.inference.precision == engines.training.precision else 3
    params = jax.tree.map(lambda leaf: scale * leaf if leaf.ndim > 1 else leaf, params)
    reference = jax.tree.map(lambda leaf: leaf.copy(), params) if engines.config.needs_reference else None
    return engines.place(loop.RunState(init_state(params, engines.numbers), reference))


@cache
def two_steps(config: RunConfig) -> tuple[loop.RunState, tuple[loop.Metrics, ...]]:
    engines = build(config)
    state, metrics = fresh_state(engines), []
    data = prompt_iterator(engines.task.split("train"), config.prompts_per_step, seed=config.seed)
    for step in (1, 2):
        state, of_step, _ = loop.global_step(engines, state, data, step)
        metrics.append(of_step)
    return state, tuple(metrics)


def metrics_of(**changes: Any) -> loop.Metrics:
    """Metrics of the second step, whose parameters are no fresh ones."""
    return two_steps(configured(**changes))[1][1]


def expected_names(layers: int, minibatches: int) -> set[str]:
    names: set[str] = set()
    usual = {name for name in METRICS if name not in OPTIONAL or name.startswith("discrepancy_live/")}
    for name in usual:
        numbers = layers if "layer_NN" in name else minibatches if "minibatch_NN" in name else 1
        names |= {name.replace("NN", f"{number:02d}") for number in range(numbers)}
    return names


def test_a_run_and_its_resumption(tmp_path: Path) -> None:
    """A run writes every metric that is defined, under its name: those of evaluations at their steps, and before
    training. Each function is traced once for each way to call it: three to sample (to train on, and to evaluate by
    either engine), two to score (R3 and live). A resumption adds none."""
    traces = {
        sample_batch: 3,
        prepare: 2,
        score: 2,
        update: 1,
        measure.rollout_statistics: 1,
        loop.rollout_advantages: 1,
    }
    for function in traces:
        function.clear_cache()
    lines: list[str] = []
    seen: list[loop.Metrics] = []
    for gradient_steps in (8, 12):
        config = configured(gradient_steps=gradient_steps, evaluation={"every": 4})
        assert train(config, tmp_path / "run", say=lines.append, watch=seen.append) is None
        assert {function: function._cache_size() for function in traces} == traces

    names = expected_names(layers=2, minibatches=2)
    evaluated = {name for name in names if name.startswith("eval/")}
    progress = {name for name in names if name.startswith("progress/")}
    assert [set(row) for row in seen] == [evaluated | progress, *[names - evaluated, names] * 3]
    columns = read_metrics(tmp_path / "run")
    assert set(columns) == names
    np.testing.assert_array_equal(columns["progress/gradient_steps"], np.arange(7) * 2)
    np.testing.assert_array_equal(columns["progress/responses"], np.arange(7) * 16)
    length = columns["response/length"][1:] * 16
    np.testing.assert_allclose(columns["progress/tokens"][1:], length.cumsum(), atol=1e-6)
    assert np.isfinite(np.stack([columns[name][1:] for name in names - evaluated])).all()
    mesh = dict.fromkeys(("data", "fsdp", "expert", "tensor"), 1)
    kernels = f"kernels: attention reference, experts tiles; mesh {mesh}"
    assert lines == [kernels, kernels, "resuming after global step 4"]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.integers(1, 2**20))
def test_minibatches_are_whole_groups_in_an_order_of_seed_and_step(per_minibatch, samples, minibatches, seed, step):
    prompts = per_minibatch * minibatches
    rows = loop.minibatch_rows(seed, step, prompts, samples, minibatches)
    assert rows.shape == (minibatches, per_minibatch * samples)
    assert sorted(rows.ravel()) == list(range(prompts * samples))
    groups = rows.reshape(minibatches, per_minibatch, samples)
    assert (groups // samples == groups[..., :1] // samples).all()
    np.testing.assert_array_equal(rows, loop.minibatch_rows(seed, step, prompts, samples, minibatches))


def test_the_order_changes_with_seed_and_step():
    orders = {loop.minibatch_rows(seed, step, 8, 1, 2).tobytes() for seed in range(5) for step in range(5)}
    assert len(orders) == 25


def test_what_the_updates_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """One advantage for the whole batch, R less its group's mean, cut with the rows that it belongs to."""
    calls: dict[str, list] = {"update": [], "rollout_advantages": [], "judge": []}

    def spied(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            calls[name].append((arguments, result))
            return result

        return call

    for name in calls:
        monkeypatch.setattr(loop, name, spied(name, getattr(loop, name)))
    config = configured()
    engines = build(config)
    data = prompt_iterator(engines.task.split("train"), config.prompts_per_step, seed=0)
    loop.global_step(engines, fresh_state(engines), data, 7)
    (_, (_, judged)) = calls["judge"][0]
    rewards = judged.total
    assert len(set(rewards)) > 2
    assert len(calls["rollout_advantages"]) == 1
    by_group = rewards.reshape(4, 4)
    advantage = (by_group - by_group.mean(1, keepdims=True)).ravel()
    rollout, old = calls["rollout_advantages"][0][0][1:3]
    rows = loop.minibatch_rows(0, 7, 4, 4, 2)
    assert len(calls["update"]) == 2
    for of_update, (arguments, _) in zip(rows, calls["update"], strict=True):
        minibatch = arguments[2]
        np.testing.assert_allclose(minibatch.advantage, advantage[of_update], atol=1e-6)
        np.testing.assert_array_equal(minibatch.groups, of_update // 4)
        np.testing.assert_array_equal(minibatch.rollout.tokens, rollout.tokens[of_update])
        np.testing.assert_array_equal(minibatch.rollout.routes, rollout.routes[:, of_update])
        np.testing.assert_array_equal(minibatch.old.log_probs, old.log_probs[of_update])
        np.testing.assert_array_equal(minibatch.old.live, old.live[:, of_update])


def no_gap(metrics: loop.Metrics, prefix: str) -> bool:
    """|log ratio| < 1e-5 on every token, and so no KL to that order."""
    largest = metrics[f"{prefix}/max_ratio"] - 1 < 1e-5
    return largest and abs(metrics[f"{prefix}/k1"]) < 1e-5 and metrics[f"{prefix}/k3"] < 1e-9


@pytest.mark.parametrize("replay", ["live", "r2", "r3"])
def test_the_first_minibatch_is_on_policy_and_the_second_is_not(replay: str) -> None:
    metrics = metrics_of(learner={"replay": replay})
    assert no_gap(metrics, "staleness/minibatch_00")
    assert metrics["routing/minibatch_00/old_vs_target"] == 0
    assert metrics["staleness/minibatch_01/k3"] > 1e-7
    halves = (metrics["staleness/minibatch_00/k3"], metrics["staleness/minibatch_01/k3"])
    assert min(halves) < metrics["staleness/k3"] < max(halves)
    assert metrics["staleness/max_ratio"] == metrics["staleness/minibatch_01/max_ratio"]


def test_one_update_is_on_policy() -> None:
    metrics = metrics_of(minibatches=1, learner={"replay": "live"})
    assert no_gap(metrics, "staleness")
    assert metrics["trust/masked"] == 0
    assert not any("minibatch_01" in name for name in metrics)
    assert metrics["weight/ess"] < 0.999  # the engines differ
    assert min(metrics["first_order/sequence_gap"], metrics["first_order/token_gap"]) > 1e-3


def test_one_update_of_equal_engines_has_no_gap_of_any_kind() -> None:
    metrics = metrics_of(minibatches=1, learner={"replay": "live"}, rollout={"precision": FLOAT32})
    assert no_gap(metrics, "staleness")
    assert no_gap(metrics, "discrepancy")
    for name in ("weight/mean", "weight/max", "weight/ess"):
        assert metrics[name] == pytest.approx(1, abs=1e-5), name
    for name in ("first_order/sequence_gap", "first_order/token_gap"):
        assert metrics[name] < 1e-5, name
    for name in ("weight/truncated", "trust/masked", "trust/masked_high", "trust/masked_low", "learner/broken"):
        assert metrics[name] == 0, name
    for name in ("routing/rollout_vs_old", "routing/old_vs_target", "discrepancy/f2"):
        assert metrics[name] == 0, name


def test_equal_engines_have_no_gap() -> None:
    for replay in ("live", "r3"):
        metrics = metrics_of(rollout={"precision": FLOAT32}, learner={"replay": replay})
        assert no_gap(metrics, "discrepancy")
        assert no_gap(metrics, "discrepancy_live")
        assert metrics["routing/rollout_vs_old"] == 0
        assert metrics["discrepancy/f2"] == 0


def test_rescored_log_probs_are_another_number() -> None:
    """e4m3: between decoding and scoring a rounding can flip. The gap is logged, and is no discrepancy any more."""
    metrics = metrics_of(rollout={"log_probs": "rescore"})
    decoded = metrics_of()
    assert not any("decode_vs_score" in name for name in decoded)
    gap = metrics["discrepancy/decode_vs_score/k3"]
    assert 0 <= gap < metrics["discrepancy/k3"]
    assert metrics["reward/mean"] == decoded["reward/mean"]
    exact = metrics_of(rollout={"precision": FLOAT32, "log_probs": "rescore"}, learner={"replay": "live"})
    assert exact["discrepancy/k3"] < 1e-12  # the same program, but for the numbers' place in memory
    assert no_gap(exact, "discrepancy/decode_vs_score")


def test_slots_change_no_draw() -> None:
    plain = metrics_of(rollout={"precision": FLOAT32})
    slots = metrics_of(rollout={"precision": FLOAT32, "slots": 5})
    for name in ("reward/mean", "response/length", "response/truncated"):
        assert plain[name] == slots[name]
    assert slots["policy/entropy"] == pytest.approx(plain["policy/entropy"], abs=1e-4)


def test_truncated_sampling_is_scored_over_what_could_be_drawn() -> None:
    truncated = {"top_k": 5, "top_p": 0.9, "support": 5}
    metrics = metrics_of(rollout={"precision": FLOAT32, **truncated})
    assert no_gap(metrics, "discrepancy")
    assert metrics["policy/entropy"] < np.log(5)


def test_replay_alters_the_policy_that_is_measured() -> None:
    with_r3, live = metrics_of(learner={"replay": "r3"}), metrics_of(learner={"replay": "live"})
    assert with_r3["routing/rollout_vs_old"] > 0
    assert with_r3["discrepancy/k3"] != with_r3["discrepancy_live/k3"]
    assert live["discrepancy/k3"] == live["discrepancy_live/k3"] > 1e-6
    layers = [live[f"routing/layer_{layer:02d}/rollout_vs_old"] for layer in (0, 1)]
    assert live["routing/rollout_vs_old"] == pytest.approx(np.mean(layers))


def test_the_gap_with_live_routing_is_measured_alone() -> None:
    """Without that pass a run is the same, bit for bit, and lacks its metrics alone."""
    (state, with_gap), (spared, without) = (two_steps(configured(learner={"live_gap": gap})) for gap in (True, False))
    jax.tree.map(np.testing.assert_array_equal, state.train.params, spared.train.params)
    lacking = {name for name in with_gap[1] if name not in without[1]}
    assert lacking == {name for name in with_gap[1] if name.startswith("discrepancy_live/")} != set()


def test_a_reference_replays_what_pi_old_replays() -> None:
    """At equal weights R3's KL to the reference is 0: it holds no discrepancy of the engines."""
    config = configured(objective={"kl_coefficient": 0.1}, learner={"replay": "r3"})
    engines = build(config)
    state = fresh_state(engines)
    prompts = next(prompt_iterator(engines.task.split("train"), config.prompts_per_step, seed=5))
    rows = loop.produce(engines, state.train.params, state.reference, prompts, step=1).rows
    np.testing.assert_array_equal(rows.reference, rows.old.log_probs)
    live = loop.score_old(engines, state.reference, rows.rollout, RoutingReplay.LIVE)[0].log_probs
    assert np.abs(live - rows.reference).max() > 1e-3


def test_r3_can_replay_what_was_not_recorded() -> None:
    """The same programs with other routes. Those of the initial weights are pi_old's own choice as long as they are its
    weights, and no other one's afterwards; the sampler's choices are still what diagnostics compare."""
    of = {}
    for name in ("recorded", "permuted", "initial"):
        config = configured(learner={"replay": "r3", "replay_of": name})
        of[name] = config, *two_steps(config)
    first = {name: metrics[0] for name, (_, _, metrics) in of.items()}
    for metrics in first.values():
        assert metrics["routing/rollout_vs_old"] > 0
        assert metrics["discrepancy_live/k3"] == first["recorded"]["discrepancy_live/k3"]
    assert first["permuted"]["discrepancy/k3"] > 5 * first["recorded"]["discrepancy/k3"]
    assert first["initial"]["discrepancy/k3"] == pytest.approx(first["initial"]["discrepancy_live/k3"], rel=1e-3)
    config, state, _ = of["initial"]
    engines = build(config)
    prompts = next(prompt_iterator(engines.task.split("train"), config.prompts_per_step, seed=5))
    rows = loop.produce(engines, state.train.params, state.reference, prompts, step=3).rows
    live = loop.score_old(engines, state.reference, rows.rollout, RoutingReplay.LIVE)[0].routes
    np.testing.assert_array_equal(rows.rollout.routes, live)
    np.testing.assert_array_equal(rows.old.routes, live)
    assert (rows.old.live != live).any()


@pytest.mark.parametrize("name", get_args(RecipeName))
def test_every_recipe_takes_a_step(name: str) -> None:
    # Dense models compile faster; RSPO is about routers.
    experts = {} if name == "rspo" else {"num_experts": 0}
    config = configured(objective={"name": name}, model=experts, learner={"replay": "live"})
    engines = build(config)
    state = fresh_state(engines)
    before = jax.device_get(state.train.params)
    data = prompt_iterator(engines.task.split("train"), config.prompts_per_step, seed=0)
    state, metrics, samples = loop.global_step(engines, state, data, 1)
    assert all(np.isfinite(value) and describe(name) for name, value in metrics.items())
    assert metrics["learner/broken"] == 0
    assert metrics["learner/grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.train.params))
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    assert len(samples) == 4


def test_router_losses_join_the_objective() -> None:
    plain, with_losses = metrics_of(), metrics_of(learner={"load_balance": 0.1, "router_z": 0.01})
    # Load balance is 1 a layer where all experts are equally busy, and no less.
    assert with_losses["learner/loss"] > plain["learner/loss"] + 0.1 * 2 * 0.95
    assert with_losses["learner/grad_norm"] != plain["learner/grad_norm"]


def test_a_dense_model() -> None:
    metrics = metrics_of(model={"num_experts": 0}, learner={"replay": "live"})
    assert set(metrics) == {
        name for name in expected_names(layers=0, minibatches=2) if not re.match("routing/|eval/|progress/", name)
    }
    assert all(np.isfinite(value) for value in metrics.values())


def test_micro_batches_change_nothing() -> None:
    whole, parts = metrics_of(), metrics_of(learner={"micro_batches": 2, "score_micro_batches": 4})
    assert set(whole) == set(parts)
    for name in whole:
        if not name.startswith(("time/", "throughput/")):
            assert parts[name] == pytest.approx(whole[name], rel=2e-3, abs=1e-6), name


def test_packing_changes_nothing() -> None:
    """A random model fills its rows, which only move; those that share one are in tests/learner/test_packing.py."""
    apart, packed = metrics_of(), metrics_of(learner={"packing": True, "micro_batches": 2})
    assert packed.pop("learner/packed_rows") == 8
    assert set(apart) == set(packed)
    for name in apart:
        if not name.startswith(("time/", "throughput/")):
            assert packed[name] == pytest.approx(apart[name], rel=2e-3, abs=1e-6), name


def test_a_reference_is_frozen_and_survives_a_resume(tmp_path: Path) -> None:
    """So do moments in bfloat16, off the device, the routes of the reference, and in float16 the loss's scale; frozen
    routers stay."""
    config = configured(
        objective={"kl_coefficient": 0.1, "kl_estimator": "k3"},
        evaluation={"every": 0},
        learner={
            "moments_dtype": "bfloat16",
            "offload_optimizer": True,
            "precision": HALF,
            "replay_of": "initial",
            "freeze": ("router",),
        },
    )
    columns = {}
    for out, stops in (("whole", (12,)), ("resumed", (4, 12))):
        for gradient_steps in stops:
            config = dataclasses.replace(config, gradient_steps=gradient_steps)
            assert train(config, tmp_path / out, say=lambda line: None) is None
        columns[out] = read_metrics(tmp_path / out)
    for name in columns["whole"]:
        if not name.startswith(("time/", "throughput/")):
            np.testing.assert_array_equal(columns["whole"][name], columns["resumed"][name], err_msg=name)
    engines = build(config)
    first = initial_params(engines.training, 0)
    with Checkpoints(tmp_path / "resumed" / "checkpoints", read_only=True) as checkpoints:
        template = init_state(first, engines.numbers, "bfloat16", precision=HALF)
        restored = checkpoints.restore(loop.RunState(template, first))
    assert restored is not None
    step, state, progress = restored
    assert (step, Progress(**progress).gradient_steps) == (6, 12)
    assert (state.train.loss_scale.scale, state.train.loss_scale.updates) == (BEGIN, 12)
    assert set(columns["whole"]["learner/loss_scale"][1:]) == {BEGIN}
    jax.tree.map(np.testing.assert_array_equal, state.reference, first)
    for (path, now), before in zip(jax.tree.leaves_with_path(state.train.params), jax.tree.leaves(first), strict=True):
        assert (now != before).any() != ("router" in jax.tree_util.keystr(path)), path


def test_tokens_that_are_no_numbers_are_counted_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.score_old

    def poisoned(*arguments: Any) -> Any:
        scores, statistics = original(*arguments)
        return dataclasses.replace(scores, log_probs=scores.log_probs.at[0, 0].set(np.nan)), statistics

    monkeypatch.setattr(loop, "score_old", poisoned)
    lines: list[str] = []
    train(configured(gradient_steps=2, evaluation={"every": 0}), tmp_path / "run", say=lines.append)
    columns = read_metrics(tmp_path / "run")
    assert columns["learner/broken"][0] == pytest.approx(1 / columns["progress/tokens"][0])
    assert np.isfinite(columns["learner/grad_norm"][0])
    assert any(re.match(r"global step 1: \d\.\d\d% of the tokens had a log-prob or an advantage", x) for x in lines)
