"""The LM head of the training engine: log-probs and entropies in tiles of logits, with a gradient of its own.

[batch, time, vocab] never exists at once, in either direction. A tile is a block of rows times a block of the
vocabulary; rows carry a running maximum and sums from tile to tile, and the backward pass computes each tile's logits
once more. With z = logits / temperature, p = softmax(z) over the support, y the target and H the entropy,

    d log p_y / dz = 1[y] - p        dH / dz = -p (log p + H).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models.precision import Precision, Stored, store_activations
from rlstab_jax.models.products import at_rest, matmul
from rlstab_jax.models.transformer import Transformer, head_of, logits_of

# Rows of a tile on each device at most, unless more fit with the whole vocabulary. The weight is read once for each
# block of rows, and the hidden states for each block of columns: a tile is about as high as wide.
ROWS = 1024
# Rows of a quantised head's blocks at least, on each device.
QUANTISED_ROWS = 128
# Accelerators' units are so many columns wide.
LANES = 128
# Below every logit, and finite: what a running maximum begins from.
LOW = -1e30


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How ``row_blocks`` x ``blocks`` tiles of at most ``rows`` x ``columns`` logits cover all of them.

    ``across`` and ``along`` are the devices that rows and the vocabulary lie over. Each has an equal share of every
    tile, cut from what it holds: no weight moves, and no device computes what another does.
    """

    rows: int
    row_blocks: int
    columns: int
    blocks: int
    vocab: int
    across: int = 1
    along: int = 1

    @staticmethod
    def within(logits: int, rows: int, vocab: int, across: int = 1, along: int = 1) -> "Tiles":
        """Tiles of at most ``logits`` logits, but of one of each device at least."""
        across, along = _sharing(rows, vocab, across, along)
        each = max(logits // (across * along), 1)
        height = min(rows // across, max(logits // (across * vocab), min(ROWS, math.isqrt(each))))
        width = min(vocab // along, each // height)
        if LANES < width < vocab // along:
            width -= width % LANES
        return Tiles.of_size(height * across, width * along, rows, vocab, across, along)

    @staticmethod
    def of_size(height: int, width: int, rows: int, vocab: int, across: int = 1, along: int = 1) -> "Tiles":
        """Tiles of at most so many rows and columns, as equal as they can be: the last block begins in the one before.
        What devices cannot share equally is taken as one's."""
        across, along = _sharing(rows, vocab, across, along)
        row_share, share = rows // across, vocab // along
        row_blocks = -(-row_share // min(max(height // across, 1), row_share))
        widest = min(max(width // along, 1), share)
        even = -(-share // -(-share // widest))
        lanes = -(-even // LANES) * LANES
        each = lanes if lanes <= widest else even
        return Tiles(
            -(-row_share // row_blocks) * across, row_blocks, each * along, -(-share // each), vocab, across, along
        )

    @property
    def each(self) -> int:
        """Columns of a tile that one device has."""
        return self.columns // self.along

    def start(self, block: Int[Array, ""]) -> Int[Array, ""]:
        """First column of a block in each device's share. The last one begins early enough to be as wide as all."""
        return jnp.minimum(block * self.each, self.vocab // self.along - self.each)

    def place(self, token: Int[Array, "..."], start: Int[Array, ""]) -> Int[Array, "..."]:
        """The columns of tokens in the block from ``start`` on; past the last one of those that are not in it."""
        device, at = jnp.divmod(token, self.vocab // self.along)
        at = at - start
        inside = (token >= 0) & (token < self.vocab) & (at >= 0) & (at < self.each)
        return jnp.where(inside, device * self.each + at, self.columns)

    def seen(self, block: Int[Array, ""]) -> Bool[Array, "columns"]:
        """Which columns of a block an earlier one has had."""
        return jnp.tile(self.start(block) + jnp.arange(self.each) < block * self.each, self.along)

    def split(self, x: Array, mode: str = "edge") -> Array:
        """[rows, ...] to [row_blocks, height, ...], padded by ``mode`` (of `jnp.pad`): of the rows of a device every
        ``row_blocks``-th goes to the same block."""
        each, share = self.rows // self.across, x.shape[0] // self.across
        x = x.reshape(self.across, share, *x.shape[1:])
        padding = ((0, 0), (0, each * self.row_blocks - share), *[(0, 0)] * (x.ndim - 2))
        x = jnp.pad(x, padding, mode=mode).reshape(self.across, each, self.row_blocks, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0).reshape(self.row_blocks, self.rows, *x.shape[3:])

    def join(self, x: Array, rows: int) -> Array:
        """The inverse of ``split``."""
        x = x.reshape(self.row_blocks, self.across, -1, *x.shape[2:])
        x = jnp.moveaxis(x, 0, 2).reshape(self.across, -1, *x.shape[3:])
        return x[:, : rows // self.across].reshape(rows, *x.shape[2:])

    def cut(self, weight: Array, start: Int[Array, ""], axis: int) -> Array:
        """The columns of a block, of a weight whose vocabulary is ``axis``."""
        part = jax.lax.dynamic_slice_in_dim(self._by_device(weight, axis), start, self.each, axis + 1)
        return part.reshape(*weight.shape[:axis], self.columns, *weight.shape[axis + 1 :])

    def put(self, weight: Array, part: Array, start: Int[Array, ""], axis: int) -> Array:
        """``weight`` with ``part`` in the place of what `cut` takes."""
        parts = self._by_device(weight, axis), self._by_device(part, axis)
        return jax.lax.dynamic_update_slice_in_dim(*parts, start, axis + 1).reshape(weight.shape)

    def _by_device(self, weight: Array, axis: int) -> Array:
        return weight.reshape(*weight.shape[:axis], self.along, -1, *weight.shape[axis + 1 :])


def _sharing(rows: int, vocab: int, across: int, along: int) -> tuple[int, int]:
    """The devices that share rows and vocabulary equally: all of them, or as if there were one."""
    return across if rows % across == 0 else 1, along if vocab % along == 0 else 1


@struct.dataclass
class Rows:
    """(A block of) the rows to score: which token, at which temperature, among which tokens (None: all) but which."""

    target: Int[Array, "rows"]
    temperature: Float[Array, "rows"]
    support: Int[Array, "rows kept"] | None
    barred: Int[Array, "rows stops"] | None


@struct.dataclass
class Running:
    """Sums over the columns seen so far, relative to the largest z among them.

    ``weight`` is sum exp(z - maximum), ``moment`` sum exp(z - maximum) (z - maximum), ``chosen`` the target's z, or
    `LOW` while it has not been seen.
    """

    maximum: Float[Array, "rows"]
    weight: Float[Array, "rows"]
    moment: Float[Array, "rows"]
    chosen: Float[Array, "rows"]

    @property
    def normaliser(self) -> Float[Array, "rows"]:
        return self.maximum + jnp.log(self.weight)

    @property
    def found(self) -> Bool[Array, "rows"]:
        """Whether the target lies in the support, as each token that was drawn does."""
        return ~(self.chosen <= LOW)  # NaN is to show

    @property
    def log_prob(self) -> Float[Array, "rows"]:
        return jnp.where(self.found, self.chosen - self.normaliser, -jnp.inf)

    @property
    def entropy(self) -> Float[Array, "rows"]:
        return jnp.log(self.weight) - self.moment / self.weight


def head_log_probs(
    model: Transformer,
    variables: dict,
    hidden: Float[Array, "rows d"],
    targets: Int[Array, "rows"],
    temperature: Float[Array, "rows"],
    support: Int[Array, "rows kept"] | None,
    logits_per_chunk: int,
    barred: Int[Array, "rows stops"] | None = None,
) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """Log-probs of ``targets`` and entropies over ``support`` without ``barred`` tokens, in nats; ``logits_per_chunk``
    logits exist at once (of a quantised head those of 128 rows a device at least). A target that is not among them has
    -inf, which the loss counts as broken; a row without any support, 0.

    Differentiable in hidden states and the head's weight, straight through quantisation, unless the weight is prepared
    for a sampler. Its gradient is accumulated in float32.
    """
    vocab = model.config.vocab_size
    greedy = temperature == 0  # a point mass: log-prob and entropy are 0 whatever the logits are
    certain = greedy
    if support is not None:  # what lies outside a response has none: an arbitrary one keeps its numbers finite
        drawn = (support < vocab).any(-1)
        support, certain = jnp.where(drawn[:, None], support, 0), greedy | ~drawn
    rows = Rows(targets, jax.lax.stop_gradient(jnp.where(greedy, 1.0, temperature)), support, barred)
    precision, weight = head_of(model, variables)
    devices = model.layout.row_parts, model.layout.parts("tensor")
    tiles = Tiles.within(logits_per_chunk, hidden.shape[0], vocab, *devices)
    if precision != precision.exempt():
        # Whole rows: a floor keeps the passes over the weight few where a chunk holds a handful of them.
        height = max(logits_per_chunk // vocab, QUANTISED_ROWS * devices[0])
        tiles = Tiles.of_size(height, vocab, hidden.shape[0], vocab, *devices)
    if weight.scale is not None:
        running = _run(tiles, lambda h, start: logits_of(model, variables, h), hidden, rows)
        return jnp.where(certain, 0.0, running.log_prob), jnp.where(greedy, 0.0, running.entropy)
    # The weight is gathered once. A product with parts of it would be a sum over devices of each tile of logits.
    tied = model.config.tie_embeddings
    values = model.layout.constrain(weight.values, *(("vocab", None) if tied else (None, "vocab")))
    log_probs, entropies = _log_probs(tiles, precision, tied, values, hidden, rows)
    return jnp.where(certain, 0.0, log_probs), jnp.where(greedy, 0.0, entropies)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _log_probs(
    tiles: Tiles, precision: Precision, tied: bool, weight: Array, hidden: Float[Array, "rows d"], rows: Rows
) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    return _forward(tiles, precision, tied, weight, hidden, rows)[0]


def _forward(tiles, precision, tied, weight, hidden, rows):
    stored = at_rest(weight, None, precision, tied)

    def product(h: Array, start: Array) -> Array:
        return _product(h, _part(tiles, tied, stored, start), precision, tied)

    running = _run(tiles, product, hidden, rows)
    return (running.log_prob, running.entropy), (weight, hidden, rows, running)


def _backward(tiles, precision, tied, saved, cotangents):
    weight, hidden, rows, running = saved
    of_log_prob, of_entropy = cotangents
    of_log_prob = jnp.where(running.found, of_log_prob, 0.0)
    narrow = jnp.bfloat16 if precision.dtype == "bfloat16" else jnp.float32
    dot = partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if narrow == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    of_log_prob, of_entropy = (tiles.split(x, "constant") for x in (of_log_prob, of_entropy))
    parts = jax.tree.map(tiles.split, (hidden, rows, running.normaliser, running.entropy))
    operands = (*parts, of_log_prob, of_entropy)
    stored = at_rest(weight, None, precision, tied)

    def of_hidden(d_logits, numbers):
        """[height, columns] with [columns, d] or [d, columns]; for each device of the vocabulary its own sum, so that
        they are added up once, and not for each tile."""
        axis = 0 if tied else 1
        each = d_logits.reshape(-1, tiles.along, tiles.each)
        numbers = numbers.reshape(*numbers.shape[:axis], tiles.along, tiles.each, *numbers.shape[axis + 1 :])
        return jnp.moveaxis(dot(each, numbers, (((2,), (axis + 1,)), ((1,), (axis,)))), 0, 1)

    def over_columns(carry, block):
        d_hidden, d_weight = carry
        start = tiles.start(block)
        part = _part(tiles, tied, stored, start)
        numbers = part.load(narrow, precision.block)

        def over_rows(d_part, xs):
            (h, rows, normaliser, entropy, of_log_prob, of_entropy), d_h = xs
            z = _scaled(tiles, _product(h, part, precision, tied), rows, block, start)
            log_p = z - normaliser[:, None]
            d_z = -jnp.exp(log_p) * (
                of_log_prob[:, None] + of_entropy[:, None] * jnp.maximum(log_p, LOW) + (of_entropy * entropy)[:, None]
            )
            target = jnp.arange(tiles.columns) == tiles.place(rows.target, start)[:, None]
            d_z = d_z + jnp.where(target & (z > -jnp.inf), of_log_prob[:, None], 0.0)
            d_logits = (d_z / rows.temperature[:, None]).astype(narrow)
            d_h = d_h + of_hidden(d_logits, numbers)
            # [height, columns] and [height, d]
            h = store_activations(h, precision).load(narrow, precision.block)
            both = (d_logits, h) if tied else (h, d_logits)
            return d_part + dot(*both, (((0,), (0,)), ((), ()))), d_h

        d_part, d_hidden = jax.lax.scan(over_rows, jnp.zeros(numbers.shape, jnp.float32), (operands, d_hidden))
        axis = 0 if tied else 1
        d_part = d_part + tiles.cut(d_weight, start, axis)
        return (d_hidden, tiles.put(d_weight, d_part, start, axis)), None

    *rows_of_blocks, d = operands[0].shape
    zeros = jnp.zeros((*rows_of_blocks, tiles.along, d), jnp.float32), jnp.zeros(weight.shape, jnp.float32)
    (d_hidden, d_weight), _ = jax.lax.scan(over_columns, zeros, jnp.arange(tiles.blocks))
    return d_weight.astype(weight.dtype), tiles.join(d_hidden.sum(2), hidden.shape[0]).astype(hidden.dtype), None


_log_probs.defvjp(_forward, _backward)


def _run(tiles: Tiles, product: Callable[[Array, Array], Array], hidden: Float[Array, "rows d"], rows: Rows) -> Running:
    """All tiles, the rows of one block of columns after another; ``product(hidden, start)`` gives a tile's logits."""
    operands = jax.tree.map(tiles.split, (hidden, rows))

    def over_columns(running: Running, block: Array) -> tuple[Running, None]:
        start = tiles.start(block)

        def tile(xs: tuple) -> Running:
            (h, rows), running = xs
            z = _scaled(tiles, product(h, start), rows, block, start)
            return _extended(running, z, tiles.place(rows.target, start))

        return jax.lax.map(tile, (operands, running)), None

    low = jnp.full((tiles.row_blocks, tiles.rows), LOW)
    running, _ = jax.lax.scan(
        over_columns, Running(low, jnp.zeros_like(low), jnp.zeros_like(low), low), jnp.arange(tiles.blocks)
    )
    return jax.tree.map(lambda x: tiles.join(x, hidden.shape[0]), running)


def _extended(running: Running, z: Array, at: Int[Array, "rows"]) -> Running:
    """The sums with one more tile, whose column ``at`` is the target's, if it has one; -inf is outside the support."""
    maximum = jnp.maximum(running.maximum, z.max(1))
    below = z - maximum[:, None]
    weight = jnp.exp(below)
    moment = (weight * jnp.where(weight > 0, below, 0.0)).sum(1)  # not inf, whose gradient would be NaN
    old, shrink = running.maximum - maximum, jnp.exp(running.maximum - maximum)
    chosen = jnp.take_along_axis(z, jnp.minimum(at, z.shape[1] - 1)[:, None], axis=1)[:, 0]
    chosen = jnp.where(at < z.shape[1], jnp.maximum(chosen, LOW), LOW)
    return Running(
        maximum,
        running.weight * shrink + weight.sum(1),
        (running.moment + running.weight * old) * shrink + moment,
        jnp.maximum(running.chosen, chosen),
    )


def _scaled(
    tiles: Tiles, logits: Float[Array, "height columns"], rows: Rows, block: Array, start: Array
) -> Float[Array, "height columns"]:
    """z of a tile, -inf outside the support and where an earlier block has been."""
    z = logits / rows.temperature[:, None]
    if tiles.vocab % tiles.columns:
        z = jnp.where(tiles.seen(block), -jnp.inf, z)
    if rows.support is not None:
        z = jnp.where(_holds(z, tiles.place(rows.support, start)), z, -jnp.inf)
    if rows.barred is not None:
        z = jnp.where(_holds(z, tiles.place(rows.barred, start)), -jnp.inf, z)
    return z


def _holds(z: Float[Array, "height columns"], at: Int[Array, "height n"]) -> Bool[Array, "height columns"]:
    """True in the columns ``at`` of each row; those past the last one are left out."""
    # By row: with the rows as indices, some compilers would bring all of them to each device.
    return jax.vmap(lambda at: jnp.zeros(z.shape[1], bool).at[at].set(True, mode="drop"))(at)


def _part(tiles: Tiles, tied: bool, weight: Stored, start: Array) -> Stored:
    """A block of the vocabulary, [columns, d] of a tied embedding, else [d, columns]; of a quantised weight all."""
    return weight if weight.scale is not None else Stored(tiles.cut(weight.values, start, 0 if tied else 1))


def _product(h: Float[Array, "height d"], part: Stored, precision: Precision, tied: bool) -> Array:
    return matmul(h, part.transposed if tied else part, precision, "float32")
