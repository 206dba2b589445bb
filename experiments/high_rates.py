"""Learning rates at which runs break: what an earlier look found there, on one cold start, confirmed on ten.

It saw N = 8 collapse at 2e-3 without clipping and replay, and at 1.5e-3 recover the on-policy level with both, which
clipping alone did not. The common rate of the other studies is a third to a half of these, and nothing breaks there.
So the controls of replay without clipping are here, at the rate that breaks runs.

    python -m experiments.high_rates --seeds 10 [--hours 2] [--plan] [--draw]
"""

from experiments import controls
from experiments.off_policy import cell
from experiments.setting import RATES, at_rate, base
from experiments.study import Panel, Study, main

LEVEL, BREAKS = RATES[-2:]
ON_POLICY, NEITHER = (1, True, "live"), (8, False, "live")
HELD = ("frozen_router", "frozen_routes", "dense")  # routing that cannot drift, all without clipping
METHODS = {  # for each rate, in the order of their worth
    LEVEL: (ON_POLICY, (8, True, "live"), (8, True, "r3"), NEITHER, (8, True, "r2")),
    BREAKS: (NEITHER, (8, True, "r3"), (8, True, "live"), (8, False, "r3"), ON_POLICY),
}


CELLS = {
    rate: tuple(cell(*method, f"-lr{rate:g}", **at_rate(rate)) for method in methods)
    for rate, methods in METHODS.items()
}
CONTROLS = tuple(controls.cell(8, False, control, f"-lr{BREAKS:g}", **at_rate(BREAKS)) for control in HELD)
UNCLIPPED = tuple(one for one in (*CELLS[BREAKS], *CONTROLS) if "noclip" in one.name)
STUDY = Study(
    name="high_rates",
    question="Learning rates at which runs break",
    base=base(),
    cells=(*CELLS[LEVEL], *CELLS[BREAKS], *CONTROLS),
    panels=tuple(
        Panel(title, tuple(one.name for one in cells))
        for title, cells in (
            *((f"learning rate {rate:g}", cells) for rate, cells in CELLS.items()),
            (f"{BREAKS:g}, routing that cannot drift", UNCLIPPED),
        )
    ),
)

if __name__ == "__main__":
    main(STUDY)
