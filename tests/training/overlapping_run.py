"""The tiny run with a lag, its batches made on a device of their own. Run by test_overlap.py."""

import dataclasses
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.training import loop
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import Engines, build, initial_params
from rlstab_jax.training.queue import blank
from rlstab_jax.training.run import train
from tests.training import tiny_run


def config(gradient_steps: int, **rollout: Any) -> RunConfig:
    """Two updates a step, one step of lag; a reference, which has to be where batches are made."""
    tiny = tiny_run.config()
    return dataclasses.replace(
        tiny,
        gradient_steps=gradient_steps,
        mesh=MeshConfig(data=1, fsdp=-1),
        rollout=dataclasses.replace(tiny.rollout, lag=1, **rollout),
        learner=dataclasses.replace(tiny.learner, remat="none"),
        objective=dataclasses.replace(tiny.objective, kl_coefficient=0.1),
        evaluation=dataclasses.replace(tiny.evaluation, every=0),
    )


def moves_between_meshes() -> None:
    """Parameters that two devices share go to a third one whole, and batches come back with their rows split."""
    engines = build(config(2, devices=1))
    assert not engines.overlaps  # collectives of virtual devices
    params = engines.place(initial_params(engines.training, 0))
    moved = engines.making.place(params)
    rows = engines.place(engines.making.place(blank(engines)[0].rows))
    first, second, third = jax.devices()
    assert {device for leaf in jax.tree.leaves(moved) for device in leaf.devices()} == {third}
    assert params["embedding"].sharding.shard_shape((14, 16)) == (14, 8)
    jax.tree.map(np.testing.assert_array_equal, params, moved)
    assert rows.groups.devices() == {first, second}
    assert {shard.data.shape for shard in rows.groups.addressable_shards} == {(8,)}


def overlapping_run(out: Path) -> None:
    made: set[tuple[str, int]] = set()  # in which thread, and on which device
    produce = loop.produce

    def recorded(engines: Engines, *others: Any, **polled: Any) -> Any:
        experience = produce(engines, *others, **polled)
        (device,) = experience.rows.old.log_probs.devices()
        made.add((threading.current_thread().name.split("_")[0], device.id))
        return experience

    loop.produce = recorded
    for gradient_steps in (2, 6):  # resumed once
        assert train(config(gradient_steps, devices=1), out) is None
    assert made == {("MainThread", 1), ("rollout", 1)}  # the first batch is waited for


if __name__ == "__main__":
    if jax.device_count() == 3:
        moves_between_meshes()
    else:
        overlapping_run(Path(sys.argv[1]))
