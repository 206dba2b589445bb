"""The whole forward pass against Qwen3-MoE written down in NumPy, float64, token by token and expert by expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.inference import prepare
from rlstab_jax.models import ModelConfig, Precision, fp8
from rlstab_jax.models.by_layer import layers_of
from rlstab_jax.models.layers import RMSNorm, rotate, rotations
from rlstab_jax.models.transformer import forward, logits_of

SIZES = {"vocab_size": 11, "num_layers": 3, "embed_dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
SIZES |= {"num_experts": 5, "experts_per_token": 2, "expert_dim": 7, "mlp_dim": 9}


def norm(x, gain, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def silu(x):
    return x / (1 + np.exp(-x))


def rotated(x, position, theta):
    """Rotates the pair (i, i + half) by position * theta^(-2i/d)."""
    half = x.size // 2
    y = x.copy()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.size)
        y[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        y[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return y


def attended(cfg, p, x):
    """Causal grouped-query attention over the rows of ``x``, one head and one query at a time."""
    time, c = len(x), cfg.head_dim
    q, k, v = (x @ p[name]["kernel"] for name in "qkv")
    if cfg.qk_norm == "projection":
        q, k = norm(q, p["q_norm"]["gain"], cfg.norm_eps), norm(k, p["k_norm"]["gain"], cfg.norm_eps)
    q, k, v = (y.reshape(time, -1, c) for y in (q, k, v))
    if cfg.qk_norm == "head":
        q, k = norm(q, p["q_norm"]["gain"], cfg.norm_eps), norm(k, p["k_norm"]["gain"], cfg.norm_eps)
    out = np.zeros_like(q)
    for head in range(cfg.num_heads):
        shared = head // (cfg.num_heads // cfg.num_kv_heads)
        for t in range(time):
            query = rotated(q[t, head], t, cfg.rope_theta)
            scores = [query @ rotated(k[s, shared], s, cfg.rope_theta) / np.sqrt(c) for s in range(t + 1)]
            weights = np.exp(scores - np.max(scores))
            out[t, head] = weights / weights.sum() @ v[: t + 1, shared]
    return out.reshape(time, -1) @ p["o"]["kernel"]


def mixed(cfg, p, x):
    """Each token through its top-k experts; also returns them."""
    out, routes = np.zeros_like(x), []
    for t, row in enumerate(x):
        logits = row @ p["router"]["kernel"]
        probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-probability)[: cfg.experts_per_token]
        routes.append(chosen)
        gates = probability[chosen] / (probability[chosen].sum() if cfg.renormalise_gates else 1)
        for gate, e in zip(gates, chosen, strict=True):
            out[t] += gate * (silu(row @ p["gate"][e]) * (row @ p["up"][e])) @ p["down"][e]
    return out, routes


def oracle(cfg, params, tokens):
    """Logits [time, vocab] and routes [layer, time, k] of one unpadded row."""
    x, routes = params["embedding"][tokens], []
    for layer, p in enumerate(v["params"] for v in layers_of({"params": params})):
        x = x + attended(cfg, p["attention"], norm(x, p["attention_norm"]["gain"], cfg.norm_eps))
        y = norm(x, p["mlp_norm"]["gain"], cfg.norm_eps)
        if cfg.kinds[layer]:
            y, chosen = mixed(cfg, p["moe"], y)
            routes.append(chosen)
        else:
            mlp = {name: p["mlp"][name]["kernel"] for name in ("gate", "up", "down")}
            y = (silu(y @ mlp["gate"]) * (y @ mlp["up"])) @ mlp["down"]
        x = x + y
    head = params["embedding"].T if cfg.tie_embeddings else params["lm_head"]["kernel"]
    return norm(x, params["final_norm"]["gain"], cfg.norm_eps) @ head, np.array(routes)


@pytest.mark.parametrize(
    "options",
    [
        {"dense_layers": (0,)},
        {"dense_layers": (1,), "renormalise_gates": False, "tie_embeddings": True, "rope_theta": 100.0}
        | {"qk_norm": "projection"},
        {"num_experts": 0, "qk_norm": "none"},
    ],
    ids=["moe", "tied, gates as they are, norm of the projections", "dense, without norm of queries and keys"],
)
def test_forward_is_the_one_written_down(options: dict) -> None:
    cfg = ModelConfig(**(SIZES | options))
    model = tiny.model(cfg)
    random = np.random.default_rng(0)
    tokens = random.integers(0, cfg.vocab_size, 6)
    padded = np.concatenate([[0, 0, 0], tokens])[None]  # prompts are right-aligned
    mask = np.arange(9)[None] >= 3
    params = tiny.parameters(cfg)
    output = forward(model, {"params": params}, jnp.asarray(padded), jnp.asarray(mask), None)
    logits = logits_of(model, {"params": params}, output.hidden[0, 3:])
    expected, routes = oracle(cfg, jax.tree.map(lambda a: np.asarray(a, np.float64), params), tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    if cfg.num_experts:
        np.testing.assert_array_equal(np.sort(output.routing.used[:, 0, 3:]), np.sort(routes))


@pytest.mark.parametrize(
    "precision", [Precision("bfloat16"), fp8(quantise_router=False, quantise_lm_head=False)], ids=["bfloat16", "fp8"]
)
def test_routers_are_exact_in_engines_that_are_not(precision: Precision) -> None:
    """Their scores are those of what they read, in float32; so are logits, where the head is exempt in a float32
    engine. The margin is between the last expert chosen and the first one that is not."""
    cfg = ModelConfig(**(SIZES | {"num_layers": 1}))
    model, params = tiny.model(cfg, precision), tiny.parameters(cfg)
    variables = prepare(params, precision)
    tokens = np.random.default_rng(2).integers(0, cfg.vocab_size, (1, 9))
    output = jax.jit(forward, static_argnums=0)(model, variables, jnp.asarray(tokens), jnp.ones((1, 9), bool))
    inputs = np.asarray(output.routing.inputs, np.float64)
    kernels = [np.float64(v["params"]["moe"]["router"]["kernel"]) for v in layers_of({"params": params})]
    logits = np.einsum("lbtd,lde->lbte", inputs, kernels)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(output.routing.scores, scores, atol=1e-5)
    ordered, k = np.sort(np.exp(scores))[..., ::-1], cfg.experts_per_token
    np.testing.assert_allclose(output.routing.margin, ordered[..., k - 1] - ordered[..., k], atol=1e-5)
    if precision.dtype == "float32":
        expected = np.asarray(output.hidden[0], np.float64) @ np.float64(params["lm_head"]["kernel"])
        np.testing.assert_allclose(logits_of(model, variables, output.hidden[0]), expected, rtol=1e-5, atol=1e-5)


def test_angles_and_norms_of_bfloat16_numbers_are_float32() -> None:
    """Position 4095 is no bfloat16 number: it would be taken for 4096, and one radian is far."""
    turns = rotations(4096, ModelConfig(**SIZES | {"head_dim": 2}, rope_theta=1e4))
    turned = rotate(jnp.ones((1, 1, 1, 2), jnp.bfloat16), turns.at(jnp.array([[4095]])))
    assert turned.dtype == jnp.bfloat16
    expected = [np.cos(4095) - np.sin(4095), np.cos(4095) + np.sin(4095)]
    np.testing.assert_allclose(np.float64(turned).ravel(), expected, rtol=2**-8)
    random = np.random.default_rng(0)
    x, gain = jnp.asarray(random.standard_normal((64, 48)), jnp.bfloat16), 1 + 0.1 * random.standard_normal(48)
    normed = RMSNorm(1e-6).apply({"params": {"gain": np.float32(gain)}}, x)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(normed), norm(np.float64(x), gain, 1e-6), rtol=1.01 * 2**-8)  # one rounding


def test_angles_and_norms_of_float16_numbers_saturate() -> None:
    large = jnp.full((1, 1, 1, 2), 60_000, jnp.float16)
    turns = rotations(2, ModelConfig(**SIZES | {"head_dim": 2}, rope_theta=1e4))
    assert rotate(large, turns.at(jnp.array([[1]])))[0, 0, 0, 1] == 65504  # 60,000 (sin 1 + cos 1) is 82,906
    normed = RMSNorm(1e-6).apply({"params": {"gain": np.full(2, 70_000, np.float32)}}, large)
    assert (normed == 65504).all()


def test_sequences_packed_into_a_row_are_what_each_is_alone() -> None:
    cfg = ModelConfig(**SIZES)
    random = np.random.default_rng(1)
    first, second = random.integers(0, cfg.vocab_size, 4), random.integers(0, cfg.vocab_size, 6)
    row = np.concatenate([first, second, [0, 0]])[None]
    segments = np.array([[1] * 4 + [2] * 6 + [0] * 2], np.int32)
    params = tiny.parameters(cfg)
    output = forward(tiny.model(cfg), {"params": params}, jnp.asarray(row), jnp.asarray(segments))
    got = logits_of(tiny.model(cfg), {"params": params}, output.hidden[0])
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for tokens, columns in ((first, slice(0, 4)), (second, slice(4, 10))):
        expected, routes = oracle(cfg, exact, tokens)
        np.testing.assert_allclose(got[columns], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.sort(output.routing.used[:, 0, columns]), np.sort(routes))
    assert (np.asarray(output.routing.used)[:, 0, 10:] == cfg.num_experts).all()
