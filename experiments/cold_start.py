"""Cold starts that differ in accuracy and style (the paper's Fig. 5): do they end alike? MiniRL + R2, N = 2.

Plain: demonstrations with a fifth of the steps wrong, stopped at 0.23. Strong: with a tenth, stopped at 0.4. Noisy: a
fifth wrong and not carried on, so that a mistake looks like a slip, stopped at 0.12. Twice the usual horizon.

Then for four times the horizon where a fifth of the prompts cannot be answered, so that no policy can exceed .85: plain
and strong as before, and slips, a twentieth of the steps wrong and not carried on, as accurate as plain.

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
# Slips are slow to learn from: in the pilot 380 to 560 updates for 0.15.
PATIENCE: dict[str, Any] = {"cold_start.max_steps": 1000}
CEILING: dict[str, Any] = {"task.unanswerable": 0.2, "gradient_steps": 4 * HORIZON}


def picture(runs: Mapping[str, list[Run]], out: Path) -> None:
    """The length of held-out answers over the run."""
    lengths = "eval/response_length", "length of held-out answers, tokens"
    drawing.over_steps(STUDY, STUDY.panels, runs, *lengths, out / "length.png")


STUDY = Study(
    name="cold_start",
    question="Cold starts, N = 2, R2",
    base=base(minibatches=2, gradient_steps=2 * HORIZON),
    cells=(
        Cell("plain", PLAIN, "plain"),
        Cell("strong", STRONG, "strong"),
        Cell("noisy", _style(0.2, False, 0.12) | PATIENCE, "noisy"),
        Cell("ceiling-plain", PLAIN | CEILING, "plain"),
        Cell("ceiling-strong", STRONG | CEILING, "strong"),
        Cell("ceiling-slips", _style(0.05, False, 0.23) | PATIENCE | CEILING, "slips"),
    ),
    panels=(
        Panel("where all prompts have an answer", ("plain", "strong", "noisy")),
        Panel("where a fifth has no answer", ("ceiling-plain", "ceiling-strong", "ceiling-slips")),
    ),
    picture=picture,
)

if __name__ == "__main__":
    main(STUDY)
