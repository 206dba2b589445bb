"""The study runner on a small study, the rules of the claims on made-up runs, and all that is committed, redrawn."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import (
    claims,
    controls,
    drawing,
    monitor_study,
    off_policy,
    on_policy,
    rates,
    scale,
    statistics,
    study,
    tuning,
    verdicts,
    workers,
)
from experiments.setting import NO_CLIP, RATES
from experiments.study import CONFIRMATORY, TUNING, Cell, Panel, Run, Study
from rlstab_jax.objectives import build as build_objective
from rlstab_jax.own_code import code_of
from rlstab_jax.rundir import leaves, plain
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.validate import validate
from tests.training import tiny_run

# The only cells whose gradients are clipped by global norm; they are of an exploration.
LIMITED = ("n1-lr0.002-norm1", "n8-lr0.002-norm1")
# On-policy, where clipping and R2 have nothing to do.
SMALL = Study(
    name="small",
    question="On-policy identities",
    base=dataclasses.replace(
        tiny_run.config(),
        gradient_steps=4,
        minibatches=1,
        learner=dataclasses.replace(tiny_run.config().learner, replay="live"),
        evaluation=dataclasses.replace(tiny_run.config().evaluation, every=2),
    ),
    cells=(Cell("live", {}, "live"), Cell("noclip", NO_CLIP), Cell("r2", {"learner.replay": "r2"})),
    panels=(Panel("all", ("live", "noclip", "r2")), Panel("none of them has run", ())),
    picture=lambda runs, out: drawing.by_level(
        {"line": {1: "live", 2: "r2"}, "other": {1: "noclip"}}, runs, "level", out / "levels.png"
    ),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study, run in this process: three cells, two pairs."""
    folder = tmp_path_factory.mktemp("studies")
    study.run(SMALL, seeds=2, workers_=0, runs=folder / "runs", results=folder / "results")
    return folder / "results"


def no_run(*args: Any) -> None:
    pytest.fail("every run is there")


def test_a_small_study_is_run_and_drawn(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (results / "small" / study.RUNS).read_text().splitlines()]
    assert [(row["cell"], row["pair"]) for row in rows] == [
        (cell, i) for cell in ("live", "noclip", "r2") for i in (0, 1)
    ]
    assert [row["config"]["seed"] for row in rows] == [2000, 2001] * 3
    assert rows[0]["versions"].keys() == {"python", "jax", "numpy", "rlstab_jax"}
    assert rows[0]["cpu_seconds"] > 0
    for name in ("curves.png", "levels.png"):
        assert (results / "small" / name).stat().st_size > 10_000
    # A second call runs nothing, and without the run directories all is drawn as it was.
    monkeypatch.setattr(workers, "do", no_run)
    before = (results / "small" / "cells.csv").read_text()
    study.run(SMALL, seeds=2, workers_=0, runs=tmp_path, results=results)
    assert (results / "small" / "cells.csv").read_text() == before
    lines = before.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("cell,pairs,runs,collapsed,collapsed_low")
    assert lines[1].startswith("live,0–1,2,")


def test_on_policy_neither_clipping_nor_r2_changes_anything(results: Path) -> None:
    runs = study.runs_of(SMALL, study.read_records(results))
    for live, noclip, r2 in zip(*(runs[name] for name in ("live", "noclip", "r2")), strict=True):
        assert live.mean("trust/masked") == live.mean("staleness/max_ratio") - 1 == 0
        for name in ("reward/mean", "learner/grad_norm", study.ACCURACY, "eval/accuracy_rollout"):
            np.testing.assert_array_equal(live.metrics[name], noclip.metrics[name])
            np.testing.assert_allclose(live.metrics[name], r2.metrics[name], rtol=1e-3)
        assert live.mean("learner/grad_norm") > 0


def test_a_study_takes_runs_of_another_one(results: Path) -> None:
    records = study.read_records(results)
    cells = (Cell("unclipped", NO_CLIP), Cell("three", {"minibatches": 3}))
    other = dataclasses.replace(SMALL, name="other", cells=cells, panels=())
    assert [job.cell for job in study.missing(other, records, seeds=2)] == ["three", "three"]
    assert len(study.runs_of(other, records)["unclipped"]) == 2


def test_a_run_that_is_out_of_time_goes_on_later(results: Path, tmp_path: Path) -> None:
    (job,) = study.missing(SMALL, {}, seeds=1, only=["live"])
    said = list[str]()
    assert workers.do(job, tmp_path, deadline=time.time()) is None
    assert workers.work([job], tmp_path, no_run, processes=0, hours=0, say=said.append) == []
    assert said == ["1 runs are left; the same command goes on"]
    row = workers.do(job, tmp_path)
    assert row is not None
    whole = study.read_records(results)[job.key]
    assert math.isnan(row["cpu_seconds"])  # it is known of neither piece
    assert row["metrics"] == whole["metrics"]
    kept = tmp_path / "kept" / study.RUNS
    study.add(kept, row)
    assert json.loads(kept.read_text())["cpu_seconds"] is None
    with kept.open("a") as file:
        file.write('{"torn": ')
    assert study.read_records(tmp_path).keys() == {job.key}
    study.add(kept, row | {"key": "another"})
    assert study.read_records(tmp_path).keys() == {job.key, "another"}


def test_processes_report_a_run_that_fails_and_go_on(tmp_path: Path) -> None:
    """Both jobs fail before any long work, one after the other in a process of its own."""
    broken = dataclasses.replace(SMALL.base, gradient_steps=0)
    jobs = [workers.Job("cell", pair, "key", broken, {}) for pair in (0, 1)]
    names, said = ["cell-pair00", "cell-pair01"], list[str]()
    assert workers.work(jobs, tmp_path, no_run, processes=1, say=said.append) == names
    assert said == [f"{name} failed: UserError: gradient_steps = 0: expected at least 1" for name in names]


def test_running_order_is_two_pairs_at_a_time() -> None:
    jobs = study.missing(SMALL, {}, seeds=3, only=["l*", "no*"])
    names = ["live-pair00", "live-pair01", "noclip-pair00", "noclip-pair01", "live-pair02", "noclip-pair02"]
    assert [job.name for job in jobs] == names


def test_pairs_are_dealt_to_the_cold_starts() -> None:
    assert [(CONFIRMATORY.seed(i), CONFIRMATORY.cold_start(i)) for i in (0, 9, 10)] == [
        (2000, 2000),
        (2009, 2009),
        (2010, 2000),
    ]


def test_seeds_and_cold_starts_are_of_one_kind_only() -> None:
    seeds = [{given.seed(i) for i in range(study.MOST_PAIRS)} for given in (TUNING, CONFIRMATORY)]
    cold_starts = [{given.cold_start(i) for i in range(study.MOST_PAIRS)} for given in (TUNING, CONFIRMATORY)]
    seen = {seed for both in monitor_study.SEEDS.values() for seed in both}
    assert not (seeds[0] | cold_starts[0] | seen) & (seeds[1] | cold_starts[1])
    assert len(cold_starts[1]) >= 3


def test_fields_are_replaced_by_their_dotted_names() -> None:
    config = study.replaced(RunConfig(), {"learner.replay": "r2", "rollout.precision.weights": "none", "seed": 5})
    assert (config.learner.replay, config.rollout.precision.weights, config.seed) == ("r2", "none", 5)
    with pytest.raises(ValueError, match="LearnerConfig has no field 'reply'"):
        study.replaced(RunConfig(), {"learner.reply": "r2"})


def test_a_run_is_known_by_what_it_computes() -> None:
    base = SMALL.base
    same = dataclasses.replace(base, checkpoint_every=7, logged_samples=0, keep_checkpoints=9)
    assert study.key_of(same) == study.key_of(base)
    longer = dataclasses.replace(base, gradient_steps=6)
    assert len({study.key_of(base), study.key_of(longer), study.key_of(dataclasses.replace(base, seed=1))}) == 3
    assert study.differences(RunConfig(logged_samples=0, learner=dataclasses.replace(RunConfig().learner))) == {}


def test_what_keys_stand_on() -> None:
    """A committed run is known by what its config differs in from the defaults, and by its recipe's name. Where a
    default has to change, studies that leave it out state the old value (in `experiments.setting`); a changed recipe
    has another name. Then `stands_on.json` may change, too."""
    kept = json.loads((Path(__file__).parent / "stands_on.json").read_text())
    now = dict(leaves(plain(RunConfig())))
    for given in verdicts.STUDIES:
        for cell in given.cells:
            now |= code_of(given.config(cell, 0))
    assert {name: now.get(name, "gone") for name in kept} == kept


def test_studies_refuse_doubled_and_unknown_names() -> None:
    with pytest.raises(ValueError, match="two cells of the name live"):
        dataclasses.replace(SMALL, cells=(*SMALL.cells, Cell("live")))
    with pytest.raises(ValueError, match="names lve"):
        dataclasses.replace(SMALL, panels=(Panel("", ("lve",)),))


def test_condensed_metrics() -> None:
    """N = 2, evaluated every 4: rows 2 and 4 make one place, 6 and 8 another; step 0 has the evaluation alone."""
    nan = math.nan
    metrics = {
        study.X: np.array([0.0, 2, 4, 6, 8]),
        "reward/mean": np.array([nan, 0.1, 0.2, 0.3, 0.5]),
        "staleness/max_ratio": np.array([nan, 3.0, 2.0, nan, 1.2345678]),
        "eval/accuracy_training": np.array([0.25, nan, 0.5, nan, 0.75]),
        "learner/grad_norm": np.array([nan, 1.0, 1.0, nan, 1.0]),
        "time/sample": np.ones(5),
    }
    assert workers.condense(metrics, 4) == {
        study.X: [0.0, 4.0, 8.0],
        "reward/mean": [None, 0.15, 0.4],
        "staleness/max_ratio": [None, 3.0, 1.2346],
        "eval/accuracy_training": [0.25, 0.5, 0.75],
        "learner/grad_norm": [None, 1.0, 1.0],
    }
    assert workers.first_broken(metrics) == 6.0
    assert workers.first_broken(metrics | {"learner/grad_norm": np.ones(5)}) is None


def made_up(final: float, pair: int, collapsed: bool = False, **means: float) -> Run:
    accuracy = np.array([0.2, 0.9, 0.1, 0.1] if collapsed else [0.2, final, final, final])
    metrics = {study.X: np.array([0.0, 100, 200, 300]), study.ACCURACY: accuracy}
    metrics |= {name.replace("__", "/"): np.full(4, value) for name, value in means.items()}
    return Run(pair, 2000 + pair % 10, 300, math.nan, 60.0, metrics)


def cell_of(finals: list[float], collapsed: int = 0, **means: float) -> list[Run]:
    return [made_up(final, i, i < collapsed, **means) for i, final in enumerate(finals)]


NOISE = [0.01 * x for x in (1, -1, 1, -1, 1, -1, -1, 1, -1, 1, -1, 1)]
FLAT = [0.7] * 12


def verdict(kind: claims.Kind, runs: dict[str, list[Run]], **fields: Any) -> str:
    given: dict[str, Any] = {"a": ("a",), "b": ("b",)} | fields
    contrast = claims.Contrast("x", "", "made_up", kind, **given)
    ((_, _, words),) = claims.verdicts([contrast], {"made_up": runs})
    return words


@pytest.mark.parametrize(
    ("kind", "difference", "expected"),
    [
        ("higher", 0.06, claims.REPRODUCED),
        ("higher", 0.026, claims.UNDECIDED),  # above 0, but not by the smallest effect
        ("higher", 0.0, claims.REFUTED),  # the interval is below the smallest effect
        ("higher", -0.06, claims.REFUTED),
        ("equivalent", 0.0, claims.REPRODUCED),
        ("equivalent", 0.028, claims.UNDECIDED),
        ("equivalent", 0.035, claims.UNDECIDED),  # beyond the margin, but its interval is not
        ("equivalent", -0.06, claims.REFUTED),
        ("best", 0.0, claims.REPRODUCED),
        ("best", -0.029, claims.UNDECIDED),
        ("best", -0.06, claims.REFUTED),
    ],
)
def test_verdicts_of_differences(kind: claims.Kind, difference: float, expected: str) -> None:
    runs = {"a": cell_of([0.7 + difference + x for x in NOISE]), "b": cell_of(FLAT)}
    assert verdict(kind, runs) == expected


def test_what_some_pairs_have_suggested_is_judged_on_others() -> None:
    """Better on the first two alone: of the ten after them it is refuted, and of the last nine nothing is known yet."""
    runs = {"a": cell_of([0.9, 0.9, *FLAT[2:12]]), "b": cell_of(FLAT[:12])}
    assert verdict("higher", runs, first_pair=2) == claims.REFUTED
    assert verdict("higher", runs, first_pair=3) == f"{claims.NOT_YET} (9 of 10 pairs)"


def test_a_verdict_rests_on_the_planned_pairs() -> None:
    """Ten more, which another study brought, would make these equivalent."""
    worse, equal = [x - 0.06 for x in FLAT[:10]], [x + 0.05 for x in FLAT[:10]]
    runs = {"a": cell_of(worse + equal), "b": cell_of([0.7] * 20)}
    assert verdict("equivalent", runs) == claims.REFUTED
    assert not verdict("equivalent", runs, planned=20).startswith(claims.REFUTED)


def test_a_wide_interval_decides_nothing() -> None:
    runs = {"a": cell_of([0.7 + 20 * x for x in NOISE]), "b": cell_of(FLAT)}
    for kind in ("higher", "equivalent", "best"):
        assert verdict(kind, runs) == claims.UNDECIDED


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (10, 0, claims.REPRODUCED),
        (7, 5, claims.UNDECIDED),  # more, but two discordant pairs are no evidence
        (5, 0, claims.UNDECIDED),  # less than half of the runs
        (2, 0, claims.REFUTED),  # 2 of 12: at most 0.484
    ],
)
def test_verdicts_of_collapses(a: int, b: int, expected: str) -> None:
    assert verdict("collapses", {"a": cell_of(FLAT, a), "b": cell_of(FLAT, b)}, planned=12) == expected


def test_verdicts_of_trends_and_amplification() -> None:
    runs = {f"a{i}": cell_of([0.6 + 0.05 * i + x for x in NOISE]) for i in range(3)}
    runs |= {f"b{i}": cell_of([0.6 + x for x in NOISE]) for i in range(3)}
    names = {"a": ("a0", "a1", "a2"), "b": ("b0", "b1", "b2"), "levels": (1.0, 2.0, 3.0)}
    assert verdict("trend", runs, **names) == claims.REPRODUCED
    assert verdict("trend", runs, **names | {"a": names["a"][::-1]}) == claims.REFUTED
    means = {"discrepancy__k3": 0.01, "discrepancy_live__k3": 0.04}  # four times: log2 is 2
    assert verdict("amplifies", {"a": cell_of(FLAT, **means)}, b=(), smallest=1.9) == claims.REPRODUCED
    assert verdict("amplifies", {"a": cell_of(FLAT, **means)}, b=(), smallest=2.1) == claims.REFUTED
    assert verdict("amplifies", {"a": cell_of(FLAT, discrepancy__k3=0.01)}, b=()) == claims.NOT_YET


def test_too_few_pairs_give_no_verdict() -> None:
    runs = {"a": cell_of([0.9] * 12), "b": cell_of([0.5] * 9)}
    assert verdict("higher", runs) == "not yet run (9 of 10 pairs)"
    assert verdict("higher", {}) == claims.NOT_YET


def test_a_pair_is_of_one_cold_start() -> None:
    """Other weights from the same seed, as another kind of processor trains them, pair with nothing."""
    a, b = ([dataclasses.replace(run, start=("s", 0.25)) for run in cell_of([x] * 12)] for x in (0.9, 0.5))
    assert verdict("higher", {"a": a, "b": b}) == claims.REPRODUCED
    b[:3] = [dataclasses.replace(run, start=("s", 0.27)) for run in b[:3]]
    assert verdict("higher", {"a": a, "b": b}) == "not yet run (9 of 10 pairs)"
    b[:3] = [dataclasses.replace(run, start=("of a dense model", 0.27)) for run in b[:3]]
    assert verdict("higher", {"a": a, "b": b}) == claims.REPRODUCED


def test_a_verdict_before_all_planned_pairs_says_so() -> None:
    runs = {"a": cell_of([0.9] * 12), "b": cell_of([0.5] * 12)}
    assert verdict("higher", runs, planned=20) == "reproduced, so far (12 of 20 pairs)"


def test_intervals_of_few_cold_starts_are_students() -> None:
    """Of three, a percentile is no more than the range of the values: 74% coverage, not 95."""
    values = np.array([0.0, 0.1, 0.3])
    found = statistics.estimate(values, np.arange(3), draws=100_000)
    error = values.std(ddof=1) / np.sqrt(3)
    assert found.high - found.mean == pytest.approx(4.3027 * error, rel=0.02)
    assert found.mean - found.low90 == pytest.approx(2.9200 * error, rel=0.02)


def test_families_are_adjusted_together() -> None:
    """Of two primary contrasts of one study both p are doubled or the larger; another study and a secondary are not."""
    runs = {"a": cell_of([0.7 + x for x in NOISE]), "b": cell_of(FLAT), "c": cell_of(FLAT, 8), "d": cell_of(FLAT, 0)}
    collapse = claims.Contrast("x", "", "one", "collapses", ("c",), ("d",))
    others = [
        claims.Contrast("y", "", "one", "higher", ("a",), ("b",)),
        dataclasses.replace(collapse, primary=False),
        dataclasses.replace(collapse, study="two"),
    ]
    adjusted = [p for _, p, _ in claims.verdicts([collapse, *others], {"one": runs, "two": runs})]
    alone = 2 / 2**8
    assert adjusted[0] == pytest.approx(2 * alone)
    assert adjusted[2] == adjusted[3] == pytest.approx(alone)


def test_every_cell_of_every_study_can_be_run() -> None:
    names = [given.name for given in verdicts.STUDIES]
    assert len(set(names)) == len(names)
    for given in verdicts.STUDIES:
        for cell in given.cells:
            config = given.config(cell, 0)
            validate(config)
            build_objective(config.objective)
            assert config.gradient_steps % config.minibatches == 0, cell.name
            assert math.isinf(config.learner.max_grad_norm) or cell.name in LIMITED, cell.name
            assert config.learner.load_balance == config.learner.router_z == 0, cell.name
            assert given.key(cell, 41) == study.key_of(given.config(cell, 41)), cell.name


def test_every_claim_names_cells_of_its_study() -> None:
    cells = {given.name: {cell.name for cell in given.cells} for given in verdicts.CONFIRMATORY}
    for contrast in claims.ALL:
        assert {*contrast.a, *contrast.b} <= cells[contrast.study], contrast
        assert len(contrast.levels) in (0, len(contrast.a)), contrast
    assert {contrast.claim for contrast in claims.PAPER} == set("abcdefghijkln")  # m is of gradients, not of runs
    for contrast in claims.DESCRIBED:
        assert {*contrast.a, *contrast.b} <= cells[contrast.study], contrast
    for contrast in claims.BY_SCALE:
        for of in (*scale.SIZES, *scale.LENGTHS):
            assert {f"{of}-{name}" for name in contrast.a + contrast.b} <= cells["scale"], contrast


def test_what_two_studies_have_in_common_is_one_run() -> None:
    for name, other, of_other in (
        ("n1-clip-live", on_policy.STUDY, "minirl"),
        ("n8-clip-r3", controls.STUDY, "n8-clip-r3"),
        ("n8-noclip-live", controls.STUDY, "n8-noclip-live"),
    ):
        configs = off_policy.STUDY.config(off_policy.STUDY.cell(name), 3), other.config(other.cell(of_other), 3)
        assert len(set(map(study.key_of, configs))) == 1


def test_controls_are_tabled_with_what_their_validity_rests_on() -> None:
    """A median withstands one wild evaluation; what was not measured is NaN, and a cell without runs is left out."""
    wild = made_up(0.7, 0, weight__ess=0.9)
    wild.metrics["weight/ess"][1] = 1e6
    (row,) = controls.validity({"a": [wild, made_up(0.5, 1, weight__ess=0.7)], "b": []})
    assert (row["cell"], row["runs"], row["collapsed"]) == ("a", 2, 0)
    assert row["final"] == pytest.approx(0.6)
    assert row["weight/ess"] == pytest.approx(0.8)
    assert math.isnan(row["staleness/k3"])


def test_rates_are_compared_where_there_are_enough_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3 lasts up to the third rate, and tunes best at the second; live routing has too few runs, and no tuning."""
    at = (("", 0), ("-lr0.0015", 1), ("-lr0.002", 6))
    runs = {f"n8-clip-r3{suffix}": cell_of(FLAT[:10], n) for suffix, n in at}
    runs |= {f"n8-clip-r3-lr{rate:g}": cell_of([0.5 + 0.1 * (rate == RATES[1])] * 3) for rate in RATES[:2]}
    runs |= {"n8-clip-live": cell_of(FLAT[:9])}
    tuned = {cell.name: [] for cell in tuning.STUDY.cells}
    tuned |= {f"n8-clip-r3-lr{rate:g}": cell_of([0.5 + 0.1 * (rate == RATES[2])] * 3) for rate in RATES}
    monkeypatch.setattr(rates, "runs_of", lambda given, _: tuned if given is tuning.STUDY else runs)
    rows = rates.table({})
    assert [(row["learning_rate"], row["collapsed"], row["best"], row["lasts"]) for row in rows] == [
        (RATES[0], 0, 0, 0),
        (RATES[2], 1, 1, 1),
        (RATES[3], 6, 0, 0),
    ]
    assert {row["method"] for row in rows} == {"N = 8, clip, R3"}
    line = next(line for line in rates.lines({}) if line[0] == "N = 8, clip, R3")
    assert line[1] == "0–9"
    assert line[4].endswith(", 1 of 10 *^")
    assert line[3] == ""
