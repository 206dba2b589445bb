"""A study is a file: named cells over a base config, seeds, and what is drawn of them.

Each cell runs with each *pair* of a cold start and a seed; such a run is an ordinary `rlstab` run directory. What is
left of a finished one is a line of ``experiments/results/<study>/runs.jsonl``, from which tables and pictures are
drawn without the run directories. A run is known by its config, so that two studies with a cell in common run it once.

    python -m experiments.off_policy --seeds 10 --hours 2     # runs what is missing, then draws
    python -m experiments.off_policy --draw                   # draws from the committed metrics
    python -m experiments.off_policy --plan                   # says what is missing and what it will cost
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments import statistics, workers
from rlstab_jax.rundir import append, config_difference, cut_lines, json_line, plain
from rlstab_jax.training.config import RunConfig
from rlstab_jax.types import UserError

RESULTS = Path(__file__).parent / "results"
RUNS = "runs.jsonl"
MOST_PAIRS = 50
X, ACCURACY = "progress/gradient_steps", "eval/accuracy_training"
# Fields that do not change what a run computes, but for the order of sums.
BESIDES = ("checkpoint_every", "keep_checkpoints", "logged_samples", "learner.remat", "learner.unroll")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of a study's grid."""

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Over the study's base config, by dotted names of fields."""
    label: str = ""
    """In pictures; empty for the name."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Cold starts and seeds: pair i has a seed of its own and the cold start i mod ``cold_starts``.

    So the first pairs are of different cold starts, whatever their number.
    """

    first_seed: int
    first_cold_start: int
    cold_starts: int = 10

    def seed(self, pair: int) -> int:
        return self.first_seed + pair

    def cold_start(self, pair: int) -> int:
        return self.first_cold_start + pair % self.cold_starts

    def seeds(self, pair: int) -> dict[str, int]:
        """Both, by the fields of a run's config."""
        return {"seed": self.seed(pair), "cold_start.seed": self.cold_start(pair)}


# No study uses a seed or a cold start of the other kind; those up to 101 belong to the study of the monitor.
TUNING = Pairs(first_seed=1000, first_cold_start=1000, cold_starts=4)
CONFIRMATORY = Pairs(first_seed=2000, first_cold_start=2000)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Cells that are drawn together: their curves, and how long they last."""

    title: str
    cells: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """Cells over a base, in the order of their worth: with little time, the first ones are run."""

    name: str
    question: str
    base: RunConfig
    cells: tuple[Cell, ...]
    panels: tuple[Panel, ...]
    pairs: Pairs = CONFIRMATORY
    picture: "Callable[[Mapping[str, list[Run]], Path], None] | None" = None
    """Draws what is this study's own, besides the panels, into a folder."""
    tables: "Callable[[Mapping[str, list[Run]]], Mapping[str, list[dict[str, Any]]]] | None" = None
    """This study's own tables by their file names, besides that of the cells."""

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"study {self.name}: two cells of the name {min(twice)}")
        if unknown := {name for panel in self.panels for name in panel.cells} - set(names):
            raise ValueError(f"study {self.name}: a panel names {min(unknown)}, which is no cell")

    def cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)

    def config(self, cell: Cell, pair: int) -> RunConfig:
        return replaced(self.base, {**cell.changes, **self.pairs.seeds(pair)})

    def key(self, cell: Cell, pair: int) -> str:
        """`key_of` the config: the pairs of a cell differ in their seeds alone, and all else is looked at once."""
        return _hash({**self._of_first_pair[cell.name], **self.pairs.seeds(pair)})

    @functools.cached_property
    def _of_first_pair(self) -> dict[str, dict[str, Any]]:
        return {cell.name: differences(self.config(cell, 0)) for cell in self.cells}


def replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    """A frozen dataclass with fields replaced by their dotted names. Raises ValueError for a name that is none."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if first not in {field.name for field in dataclasses.fields(config)}:
            raise ValueError(f"{type(config).__name__} has no field {first!r} (of {name!r})")
        inner = replaced(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: inner})
    return config


_DEFAULTS = plain(RunConfig())


def differences(config: RunConfig) -> dict[str, Any]:
    """In what a config differs from the defaults, by dotted names: fields that do not exist yet have no say in it."""
    found = {name: value for name, _, value in config_difference(_DEFAULTS, plain(config))}
    return {name: value for name, value in sorted(found.items()) if name not in BESIDES}


def key_of(config: RunConfig) -> str:
    """What a run is known by: a hash of what its config differs in from the defaults, seeds included."""
    return _hash(differences(config))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run as it is read from the committed metrics."""

    pair: int
    cold_start: int
    horizon: int
    broken: float
    """Gradient step of the first gradient that was not finite; NaN for none."""
    seconds: float
    """CPU time; NaN where it is not known."""
    metrics: Mapping[str, np.ndarray]
    """Columns [evaluation]; NaN where there is nothing."""
    start: tuple[str, float] = ("", math.nan)
    """What determines the cold start and its first evaluation, as a hash; and that held-out accuracy. A cold start that
    another kind of processor has trained has other weights, since its sums run in another order."""

    @property
    def evaluated(self) -> np.ndarray:
        return np.isfinite(self.metrics[ACCURACY])

    @property
    def steps(self) -> np.ndarray:
        return self.metrics[X][self.evaluated]

    @property
    def accuracy(self) -> np.ndarray:
        return self.metrics[ACCURACY][self.evaluated]

    @functools.cached_property
    def outcome(self) -> statistics.Outcome:
        return statistics.outcome(self.steps, self.accuracy, self.horizon, self.broken)

    @property
    def collapsed(self) -> bool:
        return self.outcome.kind == "collapsed"

    @property
    def final(self) -> float:
        return statistics.final_accuracy(self.steps, self.accuracy, self.horizon)

    @property
    def peak(self) -> float:
        """The largest mean of two evaluations in a row."""
        return float(np.max((self.accuracy[1:] + self.accuracy[:-1]) / 2))

    @property
    def speed(self) -> float:
        """The mean accuracy over the horizon: the area under the curve."""
        return float(np.trapezoid(self.accuracy, self.steps) / (self.steps[-1] - self.steps[0]))

    def mean(self, name: str) -> float:
        """Of a metric over the whole run; NaN where it was never measured."""
        return self._over_run(name, np.mean)

    def median(self, name: str) -> float:
        """As `mean`, the median."""
        return self._over_run(name, np.median)

    def _over_run(self, name: str, reduce: Callable[[np.ndarray], Any]) -> float:
        values = self.metrics.get(name, np.array([]))
        return float(reduce(values[np.isfinite(values)])) if np.isfinite(values).any() else math.nan


def read_records(results: Path) -> dict[str, dict[str, Any]]:
    """The committed lines of all studies, by the keys of their configs; a torn last line is left out."""
    return {row["key"]: row for path in sorted(results.glob(f"*/{RUNS}")) for row in read(path)}


def read(path: Path) -> list[dict[str, Any]]:
    """What has been measured: an object for each line, without a torn last one; none if there is no file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def runs_of(study: Study, records: Mapping[str, dict[str, Any]]) -> dict[str, list[Run]]:
    """The finished runs of each cell, in the order of the pairs."""
    seeds = {row["config"].get("seed") for row in records.values()}
    pairs = [pair for pair in range(MOST_PAIRS) if study.pairs.seed(pair) in seeds]
    return {cell.name: list(_runs_of(study, cell, pairs, records)) for cell in study.cells}


def _runs_of(study: Study, cell: Cell, pairs: Sequence[int], records: Mapping[str, dict[str, Any]]) -> Iterator[Run]:
    for pair in pairs:
        if (row := records.get(study.key(cell, pair))) is not None:
            config = study.config(cell, pair)
            yield Run(
                pair,
                config.cold_start.seed,
                config.gradient_steps,
                math.nan if row["broken"] is None else row["broken"],
                math.nan if row["cpu_seconds"] is None else row["cpu_seconds"],
                {name: np.array(values, float) for name, values in row["metrics"].items()},
                (_determines_start(config), row["metrics"][ACCURACY][0]),
            )


def _determines_start(config: RunConfig) -> str:
    parts = (config.seed, config.task, config.model, config.cold_start, config.learner.precision, config.evaluation)
    return _hash(plain(parts))


def matches(cell: str, patterns: Sequence[str]) -> bool:
    """Whether a cell's name is like one of the patterns that a command was given, e.g. 'n8*'."""
    return any(fnmatch.fnmatch(cell, pattern) for pattern in patterns)


def missing(
    study: Study, records: Mapping[str, dict[str, Any]], seeds: int, only: Sequence[str] = ("*",), first: int = 0
) -> list[workers.Job]:
    """What is left to run, in the order of running: two pairs at a time through all cells.

    So all cells are equally far at any time, and two workers begin with two cold starts, not twice with one.
    """
    jobs, taken = [], set(records)
    for block in range(first, seeds, 2):
        for cell in study.cells:
            for pair in range(block, min(block + 2, seeds)):
                key = study.key(cell, pair)
                if key not in taken and matches(cell.name, only):
                    taken.add(key)
                    config = study.config(cell, pair)
                    jobs.append(workers.Job(cell.name, pair, key, config, differences(config)))
    return jobs


def add(path: Path, row: Mapping[str, Any]) -> None:
    """Appends a finished run to the committed metrics; a torn line of an interrupted writer is cut before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_lines(path, "pair", math.inf)
    append(path, json_line(row))


def run(
    study: Study,
    seeds: int = 10,
    hours: float = math.inf,
    workers_: Annotated[int, tyro.conf.arg(name="workers")] = 2,
    cells: tuple[str, ...] = ("*",),
    first_pair: int = 0,
    draw_only: Annotated[bool, tyro.conf.arg(name="draw")] = False,
    plan_only: Annotated[bool, tyro.conf.arg(name="plan")] = False,
    runs: Path = Path("runs/studies"),
    results: Path = RESULTS,
) -> None:
    """Runs what is missing of the study, then draws what is there.

    Args:
      study: to run.
      seeds: pairs of a cold start and a seed, for each cell.
      hours: stop after so long; unfinished runs are saved and go on when the command is given again.
      workers_: processes, each with its share of the cores; 0 runs in this one.
      cells: only those whose name matches one of these, e.g. 'n8*' 'n1-*'.
      first_pair: leave out the pairs before, e.g. where their cold starts are on another machine.
      draw_only: only draw, from the committed metrics.
      plan_only: only say what is missing.
      runs: where the run directories and their cold starts are kept.
      results: where the metrics, tables and pictures are.
    """
    if not 0 <= first_pair < seeds <= MOST_PAIRS:
        raise UserError(f"first_pair = {first_pair}, seeds = {seeds}: expected 0 <= first_pair < seeds <= {MOST_PAIRS}")
    jobs = [] if draw_only else missing(study, read_records(results), seeds, cells, first_pair)
    if plan_only:
        _say_plan(study, jobs, read_records(results))
        return
    failed = workers.work(
        jobs,
        runs,
        lambda row: add(results / study.name / RUNS, row),
        processes=workers_,
        hours=hours,
    )
    from experiments import drawing  # imports this module

    drawing.draw(study, runs_of(study, read_records(results)), results / study.name)
    if failed:
        raise UserError(f"{len(failed)} runs failed: {', '.join(failed[:5])}")


def _say_plan(study: Study, jobs: Sequence[workers.Job], records: Mapping[str, dict[str, Any]]) -> None:
    known = [row["cpu_seconds"] for row in records.values() if row["cpu_seconds"] is not None]
    cost = f"about {len(jobs) * np.median(known) / 3600:.1f} hours of one core" if known else "of unknown cost"
    print(f"{study.name}: {len(study.cells)} cells, {len(jobs)} runs missing, {cost}")
    for name, count in Counter(job.cell for job in jobs).items():
        print(f"  {name}: {count}")


def main(study: Study) -> None:
    """The command line of a study's file."""
    command(functools.partial(run, study))


def command(function: Callable[..., None]) -> None:
    """The command line of a function: what a user did wrong is one line, and so is Ctrl-C."""
    try:
        tyro.cli(function)
    except UserError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
