"""Identity 8: each recipe's gradient is that of the published objective, written in NumPy and differenced."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import gradient, ragged

from rlstab_jax import objectives as o
from rlstab_jax.objectives.config import Estimator, RecipeName
from rlstab_jax.types import Scores, UserError

MANY = settings(max_examples=12, deadline=None)
Published = Callable[[np.ndarray], float]  # log pi_theta of every token -> the objective J to maximise


def advantage(rewards: np.ndarray, groups: np.ndarray, std: bool) -> np.ndarray:
    result = np.zeros_like(rewards)
    for i in range(len(rewards)):
        same = rewards[groups == groups[i]]
        result[i] = (rewards[i] - same.mean()) / ((same.std() + 1e-6) if std else 1.0)
    return result


def rows_of(s: Scores):
    return [(i, np.flatnonzero(s.mask[i])) for i in range(len(s.mask))]


def group_mean(s: Scores, rows: list[float]) -> float:
    return float(np.mean([np.mean(np.array(rows)[s.groups == g]) for g in np.unique(s.groups)]))


def ppo(r: np.ndarray, a: float, low: float, high: float) -> np.ndarray:
    return np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)


def published_minirl(s: Scores, rewards: np.ndarray) -> Published:
    a, fixed = advantage(rewards, s.groups, std=False), s.target

    def j(target: np.ndarray) -> float:
        total = 0.0
        for i, t in rows_of(s):
            r = np.exp(fixed[i, t] - s.old[i, t])
            m = ~(((a[i] > 0) & (r > 1.27)) | ((a[i] < 0) & (r < 0.8)))
            total += np.sum(m * np.minimum(np.exp(fixed[i, t] - s.rollout[i, t]), 1.5) * a[i] * target[i, t])
        return total / len(a)

    return j


def published_capped_discrepancy(s: Scores, rewards: np.ndarray) -> Published:
    a, fixed = advantage(rewards, s.groups, std=False), s.target

    def j(target: np.ndarray) -> float:
        total = 0.0
        for i, t in rows_of(s):
            r = np.exp(fixed[i, t] - s.old[i, t])
            m = ~(((a[i] > 0) & (r > 1.27)) | ((a[i] < 0) & (r < 0.8)))
            w = r * np.minimum(np.exp(s.old[i, t] - s.rollout[i, t]), 1.5)
            total += np.sum(m * w * a[i] * target[i, t]) / len(t)
        return total / len(a)

    return j


def published_reinforce(s: Scores, rewards: np.ndarray) -> Published:
    return lambda target: sum((rewards[i] - 0.25) * target[i, t].sum() for i, t in rows_of(s)) / len(rewards)


def published_rloo(s: Scores, rewards: np.ndarray) -> Published:
    a = np.zeros_like(rewards)
    for i in range(len(rewards)):
        others = [rewards[k] for k in range(len(rewards)) if s.groups[k] == s.groups[i] and k != i]
        a[i] = rewards[i] - np.mean(others) if others else 0.0
    return lambda target: sum(a[i] * target[i, t].sum() for i, t in rows_of(s)) / len(a)


def published_sequence_is(s: Scores, rewards: np.ndarray) -> Published:
    """Eq. 1 itself, of which the recipe is the gradient (Eq. 2)."""
    a = advantage(rewards, s.groups, std=False)
    return lambda target: sum(np.exp(np.sum(target[i, t] - s.rollout[i, t])) * a[i] for i, t in rows_of(s)) / len(a)


def published_grpo(s: Scores, rewards: np.ndarray) -> Published:
    a = advantage(rewards, s.groups, std=True)

    def j(target: np.ndarray) -> float:
        rows = []
        for i, t in rows_of(s):
            clipped = ppo(np.exp(target[i, t] - s.old[i, t]), a[i], 0.2, 0.2)
            rows.append(np.mean(np.maximum(clipped, 1.4 * a[i]) if a[i] < 0 else clipped))
        return group_mean(s, rows)

    return j


def published_dr_grpo(s: Scores, rewards: np.ndarray) -> Published:
    a = advantage(rewards, s.groups, std=False)
    return lambda target: np.mean(
        [ppo(np.exp(target[i, t] - s.old[i, t]), a[i], 0.2, 0.2).sum() / 100 for i, t in rows_of(s)]
    )


def published_dapo(s: Scores, rewards: np.ndarray) -> Published:
    a = advantage(rewards, s.groups, std=True)
    return lambda target: (
        sum(ppo(np.exp(target[i, t] - s.old[i, t]), a[i], 0.2, 0.28).sum() for i, t in rows_of(s)) / s.mask.sum()
    )


def published_gspo(s: Scores, rewards: np.ndarray) -> Published:
    a = advantage(rewards, s.groups, std=True)
    return lambda target: group_mean(
        s, [ppo(np.exp(np.mean(target[i, t] - s.old[i, t])), a[i], 0.1, 0.2) for i, t in rows_of(s)]
    )


def published_cispo(s: Scores, rewards: np.ndarray) -> Published:
    a, fixed = advantage(rewards, s.groups, std=True), s.target

    def j(target: np.ndarray) -> float:
        means = []
        for g in np.unique(s.groups):
            rows = [(i, t) for i, t in rows_of(s) if s.groups[i] == g]
            w = {i: np.clip(np.exp(fixed[i, t] - s.old[i, t]), 0.8, 1.27) for i, t in rows}
            means.append(sum(np.sum(w[i] * a[i] * target[i, t]) for i, t in rows) / sum(len(t) for _, t in rows))
        return float(np.mean(means))

    return j


def published_tis(s: Scores, rewards: np.ndarray) -> Published:
    a = advantage(rewards, s.groups, std=True)

    def j(target: np.ndarray) -> float:
        total = 0.0
        for i, t in rows_of(s):
            tis = np.minimum(np.exp(s.old[i, t] - s.rollout[i, t]), 1.2)
            total += np.sum(tis * ppo(np.exp(target[i, t] - s.old[i, t]), a[i], 0.2, 0.28))
        return total / s.mask.sum()

    return j


def published_icepop(s: Scores, rewards: np.ndarray) -> Published:
    a = advantage(rewards, s.groups, std=True)

    def j(target: np.ndarray) -> float:
        rows = []
        for i, t in rows_of(s):
            k = np.exp(s.old[i, t] - s.rollout[i, t])
            k = np.where((k >= 0.8) & (k <= 1.3), k, 0.0)
            rows.append(np.mean(k * ppo(np.exp(target[i, t] - s.old[i, t]), a[i], 0.2, 0.2)))
        return group_mean(s, rows)

    return j


def published_dppo(s: Scores, rewards: np.ndarray, kl: bool) -> Published:
    a, fixed = advantage(rewards, s.groups, std=False), s.target

    def j(target: np.ndarray) -> float:
        total = 0.0
        for i, t in rows_of(s):
            p, m = np.exp(fixed[i, t]), np.exp(s.rollout[i, t])
            d = m * np.log(m / p) + (1 - m) * np.log((1 - m) / (1 - p)) if kl else np.abs(p - m)
            stop = (d > 0.05) & (((a[i] > 0) & (p > m)) | ((a[i] < 0) & (p < m)))
            total += np.sum(~stop * np.minimum(p / m, 1.5) * a[i] * target[i, t])
        return total / len(a)

    return j


def published_rspo(s: Scores, rewards: np.ndarray) -> Published:
    a = advantage(rewards, s.groups, std=True)

    def j(target: np.ndarray) -> float:
        rows = []
        for i, t in rows_of(s):
            shift = np.abs(s.router_target[i, t] - s.router_old[i, t]).mean(-1)
            ratio = np.maximum(np.exp(-shift), 0.9) * np.exp(target[i, t] - s.old[i, t])
            fixed = np.maximum(np.exp(-shift), 0.9) * np.exp(s.target[i, t] - s.old[i, t])
            stopped = fixed > 1.49 if a[i] > 0 else fixed < 0.67
            ratio = np.where(stopped, fixed, ratio)  # clipped on the side that A's sign clips: a constant
            weight = np.exp(np.mean(np.log(np.clip(fixed, 0.67, 1.49))))
            rows.append(weight * a[i] * np.mean(np.log(ratio)))  # first order in log ratio: the gradient at `fixed`
        return group_mean(s, rows)

    return j


def penalised(recipe: Callable[[Scores, np.ndarray], Published], penalty: Callable[..., np.ndarray], mean: str):
    """J less 0.3 times a KL: mean over the tokens of a row and over groups (GRPO), or their sum over rows (MiniRL)."""

    def published(s: Scores, rewards: np.ndarray) -> Published:
        j = recipe(s, rewards)

        def less(target: np.ndarray) -> float:
            rows = [penalty(s, target, i, t) for i, t in rows_of(s)]
            kl = group_mean(s, [row.mean() for row in rows]) if mean == "groups" else sum(r.sum() for r in rows) / 6
            return j(target) - 0.3 * kl

        return less

    return published


def k2(s: Scores, target: np.ndarray, i: int, t: np.ndarray) -> np.ndarray:
    return (target[i, t] - s.reference[i, t]) ** 2 / 2


def k3(s: Scores, target: np.ndarray, i: int, t: np.ndarray) -> np.ndarray:
    d = target[i, t] - s.reference[i, t]
    return np.exp(-d) - 1 + d


def corrected_k3(s: Scores, target: np.ndarray, i: int, t: np.ndarray) -> np.ndarray:
    return np.exp(target[i, t] - s.rollout[i, t]) * k3(s, target, i, t)


def with_kl(name: RecipeName, estimator: Estimator, **numbers: float) -> o.Objective:
    return o.build(o.ObjectiveConfig(name, kl_coefficient=0.3, kl_estimator=estimator, **numbers))


CASES = {
    "minirl": (o.minirl(cap=1.5), published_minirl),
    "minirl_discrepancy": (
        o.minirl(cap=1.5, cap_on="discrepancy", length_normalise=True),
        published_capped_discrepancy,
    ),
    "reinforce": (o.reinforce(baseline=0.25), published_reinforce),
    "rloo": (o.rloo(), published_rloo),
    "sequence_is": (o.sequence_is(), published_sequence_is),
    "grpo": (o.grpo(dual_clip=1.4), published_grpo),
    "dr_grpo": (o.dr_grpo(length=100.0), published_dr_grpo),
    "dapo": (o.dapo(), published_dapo),
    "gspo": (o.gspo(eps_low=0.1, eps_high=0.2), published_gspo),
    "cispo": (o.cispo(), published_cispo),
    "tis": (o.tis(cap=1.2), published_tis),
    "icepop": (o.icepop(band_low=0.8, band_high=1.3), published_icepop),
    "dppo_tv": (o.dppo_tv(delta=0.05, cap=1.5), lambda s, r: published_dppo(s, r, kl=False)),
    "dppo_kl": (o.dppo_kl(delta=0.05, cap=1.5), lambda s, r: published_dppo(s, r, kl=True)),
    "rspo": (o.rspo(floor=0.9), published_rspo),
    "minirl, k2": (with_kl("minirl", "k2", cap=1.5), penalised(published_minirl, k2, "rows")),
    "minirl, k3": (with_kl("minirl", "corrected_k3", cap=1.5), penalised(published_minirl, corrected_k3, "rows")),
    "grpo, k3": (with_kl("grpo", "k3", dual_clip=1.4), penalised(published_grpo, k3, "groups")),
}


def differences(j: Published, target: np.ndarray, mask: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of J with respect to the log-prob of each token of the mask."""
    result = np.zeros_like(target)
    for index in zip(*np.nonzero(mask), strict=True):
        up, down = target.copy(), target.copy()
        up[index] += step
        down[index] -= step
        result[index] = (j(up) - j(down)) / (2 * step)
    return result


@pytest.mark.parametrize("name", CASES)
@MANY
@given(seed=st.integers(0, 2**31))
def test_gradient_is_that_of_the_published_objective(name: str, seed: int) -> None:
    objective, published = CASES[name]
    scores, rewards = ragged(seed)
    expected = -differences(published(scores, rewards), scores.target, scores.mask)
    np.testing.assert_allclose(gradient(objective, scores, rewards), expected, atol=2e-8, rtol=2e-6)


def test_no_importance_sampling_is_blind_to_the_inference_engine() -> None:
    scores, rewards = ragged(0)
    moved = scores.replace(rollout=scores.rollout - 0.3)
    for cap_on in ("product", "discrepancy"):
        objective = o.minirl(importance_sampling=False, cap_on=cap_on)
        np.testing.assert_array_equal(gradient(objective, scores, rewards), gradient(objective, moved, rewards))
    with pytest.raises(UserError, match="cap_on = 'prodct': expected 'product' or 'discrepancy'"):
        o.minirl(cap_on="prodct")


def test_infinite_eps_and_cap_switch_clipping_and_truncation_off() -> None:
    scores, rewards = ragged(1, spread=2.0)
    off = o.minirl(eps_low=np.inf, eps_high=np.inf, cap=np.inf)
    a, ratio = advantage(rewards, scores.groups, std=False), np.exp(scores.target - scores.rollout)
    expected = np.where(scores.mask, -ratio * a[:, None] / len(a), 0.0)
    np.testing.assert_allclose(gradient(off, scores, rewards), expected, rtol=1e-12)


def test_a_weight_counts_as_truncated_where_the_cap_changed_it() -> None:
    target, rollout = np.full((1, 2), -0.1, np.float32), np.array([[-3.0, -0.1]], np.float32)  # weights e^2.9 and 1
    scores = Scores(target, target, rollout, np.ones((1, 2), bool), np.zeros(1, int))
    _, parts = o.surrogate(o.minirl(cap=5.0), scores, np.ones(1, np.float32), np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(parts.truncated, [[True, False]])
    np.testing.assert_allclose(parts.weight, [[5.0, 1.0]])


@pytest.mark.parametrize(
    ("recipe", "piece", "numbers"),
    [
        (o.minirl, "truncate", {"at": 5.0}),
        (o.minirl, "trust", {"eps_low": 0.2, "eps_high": 0.27}),
        (o.sequence_is, "truncate", {"at": np.inf}),
        (o.dr_grpo, "normalise", {"length": 1.0}),
        (o.gspo, "trust", {"eps_low": 3e-4, "eps_high": 4e-4}),
        (o.tis, "truncate", {"at": 2.0}),
        (o.tis, "trust", {"eps_low": 0.2, "eps_high": 0.28}),
        (o.icepop, "trust.first", {"eps_low": 0.2, "eps_high": 0.2}),
        (o.icepop, "trust.second", {"low": 0.5, "high": 5.0}),
        (o.dppo_tv, "trust", {"at": 0.15}),
        (o.dppo_kl, "trust", {"at": 0.05}),
        (o.dppo_tv, "truncate", {"at": 20.0}),
        (o.dppo_kl, "truncate", {"at": 20.0}),
        (o.rspo, "trust.of.second", {"floor": 0.7}),
        (o.rspo, "weight.of.of", {"low": 0.67, "high": 1.49}),
        (o.rspo, "trust", {"eps_low": 0.33, "eps_high": 0.49}),
        (o.grpo, "trust.second", {"at": np.inf}),
        (o.dapo, "trust.second", {"at": np.inf}),
    ],
)
def test_defaults_are_the_published_numbers(recipe: Callable, piece: str, numbers: dict) -> None:
    """Those of the module's docstrings; RSPO's floor and Dr.GRPO's length are this project's."""
    first, *inner = piece.split(".")
    found = getattr(recipe(), first)
    for name in inner:
        found = found.keywords[name]
    assert {name: found.keywords[name] for name in numbers} == pytest.approx(numbers)


def slope_of_entropy(objective: o.Objective, scores: Scores, rewards: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        advantage, c = o.advantages_of(objective, scores, jnp.asarray(rewards)), o.coefficients(objective, scores)

        def loss(entropy: jax.Array) -> jax.Array:
            return o.surrogate(objective, scores.replace(entropy=entropy), advantage, c)[0]

        return np.asarray(jax.grad(loss)(jnp.asarray(scores.entropy)))


def test_an_entropy_bonus_lowers_the_loss_by_each_token_s_share() -> None:
    """The loss falls with a token's entropy as with its coefficient c, of which a response has 1/n or 1/(n |y|)."""
    scores, rewards = ragged(2)
    for divide in (False, True):
        objective = o.build(o.ObjectiveConfig("minirl", entropy_coefficient=0.7, length_normalise=divide))
        share = scores.mask / len(rewards) / (scores.mask.sum(1, keepdims=True) if divide else 1)
        np.testing.assert_allclose(slope_of_entropy(objective, scores, rewards), -0.7 * share, rtol=1e-9)
