"""What a run listens to by default (`monitor.LIVE`), judged on the runs of the studies: N from 1 to 8, all objectives.

The study that chose the thresholds of `MonitorConfig` has N = 8 alone. This counts, from the run directories of any
studies, on how many runs each check speaks, at those thresholds and at LIVE's, and on how many collapses no later than
the last evaluation that was still good.

    python -m experiments.monitor_live [--runs runs/studies]
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import statistics
from experiments.drawing import write_csv
from experiments.study import ACCURACY, RESULTS, X, command
from rlstab_jax.rundir import read_manifest, read_metrics
from rlstab_jax.stability.monitor import CHECKS, LIVE, Check, MonitorConfig, review
from rlstab_jax.types import UserError

FILE = RESULTS / "monitor" / "live.csv"
CONFIGS = {"MonitorConfig": MonitorConfig(), "LIVE": LIVE}
LEARNT = 0.05  # gain of held-out accuracy, below which a run that did not collapse is flat


def threshold(config: MonitorConfig, check: str) -> float:
    given = getattr(config, check)
    return given.factor if isinstance(given, Check) else given.gap


def kind_of(metrics: Mapping[str, np.ndarray], horizon: int) -> tuple[str, float]:
    """How a run ended (collapsed, degraded, learnt or flat), and the last evaluation before its collapse, or NaN."""
    evaluated = np.isfinite(metrics[ACCURACY])
    steps, accuracy = metrics[X][evaluated], metrics[ACCURACY][evaluated]
    outcome = statistics.outcome(steps, accuracy, horizon)
    if outcome.kind == "collapsed":
        return outcome.kind, float(max(steps[steps < outcome.onset], default=0.0))
    flat = outcome.kind == "learnt" and accuracy[-3:].mean() < accuracy[0] + LEARNT
    return "flat" if flat else outcome.kind, math.nan


def judged(runs: Path) -> Iterator[dict[str, Any]]:
    """For each finished run and config its N, its end, and for each check whether it spoke, and ahead of a collapse."""
    for path in sorted(path.parent for path in runs.glob("*/metrics.jsonl")):
        config, metrics = read_manifest(path)["config"], read_metrics(path)
        if ACCURACY not in metrics or metrics[X][-1] < config["gradient_steps"]:
            continue
        kind, good_until = kind_of(metrics, config["gradient_steps"])
        for name, listens in CONFIGS.items():
            first: dict[str, float] = {}
            for remark in review(metrics, listens):
                first.setdefault(remark.check, remark.step)
            for check in CHECKS:
                step = first.get(check, math.inf)
                of = {"config": name, "check": check, "updates": config["minibatches"], "end": kind}
                yield of | {"spoke": math.isfinite(step), "ahead": step <= good_until}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts of runs by config, check, N and end."""
    found: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["config"], row["check"], row["updates"], row["end"]), []).append(row)
    return [
        {
            "config": config,
            "check": check,
            "threshold": threshold(CONFIGS[config], check),
            "updates": updates,
            "end": end,
            "runs": len(of),
            "spoke": sum(row["spoke"] for row in of),
            "ahead": sum(row["ahead"] for row in of) if end == "collapsed" else "",
        }
        for (config, check, updates, end), of in sorted(found.items())
        if math.isfinite(threshold(CONFIGS[config], check))
    ]


def main(runs: Path = Path("runs/studies"), out: Path = FILE) -> None:
    """Writes the table.

    Args:
      runs: directory that holds the run directories of studies.
      out: the table.
    """
    if not (rows := list(judged(runs))):
        raise UserError(f"{runs} holds no finished run: run a study first, e.g. python -m experiments.off_policy")
    write_csv(out, table(rows))
    print(f"{len(rows) // len(CHECKS) // len(CONFIGS)} runs counted in {out}")


if __name__ == "__main__":
    command(main)
