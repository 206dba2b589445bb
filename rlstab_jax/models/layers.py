"""The parts of a decoder layer: attention with its cache, router and experts, dense feed-forward, norm, projection.

Modules of Flax; `transformer` makes layers and the model of them. Routes are an input and an output of `MoE`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models import expert_parallel, remat
from rlstab_jax.models.attention import ATTENTION, DECODE_ATTENTION
from rlstab_jax.models.attention_parallel import over_devices
from rlstab_jax.models.attention_tpu import Segments
from rlstab_jax.models.config import Kernels, ModelConfig
from rlstab_jax.models.experts import KERNELS, ExpertWeights
from rlstab_jax.models.precision import (
    Precision,
    Stored,
    as_bytes,
    from_bytes,
    saturate,
    saturating,
    store,
)
from rlstab_jax.models.products import at_rest, matmul, straight
from rlstab_jax.parallel.sharding import Layout
from rlstab_jax.types import Routes, route_dtype

# Quantised weights travel as two collections: "params" holds the stored values, SCALE their scales, by the same names.
SCALE = "weight_scale"
# Weights [d, E] that foretell each router's choice (PR2, see `learner.predictor`): where no routes are given, tokens
# use the experts that are foretold.
PREDICTOR = "predictor"


@struct.dataclass
class KeyValues:
    """Keys and values of one layer as a cache stores them, `as_bytes`.

    ``k`` is [batch, kv_head, head_dim, time], a decode step's product with it then reads along time (twice as fast on
    CPU); ``v`` is [batch, kv_head, time, head_dim].
    """

    k: Stored
    v: Stored

    def over_time(self, f: Callable[..., Array], *others: "KeyValues") -> "KeyValues":
        """``f(array, *others, axis)`` on each stored array, with its time axis."""
        k = jax.tree.map(lambda *arrays: f(*arrays, axis=3), self.k, *(other.k for other in others))
        v = jax.tree.map(lambda *arrays: f(*arrays, axis=2), self.v, *(other.v for other in others))
        return KeyValues(k, v)


@struct.dataclass
class Past:
    """What one decode step of a layer attends to. The rows of one prompt are adjacent and share its part.

    Attributes:
      prompt: of ``prompts`` rows and prompt_length; ``rows`` is a multiple of ``prompts``.
      response: of ``rows`` rows and a window of time; this step writes its ``column``, the same for all rows.
      prompt_mask, response_mask: True on what is attended to, the column that is being written included.
    """

    prompt: KeyValues
    response: KeyValues
    prompt_mask: Bool[Array, "prompts prompt_length"]
    response_mask: Bool[Array, "rows window"]
    column: Int[Array, ""]


@struct.dataclass
class RouterSums:
    """Sums over tokens that were fed, for the load-balance and z losses: exact under accumulation and sharding."""

    load: Float[Array, "*layer expert"]  # assignments to each expert in use
    probability: Float[Array, "*layer expert"]
    z: Float[Array, "*layer"]  # squared logsumexp of the router's logits
    tokens: Float[Array, "*layer"]


@struct.dataclass
class Routing:
    """What the routers of MoE layers did with each token. Leading axis: MoE layers in depth order."""

    used: Routes  # the sentinel num_experts where the token was not fed
    live: Routes  # top-k of the live scores at that layer, also under replay
    margin: Float[Array, "layer batch fed"]  # k-th minus (k+1)-th live probability
    log_probs: Float[Array, "layer batch fed k"]  # log router probability of each expert in use, or else watched
    inputs: Float[Array, "layer batch fed d"]  # what the routers read
    scores: Float[Array, "layer batch fed expert"]  # log router probability of every expert
    sums: RouterSums


class Linear(nn.Module):
    """A matrix product [tokens, in] -> [tokens, features] in the engine's precision."""

    features: int
    precision: Precision
    out: str | None = None  # dtype of the result; the precision's by default

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens features"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        weight = at_rest(kernel, self.get_variable(SCALE, "kernel"), self.precision)
        return matmul(x, weight, self.precision, self.out or self.precision.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        gain = self.param("gain", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return saturate(x32 * gain, x.dtype)


@struct.dataclass
class Rotations:
    """Cosines and sines of the angles by which `rotate` turns each pair of channels."""

    cos: Float[Array, "*tokens c/2"]
    sin: Float[Array, "*tokens c/2"]

    def at(self, positions: Int[Array, "batch time"]) -> "Rotations":
        """Of tokens there, [batch, 1, time, c/2], from those of all positions, [position, c/2]."""
        return jax.tree.map(lambda a: jnp.take(a, positions[:, None], axis=0, mode="clip"), self)


def rotations(length: int, config: ModelConfig) -> Rotations:
    """Of rotary position embeddings, for the positions below ``length``; once for all layers and steps.

    To be looked up, since compilers fuse a cosine into what uses it, and each head of each layer would compute its own.
    """
    frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    return Rotations(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "batch head time c"], by: Rotations) -> Float[Array, "batch head time c"]:
    """Rotary position embedding, halves paired as in Hugging Face's Qwen3."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * by.cos - second * by.sin, second * by.cos + first * by.sin]
    return saturate(jnp.concatenate(turned, axis=-1), x.dtype)


class Attention(nn.Module):
    config: ModelConfig
    precision: Precision
    kernels: Kernels
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d"],
        turn: Rotations,
        segments: Segments,
        past: Past | None = None,
    ) -> tuple[Float[Array, "batch time d"], KeyValues]:
        """Attends causally within segments, or, in a decode step (time = 1), to ``past``, whose response it extends.

        Returns the result, and the keys and values of the tokens or of the extended response.
        """
        cfg = self.config
        batch, time, d = x.shape
        flat = x.reshape(batch * time, d)

        def project(name: str, heads: int, norm: str = "none") -> Array:
            y = Linear(heads * cfg.head_dim, self.precision, name=name)(flat)
            y = RMSNorm(cfg.norm_eps, name=f"{name}_norm")(y) if norm == "projection" else y
            y = y.reshape(batch, time, heads, cfg.head_dim)
            y = RMSNorm(cfg.norm_eps, name=f"{name}_norm")(y) if norm == "head" else y
            split = "heads" if name == "q" else "kv_heads"
            return self.layout.constrain(y.swapaxes(1, 2), "batch", split, "time", "head_dim")

        q = project("q", cfg.num_heads, cfg.qk_norm)
        k = project("k", cfg.num_kv_heads, cfg.qk_norm)
        v = project("v", cfg.num_kv_heads)
        q, k = rotate(q, turn), rotate(k, turn)
        # Attention reads what a cache would hold, with or without one: prefill, decode and scoring see equal numbers.
        stored_k, stored_v = (as_bytes(store(a, self.precision.kv_cache)) for a in (k, v))
        kv = KeyValues(jax.tree.map(lambda a: a.swapaxes(2, 3), stored_k), stored_v)
        if past is None:
            attend = over_devices(ATTENTION[self.kernels.attention], self.kernels.attention, self.layout)
            y = attend(q, self._load(stored_k, k), self._load(stored_v, v), segments)
        else:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=past.column)
            kv = self._laid_out(past.response.over_time(write, kv))
            name = self.kernels.decode_attention
            kernel = partial(DECODE_ATTENTION[name], format=self.precision.kv_cache)
            y = over_devices(kernel, name, self.layout)(
                q,
                (past.prompt.k, past.prompt.v),
                (kv.k, kv.v),
                past.prompt_mask,
                past.response_mask,
            )
        y = y.swapaxes(1, 2).reshape(batch * time, cfg.num_heads * cfg.head_dim)
        return Linear(d, self.precision, name="o")(y).reshape(batch, time, d), kv

    def _laid_out(self, kv: KeyValues) -> KeyValues:
        """A cache's rows and heads lie where those of the queries do."""
        return jax.tree.map(lambda a: self.layout.constrain(a, "batch", "kv_heads", None, None), kv)

    def _load(self, stored: Stored, exact: Array) -> Array:
        loaded = from_bytes(stored, self.precision.kv_cache).load(self.precision.dtype)
        return loaded if self.precision.kv_cache == "none" else straight(jax.lax.stop_gradient(loaded), exact)


def route(
    log_probs: Float[Array, "tokens expert"],
    k: int,
    recorded: Int[Array, "tokens k"] | None,
    renormalise: bool,
    layout: Layout,
) -> tuple[Int[Array, "tokens k"], Float[Array, "tokens k"], Int[Array, "tokens k"], Float[Array, "tokens"]]:
    """Chooses experts: the recorded ones where a token has them, else the live top-k. Gates are always live.

    Gates are gathered from the full scores, so the router receives gradient under replay, and renormalised after the
    gather and in log space, so that nothing is 0/0, however unlikely a replayed expert has become.

    Returns:
      experts in use, their gates, the live top-k, and the live margin (k-th minus (k+1)-th probability; 0 if k is all).
    """
    num_experts = log_probs.shape[-1]
    top, order = _top_k(jax.lax.stop_gradient(log_probs), min(k + 1, num_experts), layout)
    live = remat.order(order)[:, :k]
    margin = jnp.exp(top[:, k - 1]) - jnp.exp(top[:, k]) if k < num_experts else jnp.zeros_like(top[:, 0])
    used = live
    if recorded is not None:
        recorded = recorded.astype(live.dtype)
        used = jnp.where(jnp.all(recorded < num_experts, axis=-1, keepdims=True), recorded, live)
    chosen = jnp.take_along_axis(log_probs, used, axis=-1)
    gates = jax.nn.softmax(chosen, axis=-1) if renormalise else jnp.exp(chosen)
    return used, gates, live, margin


def _top_k(x: Float[Array, "tokens expert"], k: int, layout: Layout) -> tuple[Array, Array]:
    """`jax.lax.top_k` of each token where it lies: on CPU, XLA would gather all tokens on each device for it.

    Barriers keep its results whole: where users take different parts of them, XLA for CPUs would sort all experts. One
    for each, since the same compiler fails on a barrier for both.
    """

    def top_k(x: Array) -> tuple[Array, Array]:
        values, order = jax.lax.top_k(x, k)
        return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(order)

    if not layout.splits or x.shape[0] % layout.row_parts:
        return top_k(x)
    rows = PartitionSpec(layout.rows, None)
    return jax.shard_map(top_k, mesh=layout.mesh, in_specs=rows, out_specs=(rows, rows))(x)


class MoE(nn.Module):
    """Router and experts of one layer. Unless it replays, it routes live and only watches the given routes."""

    config: ModelConfig
    precision: Precision
    kernel: str
    chunk: int = 0
    layout: Layout = Layout()
    replay: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], fed: Bool[Array, "batch time"], routes: Array | None
    ) -> tuple[Float[Array, "batch time d"], Routing]:
        cfg = self.config
        batch, time, d = x.shape
        flat = x.reshape(batch * time, d)
        with jax.named_scope("router"):
            logits = Linear(cfg.num_experts, self.precision.router, out="float32", name="router")(flat)
            normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            log_probs = logits - normaliser
            recorded = None if routes is None else routes.reshape(batch * time, -1)
            predictor: Array | None = self.get_variable(PREDICTOR, "predictor")
            if predictor is not None and recorded is None:
                foretold = log_probs + jnp.matmul(flat.astype(jnp.float32), predictor, precision="highest")
                recorded = _top_k(foretold, cfg.experts_per_token, self.layout)[1]
            used, gates, live, margin = route(
                log_probs, cfg.experts_per_token, recorded if self.replay else None, cfg.renormalise_gates, self.layout
            )
            # Tokens that are not fed are never dispatched: padding loads no expert.
            token_fed = fed.reshape(-1, 1)
            used = jnp.where(token_fed, used, cfg.num_experts)
            gates = jnp.where(token_fed, gates, 0.0)
        with jax.named_scope("experts"):
            kernel = KERNELS[self.kernel]
            sums = expert_parallel.compute(
                kernel, flat, used, gates, self._weights(d), self.precision, self.layout, self.chunk
            )
            y = saturate(sums, x.dtype)
        narrow = route_dtype(cfg.num_experts)
        shape = (batch, time, cfg.experts_per_token)
        one_hot = used[..., None] == jnp.arange(cfg.num_experts)
        router_sums = RouterSums(
            load=one_hot.sum((0, 1), dtype=jnp.float32),
            probability=jnp.where(token_fed, jnp.exp(log_probs), 0.0).sum(0),
            z=jnp.where(token_fed, normaliser**2, 0.0).sum(),
            tokens=token_fed.sum(dtype=jnp.float32),
        )
        watched = used if self.replay or recorded is None else recorded.astype(used.dtype)
        chosen = jnp.take_along_axis(log_probs, jnp.minimum(watched, cfg.num_experts - 1), axis=-1)
        routing = Routing(
            used=used.astype(narrow).reshape(shape),
            live=jnp.where(token_fed, live, cfg.num_experts).astype(narrow).reshape(shape),
            margin=margin.reshape(batch, time),
            log_probs=jnp.where(token_fed, chosen, 0.0).reshape(shape),
            inputs=x,
            scores=log_probs.reshape(batch, time, -1),
            sums=router_sums,
        )
        return y.reshape(batch, time, d), routing

    def _weights(self, d: int) -> ExpertWeights:
        cfg = self.config
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
        )

        def weight(name: str, rows: int, columns: int) -> Stored:
            values = self.param(name, init, (cfg.num_experts, rows, columns), jnp.float32)
            return at_rest(values, self.get_variable(SCALE, name), self.precision)

        f = cfg.expert_dim
        return ExpertWeights(weight("gate", d, f), weight("up", d, f), weight("down", f, d))


class Dense(nn.Module):
    """A dense SwiGLU feed-forward layer."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        batch, time, d = x.shape
        flat = x.reshape(batch * time, d)
        gate = jax.nn.silu(Linear(self.config.mlp_dim, self.precision, name="gate")(flat))
        hidden = saturating(jnp.multiply, gate, Linear(self.config.mlp_dim, self.precision, name="up")(flat))
        return Linear(d, self.precision, name="down")(hidden).reshape(batch, time, d)
