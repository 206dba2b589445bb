"""The sampler records what it really did: log-probs, routes, masks (identities 3, 6, 7 and 11 of DESIGN.md)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.inference import prepare, sample, sample_keys
from rlstab_jax.inference.sampler import draw, keep_mask
from rlstab_jax.learner import score
from rlstab_jax.models import Precision, fp8
from rlstab_jax.stability.gaps import discrepancy
from rlstab_jax.stability.routing import disagreement
from rlstab_jax.types import Rollout, route_dtype, take_rows

EXPERTS = tiny.MIXED.num_experts
TEMPERATURES = (1.0, 0.6)


def teacher_forced(rollout: Rollout, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """|d log-prob| of sampled tokens, and whether the expert sets of fed tokens differ, [layer, token]."""
    scores, _ = score(tiny.model(precision=precision), prepare(tiny.parameters(), precision), rollout)
    mask, fed = np.asarray(rollout.response_mask), np.asarray(rollout.fed_mask)
    differ = (np.sort(scores.routes, -1) != np.sort(rollout.routes, -1)).any(-1)
    return np.abs(scores.log_probs - rollout.log_probs)[mask], differ[:, fed]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_float32_log_probs_and_routes_are_those_of_a_teacher_forced_pass(temperature: float) -> None:
    rollout = tiny.rollout(tiny.FLOAT32, temperature=temperature)
    difference, differ = teacher_forced(rollout, tiny.FLOAT32)
    assert difference.max() < 1e-5
    assert not differ.any()  # no margin of these routers is below 1e-5
    assert rollout.temperature == np.float32(temperature)
    # What makes this a test: early stops, truncation, prompts of different lengths.
    lengths = np.asarray(rollout.response_mask).sum(1)
    assert lengths.min() < tiny.RESPONSE == lengths.max()
    assert len(set(np.asarray(rollout.prompt_mask).sum(1))) > 2


def test_equal_engines_have_no_discrepancy() -> None:
    rollout = tiny.rollout(tiny.FLOAT32)
    old, _ = score(tiny.model(), {"params": tiny.parameters()}, rollout)
    assert np.abs(old.log_probs - rollout.log_probs).max() < 1e-5
    gaps = {name: s.value() for name, s in discrepancy(old.log_probs, rollout.log_probs, rollout.response_mask).items()}
    assert abs(gaps["k1"]) < 1e-5
    assert abs(gaps["k3"]) < 1e-9
    assert abs(gaps["max_ratio"] - 1) < 1e-5
    assert gaps["f2"] == 0
    assert (disagreement(rollout.routes, old.live, rollout.fed_mask, EXPERTS).value() == 0).all()


@pytest.mark.parametrize(
    ("precision", "median", "largest", "flips"),
    [
        (fp8(), 1e-5, 0.5, 0.05),
        (fp8("float8_e5m2", quantise_router=False, quantise_lm_head=False), 1e-5, 1.0, 0.05),
        (Precision("bfloat16"), 0.01, 0.1, 0.05),
    ],
    ids=["e4m3", "e5m2 with exemptions", "bfloat16"],
)
def test_narrow_formats_decode_as_they_score(precision: Precision, median: float, largest: float, flips: float) -> None:
    """Decoding and scoring sum in different orders: float32 noise of 1e-6, or an ulp of bfloat16 (2^-8), and a value on
    the border between two stored ones then moves by a whole step. So most tokens agree to the noise, and few to a step.
    An engine that ignored its precision would agree as well, so it must differ from float32 by far more.
    """
    difference, differ = teacher_forced(tiny.rollout(precision), precision)
    assert np.median(difference) < median, np.sort(difference)
    assert difference.max() < largest
    assert differ.mean() <= flips
    other, _ = teacher_forced(tiny.rollout(precision), tiny.FLOAT32)
    assert np.median(other) > max(1e-3, 2 * np.median(difference))


def test_routes_are_recorded_for_fed_tokens_alone() -> None:
    rollout = tiny.rollout()
    routes = np.asarray(rollout.routes)
    assert routes.shape == (2, 8, tiny.PROMPT + tiny.RESPONSE - 1, 2)
    assert routes.dtype == np.uint8
    np.testing.assert_array_equal((routes < EXPERTS).all(-1), np.broadcast_to(rollout.fed_mask, routes.shape[:3]))
    assert (routes[:, ~np.asarray(rollout.fed_mask)] == EXPERTS).all()
    assert (routes[..., 0] != routes[..., 1])[:, np.asarray(rollout.fed_mask)].all()


def test_layout_of_stopped_and_truncated_responses() -> None:
    rollout = tiny.rollout()
    tokens, mask = np.asarray(rollout.tokens)[:, tiny.PROMPT :], np.asarray(rollout.response_mask)
    prompts, prompt_mask = tiny.prompts()
    np.testing.assert_array_equal(np.asarray(rollout.tokens)[:, : tiny.PROMPT], np.repeat(prompts, 2, 0))
    np.testing.assert_array_equal(rollout.prompt_mask, np.repeat(prompt_mask, 2, 0))
    for row, kept, truncated in zip(tokens, mask, np.asarray(rollout.truncated), strict=True):
        n = kept.sum()
        assert n >= 1
        assert kept[:n].all()
        stops = np.isin(row[:n], tiny.STOP_IDS)
        assert not stops[:-1].any()  # the stop token belongs to the response, and ends it
        assert stops[-1] == (not truncated)
        assert not truncated or n == tiny.RESPONSE
        assert (row[n:] == 0).all()
    assert (np.asarray(rollout.log_probs)[~mask] == 0).all()
    assert (np.asarray(rollout.log_probs)[mask] < 0).all()


def engine(prompts: np.ndarray, mask: np.ndarray, keys: jax.Array, samples: int = 1, **options: object) -> Rollout:
    sampling = options.pop("sampling", None) or tiny.sampling()
    variables = prepare(tiny.parameters(), tiny.FLOAT32)
    response = options.pop("response_length", tiny.RESPONSE)
    return sample(
        tiny.model(), variables, prompts, mask, keys, sampling, response_length=response, samples_per_prompt=samples,
        **options,
    )  # fmt: skip


def assert_same_rollout(first: Rollout, second: Rollout) -> None:
    for name in ("tokens", "response_mask", "truncated", "routes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    np.testing.assert_allclose(first.log_probs, second.log_probs, atol=1e-5)


def test_shared_prefill_slot_and_padding_change_nothing() -> None:
    """Eight rows of their own, in another order, behind more padding, with a row that only fills up."""
    prompts, mask = tiny.prompts()
    shared = tiny.rollout(tiny.FLOAT32)
    order = np.random.default_rng(1).permutation(8)
    separate = np.repeat(prompts, 2, 0)[order], np.repeat(mask, 2, 0)[order]
    filler = np.full((1, tiny.PROMPT), 9, np.int32), np.zeros((1, tiny.PROMPT), bool)
    tokens, valid = (np.pad(np.concatenate(pair), ((0, 0), (3, 0))) for pair in zip(separate, filler, strict=True))
    keys = jnp.concatenate([tiny.keys()[order], tiny.keys()[:1]])
    rollout = engine(tokens, valid, keys)
    assert not rollout.response_mask[8].any()
    assert (np.asarray(rollout.routes)[:, 8] == EXPERTS).all()
    cut = dataclasses.replace(
        take_rows(rollout, np.arange(8)), tokens=rollout.tokens[:8, 3:], routes=rollout.routes[:, :8, 3:]
    )
    assert_same_rollout(take_rows(shared, order), cut)


def test_keys_depend_on_seed_step_prompt_sample_and_attempt_alone() -> None:
    def data(
        seed: int = 0, step: int = 3, ids: tuple = (5, 2**40 + 5, 9), attempt: int = 0, samples: int = 2
    ) -> np.ndarray:
        return np.asarray(jax.random.key_data(sample_keys(jax.random.key(seed), step, ids, samples, attempt)))

    base = data()
    assert len(np.unique(base, axis=0)) == 6
    np.testing.assert_array_equal(data(ids=(9, 5))[:2], base[4:])  # not on the slot
    np.testing.assert_array_equal(data(samples=3)[[0, 1, 3, 4]], base[:4])  # nor on how many samples there are
    for other in (data(seed=1), data(step=4), data(attempt=1), data(ids=(6, 7, 8))):
        assert not (other[:, None] == base).all(-1).any()


def test_a_draw_depends_on_its_key_and_position_alone() -> None:
    logits = jnp.zeros((4, 1000))
    keys = tiny.keys()[:4]
    first = draw(logits, keys, 3, tiny.sampling(), False)[0]
    np.testing.assert_array_equal(draw(logits[::-1], keys[::-1], 3, tiny.sampling(), False)[0][::-1], first)
    assert (draw(logits, keys, 4, tiny.sampling(), False)[0] != first).all()


def kept_by_hand(p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    mass = np.cumsum(p[kept] / p[kept].sum())
    kept = kept[: int(np.searchsorted(mass, top_p)) + 1]
    return np.isin(np.arange(len(p)), kept)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (0, 0.5), (5, 0.7), (100, 1e-6)])
def test_support_and_log_probs_under_truncation(top_k: int, top_p: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((200, 11)).astype(np.float32) * 2
    temperature = 0.8
    sampling = tiny.sampling(temperature=np.float32(temperature), top_k=np.int32(top_k), top_p=np.float32(top_p))
    keys = jax.random.split(jax.random.key(0), 200)
    tokens, log_probs = draw(jnp.asarray(logits), keys, 0, sampling, True)
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum(1, keepdims=True)
    for row in range(200):
        kept = kept_by_hand(p[row], top_k, top_p)
        np.testing.assert_array_equal(keep_mask(jnp.asarray(logits[row : row + 1] / temperature), sampling)[0], kept)
        assert kept[tokens[row]]
        np.testing.assert_allclose(log_probs[row], np.log(p[row, tokens[row]] / p[row, kept].sum()), atol=1e-5)


def test_ties_with_the_last_kept_token_are_kept() -> None:
    mask = keep_mask(jnp.asarray([[2.0, 1.0, 1.0, 0.0]]), tiny.sampling(top_k=2))
    np.testing.assert_array_equal(mask[0], [True, True, True, False])


def test_draws_follow_the_distribution() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    keys = jax.random.split(jax.random.key(1), 20_000)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (20_000, 4))
    tokens, _ = draw(logits, keys, 0, tiny.sampling(), False)
    shares = np.bincount(np.asarray(tokens), minlength=4) / 20_000
    assert (np.abs(shares - p) < 4 * np.sqrt(p * (1 - p) / 20_000)).all()


def test_greedy_is_a_point_mass() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 9)), jnp.float32)
    tokens, log_probs = draw(logits, jax.random.split(jax.random.key(0), 6), 0, tiny.sampling(temperature=0.0), False)
    np.testing.assert_array_equal(tokens, np.argmax(logits, 1))
    assert (np.asarray(log_probs) == 0).all()


def test_one_trace_for_all_numbers() -> None:
    """Temperature, lengths, stop tokens, weights, prompts and keys are traced: nothing of them compiles again."""
    prompts, mask = tiny.prompts()
    before = sample._cache_size()
    tiny.rollout(tiny.FLOAT32)
    once = sample._cache_size()
    for step, changes in enumerate(({}, {"temperature": np.float32(0.3)}, {"max_new_tokens": np.int32(3)})):
        sampling = tiny.sampling(**changes, stop_ids=np.array([step, 2], np.int32))
        result = engine(prompts, mask, tiny.keys(step=step), tiny.SAMPLES, sampling=sampling)
        if "max_new_tokens" in changes:
            assert result.response_mask.sum(1).max() == 3
    assert once <= before + 1
    assert sample._cache_size() <= once + 1  # max_new_tokens as an array instead of the default integer


def test_more_than_255_experts_need_sixteen_bits() -> None:
    assert [route_dtype(n) for n in (8, 255, 256, 65_534)] == [np.uint8, np.uint8, np.uint16, np.uint16]
    config = dataclasses.replace(
        tiny.MIXED, num_layers=1, dense_layers=(), num_experts=300, embed_dim=8, expert_dim=2, head_dim=4
    )
    prompts, mask = tiny.prompts()
    # The last experts are much preferred by some tokens.
    grow = partial(jnp.multiply, jnp.where(jnp.arange(300) < 256, 1, 4))
    params = jax.tree.map(lambda leaf: grow(leaf) if leaf.shape[-1] == 300 else leaf, tiny.parameters(config))
    variables = prepare(params, tiny.FLOAT32)
    model = tiny.model(config, experts="dense")
    rollout = sample(model, variables, prompts, mask, tiny.keys(samples=1), tiny.sampling(), response_length=2)
    assert rollout.routes.dtype == np.uint16
    assert np.asarray(rollout.routes)[:, np.asarray(rollout.fed_mask)].max() > 255
    assert (np.asarray(rollout.routes)[:, ~np.asarray(rollout.fed_mask)] == 300).all()


def test_a_dense_model_has_no_routes() -> None:
    config = dataclasses.replace(tiny.MIXED, num_layers=1, num_experts=0, dense_layers=())
    prompts, mask = tiny.prompts()
    variables = prepare(tiny.parameters(config), tiny.FLOAT32)
    rollout = sample(
        tiny.model(config), variables, prompts, mask, tiny.keys(samples=1), tiny.sampling(), response_length=2
    )
    assert rollout.routes is None
    scores, statistics = score(tiny.model(config), variables, rollout)
    assert scores.routes is scores.live is scores.router is None
    assert list(statistics) == ["policy/entropy"]
    assert np.abs(scores.log_probs - rollout.log_probs).max() < 1e-5
