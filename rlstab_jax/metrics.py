"""The name, meaning and unit of every metric that a run records."""

import dataclasses
import re

STEP = "progress/global_steps"


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric means (with its formula), how its tokens or sequences become one number, and its unit."""

    meaning: str
    reduction: str
    unit: str


def _gap(prefix: str, numerator: str, denominator: str) -> dict[str, Metric]:
    """The estimators of one gap, with d = log numerator - log denominator of a sampled token and r = exp(d)."""
    ratio = f"r = {numerator} / {denominator}"
    return {
        f"{prefix}/k1": Metric(f"KL({denominator} || {numerator}), estimator -log r, {ratio}", "mean, tokens", "nats"),
        f"{prefix}/k3": Metric(f"the same KL, estimator r - 1 - log r >= 0, {ratio}", "mean, tokens", "nats"),
        f"{prefix}/max_ratio": Metric(f"max(r, 1/r), {ratio}", "maximum, tokens", "1"),
    }


def _f2(prefix: str) -> dict[str, Metric]:
    return {f"{prefix}/f2": Metric("tokens with max(pi_old/mu_old, mu_old/pi_old) > 2", "share of tokens", "1")}


# Under replay a layer's live choice is made on what the replayed experts of the layers below it have left.
_DIFFER = "top-k expert sets that differ between the live choices of "
_ROUTING = {
    "rollout_vs_old": Metric(_DIFFER + "mu_old and pi_old", "share of fed tokens x MoE layers", "1"),
    "old_vs_target": Metric(_DIFFER + "pi_old and pi_theta", "share of fed tokens x MoE layers", "1"),
    "margin": Metric("k-th less (k+1)-th router probability of pi_old", "mean, fed tokens x MoE layers", "1"),
    "load_max": Metric("the busiest expert's load over the mean load", "maximum, MoE layers", "1"),
}

# In a name, `layer_NN` and `minibatch_NN` stand for every number, from 00 on, and `NAME` for a reward's. "Response
# tokens" count up to and including the stop token; "fed tokens" are those that the model was fed, prompts included.
METRICS: dict[str, Metric] = {
    "reward/mean": Metric("R(x, y) of the responses sampled for this step", "mean, responses", "1"),
    "reward/without_signal": Metric(
        "groups whose rewards are all equal, or of which no response with an advantage is trained on",
        "share of groups sampled",
        "1",
    ),
    "reward/component/NAME": Metric(
        "one reward of those that R is the weighted sum of, unweighted", "mean, responses", "1"
    ),
    "reward/verifier_failures": Metric("verdicts that failed; they count as 0", "count", "verdicts"),
    "reward/verifier_gave_up": Metric(
        "answers that used up a verifier's time or memory; they count as 0", "count", "verdicts"
    ),
    "reward/overlong": Metric("the punishment for length, in addition to R", "mean, responses trained on", "1"),
    "response/count": Metric("responses sampled for this step, whether trained on or not", "count", "responses"),
    "response/length": Metric("response tokens", "mean, responses", "tokens"),
    "response/truncated": Metric("responses that met the length limit and did not stop", "share of responses", "1"),
    "dynamic/attempts": Metric("batches sampled for this step", "count", "batches"),
    "dynamic/unfilled": Metric(
        "groups trained on without signal, since the attempts were used up", "share of groups trained on", "1"
    ),
    "dynamic/unused": Metric("groups with signal that found no place", "count", "groups"),
    **_gap("discrepancy", "pi_old", "mu_old"),
    **_f2("discrepancy"),
    **_gap("discrepancy/decode_vs_score", "mu_old in a scoring pass", "mu_old as it drew"),
    "discrepancy/decode_vs_score/f2": Metric("tokens with max(r, 1/r) > 2 for that ratio", "share of tokens", "1"),
    **_gap("discrepancy_live", "pi_old (live routing)", "mu_old"),
    **_f2("discrepancy_live"),
    **_gap("staleness", "pi_theta", "pi_old"),
    **_gap("staleness/minibatch_NN", "pi_theta", "pi_old"),
    "staleness/lag": Metric(
        "global steps from the parameters of mu_old and pi_old to those that the step began with",
        "mean, tokens",
        "global steps",
    ),
    "weight/mean": Metric("importance weight of a token as the loss uses it, truncated", "mean, tokens", "1"),
    "weight/max": Metric("importance weight of a token as the loss uses it, truncated", "maximum, tokens", "1"),
    "weight/ess": Metric("effective sample size (sum w)^2 / (n sum w^2)", "share of tokens", "1"),
    "weight/truncated": Metric("weights that were truncated", "share of tokens", "1"),
    "trust/masked": Metric("tokens whose gradient the trust region stops, 1 - M_t", "share of tokens", "1"),
    "trust/masked_high": Metric("those of them with A > 0", "share of tokens", "1"),
    "trust/masked_low": Metric("those of them with A < 0", "share of tokens", "1"),
    **{f"routing/{name}": metric for name, metric in _ROUTING.items()},
    **{f"routing/layer_NN/{name}": metric for name, metric in _ROUTING.items()},
    "routing/minibatch_NN/old_vs_target": _ROUTING["old_vs_target"],
    "routing/tokens_differ": Metric(
        "tokens of which some layer's top-k set differs between the live choices of mu_old and pi_old",
        "share of fed tokens",
        "1",
    ),
    "predictor/kl": Metric(
        "KL(router of pi_theta || what its predictor, as it is by then, makes of the old pass): what it learns by",
        "mean, observed tokens x MoE layers",
        "nats",
    ),
    "predictor/kl_unpredicted": Metric(
        "KL(router of pi_theta || router of pi_old), on the same tokens", "mean, observed tokens x MoE layers", "nats"
    ),
    "predictor/missed": Metric(
        "top-k expert sets that differ between what the old pass foretold and pi_theta's live choices",
        "share of fed tokens x MoE layers",
        "1",
    ),
    "first_order/sequence_gap": Metric(
        "|prod_t r_t - 1 - sum_t (r_t - 1)|, r = pi_theta / mu_old", "mean, responses", "1"
    ),
    "first_order/token_gap": Metric("|prod_s r_s - r_t|, r = pi_theta / mu_old", "mean, tokens", "1"),
    "policy/entropy": Metric(
        "entropy of pi_old, over the tokens that sampling kept, on mu_old's prefixes", "mean, tokens", "nats"
    ),
    "learner/loss": Metric("the objective's loss, with the router's losses if any", "mean, updates of the step", "1"),
    "learner/grad_norm": Metric("global gradient norm before clipping", "mean, updates of the step", "1"),
    "learner/broken": Metric(
        "tokens with a log-prob or an advantage that is NaN or infinite; the loss counts them as exactly 0",
        "share of tokens",
        "1",
    ),
    "learner/rejected": Metric(
        "tokens that the objective's select or normalise leaves out of the loss", "share of tokens", "1"
    ),
    "learner/discarded": Metric("updates of the step that a monitor's policy skip took back", "count", "updates"),
    "learner/packed_rows": Metric("rows that a mini-batch was packed into", "mean, updates of the step", "rows"),
    "learner/learning_rate": Metric("learning rate of the step's last update", "last", "1"),
    "learner/loss_scale": Metric(
        "what the loss is multiplied by in float16, after the step's last update: half where a gradient overflowed",
        "last",
        "1",
    ),
    "time/sample": Metric(
        "wall-clock time of sampling the batch that is learnt from, under a lag in an earlier step", "sum", "s"
    ),
    "time/judge": Metric("wall-clock time of judging that batch", "sum", "s"),
    "time/score": Metric("wall-clock time of scoring that batch: pi_old, live routing, a reference", "sum", "s"),
    "time/step": Metric("wall-clock time of the global step, in which the other times may overlap", "sum", "s"),
    "time/update": Metric("wall-clock time of the updates", "sum", "s"),
    "throughput/sample_tokens_per_s": Metric("response tokens sampled over time/sample", "ratio of sums", "tokens/s"),
    "throughput/update_tokens_per_s": Metric(
        "response tokens trained on over time/update", "ratio of sums", "tokens/s"
    ),
    "eval/accuracy_rollout": Metric(
        "reward on held-out prompts, sampled by the inference engine", "mean, prompts x samples", "1"
    ),
    "eval/accuracy_training": Metric(
        "reward on held-out prompts, sampled by the training engine", "mean, prompts x samples", "1"
    ),
    "eval/response_length": Metric("response tokens on held-out prompts", "mean, responses", "tokens"),
    STEP: Metric("rollout batches so far, this one included", "count", "global steps"),
    "progress/gradient_steps": Metric("updates so far, this step's included", "count", "gradient steps"),
    "progress/responses": Metric("responses sampled so far for training", "count", "responses"),
    "progress/tokens": Metric("response tokens sampled so far for training", "count", "tokens"),
}

# Those that only some runs have: with a gap of live routing, verifiers of their own, a punishment for length, dynamic
# sampling, a monitor that may skip updates, packing, PR2.
_OF_SOME_RUNS = (
    "discrepancy/decode_vs_score/",
    "discrepancy_live/",
    "reward/component/",
    "reward/verifier_",
    "reward/overlong",
    "dynamic/",
    "learner/discarded",
    "learner/packed_rows",
    "learner/loss_scale",
    "predictor/",
)
OPTIONAL = frozenset(name for name in METRICS if name.startswith(_OF_SOME_RUNS))


def describe(name: str) -> Metric:
    """The definition of a metric's name, e.g. ``staleness/minibatch_03/k1``. Raises ValueError for an unknown name."""
    pattern = re.sub(r"(?<=/)(layer|minibatch)_\d{2,}(?=/)", r"\1_NN", name)
    pattern = re.sub(r"(?<=^reward/component/)[a-z0-9_]+$", "NAME", pattern)
    if pattern not in METRICS:
        raise ValueError(f"metric {name!r} is not defined: give it a line in METRICS of rlstab_jax/metrics.py")
    return METRICS[pattern]
