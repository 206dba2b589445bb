"""Off-policy training (the paper's Figs. 2 to 4, and the cells that it leaves empty).

N updates per rollout batch, clipping on or off, routing live or replayed, all at equal responses; then the learning
rates, the size of the mini-batch and the cap of the weight at N = 8.

    python -m experiments.off_policy --seeds 10 [--hours 2] [--plan] [--draw]
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import drawing
from experiments.setting import HIGHER, HIGHER_RATE, at_rate, base, clipping, replay, updates
from experiments.study import Cell, Panel, Run, Study, main

UPDATES = (2, 4, 8, 16)
REPLAYS = {mode: (label, replay(mode)) for mode, label in (("live", "live"), ("r2", "R2"), ("r3", "R3"))}
METHODS = ((1, True, "live"), *((8, clip, mode) for clip in (True, False) for mode in REPLAYS))
AT_HIGHER = tuple(method for method in METHODS if method != (8, False, "r2"))  # which was dropped
SIZES = {64: 8, 256: 32}  # mini-batch in responses, and its prompts; 128 is the base's


def name(number: int, clip: bool, mode: str) -> str:
    return f"n{number}-{'clip' if clip else 'noclip'}-{mode}"


def methods(number: int) -> tuple[tuple[bool, str], ...]:
    """Clipping and replay of the cells at N = 2 and above; N = 16 without clipping was dropped."""
    return tuple((clip, mode) for clip in (True, False) if clip or number < 16 for mode in REPLAYS)


def cell(
    number: int,
    clip: bool,
    mode: str,
    suffix: str = "",
    modes: Mapping[str, tuple[str, dict[str, Any]]] = REPLAYS,
    **changes: object,
) -> Cell:
    """``modes`` says for each mode of routing its label and what it changes."""
    label, routing = modes[mode]
    label = f"N = {number}, {'clip' if clip else 'no clip'}, {label}{suffix.replace('-', ', ')}"
    return Cell(name(number, clip, mode) + suffix, updates(number) | clipping(clip) | routing | changes, label)


def grid() -> tuple[Cell, ...]:
    """The cells in the order of their worth."""
    on_policy = [cell(1, True, "live"), cell(1, True, "r3")]  # R2, and no clipping, change nothing there: a test
    main_cells = [cell(n, *method) for n in (8, 2, 4, 16) for method in methods(n)]
    rates = [cell(*method, HIGHER, **at_rate(HIGHER_RATE)) for method in AT_HIGHER]  # the next lower rate was dropped
    sizes = [
        cell(8, True, mode, f"-batch{size}", prompts_per_minibatch=prompts)
        for size, prompts in SIZES.items()
        for mode in ("live", "r3")
        if (size, mode) != (256, "live")  # dropped: it costs two cells
    ]
    caps = [cell(8, True, mode, "-nocap", **{"objective.cap": math.inf}) for mode in ("live", "r3")]
    caps += [cell(8, True, "live", "-capfactor", **{"objective.cap_on": "discrepancy"})]
    caps += [cell(8, True, "live", "-cap2", **{"objective.cap": 2.0})]
    return (*on_policy, *main_cells, *rates, *sizes, *caps)


def picture(runs: Mapping[str, list[Run]], out: Path) -> None:
    """Final accuracy and share of collapses by N."""
    lines = {
        (f"{'clip' if clip else 'no clip'}, {label}"): {
            number: name(number, number == 1 or clip, "live" if number == 1 and mode == "r2" else mode)
            for number in (1, *UPDATES)
        }
        for clip in (True, False)
        for mode, (label, _) in REPLAYS.items()
    }
    drawing.by_level(
        lines,
        runs,
        "N, updates per rollout batch\n(at 1, in black, clipping changes nothing; R2 is live there)",
        out / "by_updates.png",
    )


STUDY = Study(
    name="off_policy",
    question="Off-policy updates: clipping and routing replay, by N",
    base=base(),
    cells=grid(),
    panels=(
        *(Panel(f"N = {n}", tuple(name(n, *method) for method in methods(n))) for n in UPDATES),
        Panel(f"Learning rate {HIGHER_RATE:g}", tuple(name(*method) + HIGHER for method in AT_HIGHER)),
        *(
            Panel(title, tuple(name(8, True, mode) + suffix for suffix in suffixes))
            for title, mode, suffixes in (
                ("N = 8, live, mini-batch of 128 or 64 responses", "live", ("", "-batch64")),
                ("N = 8, R3, mini-batch of 128, 64 or 256 responses", "r3", ("", "-batch64", "-batch256")),
                ("N = 8, live, the weight's cap", "live", ("", "-nocap", "-cap2", "-capfactor")),
                ("N = 8, R3, the weight's cap", "r3", ("", "-nocap")),
            )
        ),
    ),
    picture=picture,
)

if __name__ == "__main__":
    main(STUDY)
