"""The runs that a report compares: reading them, grouping those that differ only in their seed, naming the groups, and
the fields in which their configs differ."""

import datetime
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlstab_jax.report.curves import Metrics
from rlstab_jax.report.panels import X
from rlstab_jax.report.samples import chosen
from rlstab_jax.rundir import MAY_CHANGE, leaves, read_manifest, read_metrics, read_samples
from rlstab_jax.types import UserError

PROVENANCE = ("code", "versions", "devices", "mesh", "rollout_mesh", "resolved")  # of a manifest, besides the config


class Run(NamedTuple):
    """A run as it is on disk now.

    ``name`` is the shortest end of its path that tells it from the others. ``samples`` are the logged responses that
    are shown. ``written`` is when its last step was.
    """

    path: Path
    name: str
    manifest: dict[str, Any]
    metrics: Metrics
    samples: list[Mapping[str, Any]]
    written: datetime.datetime

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest["config"]

    @property
    def steps(self) -> int:
        """Gradient steps so far."""
        return int(np.nanmax(self.metrics[X], initial=0))


class Group(NamedTuple):
    """Runs whose configs differ in nothing but the fields that are averaged over."""

    label: str
    runs: list[Run]


class Difference(NamedTuple):
    """A field, and its values in each group, one where all runs of the group agree; ``None`` for an absent one."""

    field: str
    values: list[tuple[str | None, ...]]


def read_runs(paths: Sequence[Path], say: Callable[[str], None] = print) -> list[Run]:
    """Reads runs, finished or not; a directory of runs stands for all runs in it. A run without a step is left out, and
    so is one whose files cannot be read, where there are others.

    Raises:
      UserError: no such directory, a directory that is no run's, no run that can be read, or none with a step.
    """
    if not paths:
        raise UserError(
            "expected the directory of a run: rlstab report runs/quickstart-seed0 (before --over, which takes all the "
            "words that follow it)"
        )
    found = list(dict.fromkeys(run for path in paths for run in _expand(path)))
    runs: list[Run] = []
    damage: list[UserError] = []
    for path, name in zip(found, _names(found), strict=True):
        try:
            run = _read(path, name)
        except UserError as error:
            damage.append(error)
            say(f"left out: {error}")
            continue
        if run is None:
            say(f"{path} is left out: it has no step yet")
        else:
            runs.append(run)
    if not runs and damage:
        raise damage[0]
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: no run there has a step yet; wait for its first")
    return runs


def _expand(path: Path) -> list[Path]:
    """The run in ``path``, or the runs in its directories."""
    if not path.exists():
        raise UserError(f"{path}: there is no such directory; give a run's, such as runs/quickstart-seed0")
    if not path.is_dir():
        raise UserError(f"{path} is a file; give the directory of the run")
    if _is_run(path):
        return [path.resolve()]
    inside = sorted((child.resolve() for child in path.iterdir() if _is_run(child)), key=_in_order)
    if not inside:
        beside = f", or {path.parent} for all runs in it" if _holds_runs(path.parent) else ""
        raise UserError(f"{path}: no manifest.json is there, so it is no run; give the directory of a run{beside}")
    return inside


def _is_run(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def _holds_runs(path: Path) -> bool:
    return any(_is_run(child) for child in path.iterdir())


def _in_order(path: Path) -> list[Any]:
    """A key by which seed2 comes before seed10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _read(path: Path, name: str) -> Run | None:
    manifest = read_manifest(path)
    if "config" not in manifest:
        raise UserError(f"{path}: its manifest.json holds no config; is it the directory of a run?")
    file = path / "metrics.jsonl"
    metrics = read_metrics(file) if file.exists() else {}
    if not metrics:
        return None
    if X not in metrics:
        raise UserError(f"{file} holds no {X}: is it of a training run?")
    steps = metrics[X][np.isfinite(metrics[X])]
    if (back := np.flatnonzero(np.diff(steps) <= 0)).size:
        after, before = steps[back[0] + 1], steps[back[0]]
        raise UserError(f"{file}: {X} is {after:g} after {before:g}; are these the lines of several runs?")
    samples = read_samples(path)
    for number, sample in enumerate(samples, start=1):
        if not isinstance(sample.get("global_step"), int) or not isinstance(sample.get("reward"), int | float | None):
            raise UserError(
                f"{path}/samples.jsonl, line {number}: expected a global_step and a reward that are numbers: mend or "
                "remove it"
            )
    written = datetime.datetime.fromtimestamp(os.stat(file).st_mtime, datetime.UTC)
    return Run(path, name, manifest, metrics, chosen(samples), written)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def group_runs(runs: Sequence[Run], over: Sequence[str] = ("seed",)) -> list[Group]:
    """Groups runs whose configs are equal but for the fields ``over`` and `MAY_CHANGE`; both in the given order. Runs
    that --fresh has moved aside are a group of their own, and so are those with another code of a function.

    A group is named by what its runs' names begin with, and by all these names where two groups' begin alike.

    Raises:
      UserError: no run's config has a field of that name.
    """
    kept: dict[str, list[Run]] = {}
    fields = [dict(leaves(run.config)) for run in runs]
    for name in over:
        if not any(name in one for one in fields):
            raise UserError(f"--over {name}: no run's config has such a field; seed or cold_start.seed are some")
    for run, values in zip(runs, fields, strict=True):
        rest = {name: value for name, value in values.items() if name not in (*over, *MAY_CHANGE)}
        rest["code"] = run.manifest.get("code")
        rest["aside"] = re.search(r"\.old-\d+$", run.path.name) is not None  # moved there by --fresh
        kept.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    labels = [common_name([run.name for run in group]) for group in kept.values()]
    # Names of runs differ, so that a list of them tells apart what begins alike.
    unique = [
        label if labels.count(label) == 1 else ", ".join(run.name for run in group)
        for label, group in zip(labels, kept.values(), strict=True)
    ]
    return [Group(label, group) for label, group in zip(unique, kept.values(), strict=True)]


def common_name(names: Sequence[str]) -> str:
    """What names begin with, without the seed.

    >>> common_name(["quickstart-seed0", "quickstart-seed10"]), common_name(["r3-seed1"]), common_name(["lr2", "lr23"])
    ('quickstart', 'r3', 'lr2, lr23')
    """
    if len(names) == 1:
        return re.sub(r"(?<=.)[-_.]seed[-_.]?\d+$", "", names[0])
    common = os.path.commonprefix(names)  # noqa: RUF071 (of characters)
    if any(re.match(r"\d", name[len(common) :]) for name in names):
        common = re.sub(r"\d+$", "", common)  # no part of a number
    whole = re.sub(r"[-_./]?(seed)?[-_./]*$", "", common)
    if whole and (whole != common or whole in names or len(whole) > 2):
        return whole
    return ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"


def differences(groups: Sequence[Group]) -> tuple[list[Difference], list[tuple[str, str]]]:
    """The fields of configs, and of what runs ran on, that differ between any two runs; and those that do not."""
    fields = [[dict(_described(run)) for run in group.runs] for group in groups]
    names = list(dict.fromkeys(name for group in fields for run in group for name in run))
    differ, shared = [], []
    for name in names:
        values = [tuple(dict.fromkeys(run.get(name) for run in group)) for group in fields]
        if len({value for group in values for value in group}) > 1:
            differ.append(Difference(name, values))
        else:
            shared.append((name, str(values[0][0])))
    return differ, shared


def _described(run: Run) -> Iterable[tuple[str, str]]:
    """Fields of the config by their names, and what the run ran on with the name of its part before them."""
    for name, value in leaves(run.config):
        yield name, json.dumps(value)
    for part in PROVENANCE:
        for name, value in leaves({part: run.manifest.get(part, {})}):
            if value != {}:
                yield f"{name} (not config)", json.dumps(value)
