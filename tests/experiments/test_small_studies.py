"""Each study, small: a cell of it is run through its own command's function, kept, and drawn with all it draws."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments import study, verdicts
from experiments.study import Study, replaced
from rlstab_jax.rundir import read_metrics

# Of each study the cell that has the most in it that others have not.
CELLS = {
    "tuning": "n8-noclip-r2-lr0.002",
    "regime": "n8-lr0.0015-capfactor",
    "off_policy": "n8-noclip-r3",
    "high_rates": "n8-noclip-frozen_routes-lr0.002",
    "on_policy": "length_norm-skips",
    "objectives": "n8-kpop",
    "discrepancy": "bf16_e4m3",
    "cold_start": "ceiling-slips",
    "controls": "n8-clip-uneven",
    "staleness": "lag8-r3",
    "scale": "len73-n8-clip-live",
}
# What is left of a cell is what it changes beside these.
SMALL: dict[str, Any] = {
    "gradient_steps": 2,
    "prompts_per_minibatch": 2,
    "samples_per_prompt": 2,
    "model.embed_dim": 16,
    "model.head_dim": 8,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.num_experts": 4,
    "task.heldout_prompts": 4,
    "cold_start.max_steps": 0,
    "evaluation.every": 2,
    "evaluation.prompts": 4,
    "evaluation.samples": 1,
}
LEFT = {"lag8-r3": {"minibatches": 1, "rollout.lag": 1}}


def small(given: Study, cell: str) -> Study:
    changes = given.cell(cell).changes | SMALL | {"minibatches": 2} | LEFT.get(cell, {})
    of_it = dataclasses.replace(given.cell(cell), changes=changes)
    others = tuple(other for other in given.cells if other.name != cell)  # pictures and tables may ask for them
    return dataclasses.replace(given, base=replaced(given.base, SMALL), cells=(of_it, *others))


@pytest.mark.parametrize("given", verdicts.STUDIES, ids=lambda given: given.name)
def test_a_small_version_of_each_study(given: Study, tmp_path: Path) -> None:
    cell = CELLS[given.name]
    study.run(
        small(given, cell), seeds=1, workers_=0, cells=(cell,), runs=tmp_path / "runs", results=tmp_path / "results"
    )
    (row,) = map(json.loads, (tmp_path / "results" / given.name / study.RUNS).read_text().splitlines())
    assert (row["cell"], row["pair"], row["broken"]) == (cell, 0, None)
    (run,) = (tmp_path / "runs").glob(f"{cell}-pair00-*")
    metrics = read_metrics(run)
    assert row["metrics"]["eval/accuracy_training"] == pytest.approx(
        [metrics["eval/accuracy_training"][i] for i in (0, -1)]
    )
    drawn = tmp_path / "results" / given.name
    assert cell in (drawn / "README.md").read_text()
    assert {path.name for path in (study.RESULTS / given.name).glob("*.png")} <= {path.name for path in drawn.iterdir()}
