"""What replay's benefit comes from: R3 against replay of the wrong routes, against a router that stands still, and
against a dense model of equal active parameters, where there is nothing to replay.

If it comes from a restored first-order approximation, routes that are merely held fixed do not do: neither another
token's, which keep each expert's load, nor those that the training engine chose at the cold start. Both are replayed as
R3 replays the sampler's, in the old pass and in the updates.

    python -m experiments.controls --seeds 10 [--hours 2] [--plan] [--draw]
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import drawing
from experiments.setting import base, clipping, replay, updates
from experiments.study import Cell, Panel, Run, Study, main

_EXPERTS = base().model
DENSE = {"model.num_experts": 0, "model.mlp_dim": _EXPERTS.experts_per_token * _EXPERTS.expert_dim}
# Live routing and R3 are runs of `off_policy`.
ROUTING: dict[str, tuple[str, dict[str, Any]]] = {
    "live": ("live", replay("live")),
    "r3": ("R3", replay("r3")),
    "permuted": ("another token's routes", replay("r3") | {"learner.replay_of": "permuted"}),
    "frozen_routes": ("the cold start's routes", replay("r3") | {"learner.replay_of": "initial"}),
    "frozen_router": ("live, router frozen", replay("live") | {"learner.freeze": ("router",)}),
}
UNCLIPPED = ("live", "r3", "frozen_routes", "frozen_router")  # wrong routes lose with clipping already, or not at all
MEASURED = (
    "trust/masked", "weight/ess", "weight/truncated", "staleness/k3", "discrepancy/k3", "discrepancy_live/k3",
    "routing/old_vs_target", "first_order/sequence_gap", "first_order/token_gap",
)  # fmt: skip


def _cell(number: int, clip: bool, name: str, label: str, changes: Mapping[str, Any]) -> Cell:
    words = "clip" if clip else "no clip"
    return Cell(name, updates(number) | clipping(clip) | changes, f"N = {number}, {words}, {label}")


def cells() -> tuple[Cell, ...]:
    """In the order of their worth."""
    of_routing = [
        _cell(8, clip, f"n8-{'clip' if clip else 'noclip'}-{name}", label, changes)
        for clip in (True, False)
        for name, (label, changes) in ROUTING.items()
        if clip or name in UNCLIPPED
    ]
    dense = [
        _cell(n, clip, f"dense-n{n}-{'clip' if clip else 'noclip'}", "dense", DENSE)
        for n, clip in ((8, True), (8, False), (1, True))
    ]
    return (*of_routing, *dense)


def validity(runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """What the first-order approximation rests on, beside how the cells ended.

    Of each measure the median over a run, whose tails are heavy, and the mean over runs.
    """
    rows = []
    for name, done in runs.items():
        if not done:
            continue
        collapsed = sum(run.outcome.kind == "collapsed" for run in done)
        final = drawing.mean_of(done, "final")
        row = {"cell": name, "runs": len(done), "collapsed": collapsed, "final": final.mean}
        row |= {"final_low": final.low, "final_high": final.high}
        rows.append(row | {measure: float(np.mean([run.median(measure) for run in done])) for measure in MEASURED})
    return rows


STUDY = Study(
    name="controls",
    question="What replay's benefit comes from, N = 8",
    base=base(),
    cells=cells(),
    panels=(
        Panel("clip", tuple(f"n8-clip-{name}" for name in ROUTING)),
        Panel("no clip", tuple(f"n8-noclip-{name}" for name in UNCLIPPED)),
        Panel("dense", ("dense-n8-clip", "dense-n8-noclip", "dense-n1-clip")),
    ),
    tables=lambda runs: {"first_order.csv": validity(runs)},
)

if __name__ == "__main__":
    main(STUDY)
