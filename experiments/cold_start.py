"""Cold starts that differ in accuracy and style (the paper's Fig. 5): do they end alike? MiniRL + R2, N = 2.

Plain: demonstrations with a fifth of the steps wrong, stopped at 0.23. Strong: with a tenth, stopped at 0.4. Noisy: a
fifth wrong and not carried on, so that a mistake looks like a slip, stopped at 0.12. Twice the usual horizon.

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
        # Slips are slow to learn from: in the pilot 380 to 560 updates for 0.15.
        Cell("noisy", replay("r2") | _style(0.2, False, 0.12) | {"cold_start.max_steps": 1000}, "noisy"),
    ),
    panels=(Panel("held-out accuracy by cold start", ("plain", "strong", "noisy")),),
)

if __name__ == "__main__":
    main(STUDY)
