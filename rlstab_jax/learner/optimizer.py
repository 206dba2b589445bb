"""The training state and its optimiser step: clipping by global norm, Adam, decoupled weight decay, linear warm-up."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from rlstab_jax.learner.loss_scale import LossScale, init_loss_scale
from rlstab_jax.learner.predictor import Predictor, init_predictor
from rlstab_jax.models.precision import Precision
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.parallel.host_memory import HOST, kept_like, on_device
from rlstab_jax.parallel.sharding import Rules, shardings
from rlstab_jax.types import UserError


@struct.dataclass
class LearnerNumbers:
    """Float32 scalars of `LearnerConfig`, as traced arguments of the jitted update."""

    learning_rate: Any
    warmup_steps: Any
    adam_b1: Any
    adam_b2: Any
    adam_eps: Any
    weight_decay: Any
    max_grad_norm: Any
    load_balance: Any
    router_z: Any
    predictor_rate: Any


@struct.dataclass
class TrainState:
    """What an update changes: float32 parameters, the optimiser's state, gradient steps taken, PR2's predictors, and
    in float16 the loss's scale."""

    params: dict
    opt_state: Any
    step: Int[Array, ""]
    predictor: Predictor | None = None
    loss_scale: LossScale | None = None


def optimizer(numbers: LearnerNumbers, step: Int[Array, ""] | int) -> optax.GradientTransformation:
    """Global-norm clipping, Adam, decoupled weight decay, linear warm-up. Built inside jit: its numbers are traced."""
    return optax.chain(
        optax.clip_by_global_norm(numbers.max_grad_norm),
        optax.scale_by_adam(b1=numbers.adam_b1, b2=numbers.adam_b2, eps=numbers.adam_eps),
        optax.add_decayed_weights(numbers.weight_decay, mask=_decayed),
        optax.scale(-learning_rate(numbers, step)),
    )


def _decayed(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "gain", params)


def learning_rate(numbers: LearnerNumbers, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The rate of the update after ``step`` updates: linear warm-up, then constant."""
    return numbers.learning_rate * jnp.minimum(1.0, (step + 1) / jnp.maximum(numbers.warmup_steps, 1.0))


def init_state(
    params: dict,
    numbers: LearnerNumbers,
    moments_dtype: str = "float32",
    predictor: bool = False,
    precision: Precision | None = None,
) -> TrainState:
    """A state at gradient step 0, with Adam's moments in ``moments_dtype``, if PR2 needs it a ``predictor``, and the
    loss's scale if the training engine's ``precision`` needs one."""

    def typed(leaf: Array) -> Array:
        return leaf.astype(moments_dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    opt_state = jax.tree.map(typed, optimizer(numbers, 0).init(params))
    predictors = init_predictor(params) if predictor else None
    return TrainState(params, opt_state, jnp.int32(0), predictors, init_loss_scale(precision or Precision()))


def state_shardings(mesh: Mesh, state: TrainState, rules: Rules) -> TrainState:
    """A sharding for each leaf of a state. What the optimiser keeps of a parameter is split as the parameter is.

    Args:
      state: arrays or ``ShapeDtypeStruct``.
    """

    def axes_of(tree: Any, params: dict) -> Any:
        """Of a tree that holds trees like ``params``."""
        axes = logical_axes(params)
        like_params: Any = jax.tree.structure(params)

        def is_params(node: Any) -> bool:
            return isinstance(node, dict) and jax.tree.structure(node) == like_params

        return jax.tree.map(lambda node: axes if is_params(node) else (None,) * node.ndim, tree, is_leaf=is_params)

    places = axes_of(dataclasses.replace(state, predictor=None), state.params)
    if state.predictor is not None:
        places = dataclasses.replace(places, predictor=axes_of(state.predictor, state.predictor.weights))
    return shardings(mesh, places, rules)


def offloaded(places: TrainState, state: TrainState) -> TrainState:
    """``places``, the shardings of a ``state``, with the optimiser's arrays in the host's memory."""

    def place(at: NamedSharding, leaf: Any) -> NamedSharding:
        return at.with_memory_kind(HOST) if leaf.ndim else at

    return dataclasses.replace(places, opt_state=jax.tree.map(place, places.opt_state, state.opt_state))


def without_frozen(tree: dict, freeze: Collection[str]) -> dict:
    """A tree like the parameters, with 0 for those whose path holds one of the names in ``freeze``."""

    def of(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        return jnp.zeros_like(leaf) if any(entry.key in freeze for entry in path) else leaf

    return jax.tree_util.tree_map_with_path(of, tree) if freeze else tree


def check_frozen(params: dict, freeze: Collection[str]) -> None:
    """Raises UserError for a name in ``freeze`` that no parameter of ``params`` (arrays or shapes) has in its path, and
    where these are all parameters."""
    names = {entry.key for path, _ in jax.tree_util.tree_leaves_with_path(params) for entry in path}
    if unknown := sorted(set(freeze) - names):
        raise UserError(f"learner.freeze: no parameter is named {unknown[0]!r}; there are {', '.join(sorted(names))}")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if all(any(entry.key in freeze for entry in path) for path in paths):
        raise UserError(f"learner.freeze = {tuple(freeze)} leaves no parameter to train: name fewer")


def apply_gradient(
    state: TrainState, gradient: dict, numbers: LearnerNumbers, freeze: Collection[str] = ()
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimiser step. A gradient that is not finite changes the step count alone, and is reported as it is.

    The optimiser's state is computed with in float32 on the device, and kept in the types and the memory it came in.
    Parameters named in ``freeze`` stay as they are, and their gradient counts in no norm.
    """
    gradient = without_frozen(gradient, freeze)
    norm = optax.tree.norm(gradient)
    kept = jax.tree.map(on_device, state.opt_state)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, kept)
    updates, opt_state = optimizer(numbers, state.step).update(gradient, wide, state.params)
    opt_state = _narrow_like(opt_state, kept, state.step)
    params = optax.apply_updates(state.params, without_frozen(updates, freeze))  # weight decay is an update too
    finite = jnp.isfinite(norm)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, kept)
    )
    opt_state = jax.tree.map(kept_like, opt_state, state.opt_state)
    measures = {"learner/grad_norm": norm, "learner/learning_rate": learning_rate(numbers, state.step)}
    return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), measures


def stochastically_rounded(x: Float[Array, "..."], key: Array) -> Array:
    """``x`` in bfloat16: up or down at random, such that the mean is ``x``.

    To nearest, an average of slow decay would stand still: (1 - b2) v is less than half of a step below v once 1 - b2
    is below 2^-9.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    raised = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _narrow_like(tree: Any, kept: Any, step: Int[Array, ""]) -> Any:
    """``tree`` in the types of ``kept``; what is rounded to bfloat16 depends on the step and the place in the tree."""
    key = jax.random.fold_in(jax.random.key(0), step)
    leaves, structure = jax.tree.flatten(tree)
    narrow = [
        stochastically_rounded(leaf, jax.random.fold_in(key, i)) if old.dtype == jnp.bfloat16 else leaf
        for i, (leaf, old) in enumerate(zip(leaves, jax.tree.leaves(kept), strict=True))
    ]
    return jax.tree.unflatten(structure, narrow)
