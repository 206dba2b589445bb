"""Every parameter has logical axes of its rank, and its optimiser state is split alike."""

import dataclasses

import jax
import pytest
import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from rlstab_jax.learner import init_state, state_shardings
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.parallel.mesh import AXES
from rlstab_jax.parallel.sharding import INFERENCE, TRAINING, check_divides, shardings
from rlstab_jax.types import UserError

CONFIGS = {
    "mixed": tiny.MIXED,
    "untied": dataclasses.replace(tiny.MIXED, tie_embeddings=False),
    "dense": dataclasses.replace(tiny.MIXED, num_experts=0, dense_layers=()),
    "all MoE": dataclasses.replace(tiny.MIXED, dense_layers=()),
}
MESH = AbstractMesh((1, 2, 2, 2), AXES)


def is_names(node: object) -> bool:
    return isinstance(node, tuple)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_named(name: str) -> None:
    params = tiny.parameters(CONFIGS[name])
    axes = logical_axes(params)
    assert jax.tree.structure(axes, is_leaf=is_names) == jax.tree.structure(params)
    sizes = {
        "heads": 32,
        "kv_heads": 16,
        "head_dim": 8,
        "embed": 32,
        "experts": 8,
        "mlp": 40,
        "vocab": 17,
        "expert_mlp": 16,
    }
    for names, leaf in zip(jax.tree.leaves(axes, is_leaf=is_names), jax.tree.leaves(params), strict=True):
        assert all(size == sizes.get(axis, size) for axis, size in zip(names, leaf.shape, strict=True)), names
    assert axes["segment_0"]["block_0"]["attention"]["q"]["kernel"] == ("layers", "embed", "heads")
    if "lm_head" in axes:
        assert axes["lm_head"]["kernel"] == ("embed", "vocab")


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no logical axes for the parameter final_norm/bias"):
        logical_axes({"final_norm": {"bias": jax.ShapeDtypeStruct((3,), "float32")}})


def test_placement_by_table() -> None:
    params = tiny.parameters(CONFIGS["all MoE"])
    moe = ("segment_0", "block_0", "moe", "up")
    for rules, spec in (
        (TRAINING, P(None, "expert", "fsdp", "tensor")),
        (INFERENCE, P(None, "expert", None, "tensor")),
    ):
        placed = shardings(MESH, logical_axes(params), rules)
        for key in moe:
            placed = placed[key]
        assert placed.spec == spec


def test_sizes_that_do_not_divide_are_named() -> None:
    params = tiny.parameters()  # 17 tokens
    with pytest.raises(UserError, match=r"embedding: dimension 0 \(vocab, size 17\) is not divisible"):
        check_divides(MESH, params, logical_axes(params), TRAINING)


def test_optimiser_state_is_split_as_its_parameters() -> None:
    state = jax.eval_shape(init_state, tiny.parameters(), tiny.numbers())
    placed = state_shardings(MESH, state, TRAINING)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    adam = next(part for part in placed.opt_state if hasattr(part, "mu"))
    assert adam.mu == placed.params == adam.nu
    assert adam.count.spec == placed.step.spec == P()
