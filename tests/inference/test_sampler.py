"""The sampler records what it really did: log-probs, routes, masks (identities 3, 6, 7 and 11 of DESIGN.md)."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.inference import prepare, sample, sample_continuously, sample_keys, sample_matched, slots
from rlstab_jax.inference.sampler import sample_batch
from rlstab_jax.learner import score
from rlstab_jax.models import Precision, fp8
from rlstab_jax.stability.gaps import discrepancy
from rlstab_jax.stability.routing import disagreement
from rlstab_jax.types import Rollout, UserError, route_dtype, take_rows

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
    assert (rollout.temperature == np.float32(temperature)).all()
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
    ("precision", "largest", "flips"),
    [
        (fp8(), 0.5, 0.05),
        (fp8("float8_e5m2", quantise_router=False, quantise_lm_head=False), 1.0, 0.05),
        (Precision("bfloat16"), 0.1, 0.05),
        (fp8(dtype="bfloat16"), 0.5, 0.05),
    ],
    ids=["e4m3", "e5m2 with exemptions", "bfloat16", "e4m3 and bfloat16"],
)
def test_narrow_formats_decode_as_they_score(precision: Precision, largest: float, flips: float) -> None:
    """Decoding and scoring sum in different orders: float32 noise of 1e-6, and a value on the border between two stored
    ones then moves by a whole step. So most tokens agree to the noise, and few to a step. An engine that ignored its
    precision would agree as well, so it must differ from float32 by far more.
    """
    difference, differ = teacher_forced(tiny.rollout(precision), precision)
    assert np.median(difference) < 1e-5, np.sort(difference)
    assert difference.max() < largest
    assert differ.mean() <= flips
    other, _ = teacher_forced(tiny.rollout(precision), tiny.FLOAT32)
    assert np.median(other) > 1e-3


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
    variables = prepare(tiny.parameters(), tiny.FLOAT32)
    rollout = sample_batch(
        tiny.model(), variables, tokens, valid, keys, tiny.sampling(), response_length=tiny.RESPONSE,
        samples_per_prompt=1, support=0, record_routes=True,
    )  # fmt: skip
    assert not rollout.response_mask[8].any()
    assert (np.asarray(rollout.routes)[:, 8] == EXPERTS).all()
    cut = dataclasses.replace(
        take_rows(rollout, np.arange(8)), tokens=rollout.tokens[:8, 3:], routes=rollout.routes[:, :8, 3:]
    )
    assert_same_rollout(take_rows(shared, order), cut)


def test_columns_that_no_prompt_needs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, mask = tiny.prompts()
    wide = [np.pad(a, ((0, 0), (17, 0)), constant_values=v) for a, v in ((prompts, 3), (mask, False))]
    monkeypatch.setattr(slots, "SHORTEST_PROMPT", 4)
    assert [slots.spare_columns(m) for m in (mask, wide[1], wide[1][:, :20])] == [0, 17, 17]  # 23 -> 12 -> 6
    rollout = engine(*wide, tiny.keys(), tiny.SAMPLES)
    narrow = tiny.rollout(tiny.FLOAT32)
    np.testing.assert_array_equal(rollout.tokens[:, :17], 3)
    assert not rollout.prompt_mask[:, :17].any()
    assert (np.asarray(rollout.routes)[:, :, :17] == EXPERTS).all()
    cut = dataclasses.replace(rollout, tokens=rollout.tokens[:, 17:], routes=rollout.routes[:, :, 17:])
    assert_same_rollout(narrow, cut)
    assert rollout.tokens.shape[1] == 17 + narrow.tokens.shape[1]


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


@pytest.mark.parametrize("sampler", [sample, partial(sample_continuously, slots=3), sample_matched])
def test_barred_stop_tokens_are_barred_from_the_scores_too(sampler: Any) -> None:
    """pi is a distribution over the tokens that could be drawn, at each row's own minimal length: mu at equal weights.
    One over the whole vocabulary would differ in the first tokens by what stop tokens hold."""
    rows = np.arange(8)
    minimum = np.int32(rows // 2 * 2)
    sampling = tiny.sampling(temperature=np.float32(0.7 + rows / 10), min_new_tokens=minimum)
    variables = prepare(tiny.parameters(), tiny.FLOAT32)
    rollout = sampler(
        tiny.model(), variables, *tiny.prompts(), tiny.keys(), sampling, response_length=tiny.RESPONSE,
        samples_per_prompt=tiny.SAMPLES,
    )  # fmt: skip
    mask, early = np.asarray(rollout.response_mask), np.arange(tiny.RESPONSE) < minimum[:, None]
    assert early.sum() == mask[early].sum()
    assert mask[~early].sum() < mask[~early].size
    scores, _ = score(tiny.model(), {"params": tiny.parameters()}, rollout)
    np.testing.assert_allclose(scores.log_probs, rollout.log_probs, atol=1e-5)
    whole, _ = score(tiny.model(), {"params": tiny.parameters()}, dataclasses.replace(rollout, minimum=None))
    np.testing.assert_allclose(whole.log_probs[~early], rollout.log_probs[~early], atol=1e-5)
    assert np.asarray(rollout.log_probs - whole.log_probs)[early].min() > 1e-3
    assert np.asarray(scores.entropy != whole.entropy)[early].all()


def test_under_truncation_equal_engines_have_equal_log_probs() -> None:
    """pi is renormalised over what mu could draw, at each row's own temperature. Where mu is a
    mixture, pi is none, and what was recorded is the mixture of pi made by hand."""
    prompts, mask = tiny.prompts()
    rows = np.arange(len(prompts) * tiny.SAMPLES)
    uniform = np.float32(rows // 4 * 0.3)
    sampling = tiny.sampling(
        temperature=np.float32(0.7 + rows / 10), top_p=np.float32(0.6 + rows / 20), top_k=np.int32(rows % 3 * 3),
        min_p=np.float32(rows % 2 * 0.1), uniform=uniform,
    )  # fmt: skip
    rollout = engine(prompts, mask, tiny.keys(), tiny.SAMPLES, sampling=sampling, support=9)
    kept, valid = np.asarray(rollout.support), np.asarray(rollout.response_mask)
    sizes = (kept < tiny.MIXED.vocab_size).sum(-1)
    assert len(set(sizes[valid])) > 4
    assert (sizes[~valid] == 0).all()
    tokens = np.asarray(rollout.tokens)[:, tiny.PROMPT :]
    assert (kept == tokens[..., None]).any(-1)[valid].all()
    old, _ = score(tiny.model(), {"params": tiny.parameters()}, rollout)
    share = np.broadcast_to(uniform[:, None], valid.shape)[valid]
    mixture = (1 - share) * np.exp(np.asarray(old.log_probs)[valid]) + share / sizes[valid]
    np.testing.assert_allclose(rollout.log_probs[valid], np.log(mixture), atol=1e-5)
    whole, _ = score(tiny.model(), {"params": tiny.parameters()}, dataclasses.replace(rollout, support=None))
    plain = valid & (sizes < 17) & (uniform == 0)[:, None]
    assert np.abs(whole.log_probs - rollout.log_probs)[plain].min() > 1e-3


def test_one_trace_for_all_numbers() -> None:
    """Temperature, lengths, stop tokens, weights, prompts and keys are traced: nothing of them compiles again."""
    prompts, mask = tiny.prompts()
    before = sample_batch._cache_size()
    tiny.rollout(tiny.FLOAT32)
    once = sample_batch._cache_size()
    for step, changes in enumerate(({}, {"temperature": np.float32(0.3)}, {"max_new_tokens": np.int32(3)})):
        sampling = tiny.sampling(**changes, stop_ids=np.array([step, 2], np.int32))
        result = engine(prompts, mask, tiny.keys(step=step), tiny.SAMPLES, sampling=sampling)
        if "max_new_tokens" in changes:
            assert result.response_mask.sum(1).max() == 3
    assert once <= before + 1
    assert sample_batch._cache_size() <= once + 1  # max_new_tokens as an array instead of the default integer


def test_a_step_copies_no_cache() -> None:
    """In the compiled loop over tokens, arrays of a cache's shape come from their update in place alone."""
    arguments = (tiny.model(), prepare(tiny.parameters(), tiny.FLOAT32), *tiny.prompts(), tiny.keys(), tiny.sampling())
    options = {"response_length": 10, "samples_per_prompt": 2, "support": 0, "record_routes": True}
    program = sample_batch.lower(*arguments, **options).compile().as_text()
    made = re.findall(r"f32\[8,2,(?:8,9|9,8)\]\S* ([\w-]+)\(.*op_name=\"[^\"]*while/body/Block[^\"]*?(\w+)\"", program)
    assert len(made) >= 8  # keys and values of four layers
    assert {op for op, _ in made} <= {"fusion", "dynamic-update-slice", "bitcast"}, made
    assert {name for op, name in made if op != "bitcast"} == {"dynamic_update_slice"}, made


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


@pytest.mark.parametrize("sampler", [sample, partial(sample_continuously, slots=2), sample_matched])
def test_another_number_of_keys_than_of_responses_is_refused(sampler: Any) -> None:
    variables = prepare(tiny.parameters(), tiny.FLOAT32)
    with pytest.raises(UserError, match=r"keys \(4,\): expected one for each of 8 responses"):
        sampler(
            tiny.model(), variables, *tiny.prompts(), tiny.keys(samples=1), tiny.sampling(),
            response_length=tiny.RESPONSE, samples_per_prompt=2,
        )  # fmt: skip


def test_weights_that_were_not_prepared_are_refused() -> None:
    """A sampler would quantise them again at each token, or take quantised ones as they are."""
    for precision in (fp8(), Precision(weights="int8")):
        with pytest.raises(UserError, match=r"but these are not quantised: pass inference\.prepare"):
            sample(
                tiny.model(precision=precision), {"params": tiny.parameters()}, *tiny.prompts(), tiny.keys(),
                tiny.sampling(), response_length=tiny.RESPONSE, samples_per_prompt=tiny.SAMPLES,
            )  # fmt: skip
    with pytest.raises(UserError, match="the weights are quantised, but the model's precision stores them as they"):
        sample(
            tiny.model(), prepare(tiny.parameters(), fp8()), *tiny.prompts(), tiny.keys(),
            tiny.sampling(), response_length=tiny.RESPONSE, samples_per_prompt=tiny.SAMPLES,
        )  # fmt: skip
