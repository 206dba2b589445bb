"""On-policy training (the paper's Fig. 1): MiniRL, and what is taken from it or added to it, one update per batch.

Once with e4m3 rollouts, once in 4 bits, where the discrepancy is ten times as large, and once with a mismatch that
training cannot remove: a tenth of mu is uniform over the vocabulary. In an earlier look that one did its harm after 300
updates, so its cells have twice the usual horizon. So have those that tell how long a gap lasts from how large it is:
engines of one precision with noise on the sampler's weights, which is the same in all of the run or drawn anew for each
batch; of 0.2 it makes a gap somewhat larger than rounding to 4 bits, of 0.03 one as large as rounding to e4m3.

Answers are as long as prompts ask, so that 1/|y| weighs prompts alone; but not where the cold start has seen answers
that skip steps: those to one prompt differ in length, and shorter ones are right less often.

    python -m experiments.on_policy --seeds 10 [--hours 2] [--plan] [--draw]
"""

from collections.abc import Mapping
from pathlib import Path

from experiments import drawing
from experiments.setting import HORIZON, base, replay
from experiments.study import Cell, Panel, Run, Study, main
from rlstab_jax.models import Precision, quantised

ARMS = {
    "minirl": ("MiniRL", {}),
    "no_is": ("- IS", {"objective.importance_sampling": False}),
    "length_norm": ("+ length norm", {"objective.length_normalise": True}),
    "r3": ("+ R3", replay("r3")),
    "r3-no_is": ("+ R3, - IS", replay("r3") | {"objective.importance_sampling": False}),
    "r3-length_norm": ("+ R3, + length norm", replay("r3") | {"objective.length_normalise": True}),
}
FOUR_BIT = {"rollout.precision": quantised("float4_e2m1fn")}
E4M3_CELLS = tuple(Cell(name, changes, label) for name, (label, changes) in ARMS.items())
FOUR_BIT_CELLS = tuple(
    Cell(f"{name}-4bit", ARMS[name][1] | FOUR_BIT, f"{ARMS[name][0]}, 4 bits") for name in ("minirl", "no_is", "r3")
)
MIXED = {"rollout.uniform": 0.1, "gradient_steps": 2 * HORIZON}
MIXED_CELLS = (
    Cell("mixed", MIXED, "MiniRL, mu mixed"),
    Cell("mixed-no_is", ARMS["no_is"][1] | MIXED, "- IS, mu mixed"),
)
_NOISE = {"rollout.precision": Precision(), "gradient_steps": 2 * HORIZON}
NOISES = {
    "noise": ("noise that lasts", _NOISE | {"rollout.weight_noise": 0.2}),
    "noise_anew": ("noise drawn anew", _NOISE | {"rollout.weight_noise": 0.2, "rollout.weight_noise_lasts": False}),
    "small_noise": ("small noise that lasts", _NOISE | {"rollout.weight_noise": 0.03}),
}
NOISE_CELLS = tuple(
    Cell(f"{name}{ending}", ARMS[arm][1] | changes, f"{ARMS[arm][0]}, {label}")
    for name, (label, changes) in NOISES.items()
    for arm, ending in (("minirl", ""), ("no_is", "-no_is"))
)
SKIPS = {
    "task.demonstration_skips": 0.3,
    "task.demonstration_noise": 0.1,
    "cold_start.target_accuracy": 0.2,
    "cold_start.max_steps": 1000,
}
SKIPS_CELLS = tuple(
    Cell(f"{name}-skips", ARMS[name][1] | SKIPS, f"{ARMS[name][0]}, answers that skip")
    for name in ("minirl", "length_norm")
)


def picture(runs: Mapping[str, list[Run]], out: Path) -> None:
    """The length of held-out answers over the run, where it may change."""
    lengths = "eval/response_length", "length of held-out answers, tokens"
    drawing.over_steps(STUDY, STUDY.panels[-1:], runs, *lengths, out / "length.png")


STUDY = Study(
    name="on_policy",
    question="On-policy training: MiniRL and its ablations",
    base=base(minibatches=1),
    cells=E4M3_CELLS + FOUR_BIT_CELLS + MIXED_CELLS + NOISE_CELLS + SKIPS_CELLS,
    panels=(
        Panel("e4m3 rollouts", tuple(cell.name for cell in E4M3_CELLS)),
        Panel("4-bit rollouts", tuple(cell.name for cell in FOUR_BIT_CELLS)),
        Panel("e4m3 rollouts, a tenth of mu uniform", tuple(cell.name for cell in MIXED_CELLS)),
        Panel("noise on the sampler's weights", tuple(cell.name for cell in NOISE_CELLS)),
        Panel("answers that skip steps", tuple(cell.name for cell in SKIPS_CELLS)),
    ),
    picture=picture,
)

if __name__ == "__main__":
    main(STUDY)
