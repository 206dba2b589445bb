"""What a collapse is, how leads are counted, and that defaults and tables are what the committed metrics give."""

import math
from pathlib import Path

import numpy as np
import pytest

from experiments import monitor_live
from experiments import monitor_study as study
from experiments.statistics import Outcome
from rlstab_jax.rundir import open_run, read_metrics
from rlstab_jax.stability.monitor import BASELINE, CHECKS, MonitorConfig, review
from rlstab_jax.types import UserError


def run(accuracy: list[float], **columns: list[float]) -> study.Metrics:
    """A run of 8 gradient steps a row, evaluated at every row; all that the monitor reads is constant."""
    length = len(accuracy)
    metrics = {name: np.ones(length) for name in BASELINE}
    metrics |= {study.X: 8.0 * np.arange(1, length + 1), "progress/global_steps": np.arange(1.0, length + 1)}
    return metrics | {
        study.ACCURACY: np.array(accuracy),
        **{k.replace("__", "/"): np.array(v) for k, v in columns.items()},
    }


def test_outcomes():
    fallen = [0.3, 0.6, 0.2, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert study.outcome(run(fallen)) == Outcome("collapsed", 40.0, 0.6, 0.2)  # it had come back at 32
    assert study.outcome(run([0.3, 0.6, 0.2, 0.2, 0.4])).kind == "degraded"
    assert study.outcome(run([0.3, 0.6, 0.55, 0.58, 0.52])).kind == "learnt"
    broken = study.outcome(run([0.3] * 10, learner__grad_norm=[1, 1, 1, 1, math.nan, 1, 1, 1, 1, 1]))
    assert (broken.kind, broken.onset) == ("collapsed", 40.0)


def test_leads_and_needless_warnings_are_counted_by_clipping():
    cells = [
        study.Cell("testing", 0, clip, "live", rate) for clip, rate in ((False, 1e-3), (False, 2e-3), (True, 1e-3))
    ]
    loud = [1.0] * 4 + [50.0] * 6
    runs = {
        cells[0]: run([0.5] * 5 + [0.6] + [0.1] * 4, learner__grad_norm=loud),  # speaks at 40, collapses at 56
        cells[1]: run([0.5] * 10, learner__grad_norm=loud),
        cells[2]: run([0.5] * 10),
    }
    rows = {(row["clipping"], row["check"]): row for row in study.judge(runs, MonitorConfig(patience=1))}
    assert rows["off", "gradient"] == {
        "clipping": "off",
        "check": "gradient",
        "collapsed": 1,
        "warned_ahead": 1,
        "lead_steps": "16",
        "degraded": 0,
        "warned_degraded": 0,
        "learnt": 1,
        "warned_learnt": 1,
    }
    assert rows["off", "entropy"]["warned_ahead"] == rows["off", "entropy"]["warned_learnt"] == 0
    assert rows["on", study.ANY]["learnt"] == 1
    assert rows["on", study.ANY]["warned_learnt"] == 0


def test_what_is_kept_of_a_run_is_what_the_monitor_reads(tmp_path):
    noise = np.random.default_rng(0)
    metrics = run([0.5] * 20, learner__grad_norm=np.exp(noise.standard_normal(20)).tolist())
    metrics["time/sample"] = np.ones(20)
    metrics["learner/grad_norm"][15:17] = math.nan
    study.keep(metrics, tmp_path / "kept.jsonl")
    kept = read_metrics(tmp_path / "kept.jsonl")
    assert "time/sample" not in kept
    steps = [(remark.check, remark.step) for remark in review(metrics)]
    assert steps
    assert [(remark.check, remark.step) for remark in review(kept)] == steps


def test_the_studies_share_no_seed():
    assert not set(study.SEEDS["choosing"]) & set(study.SEEDS["testing"])
    assert len({cell.name for cell in study.CELLS}) == len(study.CELLS)


def test_the_defaults_are_what_the_rule_gives_on_the_choosing_study():
    assert study.choose(study.read_runs("choosing"), MonitorConfig()) == MonitorConfig()


@pytest.mark.parametrize("name", ["judgement.csv", "runs.csv"])
def test_committed_tables_are_drawn_from_the_committed_metrics(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "train", lambda *args, **kwargs: pytest.fail("every run is there"))
    monkeypatch.setattr(study, "_picture", lambda *args: None)
    study.run_cells(tmp_path)
    study.draw(tmp_path)
    assert (tmp_path / name).read_text() == (study.RESULTS / name).read_text()
    printed = capsys.readouterr().out
    assert all(check in printed for check in CHECKS)


def test_what_a_run_listens_to_is_counted(tmp_path: Path) -> None:
    """One run that learns in peace, one that collapses after its gradient has broken."""
    for name, accuracy, norm in (("good", [0.2, 0.5, 0.8, 0.8, 0.8], 1.0), ("bad", [0.2, 0.5, 0.8, 0.1, 0.1], 100.0)):
        run = open_run(tmp_path / name, {"config": {"gradient_steps": 64, "minibatches": 8}})
        for step in range(9):
            row = {"progress/global_steps": step, "progress/gradient_steps": 8 * step}
            if step % 2 == 0:
                row["eval/accuracy_training"] = accuracy[step // 2]
            if step:
                row |= {"reward/mean": 0.5, "learner/grad_norm": 1.0 if step < 4 else norm}
            run.append_metrics(row)
    rows = monitor_live.table(list(monitor_live.judged(tmp_path)))
    of = {(row["check"], row["end"]): row for row in rows if row["config"] == "LIVE"}
    assert of["gradient", "collapsed"] == {
        "config": "LIVE", "check": "gradient", "threshold": 8.0,
        "updates": 8, "end": "collapsed", "runs": 1, "spoke": 1, "ahead": 0,
    }  # fmt: skip
    assert of["gradient", "learnt"]["spoke"] == of["entropy", "collapsed"]["spoke"] == 0
    assert {row["check"] for row in rows if row["config"] == "MonitorConfig"} == set(CHECKS)
    with pytest.raises(UserError, match="holds no finished run"):
        monitor_live.main(tmp_path / "good", tmp_path / "out.csv")
