"""The tiny run on 8 virtual devices, resumed once. Run by test_mesh.py, which compares metrics."""

import dataclasses
import sys
from pathlib import Path

import jax

from rlstab_jax.learner import score, update
from rlstab_jax.models import Precision
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.training.engines import build
from rlstab_jax.training.plan_programs import Programs
from rlstab_jax.training.plan_sampling import device_bytes
from rlstab_jax.training.run import train
from tests.training import tiny_run

# Other shapes are tested on the engines alone (tests/learner/engines_on_meshes.py).
MESHES = {"three axes": MeshConfig(data=2, fsdp=2, expert=2)}


def config(gradient_steps: int, mesh: MeshConfig):
    """Mini-batches that divide over 8 devices, no remat: it compiles faster. On several devices by slots, which change
    no draw."""
    default = tiny_run.config()
    return dataclasses.replace(
        default,
        gradient_steps=gradient_steps,
        prompts_per_minibatch=8,
        samples_per_prompt=2,
        mesh=mesh,
        rollout=dataclasses.replace(default.rollout, slots=0 if mesh == MeshConfig() else 16),
        learner=dataclasses.replace(default.learner, remat="none"),
        evaluation=dataclasses.replace(default.evaluation, every=4),
    )


def matched():
    """One global step whose engines are equal to the bit, though the mesh splits the parameters."""
    default = config(2, MESHES["three axes"])
    changes = {"precision": Precision(), "log_probs": "matched", "response_length": 4, "slots": 0}
    rollout = dataclasses.replace(default.rollout, **changes)
    return dataclasses.replace(default, rollout=rollout, evaluation=dataclasses.replace(default.evaluation, every=0))


def check_plan_of_slots() -> None:
    """A plan takes what rounds carry to lie over all devices, whatever the layout of what was prefilled."""
    programs = Programs(build(config(2, MESHES["three axes"])))
    for program in (programs.prefill, programs.admit, programs.decode):
        held = {**program.parts, **program.kept}
        for name in ("KV cache", "responses"):
            whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held[name]))
            assert device_bytes(held[name]) * 8 == whole, (program.name, name)
        assert device_bytes(held) > 0


if __name__ == "__main__":
    assert jax.device_count() == 8
    check_plan_of_slots()
    for name, mesh in MESHES.items():
        for function in (score, update):
            function.clear_cache()
        for gradient_steps in (2, 6):
            assert train(config(gradient_steps, mesh), Path(sys.argv[1]) / name) is None
            assert (score._cache_size(), update._cache_size()) == (2, 1), name
    assert train(matched(), Path(sys.argv[1]) / "matched") is None
