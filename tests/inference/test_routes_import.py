"""Routes of other engines: translated, or refused with the row, token and layer that is wrong."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny

from rlstab_jax.inference import import_routes
from rlstab_jax.types import UserError, route_dtype

CONFIG = tiny.MIXED  # MoE layers 0 and 2, 8 experts, 2 a token


def recorded() -> list[np.ndarray]:
    """What an engine would hand over of this rollout: [fed, layer, k] a row, without padding."""
    rollout = tiny.rollout()
    fed = np.asarray(rollout.fed_mask)
    return [np.asarray(rollout.routes)[:, row, fed[row]].swapaxes(0, 1).astype(np.int32) for row in range(len(fed))]


def test_a_round_trip_gives_the_sampled_routes() -> None:
    rollout = tiny.rollout()
    routes = import_routes(recorded(), rollout, CONFIG)
    np.testing.assert_array_equal(routes, rollout.routes)
    assert routes.dtype == rollout.routes.dtype == route_dtype(CONFIG.num_experts)
    assert (np.asarray(routes)[:, ~np.asarray(rollout.fed_mask)] == CONFIG.num_experts).all()


def test_not_recorded_becomes_the_sentinel() -> None:
    rows = recorded()
    rows[3][1, 0] = -1
    routes = np.asarray(import_routes(rows, tiny.rollout(), CONFIG))
    column = np.flatnonzero(np.asarray(tiny.rollout().fed_mask)[3])[1]
    assert (routes[0, 3, column] == CONFIG.num_experts).all()
    assert (routes != np.asarray(tiny.rollout().routes)).sum() == CONFIG.experts_per_token


@pytest.mark.parametrize("names", [[2, 0], np.array([2, 0]), ["model.layers.2.mlp", "model.layers.0.mlp"]])
def test_layers_are_put_into_depth_order_by_their_number(names: Any) -> None:
    swapped = [row[:, ::-1] for row in recorded()]
    np.testing.assert_array_equal(import_routes(swapped, tiny.rollout(), CONFIG, names), tiny.rollout().routes)


def test_layer_10_comes_after_layer_2() -> None:
    config = dataclasses.replace(CONFIG, num_layers=11, dense_layers=tuple(range(2)) + tuple(range(3, 10)))
    swapped = [row[:, ::-1] for row in recorded()]
    routes = import_routes(swapped, tiny.rollout(), config, ["layer_10", "layer_2"])
    np.testing.assert_array_equal(routes, tiny.rollout().routes)


def changed(row: int, change: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    rows = recorded()
    rows[row] = change(rows[row].copy())
    return rows


def put(value: object, *index: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(routes: np.ndarray) -> np.ndarray:
        routes[index] = value
        return routes

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(8, 1, 0, 0), "row 2, token 1, layer 0: expert 8, expected 0 to 7, or -1"),
        (put(-2, 0, 1, 1), "row 2, token 0, layer 1: expert -2"),
        (put(-1, 0, 1, 1), "row 2, token 0, layer 1: .* -1 for some of the experts"),
        (put([5, 5], 1, 1), r"row 2, token 1, layer 1: \[5, 5\] names an expert twice"),
        (lambda r: r[:, :1], r"row 2: shape .*, expected .*MoE layers"),
        (lambda r: r[..., :1], r"row 2: shape"),
        (lambda r: r[:-1], r"row 2: shape"),
        (lambda r: np.concatenate([r, np.full_like(r[:1], -1)]), "the last token of a response is never fed"),
        (lambda r: r[None], "row 2: shape"),
        (lambda r: r.astype(np.float32), "row 2: float32, expected integers"),
        (lambda r: np.where(r == r, 255, 0).astype(np.uint8), "expert 255"),  # -1 in eight unsigned bits
        (lambda r: np.full(r.shape, 2**64 - 1, np.uint64), f"expert {2**64 - 1}"),  # and in 64
        (lambda r: [*r[:-1].tolist(), r[-1, :1].tolist()], "routes of row 2: no array"),
    ],
)
def test_malformed_routes_are_refused(change: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_routes(changed(2, change), tiny.rollout(), CONFIG)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 0], r"layers \[0, 0\], expected each of the model's MoE layers \[0, 2\] once"),
        ([0, 1], r"layers \[0, 1\]"),
        ([0], r"layers \[0\]"),
        (["first", "layer_2"], "layer 'first': expected its depth, or a name that holds this one number"),
        (["layer²", "layer_2"], "layer 'layer²': expected its depth, or a name"),
        (["layer_0", b"layer_2"], "layer b'layer_2': expected its depth"),
        (3, "moe_layers = 3, expected a list of the layers' numbers or names"),
        ("02", "moe_layers = '02', expected a list"),
        ([None, 2], "layer None: expected its depth"),
        ([0.0, 2], "layer 0.0: expected its depth"),
    ],
)
def test_layers_that_are_not_the_models_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_routes(recorded(), tiny.rollout(), CONFIG, layers)


def test_rows_and_a_dense_model() -> None:
    with pytest.raises(UserError, match="7 rows, but the rollout has 8"):
        import_routes(recorded()[1:], tiny.rollout(), CONFIG)
    with pytest.raises(UserError, match="routes: NoneType, expected a list of arrays"):
        import_routes(None, tiny.rollout(), CONFIG)
    with pytest.raises(UserError, match="the model is dense"):
        import_routes(recorded(), tiny.rollout(), dataclasses.replace(CONFIG, num_experts=0))
