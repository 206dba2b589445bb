"""Impossible sizes are refused by name, kernels by hardware; layers group into scans."""

import pytest

from rlstab_jax.models import Kernels, ModelConfig, resolve_kernels
from rlstab_jax.types import UserError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "model.num_layers = 0"),
        ({"embed_dim": -4}, "model.embed_dim = -4"),
        ({"num_kv_heads": 3}, "model.num_kv_heads = 3 does not divide model.num_heads = 4"),
        ({"head_dim": 7}, "model.head_dim = 7"),
        ({"num_experts": 4, "experts_per_token": 5}, "model.experts_per_token = 5 exceeds model.num_experts = 4"),
        ({"experts_per_token": 0}, "model.experts_per_token = 0"),
        ({"expert_dim": 0}, "model.expert_dim = 0"),
        ({"num_experts": 0, "mlp_dim": 0}, "model.mlp_dim = 0"),
        ({"dense_layers": (0,), "mlp_dim": 0}, "model.mlp_dim = 0"),
        ({"num_experts": -1}, "model.num_experts = -1"),
        ({"qk_norm": "heads"}, "model.qk_norm = 'heads': expected one of head, projection, none"),
        ({"num_experts": 65_535}, "at most 65534"),
        ({"dense_layers": (0, 2)}, r"model.dense_layers holds \[2\]: expected indices from 0 to 1"),
    ],
)
def test_validate_names_the_field(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**changes).validate()


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": 0, "expert_dim": 0}, {"num_experts": 65_534}, {"dense_layers": (0, 1)}]
)
def test_validate_accepts(changes: dict) -> None:
    ModelConfig(**changes).validate()


def test_kernels_by_hardware() -> None:
    assert resolve_kernels(Kernels(), "cpu") == Kernels("reference", "tiles", "reference", "grouped")
    assert resolve_kernels(Kernels(), "tpu") == Kernels("reference", "ragged_dot", "reference", "ragged_dot")
    assert resolve_kernels(Kernels("cudnn", "dense"), "gpu") == Kernels("cudnn", "dense", "reference", "grouped")
    for platform in ("cpu", "tpu"):
        with pytest.raises(UserError, match="cudnn"):
            resolve_kernels(Kernels(attention="cudnn"), platform)


@pytest.mark.parametrize(
    ("layers", "dense", "segments"),
    [
        (3, (), (((True,), 3),)),
        (1, (), (((True,), 1),)),
        (4, (1, 3), (((True, False), 2),)),
        (5, (0,), (((False,), 1), ((True,), 4))),
        (5, (1, 3), (((True, False), 2), ((True,), 1))),
        (6, (2, 5), (((True, True, False), 2),)),
        (3, (0, 1, 2), (((False,), 3),)),
    ],
)
def test_segments(layers: int, dense: tuple[int, ...], segments: tuple) -> None:
    config = ModelConfig(num_layers=layers, dense_layers=dense)
    assert config.segments == segments
    assert sum((kinds * repeats for kinds, repeats in config.segments), ()) == config.kinds
