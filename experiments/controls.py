"""What else could explain replay's benefit: a dense model of equal active parameters, where there is nothing to replay.

python -m experiments.controls --seeds 10 [--hours 2] [--plan] [--draw]
"""

from experiments.setting import base, clipping, updates
from experiments.study import Cell, Panel, Study, main

_EXPERTS = base().model
DENSE = {"model.num_experts": 0, "model.mlp_dim": _EXPERTS.experts_per_token * _EXPERTS.expert_dim}

STUDY = Study(
    name="controls",
    question="A dense model of equal active parameters",
    base=base(),
    cells=tuple(
        Cell(
            f"dense-n{n}-{'clip' if clip else 'noclip'}",
            DENSE | updates(n) | clipping(clip),
            f"N = {n}, {'clip' if clip else 'no clip'}",
        )
        for n, clip in ((8, True), (8, False), (1, True))
    ),
    panels=(Panel("dense", ("dense-n8-clip", "dense-n8-noclip", "dense-n1-clip")),),
)

if __name__ == "__main__":
    main(STUDY)
