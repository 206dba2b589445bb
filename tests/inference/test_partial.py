"""Responses drawn in rounds: at equal weights the same ones, at newer weights a mixture that says what is whose."""

from dataclasses import fields
from typing import Any

import jax
import numpy as np
import tiny

from rlstab_jax.inference import prepare, sample, sample_on, with_room
from rlstab_jax.learner import score
from rlstab_jax.types import Rollout

ROUNDS = (0, 4, tiny.RESPONSE)
# Of tokens: at the end of the first round, within it, within the second one; and of the other rows the buffer's.
LIMITS = np.array([8, 8, 4, 8, 3, 8, 6, 8], np.int32)


def drawn(*weights: dict) -> Rollout:
    """Each round by the next of ``weights``."""
    minimum = np.int32(np.arange(8) % 2 * 6)  # of every other row, above the first round
    own = {"min_new_tokens": minimum, "max_new_tokens": LIMITS}
    sampling, support = tiny.sampling(top_k=np.int32(6), top_p=np.float32(0.9), **own), 6
    config, stop = tiny.MIXED, ROUNDS[1] if len(weights) > 1 else tiny.RESPONSE
    options: dict[str, Any] = {"samples_per_prompt": tiny.SAMPLES, "support": support}
    first = prepare(weights[0], tiny.FLOAT32)
    rollout = sample(tiny.model(), first, *tiny.prompts(), tiny.keys(), sampling, response_length=stop, **options)
    rollout = with_room(rollout, tiny.RESPONSE, 0, config.vocab_size, config.num_experts)
    for params, begun, end in zip(weights[1:], ROUNDS[1:], ROUNDS[2:], strict=False):
        rollout = sample_on(
            tiny.model(),
            prepare(params, tiny.FLOAT32),
            rollout,
            tiny.keys(),
            sampling.per_row(len(rollout.tokens)),
            begun=begun,
            response_length=end - begun,
            support=support,
        )
    return rollout


def test_rounds_by_equal_weights_are_one() -> None:
    """Tokens, masks, routes and supports are equal, log-probs to the rounding of sums in another order."""
    at_once, in_rounds = (drawn(*[tiny.parameters()] * rounds) for rounds in (1, 2))
    lengths = np.asarray(at_once.response_mask).sum(1)
    assert lengths.min() <= ROUNDS[1] < lengths.max()  # some are complete before others go on
    cut = LIMITS < tiny.RESPONSE
    np.testing.assert_array_equal(lengths[cut], LIMITS[cut])
    assert np.asarray(at_once.truncated)[cut].all()
    fed = np.asarray(at_once.fed_mask)
    for field in fields(Rollout):
        one, other = getattr(at_once, field.name), getattr(in_rounds, field.name)
        if field.name == "log_probs":
            np.testing.assert_allclose(one, other, atol=1e-5)
        elif field.name == "support":
            np.testing.assert_array_equal(np.sort(one, -1), np.sort(other, -1))
        elif field.name == "routes":  # a response that met its limit has its last token fed by a further round
            np.testing.assert_array_equal(one[:, fed], other[:, fed])
        else:
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_each_token_is_drawn_by_the_weights_of_its_round() -> None:
    """Its log-prob, and the route of the token before it, are those of these weights on the whole prefix."""
    weights = [tiny.parameters(seed=seed) for seed in (0, 1)]
    rollout = drawn(*weights)
    fed, mask = np.asarray(rollout.fed_mask), np.asarray(rollout.response_mask)
    assert mask[:, ROUNDS[1] :].any()
    for number, params in enumerate(weights):
        drawn_now = np.arange(tiny.RESPONSE) // ROUNDS[1] == number
        successor = np.arange(fed.shape[1]) + 1 - tiny.PROMPT  # the response position that a fed token draws
        fed_now = (successor // ROUNDS[1] == number) | ((successor < 0) & (number == 0))
        scores, _ = score(tiny.model(), {"params": params}, rollout)
        differ = (np.sort(scores.routes, -1) != np.sort(rollout.routes, -1)).any(-1)
        assert not differ[:, fed & fed_now].any()
        assert differ[:, fed & ~fed_now].any()
        gap = np.abs(scores.log_probs - rollout.log_probs)
        assert gap[mask & drawn_now].max() < 1e-5
        assert gap[mask & ~drawn_now].max() > 1e-2
