"""Objectives beside each other, on-policy and at N = 8, and contested choices of MiniRL, each alone.

Routing is live: replay is the subject of other studies. The learning rate is the common one.

    python -m experiments.objectives --seeds 10 [--hours 2] [--plan] [--draw]
"""

from experiments.recipes import minirl_anchored_at_mu, minirl_geometric, minirl_kpop, minirl_minpro, minirl_trm
from experiments.setting import base, updates
from experiments.study import Cell, Panel, Study, main
from rlstab_jax.objectives import ObjectiveConfig

OBJECTIVES = {
    "minirl": base().objective,
    "dppo_tv": ObjectiveConfig("dppo_tv"),
    "grpo": ObjectiveConfig("grpo"),
    "cispo": ObjectiveConfig("cispo"),
    "gspo": ObjectiveConfig("gspo"),
    "anchor_mu": ObjectiveConfig(recipe=minirl_anchored_at_mu),
    "icepop": ObjectiveConfig("icepop"),
    "dapo": ObjectiveConfig("dapo"),
    "tis": ObjectiveConfig("tis"),
    "rspo": ObjectiveConfig("rspo"),
    "sequence_is": ObjectiveConfig("sequence_is", cap=5.0),
    "trm": ObjectiveConfig(recipe=minirl_trm),
    "minpro": ObjectiveConfig(recipe=minirl_minpro),
    "kpop": ObjectiveConfig(recipe=minirl_kpop),
    "geometric": ObjectiveConfig(recipe=minirl_geometric),
    "dppo_tv-cap5": ObjectiveConfig("dppo_tv", cap=5.0),
    "rspo-no_shift": ObjectiveConfig("rspo", floor=1.0),  # a shift of 1, whatever the routers say
}
FIRST = ("minirl", "dppo_tv", "grpo", "cispo", "gspo", "anchor_mu")
COMPARED = ("minirl", "grpo", "gspo")  # what the others are judged against
# MiniRL, and with one piece changed.
PIECES = ("minirl", "anchor_mu", "trm", "minpro", "kpop", "geometric", "dppo_tv-cap5")
ON_POLICY = (
    "minirl",
    "dppo_tv",
    "grpo",
    "cispo",
    "icepop",
    "dapo",
    "tis",
    "sequence_is",
)  # GSPO and RSPO are GRPO there

STUDY = Study(
    name="objectives",
    question="Objectives",
    base=base(),
    cells=tuple(
        Cell(f"n{n}-{name}", updates(n) | {"objective": OBJECTIVES[name]}, name)
        for n in (8, 1)
        for name in OBJECTIVES
        if n == 8 or name in ON_POLICY
    ),
    panels=(
        Panel("N = 8", tuple(f"n8-{name}" for name in FIRST)),
        Panel(
            "N = 8, others",
            tuple(f"n8-{name}" for name in OBJECTIVES if name not in FIRST + PIECES or name in COMPARED),
        ),
        Panel("N = 8, MiniRL with one piece changed", tuple(f"n8-{name}" for name in PIECES)),
        Panel("N = 1", tuple(f"n1-{name}" for name in ON_POLICY)),
    ),
)

if __name__ == "__main__":
    main(STUDY)
