"""Plans by hand, of round numbers: the table over N, and what is printed."""

import dataclasses
import json
from typing import Any

import pytest
from rich.console import Console

from rlstab_jax.parallel.topology import topology
from rlstab_jax.training.plan import Change, Phase, Plan
from rlstab_jax.training.plan_report import as_json, by_minibatches, needed_with, print_plan
from tests.training import plan_config

CHIP = topology("v5e:2x2")
GIB = 2.0**30


def phase(name: str, runs: float, memory: dict, seconds: tuple[float, float, float], **kept: float) -> Phase:
    needed = sum(memory.values()) + sum(kept.values())
    times = dict(zip(("compute", "memory", "network"), seconds, strict=True))
    kept = {key.replace("_", " "): size for key, size in kept.items()}
    return Phase(name, runs, memory, kept, needed, True, {"bfloat16": 1e12}, 1.0, 1e9, {"all-gather": 1e9}, times)


def by_hand(waves: int = 1) -> Plan:
    """A plan of round numbers, N = 2: rows of 1 GiB in flight beside 2 GiB of weights and 3 GiB of training state."""
    config = plan_config.config()
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, waves=waves))
    weights = 2 * GIB / CHIP.chip.memory_bandwidth  # seconds to read them
    phases = (
        phase("prepare", 1, {"parameters": 1 * GIB}, (0.0, 0.5, 0.0), optimiser=2 * GIB),
        phase("decode", 100, {"weights": 2 * GIB, "KV cache": 4 * GIB}, (0.001, weights + 0.02, 0.002),
              training_state=3 * GIB),
        phase("score", 2, {"parameters": 1 * GIB, "rollout": 1 * GIB}, (1.5, 1.0, 0.5), optimiser=2 * GIB),
        phase("update", 2, {"parameters": 3 * GIB, "temporaries": 4 * GIB}, (6.0, 2.0, 3.0), global_batch=2 * GIB),
    )  # fmt: skip
    return Plan(CHIP, config, phases, (), (), row_devices=2)


def test_by_minibatches() -> None:
    """N = 1 has half the rows in flight. N = 8 has four times as many, 16 GiB: two waves of 8 would need 17 with
    weights, training state and the rollout of 4, so that four take them."""
    one, two, eight = by_minibatches(by_hand(), (1, 2, 8), price=3.0)
    weights = 2 * GIB / CHIP.chip.memory_bandwidth
    assert [row.responses for row in (one, two, eight)] == [16, 32, 128]
    assert [row.waves for row in (one, two, eight)] == [1, 1, 4]
    steps = [
        0.5 + 100 * (weights + 0.01) + 1.5 + 6,
        0.5 + 100 * (weights + 0.02) + 3 + 12,
        0.5 + 4 * 100 * (weights + 0.02) + 12 + 48,
    ]
    for row, step, n in zip((one, two, eight), steps, (1, 2, 8), strict=True):
        assert row.seconds == pytest.approx(step / n)
    assert two.sampling == pytest.approx((0.5 + 100 * (weights + 0.02)) / steps[1])
    # 30 gradient steps are 15 global steps, or 4 of 8, the last of which is not cut.
    assert two.chip_hours == pytest.approx(15 * steps[1] * 4 / 3600)
    assert eight.chip_hours == pytest.approx(4 * steps[2] * 4 / 3600)
    assert eight.cost == pytest.approx(3 * eight.chip_hours)
    # Peaks: of the update, or of decoding, with the responses that are kept meanwhile.
    assert two.needed == max(3 + 4 + 2, 2 + 3 + 4) * GIB
    assert eight.needed == max(3 + 4 + 8, 2 + 3 + 4 + 4) * GIB


def test_a_step_takes_the_longer_of_two_parts() -> None:
    """One of four devices makes batches, in less time than the others learn in: it waits. With ten times the scoring
    they wait."""
    plan = by_hand()
    config = dataclasses.replace(plan.config, rollout=dataclasses.replace(plan.config.rollout, lag=1, devices=1))
    plan = dataclasses.replace(plan, config=config)
    weights = 2 * GIB / CHIP.chip.memory_bandwidth
    (two,) = by_minibatches(plan, (2,), price=None)
    made = 0.5 + 100 * (weights + 0.02) + 3
    assert two.seconds == pytest.approx(12 / 2)
    assert two.idle == pytest.approx((12 - made) / 12 / 4)
    assert two.chip_hours == pytest.approx(15 * 12 * 4 / 3600)
    slow = dataclasses.replace(plan.phases[2], runs=20)
    (two,) = by_minibatches(dataclasses.replace(plan, phases=(*plan.phases[:2], slow, plan.phases[3])), (2,), None)
    assert two.seconds == pytest.approx((made - 3 + 30) / 2)
    assert two.idle == pytest.approx((made - 3 + 30 - 12) / (made - 3 + 30) * 3 / 4)
    console = Console(width=150)
    with console.capture() as shown:
        print_plan(plan, [two], None, console)
    assert "make batches (all phases but split and update): 1; that learn meanwhile: 3." in shown.get()
    assert f"{two.idle:.0%}" in shown.get()


def test_what_does_not_grow() -> None:
    """Four times the rows beside twice the training state: 2 + 3 + 3 GiB, of rows 16."""
    plan = by_hand()
    decode = dataclasses.replace(
        plan.phases[1], needed=12 * GIB, kept={**plan.phases[1].kept, "previous state": 3 * GIB}
    )
    assert needed_with(plan, decode, growth=4.0, factor=4.0, waves=1) == (2 + 3 + 3 + 16) * GIB


def test_what_does_not_shrink_and_what_does() -> None:
    """Of 6 GiB that belong to the rows 2 are temporaries, of which half the rows may need as much."""
    plan = by_hand()
    decode = dataclasses.replace(
        plan.phases[1], needed=11 * GIB, memory={**plan.phases[1].memory, "temporaries": 2 * GIB}
    )
    assert needed_with(plan, decode, growth=0.5, factor=0.5, waves=1) == (2 + 3 + 2 + 2) * GIB
    assert needed_with(plan, decode, growth=2.0, factor=2.0, waves=1) == (2 + 3 + 12) * GIB
    # Scores are of the whole batch: beside the rollout of 1 GiB, 3 of results.
    score = dataclasses.replace(plan.phases[2], needed=7 * GIB, memory={**plan.phases[2].memory, "results": 3 * GIB})
    assert needed_with(plan, score, growth=1.0, factor=4.0, waves=4) == (7 + 3 * (1 + 3)) * GIB


def test_by_minibatches_with_slots() -> None:
    """As many rows in flight for each N, and so more of them in turn, in one wave."""
    plan = by_hand()
    config = dataclasses.replace(plan.config, rollout=dataclasses.replace(plan.config.rollout, slots=8))
    decode = dataclasses.replace(plan.phases[1], memory={**plan.phases[1].memory, "responses": 1 * GIB})
    decode = dataclasses.replace(decode, needed=decode.needed + 1 * GIB)
    plan = dataclasses.replace(plan, config=config, phases=(plan.phases[0], decode, *plan.phases[2:]))
    two, eight = by_minibatches(plan, (2, 8), price=None)
    weights = 2 * GIB / CHIP.chip.memory_bandwidth
    assert (two.waves, eight.waves) == (1, 1)
    assert two.seconds == pytest.approx((0.5 + 100 * (weights + 0.02) + 3 + 12) / 2)
    assert eight.seconds == pytest.approx((0.5 + 4 * 100 * (weights + 0.02) + 12 + 48) / 8)
    assert needed_with(plan, decode, growth=1.0, factor=4.0, waves=1) == (2 + 3 + 4 + 4 * 1) * GIB


def test_no_wave_fits() -> None:
    plan = by_hand()
    decode = dataclasses.replace(plan.phases[1], needed=200 * GIB)
    (row,) = by_minibatches(dataclasses.replace(plan, phases=(plan.phases[0], decode, *plan.phases[2:])), (2,), None)
    assert (row.waves, row.cost) == (None, None)


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of the tables has its line, and what was changed has its reason."""
    plan = by_hand()
    change = Change("decode", "rollout.waves", 2, 8 * GIB, ("rollout.waves = 2",))
    larger = Change("score", "topology", "v5e:4x4", None, ())
    plan = dataclasses.replace(plan, refused=plan.phases[1:3], changes=(change, larger))
    table = by_minibatches(plan, (1, 2), price=3.0)
    print_plan(plan, table, 3.0, Console(width=120))
    shown = capsys.readouterr().out
    for text in (
        "4 chips, 4 devices of 15.75 GiB", "kept: training state", "bound by",
        "set rollout.waves = 2, which needs 8.00", "decode does not fit as configured, it needs 9.00 GiB",
        "(compiled: rollout.waves = 2)", "take a larger topology, v5e:4x4", "cost at 3 a chip-hour",
    ):  # fmt: skip
        assert text in shown, text
    as_numbers: dict[str, Any] = as_json(plan, table, 3.0)
    assert as_numbers["phases"][1]["total_s"] == plan.phases[1].total
    json.dumps(as_numbers)
