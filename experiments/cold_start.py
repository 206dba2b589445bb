"""Cold starts that differ in accuracy and style (the paper's Fig. 5): do they end alike? MiniRL + R2, N = 2.

Plain: demonstrations with a fifth of the steps wrong, stopped at 0.23. Strong: with a tenth, stopped at 0.4. Noisy: a
fifth wrong and not carried on, so that a mistake looks like a slip, stopped at 0.12. Twice the usual horizon, after
which plain and strong were still closing: these two once more for four times the horizon.

    python -m experiments.cold_start --seeds 10 [--hours 2] [--plan] [--draw]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import drawing
from experiments.setting import HORIZON, base, replay
from experiments.study import Cell, Panel, Run, Study, main


def _style(noise: float, propagates: bool, target: float) -> dict[str, Any]:
    return replay("r2") | {
        "task.demonstration_noise": noise,
        "task.noise_propagates": propagates,
        "cold_start.target_accuracy": target,
    }


PLAIN, STRONG = replay("r2"), _style(0.1, True, 0.4)
LONG = {"gradient_steps": 4 * HORIZON}


def picture(runs: Mapping[str, list[Run]], out: Path) -> None:
    """The length of held-out answers over the run: cold starts of other styles answer at other lengths."""
    drawing.over_steps(STUDY, runs, "eval/response_length", "length of held-out answers, tokens", out / "length.png")


STUDY = Study(
    name="cold_start",
    question="Cold starts, N = 2, R2",
    base=base(minibatches=2, gradient_steps=2 * HORIZON),
    cells=(
        Cell("plain", PLAIN, "plain"),
        Cell("strong", STRONG, "strong"),
        # Slips are slow to learn from: in the pilot 380 to 560 updates for 0.15.
        Cell("noisy", _style(0.2, False, 0.12) | {"cold_start.max_steps": 1000}, "noisy"),
        Cell("plain-long", PLAIN | LONG, "plain"),
        Cell("strong-long", STRONG | LONG, "strong"),
    ),
    panels=(
        Panel("held-out accuracy by cold start", ("plain", "strong", "noisy")),
        Panel("for twice as long", ("plain-long", "strong-long")),
    ),
    picture=picture,
)

if __name__ == "__main__":
    main(STUDY)
