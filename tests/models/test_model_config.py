"""Impossible sizes are refused by name, kernels by hardware; layers group into scans."""

import dataclasses
import importlib.metadata

import pytest

from rlstab_jax.models import Kernels, ModelConfig, resolve_kernels
from rlstab_jax.models.config import dense_remark
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
    assert resolve_kernels(Kernels(), "tpu", 32_768).attention == "chunked"
    assert resolve_kernels(Kernels("reference"), "tpu", 32_768).attention == "reference"
    assert resolve_kernels(Kernels(), "gpu") == Kernels("reference", "grouped", "reference", "grouped")
    assert resolve_kernels(Kernels("cudnn", "dense"), "gpu") == Kernels("cudnn", "dense", "reference", "grouped")
    explicit = Kernels("splash", "megablox", "splash", "narrow")
    assert resolve_kernels(explicit, "tpu") == explicit


def test_dense_products_are_remarked_on() -> None:
    """Where XLA has no grouped product, with what that costs."""
    model, kernels = ModelConfig(num_experts=64, experts_per_token=8), Kernels(experts="ragged_dot")
    assert "'ragged_dot' does 64 times the experts' work on NVIDIA GPUs" in str(dense_remark(kernels, "gpu", model))
    assert dense_remark(kernels, "gpu", ModelConfig(num_experts=0)) is None
    assert dense_remark(kernels, "tpu", model) is None
    assert dense_remark(resolve_kernels(Kernels(), "gpu"), "gpu", model) is None
    assert dense_remark(Kernels(experts="tokamax"), "gpu", model) is None


@pytest.mark.parametrize(
    ("field", "kernel", "platform", "message"),
    [
        ("attention", "cudnn", "cpu", "needs an NVIDIA GPU, but this is 'cpu': use 'auto' or 'reference'"),
        ("attention", "cudnn", "tpu", "needs an NVIDIA GPU, but this is 'tpu': use 'auto' or 'reference'"),
        ("attention", "splash", "gpu", "needs a TPU, but this is 'gpu': use 'auto' or 'reference'"),
        ("decode_attention", "splash", "cpu", "needs a TPU, but this is 'cpu': use 'auto' or 'reference'"),
        ("decode_attention", "flash", "gpu", "needs a TPU, but this is 'gpu': use 'auto' or 'reference'"),
        ("decode_attention", "triton", "cpu", "needs an NVIDIA GPU, but this is 'cpu': use 'auto' or 'reference'"),
        ("experts", "megablox", "cpu", "needs a TPU, but this is 'cpu': use 'auto' or 'tiles'"),
        ("decode_experts", "megablox", "gpu", "needs a TPU, but this is 'gpu': use 'auto' or 'grouped'"),
        ("decode_experts", "narrow", "cpu", "needs a TPU, but this is 'cpu': use 'auto' or 'grouped'"),
        ("decode_experts", "tokamax", "tpu", "needs an NVIDIA GPU, but this is 'tpu': use 'auto' or 'ragged_dot'"),
    ],
)
def test_kernels_of_other_hardware_are_refused(field: str, kernel: str, platform: str, message: str) -> None:
    kernels = dataclasses.replace(Kernels(), **{field: kernel})
    with pytest.raises(UserError, match=f"^kernels.{field} = '{kernel}' {message}$"):
        resolve_kernels(kernels, platform)


@pytest.mark.parametrize("version", [None, "0.0.12", "0.0.17", "0.1.0"])
def test_tokamax_is_asked_for_where_it_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    kernels = Kernels(experts="tokamax")
    if version in ("0.0.17", "0.1.0"):
        assert resolve_kernels(kernels, "gpu").experts == "tokamax"
    else:
        with pytest.raises(UserError, match=r"kernels.experts = 'tokamax' needs the package tokamax.*pip install"):
            resolve_kernels(kernels, "gpu")


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
