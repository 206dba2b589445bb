"""The LM head in tiles of logits: values and gradients of the plain log-softmax, and memory that a tile bounds."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.inference import prepare
from rlstab_jax.learner import score
from rlstab_jax.learner.head import LANES, Tiles, head_log_probs
from rlstab_jax.models import ModelConfig, Precision, fp8, quantised
from rlstab_jax.models.precision import store_activations, store_weight
from rlstab_jax.models.transformer import logits_of
from rlstab_jax.types import Rollout

D, ROWS, VOCAB = 8, 7, 300
CONFIG = ModelConfig(vocab_size=VOCAB, num_layers=1, embed_dim=D, num_heads=1, num_kv_heads=1, num_experts=0)
TARGETS = np.array([0, 299, 40, 128, 128, 255, 256])
TEMPERATURE = np.float32([0.7, 0.7, 1.0, 0.5, 2.0, 1.0, 1.3])
# Some tokens of each draw, filled up with the vocabulary's size; the last row was not drawn at all.
SUPPORT = np.array([[0, 4, 300], [299, 300, 300], [2, 40, 256], [128, 127, 129], [1, 2, 128], [3, 255, 0], [300] * 3])
OF_LOG_PROB, OF_ENTROPY = np.cos(np.arange(ROWS)), np.sin(1.0 + np.arange(ROWS))


def arrays(dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [rows, d] and a weight [d, vocab]."""
    generator = np.random.default_rng(0)
    return generator.standard_normal((ROWS, D)).astype(dtype), generator.standard_normal((D, VOCAB)).astype(dtype)


def oracle(hidden: np.ndarray, weight: np.ndarray, truncated: bool) -> tuple[np.ndarray, ...]:
    """Log-probs, entropies, and the gradients of their weighted sum, in float64, from the whole matrix of logits."""
    z = hidden.astype(np.float64) @ weight.astype(np.float64) / TEMPERATURE[:, None]
    drawn = np.ones(ROWS, bool)
    if truncated:
        kept = (SUPPORT[..., None] == np.arange(VOCAB)).any(1)
        drawn = kept.any(1)
        kept[~drawn, 0] = True  # any: its numbers are not used
        z = np.where(kept, z, -np.inf)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    p = np.exp(log_p)
    finite = np.where(p > 0, log_p, 0)
    log_prob = np.where(drawn, log_p[np.arange(ROWS), TARGETS], 0)
    entropy = -(p * finite).sum(1)
    a, b = np.where(drawn, OF_LOG_PROB, 0)[:, None], OF_ENTROPY[:, None]
    d_logits = (a * (np.arange(VOCAB) == TARGETS[:, None]) - a * p - b * p * (finite + entropy[:, None])) / TEMPERATURE[
        :, None
    ]
    return log_prob, entropy, d_logits @ weight.T.astype(np.float64), hidden.T.astype(np.float64) @ d_logits


@partial(jax.jit, static_argnames=("tied", "truncated", "logits", "precision"))
def run(hidden: Any, weight: Any, tied: bool, truncated: bool, logits: int, precision: Precision) -> tuple:
    config = ModelConfig(**(vars(CONFIG) | {"tie_embeddings": tied}))

    def loss(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple]:
        params = {"embedding": weight.T} if tied else {"lm_head": {"kernel": weight}}
        outputs = head_log_probs(
            tiny.model(config, precision), {"params": params}, hidden, jnp.asarray(TARGETS), jnp.asarray(TEMPERATURE),
            jnp.asarray(SUPPORT) if truncated else None, logits,
        )  # fmt: skip
        return OF_LOG_PROB @ outputs[0] + OF_ENTROPY @ outputs[1], outputs

    gradient, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, weight)
    return *outputs, *gradient


def test_a_target_outside_its_support_is_seen() -> None:
    """It is not taken for a certain one: no draw can have made it. A row without support was not drawn."""
    hidden, weight = (jnp.asarray(x) for x in arrays())
    support = jnp.asarray([[7, 4, 300], *SUPPORT[1:].tolist()])
    rows = jnp.asarray(TARGETS), jnp.asarray(TEMPERATURE), support
    found, _ = head_log_probs(tiny.model(CONFIG), {"params": {"lm_head": {"kernel": weight}}}, hidden, *rows, 900)
    assert found[0] == -np.inf
    assert np.isfinite(found[1:]).all()
    assert found[6] == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("logits", [2**20, 900, 260 * 7, 7])
def test_values_and_gradients_of_the_plain_log_softmax(tied: bool, truncated: bool, logits: int) -> None:
    """In one tile; in three of 128 columns, of which the last overlaps; in two; column by column."""
    got = run(*arrays(), tied=tied, truncated=truncated, logits=logits, precision=tiny.FLOAT32)
    for mine, wanted in zip(got, oracle(*arrays(), truncated), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-5)


@pytest.mark.parametrize("logits", [2**20, 900])
def test_barred_tokens_are_left_out(logits: int) -> None:
    """As if all others were the support, in values and gradients."""
    barred = np.array([[1, 299], [300, 300], [128, 41], [127, 255], [300, 7], [254, 256], [0, 0]])
    others = [np.setdiff1d(np.arange(VOCAB), row) for row in barred]
    support = np.stack([np.pad(row, (0, VOCAB - len(row)), constant_values=VOCAB) for row in others])

    def outputs(hidden: jax.Array, weight: jax.Array, **among: Any) -> tuple:
        params = {"lm_head": {"kernel": weight}}
        rows = jnp.asarray(TARGETS), jnp.asarray(TEMPERATURE)
        log_probs, entropies = head_log_probs(
            tiny.model(CONFIG), {"params": params}, hidden, *rows, among.get("support"), logits, among.get("barred")
        )
        return OF_LOG_PROB @ log_probs + OF_ENTROPY @ entropies, (log_probs, entropies)

    run = jax.jit(jax.grad(outputs, argnums=(0, 1), has_aux=True))
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-5),
        run(*arrays(), barred=jnp.asarray(barred)),
        run(*arrays(), support=jnp.asarray(support)),
    )


@pytest.mark.parametrize("logits", [2**20, 900])
def test_bfloat16_products_sum_in_float32(logits: int) -> None:
    """The weight's gradient over rows of one sign: a sum kept in bfloat16 would stop growing."""
    hidden, weight = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    got = run(
        hidden, weight.astype(jnp.float32), tied=False, truncated=False, logits=logits, precision=Precision("bfloat16")
    )
    wanted = oracle(np.asarray(hidden, np.float32), np.asarray(weight, np.float32), False)
    for i, (mine, exact) in enumerate(zip(got, wanted, strict=True)):
        assert mine.dtype == (jnp.bfloat16 if i == 2 else jnp.float32)
        np.testing.assert_allclose(np.asarray(mine, np.float32), exact, atol=1e-5 if i < 2 else 2e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_float32_head_of_a_bfloat16_engine(tied: bool) -> None:
    """What remains is float32's rounding, 2^-24 of logits of up to 10; a bfloat16 head rounds its weights by 2^-9.
    Hidden states and their gradients stay bfloat16. The sampler's head gives the same."""
    hidden, weight = arrays()
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    wanted = oracle(np.asarray(hidden, np.float32), weight, False)
    narrow, wide = Precision("bfloat16"), Precision("bfloat16", float32_lm_head=True)
    got = {of: run(hidden, weight, tied=tied, truncated=False, logits=900, precision=of) for of in (narrow, wide)}
    assert [x.dtype for x in got[wide]] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    for i, tolerance in enumerate((1e-5, 1e-5, 2e-2, 1e-5)):
        np.testing.assert_allclose(np.asarray(got[wide][i], np.float32), wanted[i], atol=tolerance)
    for i in (0, 1, 3):
        errors = {of: np.abs(got[of][i] - wanted[i]).max() for of in got}
        assert errors[narrow] > 1e-3 > 100 * errors[wide]

    config = ModelConfig(**(vars(CONFIG) | {"tie_embeddings": tied}))
    variables = prepare({"embedding": weight.T} | ({} if tied else {"lm_head": {"kernel": weight}}), wide)
    log_p = jax.nn.log_softmax(logits_of(tiny.model(config, wide), variables, hidden) / TEMPERATURE[:, None])
    np.testing.assert_allclose(log_p[np.arange(ROWS), TARGETS], got[wide][0], atol=1e-5)


def test_a_quantised_head_is_the_model_s_own() -> None:
    hidden, weight = arrays()
    model = tiny.model(ModelConfig(**(vars(CONFIG) | {"tie_embeddings": False})), fp8())
    params = {"lm_head": {"kernel": jnp.asarray(weight)}, "embedding": jnp.asarray(weight.T)}
    variables = prepare(params, fp8())
    logits = model.apply(variables, jnp.asarray(hidden), method="logits")
    log_p = jax.nn.log_softmax(logits / TEMPERATURE[:, None])
    for chunk in (2**20, 2 * VOCAB):
        log_prob, entropy = head_log_probs(
            model, variables, jnp.asarray(hidden), jnp.asarray(TARGETS), jnp.asarray(TEMPERATURE), None, chunk
        )
        np.testing.assert_allclose(log_prob, log_p[np.arange(ROWS), TARGETS], atol=1e-5)
        np.testing.assert_allclose(entropy, -(jnp.exp(log_p) * log_p).sum(1), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "precision",
    [fp8(), quantised("int8", scales="block", block=3), fp8(weights="none")],
    ids=["e4m3", "int8", "inputs"],
)
def test_gradients_go_straight_through_a_quantised_head(tied: bool, precision: Precision) -> None:
    """They are those of the plain log-softmax at the numbers that its stored values stand for, in blocks of rows."""
    hidden, weight = arrays()
    numbers = (
        np.asarray(store_activations(jnp.asarray(hidden), precision).load(block=precision.block)),
        np.asarray(store_weight(jnp.asarray(weight), precision).load(block=precision.block)),
    )
    got = run(hidden, weight, tied=tied, truncated=True, logits=900, precision=precision)
    for mine, wanted in zip(got, oracle(*numbers, truncated=True), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-5)


def test_logits_that_are_not_finite_show() -> None:
    hidden, weight = arrays()
    hidden[2, 3] = np.nan
    got = run(hidden, weight, tied=True, truncated=False, logits=900, precision=tiny.FLOAT32)
    broken = np.arange(ROWS) == 2
    for rows in got[:2]:
        np.testing.assert_array_equal(np.isnan(rows), broken)


@pytest.mark.parametrize("logits", [1, 17, 4096, 2**22, 2**24])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 17), (4096, 1000), (5000, 151_936), (7, 32_000)])
@pytest.mark.parametrize(("across", "along"), [(1, 1), (8, 1), (4, 5)])
def test_tiles_cover_all_logits_within_the_budget(rows: int, vocab: int, logits: int, across: int, along: int) -> None:
    """On devices over which rows and vocabulary lie, too: with a budget of fewer logits than these, each has one."""
    tiles = Tiles.within(logits, rows, vocab, across, along)
    assert tiles.across == (across if rows % across == 0 else 1)
    assert tiles.along == (along if vocab % along == 0 else 1)
    assert tiles.rows * tiles.columns <= max(logits, tiles.across * tiles.along)
    # Blocks are as equal as the units' width lets them be.
    width = LANES if tiles.each % LANES == 0 else 1
    assert tiles.columns * tiles.blocks - vocab <= tiles.along * tiles.blocks * width
    assert tiles.rows * tiles.row_blocks >= rows
    assert tiles.columns * tiles.blocks >= vocab
    split = tiles.split(jnp.arange(rows))
    np.testing.assert_array_equal(tiles.join(split, rows), np.arange(rows))
    owner = np.asarray(split).reshape(tiles.row_blocks, tiles.across, -1) // (rows // tiles.across)
    assert (owner == np.arange(tiles.across)[:, None]).all()  # every row stays with the device that has it


@pytest.mark.parametrize("along", [1, 3])
@pytest.mark.parametrize("width", [4, 9, 30])
def test_blocks_of_columns(along: int, width: int) -> None:
    """Each token is new in one block, where `place` finds it; what is cut out goes back there."""
    vocab, tokens = 30, jnp.arange(-1, 32)
    tiles = Tiles.of_size(1, width, 1, vocab, 1, along)
    assert tiles.columns <= width
    weight, filled, counted = jnp.arange(vocab)[None], jnp.zeros((1, vocab), jnp.int32), np.zeros(vocab, int)
    for block in range(tiles.blocks):
        start = tiles.start(jnp.int32(block))
        part = tiles.cut(weight, start, 1)
        owner = np.asarray(part).reshape(along, -1) // (vocab // along)
        assert (owner == np.arange(along)[:, None]).all()  # every device has a part of its own columns
        at = np.asarray(tiles.place(tokens, start))
        inside = np.isin(tokens, part)
        np.testing.assert_array_equal(np.asarray(part)[0, at[inside]], tokens[inside])
        assert (at[~inside] == tiles.columns).all()
        counted[np.asarray(part)[0, ~np.asarray(tiles.seen(jnp.int32(block)))]] += 1
        filled = tiles.put(filled, part, start, 1)
    assert (counted == 1).all()
    np.testing.assert_array_equal(filled, weight)


def shapes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every intermediate value, inner programs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


@pytest.mark.parametrize("truncated", [True, False])
def test_no_more_logits_than_a_tile_exist_in_either_direction(truncated: bool) -> None:
    program = partial(run, tied=True, truncated=truncated, logits=900, precision=tiny.FLOAT32)
    sizes = {int(np.prod(shape)) for shape in shapes_in(jax.make_jaxpr(program)(*arrays()).jaxpr)}
    assert max(sizes - {D * VOCAB, D * 128}) == ROWS * 128 <= 900  # the weight, and its part


def shape(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def temporaries(vocab: int, prompt: int = 32, response: int = 96) -> int:
    """Bytes that `score` needs besides its arguments and results, for 32 x 128 tokens."""
    config = ModelConfig(
        vocab_size=vocab, num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=2, head_dim=32, num_experts=8,
        expert_dim=256,
    )  # fmt: skip
    model = tiny.model(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    rollout = Rollout(
        shape(32, prompt + response, dtype=np.int32), shape(32, prompt, dtype=bool), shape(32, response, dtype=bool),
        shape(32, response), shape(32, dtype=bool), None, shape(32),
    )  # fmt: skip
    compiled = score.lower(model, dict(params), rollout, logits_per_chunk=2**20).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    small, large = temporaries(1_000), temporaries(150_000)
    print(f"temporaries of score: {small / 2**20:.1f} MiB at 1k, {large / 2**20:.1f} MiB at 150k: {large / small:.3f}x")
    assert large <= 1.1 * small
