"""The main contrasts at three model sizes and three lengths of responses. Its budget is its own; see PROTOCOL.md.

python -m experiments.scale --seeds 10 [--hours 2] [--plan] [--draw]
"""

from typing import Any

from experiments.setting import base, clipping, replay, updates
from experiments.study import Cell, Panel, Study, main

SIZES: dict[str, dict[str, Any]] = {
    "small": {"model.embed_dim": 32, "model.num_experts": 8, "model.head_dim": 8},
    "base": {},
    "large": {"model.num_layers": 4, "model.embed_dim": 96, "model.num_experts": 32, "model.head_dim": 24},
}
# Named by the longest answer, in tokens: longer chains, and steps written in full. With as many wrong steps as in short
# ones hardly a demonstration would end right, and no cold start would reach its accuracy.
PATIENCE: dict[str, Any] = {"cold_start.max_steps": 1500}
LENGTHS: dict[str, dict[str, Any]] = {
    "len33": {"task.operands": (8, 16), "task.demonstration_noise": 0.1, **PATIENCE},
    "len73": {"task.operands": (6, 12), "task.demonstration_noise": 0.1, "task.scratchpad": 3, **PATIENCE},
}
MAIN = {
    "n8-clip-live": updates(8) | replay("live"),
    "n8-clip-r3": updates(8) | replay("r3"),
    "n8-noclip-live": updates(8) | replay("live") | clipping(False),
    "n1-live": updates(1) | replay("live"),
}
# Asked after the runs of 73 tokens had been seen.
MORE = {"len73": {"n8-noclip-r3": updates(8) | replay("r3") | clipping(False)}}

STUDY = Study(
    name="scale",
    question="Model size and response length",
    base=base(),
    cells=tuple(
        Cell(f"{scale}-{name}", changes | change, f"{name}")
        for scale, change in (SIZES | LENGTHS).items()
        for name, changes in (MAIN | MORE.get(scale, {})).items()
    ),
    panels=tuple(
        Panel(scale, tuple(f"{scale}-{name}" for name in MAIN | MORE.get(scale, {}))) for scale in SIZES | LENGTHS
    ),
)

if __name__ == "__main__":
    main(STUDY)
