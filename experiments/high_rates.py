"""Learning rates at which runs break: what an earlier look found there, on one cold start, confirmed on ten.

It saw N = 8 collapse at 2e-3 without clipping and replay, and at 1.5e-3 recover the on-policy level with both, which
clipping alone did not. The common rate of the other studies is a third to a half of these, and nothing breaks there.

    python -m experiments.high_rates --seeds 10 [--hours 2] [--plan] [--draw]
"""

from experiments.off_policy import REPLAYS, name
from experiments.setting import RATES, at_rate, base, clipping, replay, updates
from experiments.study import Cell, Panel, Study, main

LEVEL, BREAKS = RATES[-2:]
ON_POLICY, NEITHER = (1, True, "live"), (8, False, "live")
METHODS = {  # for each rate, in the order of their worth
    LEVEL: (ON_POLICY, (8, True, "live"), (8, True, "r3"), NEITHER, (8, True, "r2")),
    BREAKS: (NEITHER, (8, True, "r3"), (8, True, "live"), (8, False, "r3"), ON_POLICY),
}


def cell_name(number: int, clip: bool, mode: str, rate: float) -> str:
    return f"{name(number, clip, mode)}-lr{rate:g}"


def _cell(number: int, clip: bool, mode: str, rate: float) -> Cell:
    changes = updates(number) | clipping(clip) | replay(mode) | at_rate(rate)
    label = f"N = {number}, {'clip' if clip else 'no clip'}, {REPLAYS[mode]}"
    return Cell(cell_name(number, clip, mode, rate), changes, label)


STUDY = Study(
    name="high_rates",
    question="Learning rates at which runs break",
    base=base(),
    cells=tuple(_cell(*method, rate) for rate, methods in METHODS.items() for method in methods),
    panels=tuple(
        Panel(f"learning rate {rate:g}", tuple(cell_name(*method, rate) for method in methods))
        for rate, methods in METHODS.items()
    ),
)

if __name__ == "__main__":
    main(STUDY)
