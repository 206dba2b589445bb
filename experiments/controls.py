"""What replay's benefit comes from: R3 against replay of the wrong routes, against a router that stands still, and
against a dense model of equal active parameters, where there is nothing to replay; and R2 against PR2, whose routes are
foretold.

If it comes from a restored first-order approximation, routes that are merely held fixed do not do: neither another
token's, which keep each expert's load, nor those that the training engine chose at the cold start. Both are replayed as
R3 replays the sampler's, in the old pass and in the updates. Another token's routes halve the weights' effective sample
size and mask three times as many tokens; "uneven" does the same to R3 at random, which leaves the approximation as it
is (live routing and R3 differ by .005 and .001 in these). Without clipping nothing collapses at the common
learning rate: there the controls are cells of `high_rates`.

    python -m experiments.controls --seeds 10 [--hours 2] [--plan] [--draw]
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import drawing, off_policy
from experiments.off_policy import REPLAYS, name
from experiments.pairing import tens
from experiments.recipes import minirl_uneven
from experiments.setting import base, replay
from experiments.study import Panel, Run, Study, main
from rlstab_jax.objectives import ObjectiveConfig

_EXPERTS = base().model
_DENSE = {"model.num_experts": 0, "model.mlp_dim": _EXPERTS.experts_per_token * _EXPERTS.expert_dim}
# Live routing, R3 and R2 are runs of `off_policy`.
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "live": REPLAYS["live"],
    "r3": REPLAYS["r3"],
    "r2": REPLAYS["r2"],
    "pr2": ("PR2", replay("pr2")),
    "permuted": ("another token's routes", replay("r3") | {"learner.replay_of": "permuted"}),
    "uneven": ("R3, weights as uneven as those", replay("r3") | {"objective": ObjectiveConfig(recipe=minirl_uneven)}),
    "frozen_routes": ("the cold start's routes", replay("r3") | {"learner.replay_of": "initial"}),
    "frozen_router": ("live, router frozen", replay("live") | {"learner.freeze": ("router",)}),
    "dense": ("dense", replay("live") | _DENSE),
}
cell = functools.partial(off_policy.cell, modes=CONTROLS)
MEASURED = (
    "trust/masked", "weight/ess", "weight/truncated", "staleness/k3", "discrepancy/k3", "discrepancy_live/k3",
    "routing/old_vs_target", "first_order/sequence_gap", "first_order/token_gap",
    "predictor/missed", "predictor/kl", "predictor/kl_unpredicted",
)  # fmt: skip


def validity(runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """What the first-order approximation rests on, beside how the cells ended.

    Ten pairs at a time. Of each measure the median over a run, whose tails are heavy, and the mean over runs.
    """
    rows = []
    for of_cell, done in ((of_cell, ten) for of_cell, of_all in runs.items() for ten in tens(of_all)):
        row = {"cell": of_cell} | drawing.ended(done) | drawing.interval(done, "final")
        rows.append(row | {measure: float(np.mean([run.median(measure) for run in done])) for measure in MEASURED})
    return rows


STUDY = Study(
    name="controls",
    question="What replay's benefit comes from, N = 8",
    base=base(),
    cells=(
        *(cell(8, True, control) for control in CONTROLS),
        *(cell(8, False, control) for control in ("live", "r3")),
        cell(1, True, "dense"),
    ),
    panels=(
        Panel("N = 8, clip", tuple(name(8, True, control) for control in CONTROLS if control != "pr2")),
        Panel("N = 8, clip, routes foretold", tuple(name(8, True, control) for control in ("live", "r2", "pr2", "r3"))),
        Panel("N = 8, no clip", tuple(name(8, False, control) for control in ("live", "r3"))),
        Panel("dense", tuple(name(number, True, "dense") for number in (8, 1))),
    ),
    tables=lambda runs: {"first_order.csv": validity(runs)},
)

if __name__ == "__main__":
    main(STUDY)
