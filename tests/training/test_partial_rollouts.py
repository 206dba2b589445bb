"""One response by several versions of the parameters: what pi_old and its routes are, and a run that does it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlstab_jax.learner import PolicyScores, score
from rlstab_jax.learner.score import replayed_routes
from rlstab_jax.rundir import MAY_CHANGE
from rlstab_jax.tasks import prompt_iterator
from rlstab_jax.training import partial
from rlstab_jax.training.config import may_change
from rlstab_jax.training.engines import build, initial_params
from rlstab_jax.training.partial import Unfinished, begin, go_on
from rlstab_jax.training.queue import blank
from rlstab_jax.training.run import train
from rlstab_jax.training.validate import validate
from rlstab_jax.types import Rollout, RoutingReplay, UserError
from tests.training.test_loop import FLOAT32, configured
from tests.training.test_queue import columns

ROUNDS = {"lag": 2, "partial": 4, "response_length": 9}


def larger(params: dict) -> dict:
    """So that two sets of parameters choose other experts."""
    return jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, params)


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_pi_old_is_of_the_version_that_drew_the_token(replay: str) -> None:
    """A pass of the learner at a version's parameters, with the routes that updates replay, gives pi_old exactly of the
    tokens of that version: the importance ratio starts from 1 for each token."""
    engines = build(configured(rollout=ROUNDS | {"precision": FLOAT32}, learner={"replay": replay}))
    prompts = next(prompt_iterator(engines.task.split("train"), engines.config.prompts_per_step, seed=0))
    older, newer = (larger(engines.place(initial_params(engines.training, seed))) for seed in (0, 1))
    first = begin(engines, older, prompts, 1, version=5)
    whole, _ = go_on(engines, newer, first, 1, version=6)
    rollout, mask = whole.rollout, np.asarray(whole.rollout.response_mask)
    np.testing.assert_array_equal(rollout.version, np.where(mask, 5 + (np.arange(9) >= 4), 0))
    assert mask[:, 4:].any()
    np.testing.assert_array_equal(rollout.tokens[mask.any(1), :-5], first.rollout.tokens[mask.any(1), :-5])

    routes = replayed_routes(RoutingReplay(replay), rollout, whole.old.routes)
    assert (routes[:, rollout.fed_mask] < engines.config.model.num_experts).all()  # none is lost between rounds
    for version, params in ((5, older), (6, newer)):
        given = replace(rollout, routes=routes)
        target, _ = score(engines.training, {"params": params}, given, replay=RoutingReplay.R3)
        gap = np.abs(target.log_probs - whole.old.log_probs)
        own = np.asarray(rollout.version) == version
        assert gap[mask & own].max() < 1e-5
        assert gap[mask & ~own].max() > 1e-2
    if replay == "r2":  # and these are the live ones of the first version, up to what the second one drew
        live, _ = score(engines.training, {"params": older}, rollout)
        until = rollout.prompt_length + 4 - 1
        np.testing.assert_array_equal(live.routes[:, :, :until], routes[:, :, :until])


def test_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round n draws columns 3 n - 3 to 3 n - 1, token n, of log-probs -n; what the rounds before have made stays."""
    engines = build(configured(rollout={"lag": 3, "partial": 3, "response_length": 9}, learner={"replay": "r3"}))
    prompts = next(prompt_iterator(engines.task.split("train"), engines.config.prompts_per_step, seed=0))
    empty, columns = blank(engines)[1].rollout, np.arange(9)
    mask = (columns < 4 + np.arange(len(empty.tokens))[:, None] % 6) | (np.arange(len(empty.tokens)) > 8)[:, None]
    asked = []

    def drawn(rollout: Rollout, number: int, begun: int, end: int) -> Rollout:
        now = mask & (columns >= begun) & (columns < end)
        tokens = rollout.tokens.at[:, rollout.prompt_length :].set(
            np.where(now, number, rollout.tokens[:, rollout.prompt_length :])
        )
        return replace(rollout, tokens=tokens, response_mask=rollout.response_mask | now)

    def first(*_: Any, length: int) -> Rollout:
        asked.append((0, length))
        whole, behind = drawn(empty, 1, 0, 3), empty.prompt_length
        cut = {name: getattr(whole, name)[:, :3] for name in ("response_mask", "log_probs")}
        return replace(
            whole, **cut, tokens=whole.tokens[:, : behind + 3], routes=whole.routes[:, :, : behind + 2], version=None
        )

    def another(_: Any, __: Any, rollout: Rollout, *options: Any) -> Rollout:
        asked.append(options[-2:])
        return drawn(rollout, len(asked), options[-2], sum(options[-2:]))

    def scored(_: Any, __: Any, rollout: Rollout, *___: Any) -> tuple[PolicyScores, dict]:
        same = np.full(mask.shape, -float(len(asked)), np.float32)
        return PolicyScores(same, same, rollout.routes, rollout.routes, None), {}

    monkeypatch.setattr(partial, "inference_weights", lambda *_: {})
    monkeypatch.setattr(partial, "sample_responses", first)
    monkeypatch.setattr(partial, "go_on_sampling", another)
    monkeypatch.setattr(partial, "score_old", scored)
    monkeypatch.setattr(partial, "score_live", lambda *arguments: scored(*arguments)[0])
    rounds = [begin(engines, {}, prompts, 1, version=5)]
    for version in (6, 7):
        rounds.append(go_on(engines, {}, rounds[-1], 1, version)[0])
    assert asked == [(0, 3), (3, 3), (6, 3)]
    whole, number = rounds[-1], 1 + columns // 3
    np.testing.assert_array_equal(whole.rollout.response_mask, mask)
    np.testing.assert_array_equal(whole.rollout.version, np.where(mask, 4 + number, 0))
    np.testing.assert_array_equal(whole.rollout.tokens[:, empty.prompt_length :], np.where(mask, number, 0))
    np.testing.assert_array_equal(whole.old.log_probs, np.broadcast_to(-number, mask.shape))
    np.testing.assert_array_equal(whole.live.log_probs, whole.old.log_probs)


def test_rounds_keep_no_live_log_probs_that_are_not_asked_for() -> None:
    engines = build(configured(rollout=ROUNDS, learner={"live_gap": False}))
    prompts = next(prompt_iterator(engines.task.split("train"), engines.config.prompts_per_step, seed=0))
    begun = begin(engines, engines.place(initial_params(engines.training, 0)), prompts, 1, version=0)
    restored = blank(engines)[1]
    assert isinstance(restored, Unfinished)
    assert begun.live is restored.live is None
    fields = {name for name in MAY_CHANGE if name not in may_change(engines.config)}
    assert fields == {"learner.live_gap"}  # another queue; without partial rollouts it is none
    assert may_change(configured()) == MAY_CHANGE


def test_a_run_with_partial_rollouts(tmp_path: Path) -> None:
    """Killed and resumed with half-drawn responses in its queue, it is the uninterrupted one bit for bit."""

    def run(name: str, gradient_steps: int) -> dict[str, np.ndarray]:
        config = configured(gradient_steps=gradient_steps, rollout=ROUNDS, evaluation={"every": 0})
        assert train(config, tmp_path / name, say=lambda line: None) is None
        return columns(tmp_path / name)

    whole = run("whole", 12)
    run("broken", 10)
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "5")
    resumed = run("broken", 12)
    assert resumed.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    assert (tmp_path / "whole" / "samples.jsonl").read_bytes() == (tmp_path / "broken" / "samples.jsonl").read_bytes()
    # In step s the first round is by the parameters of two steps ago, the second one by those of one step ago.
    lag = whole["staleness/lag"]
    assert lag[0] == 0
    assert lag[1] == 1
    assert ((lag[2:] > 1) & (lag[2:] < 2)).all()
    assert (whole["learner/broken"] == 0).all()


@pytest.mark.parametrize(
    ("check", "rollout", "message"),
    [
        (validate, {"partial": -1}, r"rollout.partial = -1: expected 0 \(none\) or more"),
        (
            validate,
            {"lag": 99},
            "rollout.lag = 99, but the run has .* global steps: batches would be sampled that none",
        ),
        (validate, {"partial": 4, "lag": 1}, "rollout.partial = 4 with rollout.lag = 1: responses are drawn over lag"),
        (validate, ROUNDS | {"attempts": 2}, "rollout.partial = 4 with rollout.attempts = 2, rollout.slots = 0 and"),
        (build, ROUNDS | {"partial": 9}, "rollout.partial = 9: 1 rounds of so many tokens leave none of the response"),
    ],
)
def test_rounds_that_are_none(check: Callable, rollout: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(configured(rollout=rollout))
