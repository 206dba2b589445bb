"""One update: exact accumulation, router losses by hand, what is not finite changes nothing (identities 6 and 11)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.learner import LearnerConfig, score, update
from rlstab_jax.learner.optimizer import apply_gradient, learning_rate
from rlstab_jax.learner.score import policy_scores
from rlstab_jax.learner.update import router_losses
from rlstab_jax.models.layers import RouterSums
from rlstab_jax.objectives import Objective, Regulariser, grpo, minirl, piece, regularisers
from rlstab_jax.types import RoutingReplay, UserError

# Two MoE layers, as many as the rollout's routes have, and no dense ones: half the time to compile.
CONFIG = dataclasses.replace(tiny.MIXED, num_layers=2, dense_layers=())
MODEL = tiny.model(CONFIG, remat="full")
R3 = RoutingReplay.R3


def minibatch() -> tiny.Minibatch:
    rollout = tiny.rollout()
    return tiny.minibatch(
        rollout, score(MODEL, {"params": tiny.parameters(CONFIG)}, rollout, replay=R3)[0], tiny.MINIRL
    )


def test_micro_batches_give_the_same_update_and_statistics() -> None:
    """Rows of different lengths, so that a mean of means would show; router losses over the whole mini-batch."""
    numbers = tiny.numbers(load_balance=0.3, router_z=0.2, max_grad_norm=1e9)
    results = [
        update(
            MODEL, tiny.state(CONFIG, numbers), minibatch(), tiny.MINIRL, numbers,
            replay=R3, micro_batches=parts, use_router_losses=True,
        )
        for parts in (1, 4)
    ]  # fmt: skip
    first, second = (tiny.gradient_of_step(state) for state, _, _ in results)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(first))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * scale), first, second)
    np.testing.assert_allclose(results[0][2]["learner/loss"], results[1][2]["learner/loss"], rtol=1e-5)
    for name, statistic in results[0][1].items():
        other = results[1][1][name].value()
        np.testing.assert_allclose(statistic.value(), other, rtol=1e-4, atol=1e-6, err_msg=name)


@jax.jit
def gradient_by_hand(params: dict, rollout: tiny.Rollout, of_log_probs: jax.Array, of_entropy: jax.Array) -> dict:
    """That of sum(of_log_probs * log pi + of_entropy * entropy), under the rollout's routes."""

    def total(params: dict) -> jax.Array:
        scores, _ = policy_scores(MODEL, {"params": params}, rollout, rollout.routes, 2**24)
        return jnp.sum(of_log_probs * scores.log_probs + of_entropy * scores.entropy)

    return jax.grad(total)(params)


def test_gradient_of_the_policy_term_by_hand() -> None:
    """On its own rollout MiniRL's first gradient is that of -(1/n) sum_i A_i sum_t min(pi/mu, 5) log pi, with sg."""
    batch = minibatch()
    numbers = tiny.numbers(max_grad_norm=1e9)
    state, _, measures = update(MODEL, tiny.state(CONFIG, numbers), batch, tiny.MINIRL, numbers, replay=R3)
    rollout = batch.rollout
    weight = np.exp(np.asarray(batch.old.log_probs) - np.asarray(rollout.log_probs)).clip(max=5.0)
    factor = np.where(rollout.response_mask, weight * np.asarray(batch.advantage)[:, None], 0) / len(weight)
    expected = gradient_by_hand(tiny.parameters(CONFIG), rollout, -factor, np.zeros_like(factor))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), tiny.gradient_of_step(state), expected)
    norm = np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(expected)))
    np.testing.assert_allclose(measures["learner/grad_norm"], norm, rtol=1e-4)


def regularised(kl: float, entropy: float) -> Objective:
    """GRPO, which has every response count alike, with both regularisers whatever their coefficients: one program."""
    kinds = ((regularisers.k2, kl), (regularisers.negative_entropy, entropy))
    return grpo().replace(regularisers=tuple(Regulariser(piece(term), coefficient) for term, coefficient in kinds))


def apart() -> tiny.Minibatch:
    """pi_theta is 0.1 nats above mu_old, 0.3 above pi_old and 0.5 above the reference on each token; A is 0."""
    batch = minibatch()
    target, mask = batch.old.log_probs, batch.rollout.response_mask
    assert mask.any(1).all()
    return dataclasses.replace(
        batch,
        rollout=dataclasses.replace(batch.rollout, log_probs=target - 0.1 * mask),
        old=dataclasses.replace(batch.old, log_probs=target - 0.3 * mask),
        reference=target - 0.5 * mask,
        advantage=jnp.zeros_like(batch.advantage),
    )


def stepped(batch: tiny.Minibatch, objective: Objective) -> tuple[dict, dict, dict]:
    """The gradient, statistics and measures of one update. It takes the state's buffers."""
    numbers = tiny.numbers(max_grad_norm=1e9)
    state = tiny.state(CONFIG, numbers)
    after, statistics, measures = update(MODEL, state, batch, objective, numbers, replay=R3)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    return tiny.gradient_of_step(after), statistics, measures


def test_the_kl_is_to_the_reference_and_gaps_point_from_the_policy_that_sampled() -> None:
    _, statistics, measures = stepped(apart(), regularised(kl=0.3, entropy=0.0))
    np.testing.assert_allclose(measures["learner/loss"], 0.3 * 0.5**2 / 2, rtol=1e-4)
    assert measures["learner/grad_norm"] > 1e-3
    # KL(pi_old || pi_theta) on tokens that pi_theta makes likelier: k1 is negative.
    np.testing.assert_allclose(statistics["staleness/k1"].value(), -0.3, atol=1e-5)
    np.testing.assert_allclose(statistics["staleness/k3"].value(), np.expm1(0.3) - 0.3, atol=1e-5)
    length = np.asarray(apart().rollout.response_mask).sum(1)
    remainder = np.exp(0.1 * length) - 1 - length * np.expm1(0.1)
    np.testing.assert_allclose(statistics["first_order/sequence_gap"].value(), remainder.mean(), atol=1e-5)


def test_the_entropy_bonus_has_a_gradient() -> None:
    gradient, _, _ = stepped(apart(), regularised(kl=0.0, entropy=0.7))
    mask = np.asarray(apart().rollout.response_mask)
    weight = np.float32(-0.7 * mask / mask.sum(1, keepdims=True) / len(mask))
    expected = gradient_by_hand(tiny.parameters(CONFIG), apart().rollout, np.zeros_like(weight), weight)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), gradient, expected)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-2


def test_any_numbers_name_the_groups() -> None:
    """Those of a mini-batch are cut from a whole batch; objectives count by numbers below that of the rows."""
    batch = dataclasses.replace(apart(), advantage=minibatch().advantage)
    (gradient, _, measures), (other, _, others) = (
        stepped(dataclasses.replace(batch, groups=jnp.asarray(groups)), regularised(kl=0.0, entropy=0.0))
        for groups in (np.arange(8) // 2, 9 + 3 * (np.arange(8) // 2))
    )
    assert measures["learner/loss"] == others["learner/loss"] != 0
    jax.tree.map(np.testing.assert_array_equal, gradient, other)


def test_router_sums_are_over_fed_tokens() -> None:
    """Every expert is chosen, so that the routing tells all probabilities; a router of zeros has logsumexp log E."""
    config = dataclasses.replace(CONFIG, experts_per_token=CONFIG.num_experts)
    model, rollout = tiny.model(config), dataclasses.replace(tiny.rollout(), routes=None)
    forward = jax.jit(lambda params: policy_scores(model, {"params": params}, rollout, None, 2**24)[1])
    params = tiny.parameters(config)
    routing = forward(params)
    fed = np.asarray(rollout.fed_mask)
    assert not fed.all()
    experts, probability = np.asarray(routing.used)[:, fed], np.exp(np.asarray(routing.log_probs)[:, fed])
    for layer, (chosen, of_layer) in enumerate(zip(experts, probability, strict=True)):
        ordered = np.take_along_axis(of_layer, chosen.argsort(-1), -1)
        np.testing.assert_allclose(routing.sums.probability[layer], ordered.sum(0), rtol=1e-5)
        np.testing.assert_array_equal(routing.sums.load[layer], np.full(config.num_experts, fed.sum()))
    np.testing.assert_array_equal(routing.sums.tokens, [fed.sum()] * 2)
    level = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * ("router" not in jax.tree_util.keystr(path)), params
    )
    np.testing.assert_allclose(forward(level).sums.z, [fed.sum() * np.log(config.num_experts) ** 2] * 2, rtol=1e-5)


def sums(load: np.ndarray, probability: np.ndarray, z: np.ndarray, tokens: np.ndarray) -> RouterSums:
    return RouterSums(*(jnp.asarray(x, jnp.float32) for x in (load, probability, z, tokens)))


def test_router_losses_by_hand() -> None:
    generator = np.random.default_rng(0)
    probability = generator.dirichlet(np.ones(4), (2, 10))  # layer, token, expert
    chosen = np.argsort(-probability, -1)[..., :2]
    load = np.stack([np.bincount(layer.ravel(), minlength=4) for layer in chosen])
    z = generator.random((2, 10))
    tokens = np.array([10.0, 10.0])
    numbers = tiny.numbers(load_balance=0.5, router_z=0.25)
    balance = sum(4 * (load[i] / 20 * probability[i].mean(0)).sum() for i in range(2))
    expected = 0.5 * balance + 0.25 * sum(z[i].mean() for i in range(2))
    whole = sums(load, probability.sum(1), z.sum(1), tokens)
    np.testing.assert_allclose(router_losses(whole, whole.load, whole.tokens, numbers, 2), expected, rtol=1e-6)
    halves = [sums(load, probability[:, cut].sum(1), z[:, cut].sum(1), tokens) for cut in (slice(0, 3), slice(3, 10))]
    total = sum(router_losses(half, whole.load, whole.tokens, numbers, 2) for half in halves)
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_uniform_routing_has_load_balance_one_per_layer() -> None:
    layers, experts, tokens, k = 3, 8, 40.0, 2
    even = np.full((layers, experts), tokens * k / experts)
    uniform = np.full((layers, experts), tokens / experts)
    zeros, count = np.zeros(layers), np.full(layers, tokens)
    numbers = tiny.numbers(load_balance=1.0)
    assert router_losses(sums(even, uniform, zeros, count), even, count, numbers, k) == pytest.approx(layers)
    skewed = np.eye(experts)[[0] * layers] * tokens
    assert router_losses(sums(skewed, skewed, zeros, count), skewed * k, count, numbers, k) == pytest.approx(layers * 8)


def test_a_gradient_that_is_not_finite_changes_the_step_count_alone() -> None:
    numbers = tiny.numbers()
    step = jax.jit(apply_gradient)
    good = jax.tree.map(jnp.ones_like, tiny.parameters(CONFIG))
    state, _ = step(tiny.state(CONFIG), good, numbers)
    for poison in (np.nan, np.inf):
        bad = good | {"embedding": good["embedding"].at[0, 0].set(poison)}
        after, measures = step(state, bad, numbers)
        jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
        assert after.step == state.step + 1 == 2
        assert not np.isfinite(measures["learner/grad_norm"])
    after, _ = step(state, good, numbers)
    assert (np.asarray(after.params["embedding"]) != np.asarray(state.params["embedding"])).all()


def test_global_norm_clipping_warm_up_and_decay() -> None:
    gradient = jax.tree.map(jnp.ones_like, tiny.parameters(CONFIG))
    count = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    state, measures = jax.jit(apply_gradient)(tiny.state(CONFIG), gradient, tiny.numbers(max_grad_norm=0.5))
    np.testing.assert_allclose(measures["learner/grad_norm"], np.sqrt(count), rtol=1e-5)
    np.testing.assert_allclose(jax.tree.leaves(tiny.gradient_of_step(state))[0], 0.5 / np.sqrt(count), rtol=1e-4)
    rates = [float(learning_rate(tiny.numbers(learning_rate=1.0, warmup_steps=4), step)) for step in range(6)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 1, 1])
    still = jax.tree.map(jnp.zeros_like, gradient)
    state, _ = jax.jit(apply_gradient)(tiny.state(CONFIG), still, tiny.numbers(weight_decay=0.1, learning_rate=0.01))
    before = tiny.parameters(CONFIG)
    np.testing.assert_allclose(state.params["embedding"], before["embedding"] * (1 - 0.001), rtol=1e-5)
    np.testing.assert_array_equal(state.params["final_norm"]["gain"], before["final_norm"]["gain"])
    warming = tiny.numbers(weight_decay=0.1, learning_rate=0.01, warmup_steps=4)
    state, _ = jax.jit(apply_gradient)(tiny.state(CONFIG), still, warming)  # the first of four steps up
    np.testing.assert_allclose(state.params["embedding"], before["embedding"] * (1 - 0.00025), rtol=1e-5)


def test_router_losses_of_a_dense_model_are_refused() -> None:
    config = dataclasses.replace(tiny.MIXED, num_layers=1, num_experts=0, dense_layers=())
    model = tiny.model(config)
    rollout = dataclasses.replace(tiny.rollout(), routes=None)
    batch = tiny.minibatch(rollout, score(model, {"params": tiny.parameters(config)}, rollout)[0], tiny.MINIRL)
    with pytest.raises(UserError, match="router losses need an MoE model"):
        update(
            model, tiny.state(config), batch, tiny.MINIRL, tiny.numbers(), replay=RoutingReplay.LIVE,
            use_router_losses=True,
        )  # fmt: skip


def test_one_trace_for_all_numbers() -> None:
    before = update._cache_size()
    batch = minibatch()
    for rate, eps in ((1e-3, 0.2), (1e-2, 0.3)):
        numbers = LearnerConfig(learning_rate=rate, warmup_steps=3, max_grad_norm=rate).numbers()
        state = tiny.state(CONFIG, numbers)
        for _ in range(2):
            state, _, _ = update(MODEL, state, batch, minirl(eps_low=eps), numbers, replay=R3)
        assert state.step == 2
    assert update._cache_size() <= before + 1
