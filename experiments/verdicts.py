"""The verdicts on the claims of the paper and of later work, from the committed metrics of all studies.

python -m experiments.verdicts                 # draws all studies, and writes experiments/results/README.md
python -m experiments.verdicts --protocol-only    # prints PROTOCOL.md's tables of contrasts and of cells
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import (
    cold_start,
    controls,
    discrepancy,
    drawing,
    engine_gaps,
    gradients,
    high_rates,
    measured,
    objectives,
    off_policy,
    on_policy,
    persistence,
    rates,
    regime,
    scale,
    staleness,
    tuning,
)
from experiments.benchmarks.common import markdown
from experiments.claims import (
    ALL,
    BY_SCALE,
    CAUSES,
    DESCRIBED,
    ENOUGH,
    EVERY,
    LATER,
    LEADS,
    NOT_YET,
    PAPER,
    REFUTED,
    REPRODUCED,
    RULES,
    SMALLEST,
    UNDECIDED,
    Contrast,
    Verdict,
    judge,
    verdicts,
)
from experiments.pairing import Runs, common
from experiments.setting import LEARNING_RATE, RATES
from experiments.study import RESULTS, Run, read, read_records, runs_of

CONFIRMATORY = tuple(
    module.STUDY
    for module in (off_policy, high_rates, on_policy, objectives, discrepancy, cold_start, controls, staleness, scale)
)
STUDIES = (tuning.STUDY, regime.STUDY, *CONFIRMATORY)
README = RESULTS / "README.md"


def write(path: Path, results: Path) -> None:
    """Writes the page of verdicts."""
    path.write_text(page(results))


def page(results: Path) -> str:
    """The page of verdicts, from the committed metrics alone."""
    records = read_records(results)
    runs = {study.name: runs_of(study, records) for study in CONFIRMATORY}
    judged = verdicts(ALL, runs)  # all at once: a family may stand in several tables
    parts = [
        "# Verdicts on the paper's claims",
        "The paper is [arXiv 2512.01374](https://arxiv.org/abs/2512.01374). Letters name its claims, in the order in "
        "which this project lists them.",
        "`python -m experiments.verdicts` writes this page from the committed metrics (`*/runs.jsonl`); "
        "[`PROTOCOL.md`](../PROTOCOL.md) has the rules, fixed before the runs; what has been added or corrected since "
        "is dated at its end.",
        f'A verdict is "{REPRODUCED}", "{UNDECIDED}" or "{REFUTED}", and needs {ENOUGH} pairs of a cold start and a '
        f'seed; before that it is "{NOT_YET}". It rests on the first {ENOUGH} of them, or {2 * ENOUGH} where so many '
        "were planned; where other studies have brought more, the figures of all stand beside it. Differences are of "
        "held-out accuracy, paired, with 95% intervals of a "
        f'hierarchical bootstrap; counts have exact intervals. A difference is "{REFUTED}" where its interval is below '
        f"{SMALLEST:g}, the smallest effect of interest, even if it is above 0; a collapse where fewer than half of "
        "the runs do, by its interval; an equivalence where its interval lies beyond that margin. p is that of no "
        "difference (of equal counts; for an equivalence, of one at the margin or beyond), adjusted by Holm within a "
        "study's primary contrasts, and within its secondary ones; refuting takes an interval alone (of (a) p, too). "
        "p is of a t test, the interval of the bootstrap's percentiles: where one pair in ten is far from the others, "
        "as where (TIS) its counterpart collapsed, an interval may leave out 0 and p not be small.",
        "## The paper's own claims",
        _table(PAPER, judged, runs),
        measured.climbing([run for name, done in runs["off_policy"].items() if "-lr" not in name for run in done]),
        "Of (e) there are more lines [below](#where-the-claims-on-staleness-could-bite), at a rate of 0.002. "
        + measured.by_quarters(runs["cold_start"]),
        _discrepancies(runs["on_policy"]),
        "Claim (m): the ablated gradients are neither equal to nor linearly correlated with the true one. Enumerated: "
        + measured.enumerated(results),
        "In training, by large samples of the runs of MiniRL on-policy (`python -m experiments.gradients`):",
        measured.of_gradients(results),
        "Of (c) and (m) training can say little about lengths where answers are as long as their prompts ask, so that "
        "1/|y| weighs prompts, and never one response to a prompt against another. "
        + measured.lengths(runs["on_policy"]),
        "## What replay does, and routes that are merely held fixed",
        "The paper's account of replay's benefit: a restored first-order approximation. If so, routes that are merely "
        "held fixed do not do, and a router that stands still does not either. The first line is that benefit itself: "
        "without it, the other ones say what wrong routes cost.",
        _table(CAUSES, judged, runs),
        "And the gradients themselves: how much of Eq. 2's gradient the token-level one holds, as its projection on it "
        "(1: all, 0: nothing; 95% intervals), at the weights that sampled and seven updates later, at the cold start "
        "and at the end of on-policy runs, of the pairs that have them all ([more](gradients/gradients.csv), of all "
        "pairs). Products and lengths are estimated by "
        "halves of the samples, so that noise may put a cosine or a projection beyond 1. No verdict.",
        measured.of_projections(results),
        "## Claims of later work",
        "All at the common rate, which tuning chose for MiniRL: of the methods of later work none has been tuned. For "
        "six of the seven that were, the best rate is the lowest of the grid, and a lower one has not been run.",
        _table(LATER, judged, runs),
        "## Where the claims on staleness could bite",
        f"{measured.collapses_without_clipping(runs['off_policy'], runs['scale'])} What was turned up in search of a "
        "regime where training without clipping and replay collapses, and on-policy training does not, on tuning "
        "seeds: no evidence (`python -m experiments.regime`, [pictures](regime/curves.png)). Runs of a pair compare "
        "where they begin from one cold start, so from one first accuracy.",
        _searched(records),
        "An earlier look saw N = 8 collapse at 2e-3 without clipping and replay, and recover the on-policy level with "
        "both at 1.5e-3, from one cold start. The same on fresh seeds and ten cold starts:",
        _table(LEADS, judged, runs),
        "## By model size and length of responses",
        "The main contrasts in final accuracy, with 95% intervals and the runs that collapsed, where ten pairs have "
        "run (`python -m experiments.scale`, [pictures](scale/curves.png)): small is d 32 with 8 experts, large is 4 "
        "layers of d 96 with 32 experts, answers are of 7 to 17 tokens; len33 and len73 are of the base's size with "
        "answers of up to 33 and 73 tokens. No verdict, and no claim about larger models.",
        _by_scale(runs["scale"]),
        "## By learning rate",
        "Final accuracy (95% interval) and collapses of the main methods on confirmatory seeds, where there are "
        f"{ENOUGH} pairs or more; only lines of the same pairs may be compared. {LEARNING_RATE:g} is the common rate; "
        "*: the method's best rate in tuning, where all four have three equal tuning pairs; ^: at most a tenth of its "
        "runs collapsed, and more at the next higher rate. What is empty has not been run, so that a method without ^ "
        "may last at higher rates than are here ([more](rates/rates.csv), [picture](rates/by_rate.png)). No "
        "verdict.",
        markdown(("method", "pairs", *(f"{rate:g}" for rate in RATES)), rates.lines(records)),
        "## Whether the gap's persistence, rather than its size, makes IS matter",
        "delta = log mu - log pi of the tokens of a fixed probe, at every 16th update of on-policy runs: its size "
        "(root mean square, nats), and its correlation over tokens with itself after more updates. If persistence "
        "decides, IS is worth accuracy where the correlation lasts, whatever the size; kinds of rollouts that differ "
        "in both cannot tell the two apart ([more](persistence/persistence.csv), "
        "[picture](persistence/persistence.png)). Accuracies are the last ones, as means over pairs. No verdict.",
        measured.of_persistence(results),
        "## What each choice of engines does at fixed weights",
        "KL and route disagreement of the engines, the share of KL that goes when the sampler's routes are replayed, "
        "and the projection of MiniRL's gradients on that of equal engines (1: all of it; 95% intervals), at the end "
        "of on-policy runs: of few pairs, so that the table orders engines and says little of small differences "
        "([more, with cosines](engine_gaps/engine_gaps.csv), [picture](engine_gaps/engine_gaps.png)). No verdict.",
        measured.of_engines(results),
        "## Other differences",
        "Of final accuracy, over pairs, with 95% intervals; no claim asks for them, or they were not asked beforehand. "
        "No verdict.",
        _described(runs),
        "## What has been run",
        "A study's page has the mean, the interval and the collapses of each of its cells.",
        _progress(records, results),
        _not_yet(runs),
        "**Not tested at all**: the weight (b) in larger models, with longer answers, in bfloat16 or with updates that "
        "are small against the quantisation step; answers beyond 73 tokens; a gap that is small and lasts, or large "
        "and does not, which alone would tell persistence from size; controls of replay in the large model; "
        "objectives of later work at rates of their own.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(
    contrasts: Sequence[Contrast], judged: Sequence[tuple[Verdict, float, str]], runs: Mapping[str, Runs]
) -> str:
    rows = [
        (
            c.claim,
            c.says,
            c.study,
            v.figures,
            str(v.pairs),
            "" if math.isnan(p) else f"{p:.2g}",
            words,
            _of_all(v, runs),
        )
        for v, p, words in judged
        if (c := v.contrast) in contrasts
    ]
    return markdown(("claim", "as tested", "study", "figures", "pairs", "p", "verdict", "of all pairs"), rows)


def _of_all(judged: Verdict, runs: Mapping[str, Runs]) -> str:
    """The figures of all pairs, and their number, where there are more than are judged."""
    contrast = judged.contrast
    every = judge(dataclasses.replace(contrast, planned=EVERY), runs[contrast.study])
    return f"{every.figures}, {every.pairs} pairs" if every.pairs > judged.pairs else ""


def _searched(records: Mapping[str, dict[str, Any]]) -> str:
    runs = runs_of(regime.STUDY, records)
    rows = [
        (
            cell.name,
            f"{sum(run.outcome.kind == 'collapsed' for run in done)} of {len(done)}",
            ", ".join(f"{run.start[1]:.2f} to {run.final:.2f} ({run.pair})" for run in done),
            f"{np.median([run.median('staleness/k3') for run in done]):.2g}",
        )
        for cell in regime.STUDY.cells
        if (done := runs[cell.name])
    ]
    head = ("cell", "collapsed", "first to final accuracy of each run (its pair)", "median KL of staleness (k3)")
    return markdown(head, rows)


def _progress(records: Mapping[str, dict[str, Any]], results: Path) -> str:
    rows: list[tuple[str, ...]] = []
    counted: set[str] = set()
    for study in STUDIES:
        done = runs_of(study, records)
        complete = sum(len(runs) >= ENOUGH for runs in done.values())
        keys = {study.key(study.cell(name), run.pair) for name, runs in done.items() for run in runs}
        own = len(keys - counted)
        counted |= keys
        link = f"[`{study.name}`]({study.name})" if any(done.values()) else f"`{study.name}`"
        command = f"`python -m experiments.{study.name} --draw`"
        runs = str(sum(map(len, done.values())))
        rows.append((link, str(len(study.cells)), str(complete), runs, str(own), command))
    for module in (gradients, persistence, engine_gaps):
        name = module.FOLDER.name
        measured = len(read(results / name / module.FILE))
        link = f"[`{name}`]({name})" if measured else f"`{name}`"
        rows.append((link, "", "", str(measured), str(measured), f"`python -m experiments.{name} --draw`"))
    head = ("study", "cells", f"with {ENOUGH} pairs", "runs", "not of a study above", "tables and pictures")
    return markdown(head, rows)


def _not_yet(runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    """The cells of confirmatory studies that lack runs, by name."""
    lines = []
    for study, cells in runs.items():
        short = [f"{name} ({len(done)})" for name, done in cells.items() if len(done) < ENOUGH]
        lines += [f"- `{study}`: {', '.join(short)}"] if short else []
    if not lines:
        return "No cell lacks runs, but for those that [the protocol](../PROTOCOL.md) says were dropped."
    return (
        f"**Not yet run**, or with fewer than {ENOUGH} pairs (their number), besides what "
        "[the protocol](../PROTOCOL.md) says was dropped:\n\n" + "\n".join(lines)
    )


def _described(runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    lines = []
    for contrast in DESCRIBED:
        verdict = judge(contrast, runs[contrast.study])
        figures = verdict.figures if verdict.pairs >= ENOUGH else verdict.text(math.nan)
        lines.append((contrast.says, contrast.study, figures, str(verdict.pairs)))
    return markdown(("A less B", "study", "difference", "pairs"), lines)


def _by_scale(runs: Mapping[str, Sequence[Run]]) -> str:
    def shown(of: str, contrast: Contrast) -> str:
        cells = tuple(f"{of}-{name}" for name in contrast.a + contrast.b)
        verdict = judge(dataclasses.replace(contrast, a=cells[:1], b=cells[1:]), runs)
        if verdict.pairs < ENOUGH:
            return verdict.text(math.nan)
        a, b = (sum(run.collapsed for run in done) for done in common(runs, cells))
        return f"{verdict.figures}; {a} and {b} of {verdict.pairs}"

    scales = (*scale.SIZES, *scale.LENGTHS)
    lines = [(of, *(shown(of, contrast) for contrast in BY_SCALE)) for of in scales]
    return markdown(("", *(contrast.says for contrast in BY_SCALE)), lines)


def _discrepancies(runs: Mapping[str, Sequence[Run]]) -> str:
    """What the authors of R3 report of it, on-policy."""

    same = dict(zip(("minirl", "r3"), common(runs, ("minirl", "r3")), strict=True))

    def mean(cell: str, name: str) -> float:
        return float(np.mean([run.mean(name) for run in same[cell]]))

    return (
        "Beside (l), what the authors of R3 report ([2510.11370](https://arxiv.org/abs/2510.11370): KL "
        "halves, a tenth of the routers' choices differs; F(2) is the share of tokens with a ratio "
        f"beyond 2), as means over {len(same['r3'])} pairs of on-policy runs with e4m3 rollouts: KL (k3) "
        f"{mean('r3', 'discrepancy_live/k3'):.2g} with live routing and {mean('r3', 'discrepancy/k3'):.2g} with R3 on "
        f"the same batches; {mean('minirl', 'routing/rollout_vs_old'):.1%} of the choices differ; F(2) is "
        f"{mean('minirl', 'discrepancy/f2'):.2%} with live routing and {mean('r3', 'discrepancy/f2'):.2%} with R3."
    )


def protocol() -> str:
    """PROTOCOL.md's tables: the rules, every contrast, and every study with its cells."""
    contrasts = [
        (c.claim, c.says, "primary" if c.primary else "", c.study, c.kind, ", ".join(c.a), ", ".join(c.b)) for c in ALL
    ]
    studies = [(s.name, str(len(s.cells)), ", ".join(cell.name for cell in s.cells)) for s in STUDIES]
    head = ("claim", "as tested", "", "study", "rule", "A", "B")
    tables = (
        markdown(("rule", "what it compares, and its verdicts"), tuple(RULES.items())),
        markdown(head, contrasts),
        markdown(("study", "cells", "names, in the order of running"), studies),
    )
    return "\n\n".join(tables)


def main(protocol_only: bool = False) -> None:
    """Draws every study, since a run may be one of several of them, and writes the page of verdicts.

    Args:
      protocol_only: print the protocol's tables instead.
    """
    if protocol_only:
        print(protocol())
        return
    records = read_records(RESULTS)
    for study in STUDIES:
        drawing.draw(study, runs_of(study, records), RESULTS / study.name)
    rates.draw(records)
    write(README, RESULTS)


if __name__ == "__main__":
    tyro.cli(main)
