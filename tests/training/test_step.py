"""What a global step passes on, part by part: keys, routes, the reference, and how each update is called."""

import dataclasses
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlstab_jax.learner import PolicyScores
from rlstab_jax.stability.reduce import values
from rlstab_jax.tasks import Rewards, prompt_iterator
from rlstab_jax.training import loop, measure, passes
from rlstab_jax.training.engines import Engines, build, initial_params
from rlstab_jax.training.queue import Experience, blank
from rlstab_jax.types import Rollout, RoutingReplay
from tests.training.test_loop import FLOAT32, configured


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What `update` is called with, in the place of calling it."""
    calls: list[SimpleNamespace] = []

    def update(_: Any, train: Any, minibatch: Any, *__: Any, **options: Any) -> tuple:
        calls.append(SimpleNamespace(minibatch=minibatch, **options))
        return train, {}, {}

    monkeypatch.setattr(loop, "update", update)
    monkeypatch.setattr(loop, "update_metrics", lambda updates: {})
    return calls


def learn_from_nothing(engines: Engines, step: int) -> None:
    """On a batch of zeros, such as a checkpoint is restored into."""
    waiting = build(configured(rollout={"lag": 1}, learner={"replay": engines.config.learner.replay}))
    rows = blank(waiting)[0]
    assert isinstance(rows, Experience)
    loop.learn(engines, SimpleNamespace(predictor=object()), rows.rows, step)


@pytest.mark.parametrize(
    ("lag", "taught"),
    [(0, [[False, True], [False, True]]), (1, [[False, True], [True, True]])],
)
def test_predictors_learn_from_weights_other_than_those_that_scored(
    lag: int, taught: list, updates: list[SimpleNamespace]
) -> None:
    """The first update without a lag, and in step 1 with one, is at the weights of the old pass: nothing has moved."""
    engines = build(configured(rollout={"lag": lag}, learner={"replay": "pr2"}))
    for step in (1, 2):
        learn_from_nothing(engines, step)
    assert [[bool(call.teach) for call in updates[:2]], [bool(call.teach) for call in updates[2:]]] == taught


@pytest.mark.parametrize(("losses", "used"), [({}, False), ({"load_balance": 0.1}, True), ({"router_z": 0.01}, True)])
def test_each_router_loss_alone_is_compiled_in(losses: dict, used: bool, updates: list[SimpleNamespace]) -> None:
    learn_from_nothing(build(configured(learner=losses)), 1)
    assert [call.use_router_losses for call in updates] == [used, used]


def test_the_kl_is_to_the_parameters_that_rl_began_with(
    updates: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They score the responses of other parameters with the routes of pi_old, under PR2 not the sampler's. Made up are
    responses, and scores that tell which parameters and, where they are replayed, which routes they are of."""
    config = configured(objective={"kl_coefficient": 0.1, "kl_in": "reward"}, learner={"replay": "pr2"})
    engines = build(config)
    waiting = blank(build(configured(rollout={"lag": 1})))[0]
    assert isinstance(waiting, Experience)
    empty = waiting.rows.rollout
    routes = jax.random.randint(jax.random.key(0), empty.routes.shape, 0, 4).astype(jnp.uint8)
    sampled = dataclasses.replace(empty, response_mask=~empty.response_mask, routes=routes)
    foretold = (routes + 1) % 4

    def replayed(of: jax.Array) -> jax.Array:
        return 0.01 * of[:, :, -sampled.response_length :].astype(jnp.float32).sum((0, 3))

    def scored(_: Any, params: dict, rollout: Any, replay: RoutingReplay, *__: Any) -> tuple[PolicyScores, dict]:
        log_probs = sampled.log_probs - params["level"]
        if replay is RoutingReplay.R3:
            log_probs -= replayed(rollout.routes)
        return PolicyScores(log_probs, log_probs, foretold, foretold, None), {}

    monkeypatch.setattr(loop, "inference_weights", lambda *_: {})
    monkeypatch.setattr(loop, "sample_responses", lambda *_, **__: sampled)
    monkeypatch.setattr(loop, "judge", lambda *_: ([""] * 16, Rewards(np.arange(16.0))))
    monkeypatch.setattr(loop, "score_old", scored)
    monkeypatch.setattr(loop, "score_live", lambda *arguments: scored(*arguments, RoutingReplay.LIVE)[0])
    train: Any = SimpleNamespace(params={"level": np.float32(1)}, predictor=None)
    data = prompt_iterator(engines.task.split("train"), config.prompts_per_step, seed=5)
    loop.global_step(engines, loop.RunState(train, {"level": np.float32(2)}), data, 1)
    reference = -2.0 - np.asarray(replayed(foretold))
    rewards = (np.arange(16.0) - 0.1 * (-1.0 - reference).sum(1)).reshape(4, 4)
    advantage = (rewards - rewards.mean(1, keepdims=True)).ravel()
    assert len(updates) == 2
    for call, rows in zip(updates, loop.minibatch_rows(0, 1, 4, 4, 2), strict=True):
        np.testing.assert_allclose(call.minibatch.old.log_probs, -1.0)
        np.testing.assert_array_equal(call.minibatch.old.routes, foretold[:, rows])
        np.testing.assert_allclose(call.minibatch.reference, reference[rows], rtol=1e-6)
        np.testing.assert_allclose(call.minibatch.advantage, advantage[rows], atol=1e-5)


def test_partial_rollouts_have_the_same_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"lag": 2, "partial": 4, "response_length": 9}
    engines = build(configured(objective={"kl_coefficient": 0.1}, rollout=rounds))
    first, given = {"level": 2.0}, []
    monkeypatch.setattr(loop, "go_on", lambda _, __, one, *___, **____: (dataclasses.replace(one, rounds=2), {}))
    monkeypatch.setattr(loop, "begin", lambda *_, **__: "another")
    monkeypatch.setattr(loop, "judge", lambda *_: ([], Rewards(np.arange(16.0))))
    monkeypatch.setattr(loop, "collect", lambda *_, **__: SimpleNamespace(metrics={}))
    for name in ("rollout_statistics", "lag_statistics", "rollout_metrics"):
        monkeypatch.setattr(loop, name, lambda *_: {})
    monkeypatch.setattr(loop, "conclude", lambda *arguments: given.append(arguments[1]))
    monkeypatch.setattr(loop, "laid_out", lambda *_: "finished")
    polled: list[str] = []
    queue = loop.another_round(
        engines, {"level": 1.0}, first, iter([[]]), 2, blank(engines)[1:], lambda: polled.append("before a round")
    )
    assert queue == ("finished", "another")
    assert len(polled) == 2
    assert given[0] is first


def test_weights_are_quantised_once_a_step_and_freed_before_pi_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic sampling attempts three times in vain, and the log-probs are rescored: by the same weights."""
    engines = build(configured(rollout={"attempts": 3, "log_probs": "rescore"}, learner={"live_gap": False}))
    waiting = blank(build(configured(rollout={"lag": 1})))[0]
    assert isinstance(waiting, Experience)
    rows, used = waiting.rows, []

    class Weights:
        made: ClassVar[list[weakref.ref]] = []

        def __init__(self, *_: Any):
            self.made.append(weakref.ref(self))

    def by_weights(result: Any) -> Any:
        return lambda _, weights, *__, **___: used.append(weakref.ref(weights)) or result

    def scored(*_: Any) -> tuple[PolicyScores, dict]:
        assert Weights.made[0]() is None
        return rows.old, {}

    monkeypatch.setattr(loop, "inference_weights", Weights)
    monkeypatch.setattr(loop, "sample_responses", by_weights(rows.rollout))
    monkeypatch.setattr(loop, "rescore", by_weights(rows.rollout.log_probs))
    monkeypatch.setattr(loop, "judge", lambda *_: ([""] * 16, Rewards(np.zeros(16))))
    monkeypatch.setattr(loop, "score_old", scored)
    prompts = prompt_iterator(engines.task.split("train"), engines.config.prompts_per_step, seed=5)
    loop.produce(engines, {}, None, next(prompts), 1, prompts)
    assert len(Weights.made) == 1
    assert used == 4 * Weights.made


def test_noise_on_the_sampler_lasts_or_is_drawn_anew() -> None:
    """By the run's seed and, if it does not last, by the global step; without noise the weights are those stored."""

    def weights(step: int, seed: int = 0, **rollout: Any) -> np.ndarray:
        engines = build(configured(rollout={"precision": FLOAT32, **rollout}, seed=seed))
        params = initial_params(engines.training, 0)
        return np.asarray(passes.inference_weights(engines, params, step)["params"]["embedding"])

    plain, noise = weights(1), {"weight_noise": 0.1}
    np.testing.assert_array_equal(plain, weights(1, seed=1))
    lasting, anew = (weights(1, **noise, weight_noise_lasts=lasts) for lasts in (True, False))
    np.testing.assert_array_equal(lasting, weights(2, **noise))
    np.testing.assert_array_equal(anew, weights(1, **noise, weight_noise_lasts=False))
    others = weights(1, seed=1, **noise), weights(2, **noise, weight_noise_lasts=False)
    for one in (lasting, anew):
        assert all((one != other).mean() > 0.9 for other in (plain, *others))


def test_keys_of_draws_differ_by_group_step_attempt_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []

    def sampler(*arguments: Any, **_: Any) -> None:
        drawn.append(np.asarray(jax.random.key_data(arguments[4])))

    monkeypatch.setattr(passes, "sampler_for", lambda *_: sampler)

    def keys(step: int = 1, attempt: int = 0, seed: int = 0) -> np.ndarray:
        engines = build(configured(seed=seed))
        source = engines.task.split("train")
        passes.sample_responses(engines, {}, [source[i] for i in (3, 3, 4, 5)], step, attempt)
        return drawn.pop()

    every = [keys(), keys(step=2), keys(attempt=1), keys(seed=1)]
    whole = np.concatenate(every)
    assert len(whole) == 4 * 16
    assert len(np.unique(whole, axis=0)) == len(whole)  # a prompt that comes twice has two groups
    np.testing.assert_array_equal(keys(), every[0])


def test_the_matched_pass_replays_the_routes_that_r3_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = build(configured(rollout={"precision": FLOAT32, "log_probs": "matched"}))
    given: list[Any] = []
    monkeypatch.setattr(passes, "score_matched", lambda *arguments: given.append(arguments[4]))
    monkeypatch.setattr(passes, "matched_scores", lambda *_: (SimpleNamespace(router=None), {}))
    engines = dataclasses.replace(engines, needs_router=True)
    rollout: Any = SimpleNamespace(routes=np.arange(3))
    for replay in (RoutingReplay.R3, RoutingReplay.R2, RoutingReplay.LIVE):
        passes.score_old(engines, {}, rollout, replay)
    assert given[0] is rollout.routes
    assert given[1:] == [None, None]


def test_gaps_are_of_the_policy_that_scores_to_the_one_that_sampled() -> None:
    """KL(mu_old || pi_old) on tokens that pi_old makes e times as likely: k1 is -1 nat, k3 is e - 2."""
    one = np.ones((1, 1), np.float32)
    rollout = Rollout(
        tokens=np.zeros((1, 2), np.int32),
        prompt_mask=one > 0,
        response_mask=one > 0,
        log_probs=-2 * one,
        truncated=one[0] > 0,
        routes=None,
        temperature=one[0],
    )
    old, live = (PolicyScores(level * one, one, None, None, None) for level in (-1, -1.5))
    found = values(measure.rollout_statistics(rollout, old, live, 4))
    found |= values(measure.decode_statistics(rollout, old.log_probs))
    for name, nats in (("discrepancy", 1.0), ("discrepancy_live", 0.5), ("discrepancy/decode_vs_score", 1.0)):
        assert found[f"{name}/k1"] == pytest.approx(-nats), name
        assert found[f"{name}/k3"] == pytest.approx(np.exp(nats) - 1 - nats), name


def test_rollouts_are_drawn_as_the_config_says() -> None:
    sampling = build(configured(rollout={"temperature": 0.5, "min_p": 0.1, "top_k": 7, "support": 8})).sampling
    assert (sampling.temperature, sampling.min_p, sampling.top_k) == (0.5, np.float32(0.1), 7)
