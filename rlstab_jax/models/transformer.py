"""The model: blocks of `layers`, stacked and scanned, between embedding and LM head. Architecture of Qwen3-MoE.

RMSNorm, grouped-query attention with q/k norm and RoPE, a softmax router over all experts, top-k, SwiGLU experts.
OLMoE and Mixtral differ in the q/k norm alone. Pure `init`/`apply`; routes are an input and an output. `decode`
applies the same `Block` to one layer after the other, and so does `forward` where the variables lie by layer.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rlstab_jax.models.attention_tpu import Segments
from rlstab_jax.models.by_layer import LAYERS, layers_of
from rlstab_jax.models.config import Kernels, ModelConfig
from rlstab_jax.models.layers import (
    PREDICTOR,
    SCALE,
    Attention,
    Dense,
    KeyValues,
    Linear,
    MoE,
    Past,
    RMSNorm,
    Rotations,
    Routing,
    rotations,
)
from rlstab_jax.models.precision import Precision, Stored, saturating
from rlstab_jax.models.products import at_rest, matmul, take
from rlstab_jax.models.remat import Remat, recomputed, residual
from rlstab_jax.parallel.sharding import TRAINING, Layout, Rules
from rlstab_jax.types import Routes, UserError


@struct.dataclass
class Output:
    """Final hidden states [batch, time, d], the routing (None for a dense model), keys and values of each layer (None
    unless the variables lie by layer)."""

    hidden: Float[Array, "batch time d"]
    routing: Routing | None
    keys_values: list[KeyValues] | None = None


class Block(nn.Module):
    """One decoder layer: attention, then a dense or an MoE feed-forward layer, each on a normed residual."""

    config: ModelConfig
    moe: bool
    precision: Precision
    kernels: Kernels
    layout: Layout = Layout()
    replay: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d"],
        turn: Rotations,
        segments: Segments,
        routes: Array | None = None,
        past: Past | None = None,
    ) -> tuple[Float[Array, "batch time d"], KeyValues, Routing | None]:
        cfg = self.config
        with jax.named_scope("attention"):
            y, kv = Attention(cfg, self.precision, self.kernels, self.layout, name="attention")(
                RMSNorm(cfg.norm_eps, name="attention_norm")(x), turn, segments, past
            )
        x = self._residual(x, y)
        y = RMSNorm(cfg.norm_eps, name="mlp_norm")(x)
        if not self.moe:
            with jax.named_scope("mlp"):
                return self._residual(x, Dense(cfg, self.precision, name="mlp")(y)), kv, None
        with jax.named_scope("moe"):
            kernel = self.kernels.experts if past is None else self.kernels.decode_experts
            chunk = self.kernels.expert_chunk
            moe = MoE(cfg, self.precision, kernel, chunk, self.layout, self.replay, name="moe")
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
    replay: bool

    @nn.compact
    def __call__(self, x, turn, segments, routes):
        x = residual(x)
        routing, moe_layer = [], 0
        for i, moe in enumerate(self.kinds):
            block = Block(self.config, moe, self.precision, self.kernels, self.layout, self.replay, name=f"block_{i}")
            recorded = routes[moe_layer] if moe and routes is not None else None
            x, _, layer_routing = block(x, turn, segments, recorded)
            if moe:
                moe_layer += 1
                routing.append(layer_routing)
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *routing) if routing else None
        return x, stacked


class Transformer(nn.Module):
    """The whole decoder. ``remat`` says what each period keeps for the backward pass.

    On a ``mesh`` of several devices rows and activations lie by the table ``rules``, by which the parameters are
    expected to lie too, and experts are computed where they lie (`expert_parallel`).

    ``unroll`` periods are written out in each step of the scan over them: what they keep is then copied less.

    Unless it is to ``replay``, it routes live, and reads the routers' log-probs at the routes that it is given.
    """

    config: ModelConfig
    precision: Precision = Precision()
    kernels: Kernels = Kernels()
    remat: Remat = "none"
    unroll: int = 1
    mesh: Mesh | None = None
    rules: Rules = TRAINING
    replay: bool = True

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
                variable_axes={"params": 0, SCALE: 0, PREDICTOR: 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                length=repeats,
                unroll=min(self.unroll, repeats),
            )(cfg, kinds, self.precision, self.kernels, self.layout, self.replay, name=f"segment_{i}")
            for i, (kinds, repeats) in enumerate(cfg.segments)
        ]
        self.final_norm = RMSNorm(cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = Linear(cfg.vocab_size, self.precision.lm_head, out="float32")

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
        turn = rotations(tokens.shape[1], self.config).at(positions_in(segments))
        x = self.layout.constrain(self.embed(tokens), "batch", "time", "embed")
        routing, depth = [], 0
        for segment, (kinds, repeats) in zip(self.segments, self.config.segments, strict=True):
            count = sum(kinds) * repeats
            recorded = None
            if routes is not None and count:
                recorded = routes[depth : depth + count].reshape(repeats, sum(kinds), *routes.shape[1:])
            depth += count
            x, layers = segment(x, turn, segments, recorded)
            if layers is not None:
                routing.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), layers))
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routing) if routing else None
        hidden = self.final_norm(x)
        if self.is_initializing():
            self.logits(hidden[:, 0])  # an untied head has parameters of its own
        return Output(hidden, whole)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """Token embeddings in the engine's dtype."""
        # Whole rows, as `INFERENCE` has them: compilers know no good way from parts of rows to parts of a batch.
        return take(self._embedding(self.layout.constrain(self.embedding, "vocab", None)), tokens, self.precision)

    def _embedding(self, values: Float[Array, "vocab d"]) -> Stored:
        """As the LM head stores it, if it is tied."""
        of = self.precision.lm_head if self.config.tie_embeddings else self.precision.exempt()
        return at_rest(values, self.get_variable(SCALE, "embedding"), of, transposed=True)

    def finish(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The final norm, for a decode step that has applied the blocks itself."""
        return self.final_norm(x)

    def logits(self, hidden: Float[Array, "rows d"]) -> Float[Array, "rows vocab"]:
        """Float32 logits of a few rows. Call it on chunks: [batch, time, vocab] should never exist at once."""
        hidden = self.layout.constrain(hidden, "batch", "embed")
        if not self.config.tie_embeddings:
            return self.layout.constrain(self.lm_head(hidden), "batch", "vocab")
        weight = self._embedding(self.embedding).transposed
        return self.layout.constrain(matmul(hidden, weight, self.precision.lm_head, "float32"), "batch", "vocab")


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
    """`Transformer.__call__` on ``variables``, stacked or by layer (`models.by_layer`).

    Where the precision quantises weights, stacked ones may be a training engine's masters: they are quantised in this
    pass, and gradients go straight through to them.

    Raises UserError for quantised weights where the precision does not quantise them; for weights by layer that are not
    quantised where it does, since a sampler would do it at each token; and for routes of another number of layers.
    """
    if routes is not None and len(routes) != model.config.num_moe_layers:
        raise UserError(f"routes {routes.shape}: the model has {model.config.num_moe_layers} MoE layers, [layer, ...]")
    of_layers = variables.get(LAYERS, {}).values()
    scaled = any(each.get(SCALE) for each in (variables, *of_layers))
    if scaled and model.precision.weights == "none":
        raise UserError(
            "the weights are quantised, but the model's precision stores them as they are: pass inference.prepare("
            "params, precision) with the model's own precision"
        )
    if model.precision.weights != "none" and LAYERS in variables and not scaled:
        raise UserError(
            f"the model's precision stores weights in {model.precision.weights}, but these are not quantised: pass "
            "inference.prepare(params, precision)"
        )
    if LAYERS not in variables:
        return cast(Output, model.apply(variables, tokens, segments, routes))
    turn = rotations(tokens.shape[1], model.config).at(positions_in(segments))
    x = model.layout.constrain(embed(model, variables, tokens), "batch", "time", "embed")
    keys_values: list[KeyValues] = []
    routing: list[Routing] = []
    for moe, layer in zip(model.config.kinds, layers_of(variables), strict=True):
        block = Block(model.config, moe, model.precision, model.kernels, model.layout, model.replay)
        recorded = routes[len(routing)] if moe and routes is not None else None
        outputs: Any = block.apply(layer, x, turn, segments, recorded)
        x, kv, of_layer = outputs
        keys_values.append(kv)
        if moe:
            routing.append(of_layer)
    whole = jax.tree.map(lambda *layers: jnp.stack(layers), *routing) if routing else None
    return Output(finish(model, variables, x), whole, keys_values)


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

    return model.precision.lm_head, Stored(of("params"), of(SCALE))


def logits_of(model: Transformer, variables: dict, hidden: Float[Array, "rows d"]) -> Float[Array, "rows vocab"]:
    """`Transformer.logits` on ``variables``."""
    return cast(Array, model.apply(variables, hidden, method=Transformer.logits))
