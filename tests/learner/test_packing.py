"""Sequences packed into fewer rows: where they go, and that scores and updates are as they were (identity 6)."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.learner import plan, score, update
from rlstab_jax.learner.packing import first_fit, heights
from rlstab_jax.types import Rollout, RoutingReplay, UserError, split_rows

# No remat: it compiles faster.
CONFIG = dataclasses.replace(tiny.MIXED, num_layers=2, dense_layers=())
MODEL = tiny.model(CONFIG)
R2, R3 = RoutingReplay.R2, RoutingReplay.R3
CLOSE = partial(np.testing.assert_allclose, atol=1e-5)


def short_rollout() -> Rollout:
    """Responses of 0 to 8 tokens, two a length, on prompts of 1 to 6."""
    rollout = tiny.rollout()
    length = np.array([8, 2, 1, 0, 3, 5, 2, 1])
    mask = np.asarray(rollout.response_mask) & (np.arange(tiny.RESPONSE) < length[:, None])
    return dataclasses.replace(rollout, response_mask=jnp.asarray(mask), log_probs=rollout.log_probs * mask)


@pytest.mark.parametrize(("micro_batches", "shards"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_each_fed_token_has_one_place_among_those_of_its_sequence(micro_batches: int, shards: int) -> None:
    random = np.random.default_rng(0)
    rows, length = 32, 40
    count = np.minimum(random.lognormal(2, 1, rows).astype(int), length)
    first = random.integers(0, length - count + 1)
    column = np.arange(length)
    fed = (column >= first[:, None]) & (column < (first + count)[:, None])
    packing = plan(fed, micro_batches, shards)
    size = rows // (micro_batches * shards)
    dealt = jax.tree.map(np.asarray, split_rows((packing, jnp.asarray(fed)), micro_batches))
    for micro_batch in range(micro_batches):
        packed, of_micro = jax.tree.map(lambda a, i=micro_batch: a[i], dealt)
        source = packed.source.reshape(shards, -1, length)
        assert source.shape[1] in heights(size)
        assert source.shape[1] < size
        shares = packed.place.reshape(shards, size, length), of_micro.reshape(shards, size, length)
        for from_rows, place, share in zip(source, *shares, strict=True):
            assert (place[~share] == from_rows.size).all()
            taken = from_rows.ravel()[place[share]]
            np.testing.assert_array_equal(taken, np.flatnonzero(share))  # the inverse of one another
            assert (from_rows < share.size).sum() == share.sum()
        # In each packed row the columns of a sequence are adjacent and in order.
        for row, numbers in zip(packed.source, np.asarray(packed.segments), strict=True):
            for number in set(numbers) - {0}:
                tokens = row[numbers == number]
                np.testing.assert_array_equal(tokens, tokens[0] + np.arange(len(tokens)))
                at = np.flatnonzero(numbers == number)
                np.testing.assert_array_equal(at, at[0] + np.arange(len(at)))


def test_first_fit_by_decreasing_length() -> None:
    row, start = first_fit(np.array([4, 7, 3, 6, 0, 10]), 10)
    np.testing.assert_array_equal(row, [2, 1, 1, 2, 0, 0])  # 10 | 7 + 3 | 6 + 4; nothing lies behind the last one
    np.testing.assert_array_equal(start, [6, 0, 7, 0, 10, 0])


def test_as_many_rows_as_sequences_always_suffice() -> None:
    packing = plan(np.ones((5, 3), bool))
    np.testing.assert_array_equal(packing.source, np.arange(15).reshape(5, 3))
    assert heights(5) == [1, 2, 3, 4, 5]
    assert heights(64) == [8, 16, 24, 32, 40, 48, 56, 64]


def test_scores_are_as_unpacked() -> None:
    rollout, variables = short_rollout(), {"params": tiny.parameters(CONFIG)}
    packing = plan(np.asarray(rollout.fed_mask))
    assert packing.source.shape[0] < 8
    (apart, statistics), (packed, others) = (
        score(MODEL, variables, rollout, replay=R3, packing=how) for how in (None, packing)
    )
    for name in ("log_probs", "entropy", "router"):
        CLOSE(getattr(packed, name), getattr(apart, name), err_msg=name)
    np.testing.assert_array_equal(packed.routes, apart.routes)
    np.testing.assert_array_equal(packed.live, apart.live)
    assert packed.routes.dtype == apart.routes.dtype == jnp.uint8
    np.testing.assert_array_equal(statistics["routing/load"].total, others["routing/load"].total)
    for name in ("policy/entropy", "routing/margin"):
        CLOSE(statistics[name].value(), others[name].value())


def test_a_plan_for_other_micro_batches_is_refused() -> None:
    rollout, variables = short_rollout(), {"params": tiny.parameters(CONFIG)}
    packing, message = plan(np.asarray(rollout.fed_mask), 4), "planned for 4 micro-batches, used with micro_batches = 2"
    with pytest.raises(UserError, match=message):
        score(MODEL, variables, rollout, packing=packing, micro_batches=2)
    old, _ = score(MODEL, variables, rollout, replay=R3)
    with pytest.raises(UserError, match=message):
        update(
            MODEL, tiny.state(CONFIG), tiny.minibatch(rollout, old, tiny.MINIRL), tiny.MINIRL, tiny.numbers(),
            replay=R3, packing=packing, micro_batches=2,
        )  # fmt: skip


@pytest.mark.parametrize(("replay", "micro_batches", "shards"), [(R2, 1, 2), (R3, 2, 1)])
def test_the_update_is_as_unpacked(replay: RoutingReplay, micro_batches: int, shards: int) -> None:
    """Loss, gradient and statistics."""
    rollout = short_rollout()
    old = score(MODEL, {"params": tiny.parameters(CONFIG)}, rollout, replay=replay)[0]
    batch = tiny.minibatch(rollout, old, tiny.MINIRL)
    numbers = tiny.numbers(max_grad_norm=1e9)
    packing = plan(np.asarray(rollout.fed_mask), micro_batches, shards)
    results = [
        update(
            MODEL, tiny.state(CONFIG, numbers), batch, tiny.MINIRL, numbers,
            replay=replay, micro_batches=micro_batches, packing=how,
        )
        for how in (None, packing)
    ]  # fmt: skip
    first, second = (tiny.gradient_of_step(state) for state, _, _ in results)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(first))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * scale), second, first)
    (_, statistics, measures), (_, others, packed) = results
    assert packed.pop("learner/packed_rows") == packing.source.shape[0] < 8
    for name in measures:
        np.testing.assert_allclose(packed[name], measures[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name, statistic in statistics.items():
        np.testing.assert_allclose(statistic.value(), others[name].value(), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("packed", [False, True])
def test_routes_stay_narrow(packed: bool) -> None:
    """All layers' routes exist as bytes alone, with their gradient's program; a layer widens its own."""
    rollout = short_rollout()
    old = jax.eval_shape(lambda v: score(MODEL, v, rollout)[0], {"params": tiny.parameters(CONFIG)})
    batch = jax.eval_shape(lambda old: tiny.minibatch(rollout, old, tiny.MINIRL), old)
    packing = plan(np.asarray(rollout.fed_mask)) if packed else None
    program = update.lower(
        MODEL, tiny.state(CONFIG), batch, tiny.MINIRL, tiny.numbers(), replay=R3, packing=packing
    ).as_text()
    rows = {8, packing.source.shape[0]} if packing else {8}
    for count in rows:
        shape = f"tensor<2x{count}x{tiny.PROMPT + tiny.RESPONSE - 1}x2x"
        assert f"{shape}ui8>" in program
        assert re.search(re.escape(shape) + "u?i(16|32|64)>", program) is None


def test_one_trace_for_each_number_of_rows() -> None:
    rollout, variables = short_rollout(), {"params": tiny.parameters(CONFIG)}
    fed = np.asarray(rollout.fed_mask)
    before = score._cache_size()
    for order in (np.arange(8), np.arange(8)[::-1]):
        some = jax.tree.map(lambda leaf, o=order: leaf[:, o] if leaf.ndim == 4 else leaf[o], rollout)
        score(MODEL, variables, some, replay=R3, packing=plan(fed[order]))
    assert score._cache_size() <= before + 1


def test_a_kernel_for_one_sequence_a_row_refuses() -> None:
    rollout = short_rollout()
    model = tiny.model(CONFIG, dataclasses.replace(tiny.FLOAT32, dtype="bfloat16"), attention="cudnn")
    with pytest.raises(UserError, match="takes one sequence a row, but the rows are packed"):
        score(model, {"params": tiny.parameters(CONFIG)}, rollout, packing=plan(np.asarray(rollout.fed_mask)))
