"""The precision of the engines, on-policy: how large each discrepancy is, how much of it routing makes, what it does.

The first cells differ in the inference engine alone; "equal" is the engine that trains, whose only discrepancy is that
of its other kernels. A training engine in e4m3 multiplies stored values forward, and its gradients go straight through.

    python -m experiments.discrepancy --seeds 10 [--hours 2] [--plan] [--draw]
"""

from experiments.setting import base, replay
from experiments.study import Cell, Panel, Study, main
from rlstab_jax.models import Precision, fp8, quantised

PRECISIONS = {
    "equal": Precision(),
    "bf16": Precision(dtype="bfloat16"),
    "fp16": Precision(dtype="float16"),
    "e4m3": fp8("float8_e4m3fn"),
    "e5m2": fp8("float8_e5m2"),
    "4bit": quantised("float4_e2m1fn"),
    "e4m3_router_exempt": fp8("float8_e4m3fn", quantise_router=False),
    "e4m3_cache_exempt": fp8("float8_e4m3fn", kv_cache="none"),
}
# Of both engines: what is not quantised is of one dtype.
TRAINING = {
    "both_bf16": {"rollout.precision": PRECISIONS["bf16"], "learner.precision": PRECISIONS["bf16"]},
    "both_fp16": {"rollout.precision": PRECISIONS["fp16"], "learner.precision": PRECISIONS["fp16"]},
    "bf16_e4m3": {  # the paper's own
        "rollout.precision": fp8("float8_e4m3fn", dtype="bfloat16"),
        "learner.precision": PRECISIONS["bf16"],
    },
    "both_e4m3": {"rollout.precision": PRECISIONS["e4m3"], "learner.precision": PRECISIONS["e4m3"]},
    "train_e4m3": {"rollout.precision": PRECISIONS["equal"], "learner.precision": PRECISIONS["e4m3"]},
}
REPLAYED = ("e4m3", "4bit")

STUDY = Study(
    name="discrepancy",
    question="Precision of the engines, N = 1",
    base=base(minibatches=1),
    cells=(
        *(Cell(name, {"rollout.precision": precision}, name) for name, precision in PRECISIONS.items()),
        *(
            Cell(f"{name}-r3", replay("r3") | {"rollout.precision": PRECISIONS[name]}, f"{name}, R3")
            for name in REPLAYED
        ),
        *(Cell(name, changes, name) for name, changes in TRAINING.items()),
    ),
    panels=(
        Panel("live routing", tuple(PRECISIONS)[:6]),
        Panel("exempt parts, training in bf16 or fp16", ("e4m3", *tuple(PRECISIONS)[6:], *tuple(TRAINING)[:3])),
        Panel("training in e4m3", ("equal", "e4m3", *tuple(TRAINING)[3:])),
        Panel("R3", tuple(f"{name}-r3" for name in REPLAYED)),
    ),
)

if __name__ == "__main__":
    main(STUDY)
