"""Learning rates, on seeds and cold starts of their own: the same grid and budget for each method.

Its runs are pilots too: PROTOCOL.md takes the spread between seeds from those at the common rate.

    python -m experiments.tuning --seeds 2 [--hours 2] [--plan] [--draw]
"""

from experiments.off_policy import REPLAYS
from experiments.setting import LEARNING_RATE, at_rate, base, clipping, replay, updates
from experiments.study import TUNING, Cell, Panel, Study, main

RATES = (1e-3, 2e-3, 7e-4, 3e-3)
METHODS = {"n1": (1, True, "live")} | {
    f"n8-{'clip' if clip else 'noclip'}-{mode}": (8, clip, mode) for clip in (True, False) for mode in REPLAYS
}


def _cell(method: str, rate: float) -> Cell:
    number, clip, mode = METHODS[method]
    changes = updates(number) | clipping(clip) | replay(mode) | at_rate(rate)
    return Cell(f"{method}-lr{rate:g}", changes, f"{method}, {rate:g}")


STUDY = Study(
    name="tuning",
    question="Learning rates on tuning seeds",
    base=base(),
    cells=tuple(_cell(method, rate) for rate in (LEARNING_RATE, *RATES) for method in METHODS),
    panels=tuple(
        Panel(f"learning rate {rate:g}", tuple(f"{method}-lr{rate:g}" for method in METHODS))
        for rate in sorted((LEARNING_RATE, *RATES))
    ),
    pairs=TUNING,
)

if __name__ == "__main__":
    main(STUDY)
