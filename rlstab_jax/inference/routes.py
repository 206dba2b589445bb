"""Routes from other inference engines, checked and translated once, at the border."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from rlstab_jax.models.config import ModelConfig
from rlstab_jax.types import Rollout, Routes, UserError, route_dtype


def import_routes(
    recorded: Sequence[Int[np.ndarray, "fed layer k"]],
    rollout: Rollout,
    config: ModelConfig,
    moe_layers: Sequence[int | str] | None = None,
) -> Routes:
    """Routes of a rollout from what another engine recorded for each row.

    Engines such as vLLM and SGLang return one array a response, [tokens - 1, layers, k]: the last token was never fed.
    There -1 means that nothing was recorded; here ``num_experts`` means so, and such a token routes live.

    Args:
      recorded: for each row, in the order in which its tokens were fed, prompt included, padding excluded.
      rollout: whose rows these are; its own ``routes`` are not looked at.
      config: of the model.
      moe_layers: which layer each of the arrays' layers is, as a number or a name that holds one, such as
        "model.layers.10.mlp": they are put into depth order. None: they are in depth order already.

    Returns:
      [layer, batch, time - 1, k], as the training engine replays them.

    Raises:
      UserError: a count of rows, tokens, layers or experts that does not fit; an expert that does not exist; an expert
        twice for one token; -1 for some of a token's experts; numbers that are no integers; layers given twice or not
        those of the model.
    """
    if not config.num_moe_layers:
        raise UserError("routes: the model is dense and has none")
    fed = np.asarray(rollout.fed_mask)
    if not hasattr(recorded, "__len__"):
        raise UserError(f"routes: {type(recorded).__name__}, expected a list of arrays, one for each row")
    if len(recorded) != len(fed):
        raise UserError(f"routes: {len(recorded)} rows, but the rollout has {len(fed)}: give one array for each row")
    order = _depth_order(moe_layers, config)
    shape = (config.num_moe_layers, *fed.shape, config.experts_per_token)
    routes = np.full(shape, config.num_experts, route_dtype(config.num_experts))
    for row, of_row in enumerate(recorded):
        try:
            array = np.asarray(of_row)
        except ValueError as error:  # lists of unequal lengths
            raise UserError(f"routes of row {row}: no array [fed tokens, MoE layers, experts]: {error}") from error
        checked = _check_row(array, row, int(fed[row].sum()), config)
        routes[:, row, fed[row]] = checked.swapaxes(0, 1)[order]
    return jnp.asarray(routes)


def _check_row(routes: np.ndarray, row: int, fed: int, config: ModelConfig) -> Int[np.ndarray, "fed layer k"]:
    """One row's routes with the sentinel in the place of -1."""
    expected = (fed, config.num_moe_layers, config.experts_per_token)
    if routes.ndim == 3 and routes.shape[0] == fed + 1 and routes.shape[1:] == expected[1:]:
        raise UserError(
            f"routes of row {row}: {fed + 1} tokens, expected {fed}: the last token of a response is never fed to the "
            "model, so it has no route; cut it off if the engine pads it"
        )
    if routes.shape != expected:
        raise UserError(
            f"routes of row {row}: shape {routes.shape}, expected {expected}, that is [fed tokens, MoE layers, experts "
            "per token]: do the engine's model and tokens agree with this rollout's?"
        )
    if not np.issubdtype(routes.dtype, np.integer):
        raise UserError(f"routes of row {row}: {routes.dtype}, expected integers")
    # Before the cast, which a number beyond int64 would not survive; after it, -1 is no unsigned number.
    beyond = routes >= config.num_experts
    given, routes = routes, routes.astype(np.int64)
    missing = ~beyond & (routes == -1)
    wrong = beyond | (~missing & (routes < 0))
    if wrong.any():
        token, layer, slot = np.argwhere(wrong)[0]
        raise UserError(
            f"routes of row {row}, token {token}, layer {layer}: expert {given[token, layer, slot]}, expected 0 to "
            f"{config.num_experts - 1}, or -1 for not recorded"
        )
    partly = missing.any(-1) & ~missing.all(-1)
    if partly.any():
        token, layer = np.argwhere(partly)[0]
        raise UserError(
            f"routes of row {row}, token {token}, layer {layer}: {routes[token, layer].tolist()}: -1 for some of the "
            "experts; a token's experts are all recorded, or none is"
        )
    ordered = np.sort(routes, axis=-1)
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    if twice.any():
        token, layer = np.argwhere(twice)[0]
        raise UserError(
            f"routes of row {row}, token {token}, layer {layer}: {routes[token, layer].tolist()} names an expert twice"
        )
    return np.where(missing, config.num_experts, routes)


def _depth_order(moe_layers: Sequence[int | str] | None, config: ModelConfig) -> list[int]:
    """Which of the given layers is the model's first MoE layer, its second, and so on."""
    depths = [depth for depth, moe in enumerate(config.kinds) if moe]
    if moe_layers is None:
        return list(range(len(depths)))
    if isinstance(moe_layers, str) or not hasattr(moe_layers, "__len__"):
        raise UserError(f"routes: moe_layers = {moe_layers!r}, expected a list of the layers' numbers or names")
    given = [_number(layer) for layer in moe_layers]
    if sorted(given) != depths:
        raise UserError(f"routes: layers {given}, expected each of the model's MoE layers {depths} once")
    return [given.index(depth) for depth in depths]


def _number(layer: int | str) -> int:
    """The layer's number: names sort otherwise, with layer_10 before layer_2."""
    if isinstance(layer, int | np.integer):
        return int(layer)
    numbers = "".join(c if c.isdecimal() else " " for c in layer).split() if isinstance(layer, str) else []
    if len(numbers) != 1:
        raise UserError(f"routes: layer {layer!r}: expected its depth, or a name that holds this one number")
    return int(numbers[0])
