"""Does the monitor warn before a collapse, and how often for nothing? Thresholds from one study, judged on another.

Two studies of ordinary runs of the quickstart's task, N = 8 updates per rollout batch, of other seeds and other cold
starts. Some of their runs collapse, some only get worse, some learn. The thresholds that are the defaults of
`MonitorConfig` were chosen on the *choosing* study's runs; the *testing* study's runs judge them.

    python -m experiments.monitor_study [--runs runs/monitor]    # runs what is not there yet, then draws
    python -m experiments.monitor_study --draw                   # draws from the committed metrics
    python -m experiments.monitor_study --choose                 # how the thresholds were chosen
"""

import csv
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import tyro

from experiments import statistics
from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import ModelConfig, fp8
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.rundir import read_metrics
from rlstab_jax.stability.monitor import BASELINE as READ
from rlstab_jax.stability.monitor import CHECKS, GapCheck, MonitorConfig, review
from rlstab_jax.training.config import ColdStartConfig, EvaluationConfig, RolloutConfig, RunConfig
from rlstab_jax.training.run import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Metrics = dict[str, np.ndarray]
X, ACCURACY = "progress/gradient_steps", "eval/accuracy_training"
INSIDE, ANY = "any but the reward's", "any check"
FACTORS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
GAPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
KINDS = {"collapsed": "#D55E00", "degraded": "#E69F00", "learnt": "#0072B2"}
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00", "#882255", "0.5", "#000000")
MARKERS = "osD^vPXd*"
LEGEND: dict[str, Any] = {"fontsize": 7, "frameon": False, "columnspacing": 1.0}

RESULTS = Path(__file__).parent / "results" / "monitor"
SEEDS = {"choosing": (0, 1), "testing": (100, 101)}  # of a run and of its cold start
# Clipping, replay, learning rate: from runs that collapse at once to runs that learn.
ARMS = (
    (False, "live", 3e-3),
    (True, "live", 3e-3),
    (False, "r3", 3e-3),
    (False, "live", 2e-3),
    (False, "live", 1e-3),
    (True, "live", 2e-3),
    (False, "r3", 2e-3),
    (True, "live", 1e-3),
    (True, "r3", 2e-3),
    (False, "live", 1.5e-3),
)
SECOND_SEED = tuple(ARMS[i] for i in (3, 5, 4, 9))  # those between the extremes


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study."""

    study: str
    seed: int
    clip: bool
    replay: str
    learning_rate: float

    @property
    def name(self) -> str:
        clip = "clip" if self.clip else "noclip"
        return f"{self.study}-{clip}-{self.replay}-{self.learning_rate:g}-seed{self.seed}"

    def config(self) -> RunConfig:
        bounds = {} if self.clip else {"eps_low": math.inf, "eps_high": math.inf}
        return RunConfig(
            seed=self.seed,
            gradient_steps=256,
            minibatches=8,
            checkpoint_every=256,
            model=ModelConfig(rope_theta=100.0),
            rollout=RolloutConfig(precision=fp8("float8_e4m3fn")),
            learner=LearnerConfig(learning_rate=self.learning_rate, replay=self.replay),
            objective=ObjectiveConfig("minirl", **bounds),
            cold_start=ColdStartConfig(seed=self.seed),
            evaluation=EvaluationConfig(every=16, prompts=128, samples=2),
        )


CELLS = tuple(Cell(study, seeds[0], *arm) for study, seeds in SEEDS.items() for arm in ARMS) + tuple(
    Cell(study, seeds[1], *arm) for arm in SECOND_SEED for study, seeds in SEEDS.items()
)


def run_cells(runs: Path) -> None:
    """Runs the cells whose metrics are not there yet; a killed one goes on from its checkpoint, or begins again."""
    for cell in CELLS:
        if not (RESULTS / f"{cell.name}.jsonl").exists():
            print(cell.name, flush=True)
            if train(cell.config(), runs / cell.name, watch=lambda metrics: None):
                raise SystemExit("stopped; the same command goes on")
            keep(read_metrics(runs / cell.name), RESULTS / f"{cell.name}.jsonl")


def keep(metrics: Metrics, path: Path) -> None:
    """Writes what the monitor reads of a run, to six digits: what the table and the picture are drawn from."""
    names = [name for name in sorted({*READ, X, ACCURACY, "progress/global_steps"}) if name in metrics]
    rows = ({name: float(f"{metrics[name][i]:.6g}") for name in names} for i in range(len(metrics[X])))
    lines = [json.dumps({name: x if math.isfinite(x) else None for name, x in row.items()}) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def outcome(metrics: Metrics) -> statistics.Outcome:
    """How a run ended, by its held-out accuracy with the training engine; see `statistics.Outcome`."""
    evaluated = np.isfinite(metrics[ACCURACY])
    trained = np.isfinite(metrics["reward/mean"])
    broken = metrics[X][trained & ~np.isfinite(metrics["learner/grad_norm"])]
    return statistics.outcome(
        metrics[X][evaluated],
        metrics[ACCURACY][evaluated],
        metrics[X][-1],
        float(broken[0]) if len(broken) else math.nan,
    )


def first_remarks(metrics: Metrics, config: MonitorConfig) -> dict[str, float]:
    """The gradient step at which each check first spoke, NaN if never; also any check, and any but the reward's."""
    first: dict[str, float] = dict.fromkeys(CHECKS, math.nan)
    for remark in reversed(review(metrics, config)):
        first[remark.check] = remark.step
    inside = [step for check, step in first.items() if check not in ("reward", "held_out")]
    return {**first, INSIDE: _earliest(inside), ANY: _earliest(list(first.values()))}


def _earliest(steps: list[float]) -> float:
    return min((step for step in steps if math.isfinite(step)), default=math.nan)


def judge(runs: dict[Cell, Metrics], config: MonitorConfig) -> list[dict[str, Any]]:
    """For each check and clipping on or off: collapses warned of and how far ahead; warnings where none collapsed."""
    ends = {cell: outcome(metrics) for cell, metrics in runs.items()}
    spoke = {cell: first_remarks(metrics, config) for cell, metrics in runs.items()}
    rows = []
    for clip in (False, True):
        cells = [cell for cell in runs if cell.clip == clip]
        for check in (*CHECKS, INSIDE, ANY):
            row: dict[str, Any] = {"clipping": "on" if clip else "off", "check": check}
            collapsed = [cell for cell in cells if ends[cell].kind == "collapsed"]
            lead = [ends[cell].onset - spoke[cell][check] for cell in collapsed]
            ahead = sorted(x for x in lead if math.isfinite(x) and x > 0)
            row |= {"collapsed": len(collapsed), "warned_ahead": len(ahead)}
            row |= {"lead_steps": " ".join(f"{x:.0f}" for x in ahead)}
            for kind in ("degraded", "learnt"):
                others = [cell for cell in cells if ends[cell].kind == kind]
                row |= {kind: len(others), f"warned_{kind}": sum(math.isfinite(spoke[cell][check]) for cell in others)}
            rows.append(row)
    return rows


def choose(runs: dict[Cell, Metrics], base: MonitorConfig) -> MonitorConfig:
    """The rule for the thresholds: for each check the smallest of `FACTORS` (or `GAPS`) that warns of at most one of
    the choosing study's runs that learnt; inf, which is off, if there is none."""
    learnt = [metrics for metrics in runs.values() if outcome(metrics).kind == "learnt"]
    for check in CHECKS:
        grid = (*(GAPS if isinstance(getattr(base, check), GapCheck) else FACTORS), math.inf)
        for value in grid:
            base = _with_threshold(base, check, value)
            if sum(math.isfinite(first_remarks(metrics, base)[check]) for metrics in learnt) <= 1:
                break
    return base


def _with_threshold(config: MonitorConfig, check: str, value: float) -> MonitorConfig:
    now = getattr(config, check)
    field = "gap" if isinstance(now, GapCheck) else "factor"
    return dataclasses.replace(config, **{check: dataclasses.replace(now, **{field: value})})


def search(runs: dict[Cell, Metrics]) -> None:
    """Prints what the rule gives for each baseline, spread and patience: thresholds, and leads before each collapse."""
    ends = {cell: outcome(metrics) for cell, metrics in runs.items()}
    for steps, spreads, patience in itertools.product((24, 32, 40), (0.0, 1.0, 2.0), (1, 2)):
        base = dataclasses.replace(MonitorConfig(), baseline_steps=steps, spreads=spreads, patience=patience)
        config = choose(runs, base)
        print(f"baseline_steps {steps}, spreads {spreads:g}, patience {patience}")
        for check in CHECKS:
            collapsed = [cell for cell, end in ends.items() if end.kind == "collapsed"]
            lead = [ends[cell].onset - first_remarks(runs[cell], config)[check] for cell in collapsed]
            now = getattr(config, check)
            value = now.gap if isinstance(now, GapCheck) else now.factor
            print(f"    {check:14s} {value:6g}   {' '.join(f'{x:.0f}' for x in lead)}")


def read_runs(study: str) -> dict[Cell, Metrics]:
    paths = {cell: RESULTS / f"{cell.name}.jsonl" for cell in CELLS if cell.study == study}
    return {cell: read_metrics(path) for cell, path in paths.items() if path.exists()}


def draw(out: Path) -> None:
    """Writes runs.csv, judgement.csv and monitor.png from the committed metrics, and prints the judgement."""
    config, studies = MonitorConfig(), {study: read_runs(study) for study in SEEDS}
    judged = [{"study": study, **row} for study, runs in studies.items() for row in judge(runs, config)]
    _write_csv(out / "judgement.csv", judged)
    table = []
    for runs in studies.values():
        for cell, metrics in runs.items():
            end, spoke = outcome(metrics), first_remarks(metrics, config)
            table.append({"run": cell.name, **dataclasses.asdict(end), **spoke})
    _write_csv(out / "runs.csv", table)
    for row in judged:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    _picture(studies, config, out / "monitor.png")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows)


def _picture(studies: dict[str, dict[Cell, Metrics]], config: MonitorConfig, path: Path) -> None:
    """Above: held-out accuracy of each run. Below: when each check first spoke, against the onset of the collapse."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 10), dpi=150, layout="constrained", height_ratios=(1, 3.4))
    for column, (study, runs) in enumerate(studies.items()):
        curves, times = axes[0, column], axes[1, column]
        curves.set_title(f"{study} study", fontsize=9, loc="left")
        times.set_title("when each check first spoke", fontsize=9, loc="left")
        cells = sorted(runs, key=lambda cell: (cell.clip, -cell.learning_rate, cell.replay))
        for i, cell in enumerate(cells):
            metrics, end = runs[cell], outcome(runs[cell])
            seen = np.isfinite(metrics[ACCURACY])
            style = {"color": KINDS[end.kind], "linestyle": "-" if cell.clip else (0, (4, 1.5)), "linewidth": 1.3}
            curves.plot(metrics[X][seen], metrics[ACCURACY][seen], **style)
            times.plot([end.onset], [i], "|", color="black", markersize=28, markeredgewidth=2)
            times.axhspan(i - 0.42, i + 0.42, color=KINDS[end.kind], linewidth=0, alpha=0.15)
            spoke = first_remarks(metrics, config)
            for place, name in enumerate(CHECKS):
                look = {"marker": MARKERS[place], "color": COLOURS[place], "markersize": 4.5, "linestyle": ""}
                times.plot([spoke[name]], [i + 0.09 * (place - 4)], label=name if i == 0 else None, **look)
        times.plot([], [], "|", color="black", markersize=12, markeredgewidth=2, label="collapse")
        labels = [f"{'clip' if c.clip else 'no clip'}, {c.replay}\n{c.learning_rate:g}, seed {c.seed}" for c in cells]
        times.set_yticks(np.arange(len(cells)), labels, fontsize=7)
        times.set_ylim(len(cells) - 0.4, -0.6)
        for ax in (curves, times):
            ax.set_xlim(0, 262)
            ax.grid(axis="x", color="0.9", linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=7)
        times.set_xlabel("gradient steps", fontsize=8)
        curves.set_ylim(0, 1)
    for kind, colour in KINDS.items():
        axes[0, 0].plot([], [], color=colour, label=f"{kind}, clipping")
        axes[0, 0].plot([], [], color=colour, linestyle=(0, (4, 1.5)), label=f"{kind}, no clipping")
    axes[0, 0].set_ylabel("held-out accuracy", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, **LEGEND)
    handles, names = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, **LEGEND)
    figure.savefig(path)
    plt.close(figure)


def main(
    runs: Path = Path("runs/monitor"),
    draw_only: Annotated[bool, tyro.conf.arg(name="draw")] = False,
    choose_only: Annotated[bool, tyro.conf.arg(name="choose")] = False,
) -> None:
    """The whole study, or parts of it.

    Args:
      runs: where the runs and their cold starts are kept.
      draw_only: only draw, from the committed metrics.
      choose_only: only print how the thresholds were chosen.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    if choose_only:
        search(read_runs("choosing"))
        return
    if not draw_only:
        run_cells(runs)
    draw(RESULTS)


if __name__ == "__main__":
    tyro.cli(main)
