"""The model, from top to bottom: config, attention, router, experts, block, forward. Architecture of Qwen3-MoE.

RMSNorm, grouped-query attention with q/k norm and RoPE, a softmax router over all experts, top-k, SwiGLU experts.
OLMoE and Mixtral differ in the q/k norm alone. Pure `init`/`apply`; routes are an input and an output. Like layers are
stacked and scanned; `decode` applies the same `Block` to slices of the stacked parameters.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models import expert_parallel
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
    matmul,
    saturate,
    saturating,
    store,
    take,
)
from rlstab_jax.models.remat import Remat, recomputed, residual
from rlstab_jax.parallel.sharding import TRAINING, Layout, Rules
from rlstab_jax.types import Routes, route_dtype

# Quantised weights travel as two collections: "params" holds the stored values, SCALE their scales, by the same names.
SCALE = "weight_scale"


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
    log_probs: Float[Array, "layer batch fed k"]  # log router probability of each expert in use
    sums: RouterSums


@struct.dataclass
class Output:
    """Final hidden states [batch, time, d], the routing (None for a dense model), keys and values of each segment."""

    hidden: Float[Array, "batch time d"]
    routing: Routing | None
    keys_values: Any


class Linear(nn.Module):
    """A matrix product [tokens, in] -> [tokens, features] in the engine's precision."""

    features: int
    precision: Precision
    out: str | None = None  # dtype of the result; the precision's by default

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens features"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        weight = Stored(kernel, self.get_variable(SCALE, "kernel"))
        return matmul(x, weight, self.precision, self.out or self.precision.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        gain = self.param("gain", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * gain).astype(x.dtype)


def rotate(x: Float[Array, "batch head time c"], positions: Int[Array, "batch time"], theta: float) -> Array:
    """Rotary position embedding, halves paired as in Hugging Face's Qwen3."""
    frequency = theta ** (-jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    # Behind a barrier, or each head computes its own cosines: compilers fuse them into the product.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    config: ModelConfig
    precision: Precision
    kernels: Kernels
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d"],
        positions: Int[Array, "batch time"],
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
        q, k = rotate(q, positions, cfg.rope_theta), rotate(k, positions, cfg.rope_theta)
        # Attention reads what a cache would hold, with or without one: prefill, decode and scoring see equal numbers.
        stored_k, stored_v = (as_bytes(store(a, self.precision.kv_cache)) for a in (k, v))
        kv = KeyValues(jax.tree.map(lambda a: a.swapaxes(2, 3), stored_k), stored_v)
        if past is None:
            attend = over_devices(ATTENTION[self.kernels.attention], self.kernels.attention, self.layout)
            y = attend(q, self._load(stored_k), self._load(stored_v), segments)
        else:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=past.column)
            kv = self._laid_out(past.response.over_time(write, kv))
            name = self.kernels.decode_attention
            y = over_devices(DECODE_ATTENTION[name], name, self.layout)(
                q,
                (self._load(past.prompt.k), self._load(past.prompt.v)),
                (self._load(kv.k), self._load(kv.v)),
                past.prompt_mask,
                past.response_mask,
            )
        y = y.swapaxes(1, 2).reshape(batch * time, cfg.num_heads * cfg.head_dim)
        return Linear(d, self.precision, name="o")(y).reshape(batch, time, d), kv

    def _laid_out(self, kv: KeyValues) -> KeyValues:
        """A cache's rows and heads lie where those of the queries do."""
        return jax.tree.map(lambda a: self.layout.constrain(a, "batch", "kv_heads", None, None), kv)

    def _load(self, stored: Stored) -> Array:
        return from_bytes(stored, self.precision.kv_cache).load(self.precision.dtype)


def route(
    log_probs: Float[Array, "tokens expert"], k: int, recorded: Int[Array, "tokens k"] | None, renormalise: bool
) -> tuple[Int[Array, "tokens k"], Float[Array, "tokens k"], Int[Array, "tokens k"], Float[Array, "tokens"]]:
    """Chooses experts: the recorded ones where a token has them, else the live top-k. Gates are always live.

    Gates are gathered from the full scores, so the router receives gradient under replay, and renormalised after the
    gather and in log space, so that nothing is 0/0, however unlikely a replayed expert has become (PAPER sections 4
    and 8).

    Returns:
      experts in use, their gates, the live top-k, and the live margin (k-th minus (k+1)-th probability; 0 if k is all).
    """
    num_experts = log_probs.shape[-1]
    top, order = jax.lax.top_k(jax.lax.stop_gradient(log_probs), min(k + 1, num_experts))
    live = order[:, :k]
    margin = jnp.exp(top[:, k - 1]) - jnp.exp(top[:, k]) if k < num_experts else jnp.zeros_like(top[:, 0])
    used = live
    if recorded is not None:
        recorded = recorded.astype(live.dtype)
        used = jnp.where(jnp.all(recorded < num_experts, axis=-1, keepdims=True), recorded, live)
    chosen = jnp.take_along_axis(log_probs, used, axis=-1)
    gates = jax.nn.softmax(chosen, axis=-1) if renormalise else jnp.exp(chosen)
    return used, gates, live, margin


class MoE(nn.Module):
    """Router and experts of one layer."""

    config: ModelConfig
    precision: Precision
    kernel: str
    chunk: int = 0
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], fed: Bool[Array, "batch time"], routes: Array | None
    ) -> tuple[Float[Array, "batch time d"], Routing]:
        cfg = self.config
        batch, time, d = x.shape
        flat = x.reshape(batch * time, d)
        with jax.named_scope("router"):
            # The router is float32 in every precision, unless its stored values are quantised by choice.
            precision = dataclasses.replace(self.precision, dtype="float32")
            precision = precision if self.precision.quantise_router else precision.exempt()
            logits = Linear(cfg.num_experts, precision, out="float32", name="router")(flat)
            normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            log_probs = logits - normaliser
            recorded = None if routes is None else routes.reshape(batch * time, -1)
            used, gates, live, margin = route(log_probs, cfg.experts_per_token, recorded, cfg.renormalise_gates)
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
        chosen = jnp.take_along_axis(log_probs, jnp.minimum(used, cfg.num_experts - 1), axis=-1)
        routing = Routing(
            used=used.astype(narrow).reshape(shape),
            live=jnp.where(token_fed, live, cfg.num_experts).astype(narrow).reshape(shape),
            margin=margin.reshape(batch, time),
            log_probs=jnp.where(token_fed, chosen, 0.0).reshape(shape),
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
            return Stored(values, self.get_variable(SCALE, name))

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


class Block(nn.Module):
    """One decoder layer: attention, then a dense or an MoE feed-forward layer, each on a normed residual."""

    config: ModelConfig
    moe: bool
    precision: Precision
    kernels: Kernels
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d"],
        positions: Int[Array, "batch time"],
        segments: Segments,
        routes: Array | None = None,
        past: Past | None = None,
    ) -> tuple[Float[Array, "batch time d"], KeyValues, Routing | None]:
        cfg = self.config
        with jax.named_scope("attention"):
            y, kv = Attention(cfg, self.precision, self.kernels, self.layout, name="attention")(
                RMSNorm(cfg.norm_eps, name="attention_norm")(x), positions, segments, past
            )
        x = self._residual(x, y)
        y = RMSNorm(cfg.norm_eps, name="mlp_norm")(x)
        if not self.moe:
            with jax.named_scope("mlp"):
                return self._residual(x, Dense(cfg, self.precision, name="mlp")(y)), kv, None
        with jax.named_scope("moe"):
            kernel = self.kernels.experts if past is None else self.kernels.decode_experts
            chunk = self.kernels.expert_chunk
            moe = MoE(cfg, self.precision, kernel, chunk, self.layout, name="moe")
            y, routing = moe(y, segments.astype(bool), routes)
        return self._residual(x, y), kv, routing

    def _residual(self, x: Float[Array, "batch time d"], y: Float[Array, "batch time d"]) -> Array:
        return self.layout.constrain(saturating(jnp.add, x, y), "batch", "time", "embed")


class Period(nn.Module):
    """The blocks of one repetition of a segment; the body of the scan over layers."""

    config: ModelConfig
    kinds: tuple[bool, ...]
    precision: Precision
    kernels: Kernels
    layout: Layout

    @nn.compact
    def __call__(self, x, positions, segments, routes):
        x = residual(x)
        keys_values, routing, moe_layer = [], [], 0
        for i, moe in enumerate(self.kinds):
            block = Block(self.config, moe, self.precision, self.kernels, self.layout, name=f"block_{i}")
            recorded = routes[moe_layer] if moe and routes is not None else None
            x, kv, layer_routing = block(x, positions, segments, recorded)
            keys_values.append(kv)
            if moe:
                moe_layer += 1
                routing.append(layer_routing)
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *routing) if routing else None
        return x, (tuple(keys_values), stacked)


class Transformer(nn.Module):
    """The whole decoder. ``remat`` says what each period keeps for the backward pass.

    On a ``mesh`` of several devices rows and activations lie by the table ``rules``, by which the parameters are
    expected to lie too, and experts are computed where they lie (`expert_parallel`).

    ``unroll`` periods are written out in each step of the scan over them: what they keep is then copied less.
    """

    config: ModelConfig
    precision: Precision = Precision()
    kernels: Kernels = Kernels()
    remat: Remat = "none"
    unroll: int = 1
    mesh: Mesh | None = None
    rules: Rules = TRAINING

    @property
    def layout(self) -> Layout:
        return Layout(self.mesh, self.rules)

    def setup(self):
        cfg = self.config
        # Unit rows learn fastest, but as a tied head they would start with logits of size sqrt(d).
        init = nn.initializers.normal(cfg.embed_dim**-0.5 if cfg.tie_embeddings else 1.0)
        self.embedding = self.param("embedding", init, (cfg.vocab_size, cfg.embed_dim), jnp.float32)
        self.segments = [
            nn.scan(
                recomputed(Period, self.remat),
                variable_axes={"params": 0, SCALE: 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                length=repeats,
                unroll=min(self.unroll, repeats),
            )(cfg, kinds, self.precision, self.kernels, self.layout, name=f"segment_{i}")
            for i, (kinds, repeats) in enumerate(cfg.segments)
        ]
        self.final_norm = RMSNorm(cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = Linear(cfg.vocab_size, self.head_precision, out="float32")

    @property
    def head_precision(self) -> Precision:
        """Of the LM head."""
        return self.precision if self.precision.quantise_lm_head else self.precision.exempt()

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        segments: Segments,
        routes: Routes | None = None,
    ) -> Output:
        """Hidden states of every fed token, causally.

        Args:
          tokens: what is fed.
          segments: numbers of the sequences in each row, or a mask where it holds one. Tokens attend to their own
            sequence, and count positions from its first one; what is not fed is never attended to nor dispatched.
          routes: recorded experts [layer, batch, time, k], or None to route live. The value num_experts routes live.
        """
        positions = positions_in(segments)
        x = self.layout.constrain(self.embed(tokens), "batch", "time", "embed")
        keys_values, routing, depth = [], [], 0
        for segment, (kinds, repeats) in zip(self.segments, self.config.segments, strict=True):
            count = sum(kinds) * repeats
            recorded = None
            if routes is not None and count:
                recorded = routes[depth : depth + count].reshape(repeats, sum(kinds), *routes.shape[1:])
            depth += count
            x, (kv, layers) = segment(x, positions, segments, recorded)
            keys_values.append(kv)
            if layers is not None:
                routing.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), layers))
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routing) if routing else None
        hidden = self.final_norm(x)
        if self.is_initializing():
            self.logits(hidden[:, 0])  # an untied head has parameters of its own
        return Output(hidden, whole, keys_values)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """Token embeddings in the engine's dtype."""
        scale: Array | None = self.get_variable(SCALE, "embedding")
        # Whole rows, as `INFERENCE` has them: compilers know no good way from parts of rows to parts of a batch.
        values = self.layout.constrain(self.embedding, "vocab", None)
        return take(Stored(values, scale), tokens, self.precision)

    def finish(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The final norm, for a decode step that has applied the blocks itself."""
        return self.final_norm(x)

    def logits(self, hidden: Float[Array, "rows d"]) -> Float[Array, "rows vocab"]:
        """Float32 logits of a few rows. Call it on chunks: [batch, time, vocab] should never exist at once."""
        hidden = self.layout.constrain(hidden, "batch", "embed")
        if not self.config.tie_embeddings:
            return self.layout.constrain(self.lm_head(hidden), "batch", "vocab")
        scale: Array | None = self.get_variable(SCALE, "embedding")
        weight = Stored(self.embedding.T, None if scale is None else scale.T)
        return self.layout.constrain(matmul(hidden, weight, self.head_precision, "float32"), "batch", "vocab")


def positions_in(segments: Segments) -> Int[Array, "batch time"]:
    """Each token's position in its segment, from 0.

    >>> positions_in(jnp.array([[0, 0, 1, 1, 1, 2, 2]])).tolist()
    [[0, 1, 0, 1, 2, 0, 1]]
    """
    column = jnp.arange(segments.shape[1])
    begins = segments[:, 1:] != segments[:, :-1]
    first = jnp.pad(jnp.where(begins, column[1:], 0), ((0, 0), (1, 0)))
    return column - jax.lax.cummax(first, axis=1)


def forward(
    model: Transformer,
    variables: dict,
    tokens: Int[Array, "batch time"],
    segments: Segments,
    routes: Routes | None = None,
) -> Output:
    """`Transformer.__call__` on ``variables``."""
    return cast(Output, model.apply(variables, tokens, segments, routes))


def embed(model: Transformer, variables: dict, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
    """`Transformer.embed` on ``variables``."""
    return cast(Array, model.apply(variables, tokens, method=Transformer.embed))


def finish(model: Transformer, variables: dict, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """`Transformer.finish` on ``variables``."""
    return cast(Array, model.apply(variables, x, method=Transformer.finish))


def head_of(model: Transformer, variables: dict) -> tuple[Precision, Stored]:
    """The LM head's precision, and its weight: [vocab, d] if it is the embedding, else [d, vocab]."""
    path = ("embedding",) if model.config.tie_embeddings else ("lm_head", "kernel")

    def of(collection: str) -> Any:
        node = variables.get(collection, {})
        for name in path:
            node = node.get(name, {})
        return node if not isinstance(node, dict) else None

    return model.head_precision, Stored(of("params"), of(SCALE))


def logits_of(model: Transformer, variables: dict, hidden: Float[Array, "rows d"]) -> Float[Array, "rows vocab"]:
    """`Transformer.logits` on ``variables``."""
    return cast(Array, model.apply(variables, hidden, method=Transformer.logits))
