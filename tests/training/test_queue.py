"""Learning from batches of the past: which one, by which parameters, and what a checkpoint keeps of those that wait."""

import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from rlstab_jax.learner import score, update
from rlstab_jax.rundir import read_metrics
from rlstab_jax.training import loop, queue
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.engines import build
from rlstab_jax.training.passes import score_old
from rlstab_jax.training.run import train
from rlstab_jax.types import UserError
from tests.training.test_loop import configured, no_gap


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_which_batch_is_learnt_from(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are the number of steps that they have taken, and prompts are numbered."""
    learnt = []

    def produce(engines: Any, params: int, reference: None, prompts: int, step: int, *_: Any, **__: Any) -> Any:
        return queue.Experience((params, prompts, step), {}, [])

    def learn(engines: Any, train: Any, rows: Any, step: int) -> tuple[Any, dict]:
        learnt.append((*rows, step))
        return SimpleNamespace(params=train.params + 1, predictor=None), {}

    monkeypatch.setattr(loop, "produce", produce)
    monkeypatch.setattr(loop, "learn", learn)
    here = {"config": configured(rollout={"lag": lag}), "place": lambda tree: tree}
    engines: Any = SimpleNamespace(**here, making=SimpleNamespace(**here), overlaps=False)
    state, prompts, lags = loop.RunState(SimpleNamespace(params=0, predictor=None), None), iter(range(1, 99)), []
    for step in range(1, 8):
        state, metrics, _ = loop.global_step(engines, state, prompts, step)
        lags.append(metrics["staleness/lag"])
    assert learnt == [(max(step - 1 - lag, 0), step, step, step) for step in range(1, 8)]
    assert lags == [min(lag, step - 1) for step in range(1, 8)]
    assert len(state.queue) == lag
    assert next(prompts) == 7 + lag + 1


def columns(out: Path) -> dict[str, np.ndarray]:
    return {name: of_run for name, of_run in read_metrics(out).items() if not name.startswith(("time/", "throughput/"))}


@pytest.mark.parametrize("replay", ["r3", "pr2"])
def test_a_run_with_a_lag(replay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed and resumed, it is the uninterrupted one bit for bit. pi_old is of the parameters that sampled: step 1 is
    that of a run without a lag, steps 2 and 3 learn from other batches of the same parameters. No function is traced
    for what was restored."""
    made, produce = [], loop.produce

    def recorded(engines: Any, params: dict, *others: Any, **polled: Any) -> queue.Experience:
        experience = produce(engines, params, *others, **polled)
        made.append((jax.device_get(params), jax.device_get(others[-1]), experience))
        return experience

    monkeypatch.setattr(loop, "produce", recorded)
    for function in (score, update):
        function.clear_cache()

    def run(name: str, gradient_steps: int, lag: int = 2) -> dict[str, np.ndarray]:
        rooms = {"rollout": {"lag": lag}, "learner": {"replay": replay}, "evaluation": {"every": 0}}
        config = configured(gradient_steps=gradient_steps, **rooms)
        assert train(config, tmp_path / name, say=lambda line: None) is None
        return columns(tmp_path / name)

    punctual = run("punctual", 2, lag=0)
    made.clear()
    whole = run("whole", 12)
    engines = build(configured(rollout={"lag": 2}, learner={"replay": replay}))
    differing = [
        any((a != b).any() for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in pairwise(params for params, *_ in made)
    ]
    assert differing == [False, False, *[True] * 5]
    *weights, experience = made[4]
    params, predictor = engines.place(weights)
    old, _ = score_old(engines, params, experience.rows.rollout, engines.replay, predictor)
    np.testing.assert_array_equal(old.log_probs, experience.rows.old.log_probs)

    np.testing.assert_array_equal(whole["staleness/lag"], [0, 1, 2, 2, 2, 2])
    for name in punctual:
        np.testing.assert_array_equal(punctual[name], whole[name][:1], err_msg=name)
    assert no_gap({name: of_steps[0] for name, of_steps in whole.items()}, "staleness/minibatch_00")
    assert whole["staleness/minibatch_00/k3"][1:].min() > 1e-7

    # Killed after step 5, before that was saved.
    run("broken", 10)
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "5")
    resumed = run("broken", 12)
    assert resumed.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    assert (tmp_path / "whole" / "samples.jsonl").read_bytes() == (tmp_path / "broken" / "samples.jsonl").read_bytes()
    assert (score._cache_size(), update._cache_size()) == (2, 1)

    template = engines.place(queue.blank(engines))
    assert jax.tree.map(_kind, template[0].rows) == jax.tree.map(_kind, made[-1][-1].rows)
    with Checkpoints(tmp_path / "broken" / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore({"queue": template}, partial=True)
    assert restored is not None
    kept = [experience.rows for *_, experience in made[-2:]]
    jax.tree.map(np.testing.assert_array_equal, [one.rows for one in restored[1]["queue"]], kept)


def _kind(leaf: jax.Array) -> tuple:
    return leaf.shape, leaf.dtype


def test_a_lag_that_is_none() -> None:
    with pytest.raises(UserError, match=r"rollout.lag = -1: expected 0 \(learn from what was just sampled\) or more"):
        build(configured(rollout={"lag": -1}))
