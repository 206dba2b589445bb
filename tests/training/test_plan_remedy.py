"""What a plan proposes where a phase does not fit, by the compiler's account of a CPU with little memory."""

import dataclasses
from typing import Any

import jax
import pytest

from rlstab_jax.models import Kernels
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.topology import Topology, topology
from rlstab_jax.training import plan
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import EnginePair, build_pair
from rlstab_jax.training.plan import PHASES, Change, _levers, measure, remedy
from rlstab_jax.training.plan_programs import AFFECTED, Programs
from rlstab_jax.training.plan_sampling import device_bytes
from rlstab_jax.types import UserError
from tests.training import plan_config

pytestmark = pytest.mark.optimised

CHIP = topology("v5e:2x2")


def engines_of(config: RunConfig) -> EnginePair:
    """Those of a config on one CPU device, with the reference kernels."""
    config = dataclasses.replace(config, mesh=MeshConfig(), kernels=Kernels("reference", "dense", "reference", "dense"))
    return build_pair(config, make_mesh(config.mesh, jax.devices()[:1]), None, "cpu", (0,), 0)


def programs_of(config: RunConfig) -> Programs:
    return Programs(engines_of(config))


def device(memory: float) -> Topology:
    """A CPU with so many bytes."""
    return Topology("v5e:2x2", dataclasses.replace(CHIP.chip, memory=memory), 1, "cpu")


def small(**learner: Any) -> RunConfig:
    """A dense model of one layer, which compiles in a second, and batches in as many parts as they have."""
    config = plan_config.config()
    parts = {"micro_batches": 4, "score_micro_batches": 8}
    return dataclasses.replace(
        config,
        prompts_per_minibatch=1,
        model=dataclasses.replace(config.model, num_layers=1, num_experts=0),
        rollout=dataclasses.replace(config.rollout, waves=2),
        learner=dataclasses.replace(config.learner, replay="live", **parts, **learner),
    )


def test_a_remedy() -> None:
    """A scoring pass that is too large for a device is split into as few parts as fit, by the compiler's account."""
    config = plan_config.config()
    model = dataclasses.replace(config.model, num_layers=1)
    config = dataclasses.replace(config, model=model, prompts_per_minibatch=12)
    programs = programs_of(config)
    whole = measure(programs, programs.score, device(2.0**40))
    assert whole.fits
    fixed = sum(whole.memory.values()) - whole.memory["temporaries"] + sum(whole.kept.values())
    enough = fixed + 0.4 * whole.memory["temporaries"]
    refused = measure(programs, programs.score, device(enough))
    assert not refused.fits
    change, changed = remedy(programs, refused, device(enough), engines_of, lambda line: None)
    assert (change.phase, change.field, change.value) == ("score", "learner.score_micro_batches", 3)
    assert change.tried == ("learner.score_micro_batches = 3",)
    assert fixed < change.needed <= enough
    assert changed.engines.config.learner.score_micro_batches == 3
    # What no number of parts helps takes more chips: 3 times the memory is in the next topology, of 4 times the chips.
    hopeless = dataclasses.replace(refused, name="prepare", needed=3 * CHIP.memory)
    change, _ = remedy(programs, hopeless, CHIP, engines_of, lambda line: None)
    assert (change.field, change.value, change.needed) == ("topology", "v5e:4x4", None)
    # Where the compiler gave no number it is one step; there is always a larger number of GPUs.
    unknown, gpus = dataclasses.replace(hopeless, needed=None), topology("cuda:h100:8")
    programs = programs_of(small(offload_optimizer=True, moments_dtype="bfloat16"))
    assert remedy(programs, unknown, gpus, engines_of, lambda line: None)[0].value == "cuda:h100:16"
    much = dataclasses.replace(hopeless, needed=3 * gpus.memory)
    assert remedy(programs, much, gpus, engines_of, lambda line: None)[0].value == "cuda:h100:32"


def test_remedies_by_their_harm() -> None:
    """Parts, tiles, computing again, the host's memory, and rounding last; nothing that is set; each affects a plan."""
    config = dataclasses.replace(small(logits_per_chunk=2**24, remat="none"), prompts_per_minibatch=2)
    assert levers(config, "update") == {
        "learner.micro_batches": [8],
        "learner.logits_per_chunk": [2**22, 2**20],
        "learner.remat": ["dots", "full"],
        "learner.offload_optimizer": [True],
        "learner.moments_dtype": ["bfloat16"],
    }
    assert list(levers(config, "score")) == [
        "learner.score_micro_batches", "learner.logits_per_chunk", "learner.offload_optimizer", "learner.moments_dtype",
    ]  # fmt: skip
    assert list(levers(config, "decode")) == ["rollout.waves", "learner.offload_optimizer", "learner.moments_dtype"]
    assert list(levers(config, "prepare")) == ["learner.offload_optimizer", "learner.moments_dtype"]
    by_slots = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, waves=1, slots=6))
    assert levers(by_slots, "admit")["rollout.slots"] == [3, 1]
    of_all = [levers(config, "update"), levers(config, "score"), levers(config, "decode"), levers(by_slots, "decode")]
    assert {field for of_one in of_all for field in of_one} == set(AFFECTED)
    nothing_left = small(offload_optimizer=True, moments_dtype="bfloat16")
    assert [levers(nothing_left, name) for name in PHASES] == [{}] * len(PHASES)


def levers(config: RunConfig, phase: str) -> dict[str, list[Any]]:
    return {field: values for field, values in _levers(programs_of(config), phase) if values}


def test_an_optimiser_that_does_not_fit() -> None:
    """It goes to the host's memory, rounded where that is out of reach, and to more chips where that is not enough."""
    programs = programs_of(small())
    moments = device_bytes(programs.state.opt_state)
    whole = measure(programs, programs.prepare, device(2.0**40))

    def remedied(memory: float, engines: Any = engines_of) -> tuple[Change, Programs]:
        refused = measure(programs, programs.prepare, device(memory))
        assert not refused.fits
        return remedy(programs, refused, device(memory), engines, said.append)

    def out_of_reach(config: RunConfig) -> EnginePair:
        if config.learner.offload_optimizer:
            raise UserError("learner.offload_optimizer = True: the host's memory is out of reach")
        return engines_of(config)

    said: list[str] = []
    change, changed = remedied(whole.needed - 1)
    assert (change.field, change.value) == ("learner.offload_optimizer", True)
    assert said == ["prepare does not fit: trying learner.offload_optimizer = True"]
    assert change.needed == pytest.approx(whole.needed - moments, abs=8)
    assert device_bytes(changed.prefill.kept["training state"]) == device_bytes(programs.state) - moments + 4

    change, _ = remedied(whole.needed - 1, out_of_reach)
    assert (change.field, change.value) == ("learner.moments_dtype", "bfloat16")
    assert change.needed == pytest.approx(whole.needed - moments / 2, abs=8)
    assert change.tried == ("learner.moments_dtype = bfloat16",)

    change, same = remedied(whole.needed - 2 * moments)
    assert (change.field, change.needed, change.tried) == ("topology", None, ())
    assert same is programs


def test_a_head_that_does_not_fit() -> None:
    """Where a part of a batch is one response, of 63 tokens, its 4 million logits are made in tiles of one million."""
    config = small(logits_per_chunk=2**22)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=2**16, embed_dim=16))
    programs = programs_of(config)
    whole = measure(programs, programs.score, device(2.0**40))
    topology = device(whole.needed - 2**22)
    refused = dataclasses.replace(whole, fits=False)
    change, changed = remedy(programs, refused, topology, engines_of, lambda line: None)
    assert (change.field, change.value) == ("learner.logits_per_chunk", 2**20)
    assert change.needed <= topology.memory
    assert changed.engines.config.learner.logits_per_chunk == 2**20


def test_a_host_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that keeps its optimiser there cannot be planned where no device reads it."""

    class Device:
        device_kind = "islet"

        def addressable_memories(self) -> list[Any]:
            return []

    monkeypatch.setattr(plan, "topology_devices", lambda topology: [Device()])
    with pytest.raises(UserError, match=r"learner.offload_optimizer = True: .* out of reach of islet"):
        plan.make_plan(small(offload_optimizer=True), CHIP)
