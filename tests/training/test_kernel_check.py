"""Kernels that some hardware has: what they do not take is said when a run is built. Traced only, so on any machine."""

from dataclasses import replace

import jax
import pytest

from rlstab_jax.models import Kernels, ModelConfig, Precision, fp8
from rlstab_jax.parallel.mesh import make_mesh
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import build_pair
from rlstab_jax.types import UserError

BF16 = Precision("bfloat16")


def built(platform: str, kernels: Kernels, rollout: Precision) -> None:
    config = RunConfig(model=ModelConfig(vocab_size=32), kernels=kernels)
    config = replace(
        config,
        rollout=replace(config.rollout, prompt_length=8, response_length=8, precision=rollout),
        learner=replace(config.learner, precision=BF16),
    )
    build_pair(config, make_mesh(config.mesh, jax.devices()[:1]), None, platform, (1,), 0)


@pytest.mark.parametrize(
    ("platform", "kernels", "rollout", "message"),
    [
        ("gpu", Kernels(attention="cudnn"), fp8(), r"both engines \(learner.precision.dtype, rollout.prec"),
        (
            "tpu",
            Kernels(decode_experts="megablox"),
            fp8(dtype="bfloat16", products="native"),
            "the expert kernel 'megablox' multiplies bfloat16 and float32, but this precision multiplies float8",
        ),
    ],
)
def test_refused(platform: str, kernels: Kernels, rollout: Precision, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(platform, kernels, rollout)


def test_taken() -> None:
    built("tpu", Kernels(decode_experts="megablox"), BF16)
