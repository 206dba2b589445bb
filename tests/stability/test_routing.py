"""Diagnostics of routing against plain loops."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlstab_jax.stability import routing

MANY = settings(max_examples=12, deadline=None)
SEEDS = st.integers(0, 2**31)
LAYERS, ROWS, FED, K, EXPERTS = 3, 2, 6, 2, 5


def routes(random: np.random.Generator, unrecorded: float = 0.1) -> np.ndarray:
    chosen = np.argsort(random.random((LAYERS, ROWS, FED, EXPERTS)), -1)[..., :K].astype(np.uint8)
    return np.where(random.random(chosen.shape) < unrecorded, EXPERTS, chosen).astype(np.uint8)


def batch(seed: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    first, other = routes(random), routes(random)
    second = np.where(random.random((LAYERS, ROWS, FED, 1)) < 0.3, other, first[..., ::-1])
    fed_mask = random.random((ROWS, FED)) < 0.8
    margin = np.where(fed_mask, random.random((LAYERS, ROWS, FED)), np.nan).astype(np.float32)
    return first, second, margin, fed_mask


def plain(first, second, fed_mask) -> tuple[np.ndarray, np.ndarray]:
    counted, flipped = np.zeros((2, LAYERS, ROWS, FED), bool)
    for index in np.ndindex(counted.shape):
        a, b = set(first[index].tolist()), set(second[index].tolist())
        counted[index] = fed_mask[index[1:]] and EXPERTS not in a | b
        flipped[index] = counted[index] and a != b
    return counted, flipped


@MANY
@given(seed=SEEDS)
def test_disagreement_and_flips(seed: int) -> None:
    first, second, margin, fed_mask = batch(seed)
    counted, flipped = plain(first, second, fed_mask)
    begins = np.zeros_like(flipped)
    for layer, row, t in np.argwhere(flipped):
        begins[layer, row, t] = not flipped[:layer, row, : t + 1].any()
    total = routing.disagreement(first, second, fed_mask, EXPERTS)
    np.testing.assert_allclose(total.total, flipped.sum((1, 2)))
    np.testing.assert_allclose(total.weight, counted.sum((1, 2)))
    anywhere = routing.tokens_differ(first, second, fed_mask, EXPERTS)
    np.testing.assert_allclose((anywhere.total, anywhere.weight), (flipped.any(0).sum(), counted.any(0).sum()))
    parts = routing.flips(first, second, margin, fed_mask, EXPERTS)
    np.testing.assert_allclose(parts["first"].total, begins.sum((1, 2)))
    np.testing.assert_allclose(parts["first"].total + parts["downstream"].total, total.total)
    np.testing.assert_allclose(parts["first_margin"].total, (margin * begins).sum((1, 2), where=begins), rtol=1e-5)
    np.testing.assert_allclose(parts["first_margin"].weight, begins.sum((1, 2)))


@MANY
@given(seed=SEEDS)
def test_load_and_margin(seed: int) -> None:
    first, _, margin, fed_mask = batch(seed)
    expected = np.zeros((LAYERS, EXPERTS))
    for layer, row, t, k in np.ndindex(first.shape):
        if fed_mask[row, t] and first[layer, row, t, k] < EXPERTS:
            expected[layer, first[layer, row, t, k]] += 1
    counts = routing.load(first, fed_mask, EXPERTS)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(routing.load_max(counts), expected.max(1) / expected.mean(1), rtol=1e-6)
    mean = np.where(fed_mask, margin, 0).sum((1, 2)) / fed_mask.sum()
    np.testing.assert_allclose(routing.margin_statistics(margin, fed_mask).value(), mean, rtol=1e-5)


def test_by_hand() -> None:
    """One row, three tokens, two layers. The flip of token 1 in layer 1 follows that of token 0 in layer 0."""
    first = np.array([[[[0, 1], [0, 1], [0, 1]]], [[[0, 1], [0, 1], [0, 1]]]], np.uint8)
    second = np.array([[[[0, 2], [1, 0], [0, 1]]], [[[1, 0], [2, 1], [1, 0]]]], np.uint8)
    mask = np.ones((1, 3), bool)
    np.testing.assert_allclose(routing.disagreement(first, second, mask, 4).value(), [1 / 3, 1 / 3])
    np.testing.assert_allclose(routing.tokens_differ(first, second, mask, 4).value(), 2 / 3)
    parts = routing.flips(first, second, np.full((2, 1, 3), 0.5, np.float32), mask, 4)
    np.testing.assert_allclose(parts["first"].value(), [1 / 3, 0])
    np.testing.assert_allclose(parts["downstream"].value(), [0, 1 / 3])
    np.testing.assert_array_equal(routing.load(second, mask, 4), [[3, 2, 1, 0], [2, 3, 1, 0]])
    three = routing.three_ways(first, second, first, mask, 4)
    np.testing.assert_allclose(three["rollout_old"].value(), [1 / 3, 1 / 3])
    np.testing.assert_allclose(three["rollout_current"].value(), [0, 0])
    np.testing.assert_allclose(three["old_current"].value(), [1 / 3, 1 / 3])
