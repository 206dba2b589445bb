"""Cold starts that differ in accuracy and style (the paper's Fig. 5): do they end alike? MiniRL + R2, N = 2.

Plain: demonstrations with a fifth of the steps wrong, stopped at 0.23. Strong: with a tenth, stopped at 0.4. Noisy: two
fifths wrong and not carried on, so that a mistake looks like a slip, stopped at 0.15. Twice the usual horizon.

    python -m experiments.cold_start --seeds 10 [--hours 2] [--plan] [--draw]
"""

from typing import Any

from experiments.setting import HORIZON, base, replay
from experiments.study import Cell, Panel, Study, main


def _style(noise: float, propagates: bool, target: float) -> dict[str, Any]:
    return {
        "task.demonstration_noise": noise,
        "task.noise_propagates": propagates,
        "cold_start.target_accuracy": target,
    }


STUDY = Study(
    name="cold_start",
    question="Cold starts, N = 2, R2",
    base=base(minibatches=2, gradient_steps=2 * HORIZON),
    cells=(
        Cell("plain", replay("r2"), "plain"),
        Cell("strong", replay("r2") | _style(0.1, True, 0.4), "strong"),
        Cell("noisy", replay("r2") | _style(0.4, False, 0.15), "noisy"),
    ),
    panels=(Panel("held-out accuracy by cold start", ("plain", "strong", "noisy")),),
)

if __name__ == "__main__":
    main(STUDY)
