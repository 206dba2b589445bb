"""What is drawn of a run: tables of panels, each some metrics of one unit that are read together."""

from typing import NamedTuple

X = "progress/gradient_steps"


class Panel(NamedTuple):
    """Series of one unit that are read together: metric name -> label. An axis that is not logarithmic includes 0."""

    title: str
    unit: str
    series: dict[str, str]
    log: bool = False


class LayerMap(NamedTuple):
    """A quantity of each layer, or of each mini-batch, over training. ``metric`` has ``NN`` where the number stands."""

    title: str
    unit: str
    metric: str
    rows: str
    log: bool = False


MU_OLD, PI_OLD, PI = r"$\mu_{old}$", r"$\pi_{old}$", r"$\pi_\theta$"

REWARD = Panel(
    "Reward and held-out accuracy",
    "mean reward",
    {
        "reward/mean": "reward, training prompts",
        "eval/accuracy_rollout": "held-out, inference engine",
        "eval/accuracy_training": "held-out, training engine",
    },
)
ENTROPY = Panel(f"Entropy of {PI_OLD}", "nats per token", {"policy/entropy": "entropy"})
GAPS = Panel(
    "The two gaps",
    "KL (k3), nats per token",
    {
        "discrepancy/k3": f"discrepancy, {MU_OLD} to {PI_OLD}",
        "discrepancy_live/k3": "the same with live routing",
        "staleness/k3": f"staleness, {PI_OLD} to {PI}",
    },
    log=True,
)
ROUTING = Panel(
    "Routing disagreement",
    "share of top-k expert sets",
    {"routing/rollout_vs_old": f"{MU_OLD} against {PI_OLD}", "routing/old_vs_target": f"{PI_OLD} against {PI}"},
)
LARGEST = Panel(
    "Largest ratio of a step",
    "ratio",
    {
        "discrepancy/max_ratio": f"{PI_OLD} / {MU_OLD}",
        "staleness/max_ratio": f"{PI} / {PI_OLD}",
        "weight/max": "weight in the loss",
    },
    log=True,
)
CUT_OFF = Panel(
    "Tokens cut off",
    "share of tokens",
    {"trust/masked": "gradient stopped by the trust region", "weight/truncated": "weight truncated"},
)
GRADIENT = Panel("Gradient norm before clipping", "global L2 norm", {"learner/grad_norm": "norm"}, log=True)
LENGTH = Panel("Response length", "tokens", {"response/length": "training", "eval/response_length": "held-out"})

# The picture of a run, in its order.
PANELS = (REWARD, ENTROPY, GAPS, ROUTING, LARGEST, CUT_OFF, GRADIENT, LENGTH)

# What the page shows besides.
EXTREME = Panel(
    "Extreme ratios of the engines",
    "share of tokens",
    {"discrepancy/f2": "beyond 2 or 1/2", "discrepancy_live/f2": "the same with live routing"},
)
FIRST_ORDER = Panel(
    "Error of the first-order approximation",
    "absolute gap, 1",
    {"first_order/sequence_gap": "of a response's ratio", "first_order/token_gap": "of a token's weight"},
    log=True,
)
SIDES = Panel(
    "Sides of the trust region",
    "share of tokens",
    {"trust/masked_high": "stopped above, A > 0", "trust/masked_low": "stopped below, A < 0"},
)
SAMPLE_SIZE = Panel("Effective sample size of the weights", "share of tokens", {"weight/ess": "effective sample size"})
WEIGHT = Panel("Largest weight in the loss", "weight", {"weight/max": "largest"}, log=True)
TRUNCATED = Panel("Responses cut off", "share of responses", {"response/truncated": "met the length limit"})

LAYER_MAPS = (
    LayerMap("Engines' disagreement", "share of expert sets", "routing/layer_NN/rollout_vs_old", "MoE layer"),
    LayerMap("What updates change", "share of expert sets", "routing/layer_NN/old_vs_target", "MoE layer"),
    LayerMap("Margin of the k-th expert", "router probability", "routing/layer_NN/margin", "MoE layer"),
    LayerMap("Load of the busiest expert", "times the mean load", "routing/layer_NN/load_max", "MoE layer"),
)
STALENESS_MAP = LayerMap(
    "Staleness by mini-batch", "KL (k3), nats per token", "staleness/minibatch_NN/k3", "mini-batch", log=True
)


def plain_text(label: str) -> str:
    """A label without mathematical markup, for readers of text.

    >>> plain_text(f"{PI_OLD} / {MU_OLD}")
    'π_old / μ_old'
    """
    return label.replace(MU_OLD, "μ_old").replace(PI_OLD, "π_old").replace(PI, "π_θ")


def literal(name: str) -> str:
    """A name of the user's, in which matplotlib finds no mathematics.

    >>> print(literal("a$b$"))
    a\\$b\\$
    """
    return name.replace("$", r"\$")
