"""What the monitor's policies do to a run, and that a run resumed half-way does the same."""

import math
from dataclasses import replace

import jax
import numpy as np

from rlstab_jax.cli import STOPPED
from rlstab_jax.rundir import read_manifest, read_metrics
from rlstab_jax.stability.monitor import Check, GapCheck, MonitorConfig
from rlstab_jax.training.checkpoint import parameters
from rlstab_jax.training.engines import build, initial_params
from rlstab_jax.training.run import train
from tests.training.tiny_run import config

OFF = Check(math.inf)
# Hair triggers: the reward of random parameters is noise, and so is what these see.
TOUCHY = MonitorConfig(
    baseline_steps=4,
    patience=1,
    spreads=0.0,
    ratios=OFF,
    largest_ratio=Check(1.05, "lower"),
    gradient=Check(1.05, "skip"),
    routing=OFF,
    length=OFF,
    entropy=OFF,
    healthy_kl=OFF,
    reward=GapCheck(math.inf),
)


def run(out, **changes):
    lines: list[str] = []
    settings = replace(config(), evaluation=replace(config().evaluation, every=0), **changes)
    stopped = train(settings, out, say=lines.append)
    kept = {k: v for k, v in read_metrics(out).items() if not k.startswith(("time/", "throughput/"))}
    return stopped, kept, [line for line in lines if line.startswith("monitor")]


def test_lower_and_skip_are_exact_when_a_run_is_resumed(tmp_path):
    stopped, whole, lines = run(tmp_path / "whole", monitor=TOUCHY)
    assert stopped is None
    rates = whole["learner/learning_rate"]
    assert rates[-1] < rates[2]
    assert set(rates[2:] / rates[2]) <= {0.5**i for i in range(12)}
    assert any("are discarded" in line for line in lines)
    _, _, first = run(tmp_path / "parts", monitor=TOUCHY, gradient_steps=12)
    _, parts, second = run(tmp_path / "parts", monitor=TOUCHY)
    assert first + second == lines
    assert {k: v.tolist() for k, v in parts.items()} == {k: v.tolist() for k, v in whole.items()}


def test_discarded_updates_leave_the_parameters_as_they_were(tmp_path):
    skipping = replace(TOUCHY, largest_ratio=OFF)
    _, metrics, lines = run(tmp_path / "whole", monitor=skipping)
    assert len(metrics["learner/grad_norm"]) == 12  # steps count, whether their updates are kept or not
    discarded = [int(line.split("global step ")[1].split()[0]) for line in lines if "are discarded" in line]
    assert (np.flatnonzero(metrics["learner/discarded"] == config().minibatches) + 1).tolist() == discarded
    assert metrics["learner/discarded"].sum() == config().minibatches * len(discarded)
    for step in (discarded[0] - 1, discarded[0]):
        run(tmp_path / str(step), monitor=skipping, gradient_steps=2 * step)
    template = {"params": build(config()).placed_like(lambda: initial_params(build(config()).training, 0))}
    before, after = (
        parameters(tmp_path / str(step) / "checkpoints", template, field="train")[1]
        for step in (discarded[0] - 1, discarded[0])
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))


def test_stop_ends_the_run_with_a_checkpoint_and_an_exit_code_of_its_own(tmp_path):
    stops = replace(TOUCHY, largest_ratio=Check(1.0001, "stop"))
    stopped, metrics, lines = run(tmp_path, monitor=stops)
    assert stopped == "monitor"
    assert STOPPED[stopped] == 3
    assert "the largest ratio" in lines[-1]
    last = int(metrics["progress/global_steps"][-1])
    assert last < 12
    complete = run(tmp_path / "complete", monitor=stops, gradient_steps=2 * last)
    assert complete[0] is None  # the step that would have stopped it was its last
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    assert read_manifest(tmp_path)["config"]["monitor"]["largest_ratio"] == {"factor": 1.0001, "policy": "stop"}
