"""The configuration of a run: the rooms' own configs, composed, and what belongs to the run as a whole."""

import dataclasses
import math
from dataclasses import field
from typing import Literal, get_args

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import Kernels, ModelConfig, Precision, fp8
from rlstab_jax.models.remat import Remat
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.stability.monitor import LIVE, MonitorConfig
from rlstab_jax.stability.monitor import validate as validate_monitor
from rlstab_jax.tasks import ArithmeticConfig, TaskConfig
from rlstab_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The inference engine while it samples the responses to train on."""

    precision: Precision = field(default_factory=fp8)
    """Number formats of the inference engine."""
    temperature: float = 1.0
    """Sampling temperature; the training engine scores at the same one."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Then keep the smallest set of tokens that reaches this probability."""
    min_p: float = 0.0
    """Then keep tokens at least this many times as likely as the likeliest."""
    uniform: float = 0.0
    """Share u of mu = (1 - u) softmax + u U, with U uniform over the tokens kept: a mismatch that training cannot
    remove, since the training engine's pi and evaluations are not mixed. mu's log-probs are the mixture's."""
    support: int = 0
    """Tokens kept at most of each distribution, if it is truncated. They are recorded, and both policies renormalised
    over them, so that the IS ratio is taken at the true distributions."""
    log_probs: Literal["decode", "rescore", "matched"] = "decode"
    """mu's log-probs. decode: those that drove the draws. rescore: of a scoring pass by the inference engine's weights,
    whose distance to the former is logged. matched: sampling and the training engine's pass are one batch-invariant
    program, slow, so that every discrepancy is exactly 0; both engines' precision must be equal."""
    lag: int = 0
    """Global steps by which sampling is ahead of learning, as in an asynchronous system: the batch that step s learns
    from was sampled, and scored for pi_old, by the parameters after step s - 1 - lag; see `training.queue`."""
    partial: int = 0
    """Tokens drawn in each round of partial rollouts: a response is drawn over ``lag`` global steps, each time by the
    newest parameters, which go on where older ones stopped; see `training.partial`. 0: one version draws it whole."""
    devices: int = 0
    """Devices set aside for sampling and scoring, so that these overlap with the updates; it needs a lag. 0: each
    device does both, in turns."""
    mesh: MeshConfig = MeshConfig()
    """How the devices set aside are split; ``mesh`` of the run splits the others."""
    slots: int = 0
    """Responses in flight under continuous batching; 0 samples the whole batch at once."""
    waves: int = 1
    """Equal parts that a batch's prompts are sampled in, one after another: less memory, the same draws."""
    response_length: int = 0
    """Longest response, in tokens, the stop token included; 0 takes what the task needs."""
    prompt_length: int = 0
    """Space for a prompt, in tokens; 0 takes what the task needs."""
    attempts: int = 1
    """Batches sampled at most for one global step. Above 1, groups whose rewards are all equal are replaced by those of
    further prompts (DAPO's dynamic sampling), while attempts last."""
    overlong: Literal["keep", "drop", "penalise"] = "keep"
    """Responses that met the length limit: trained on as they were judged; or taken out of the loss, though they count
    in their group's baseline; or all rewards are lowered by length near the limit (DAPO's soft punishment)."""
    overlong_margin: int = 0
    """Tokens before the limit where the punishment begins; it grows linearly to 1 at the limit."""


@dataclasses.dataclass(frozen=True)
class ColdStartConfig:
    """Supervised training on the task's demonstrations before RL, until an accuracy; cached between runs."""

    target_accuracy: float = 0.23
    """Held-out accuracy (training engine, temperature 1) at which to stop."""
    max_steps: int = 600
    """Give up after so many updates; 0 starts RL from ``initial``, or from random parameters."""
    batch_size: int = 128
    """Demonstrations per update."""
    learning_rate: float = 4e-3
    """Step size of Adam; no warm-up, no clipping by trust region, gradients clipped to norm 1."""
    check_every: int = 10
    """Updates between measurements of the accuracy."""
    check_prompts: int = 256
    """Held-out prompts of one measurement, one sample each."""
    seed: int = 0
    """Of the initial parameters and the demonstrations; runs of other seeds share a cold start."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out prompts, sampled by each engine with live routing."""

    every: int = 40
    """Gradient steps between evaluations; 0 for never."""
    prompts: int = 128
    """Held-out prompts."""
    samples: int = 4
    """Samples per prompt; the accuracy is the mean over all."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Then keep the smallest set of tokens that reaches this probability."""
    min_p: float = 0.0
    """Then keep tokens at least this many times as likely as the likeliest."""
    support: int = 1024
    """Tokens kept at most of each distribution, if it is truncated."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run. A global step samples N mini-batches of prompts x G responses and makes N updates (PAPER section 5)."""

    seed: int = 0
    """Of prompts' order, draws and mini-batches."""
    initial: str = ""
    """Directory with the parameters to begin from, an import's or a run's; "" begins from random ones."""
    gradient_steps: int = 320
    """Updates of the whole run; the last global step is never cut."""
    prompts_per_minibatch: int = 16
    """Prompts of one update."""
    samples_per_prompt: int = 8
    """Responses per prompt, G."""
    minibatches: int = 4
    """Updates per rollout batch, N; 1 is on-policy."""
    checkpoint_every: int = 80
    """Gradient steps between checkpoints; one more is written at the end and on Ctrl-C or SIGTERM."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    logged_samples: int = 4
    """Responses per global step that go into samples.jsonl."""
    task: TaskConfig = ArithmeticConfig()
    """What is learnt."""
    model: ModelConfig = ModelConfig()
    """Sizes of the transformer."""
    rollout: RolloutConfig = RolloutConfig()
    """The inference engine."""
    learner: LearnerConfig = LearnerConfig()
    """The training engine."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is maximised."""
    cold_start: ColdStartConfig = ColdStartConfig()
    """Supervised training before RL."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out accuracy during the run."""
    monitor: MonitorConfig = LIVE
    """What the monitor says of the run while it goes on, and what it does."""
    kernels: Kernels = Kernels()
    """Implementations of attention and experts."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are split."""

    @property
    def prompts_per_step(self) -> int:
        return self.prompts_per_minibatch * self.minibatches

    @property
    def responses_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def needs_reference(self) -> bool:
        """Whether the parameters that RL begins with are kept."""
        return self.objective.needs_reference or self.learner.replay_of == "initial"


# Fields that may differ when a run goes on: how long it is, and what it costs, never what it computes.
MAY_CHANGE = (
    "gradient_steps", "checkpoint_every", "keep_checkpoints", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor",
)  # fmt: skip


_TINY, _HUGE = 1e-30, 1e30
LEARNER_RANGES = {
    "learning_rate": (_TINY, 1e3, "above 0"),
    "warmup_steps": (0, 2**31 - 1, "0 (none) or more"),
    "adam_b1": (0, 1 - 1e-9, "from 0 to below 1"),
    "adam_b2": (0, 1 - 1e-9, "from 0 to below 1"),
    "adam_eps": (0, _HUGE, "0 or more"),
    "weight_decay": (0, _HUGE, "0 (none) or more"),
    "load_balance": (0, _HUGE, "0 (none) or more"),
    "router_z": (0, _HUGE, "0 (none) or more"),
    "logits_per_chunk": (1, 2**40, "at least 1"),
    "max_grad_norm": (_TINY, math.inf, "above 0, or inf for no clipping"),
}  # NaN is in none of them


def truncates(sampling: RolloutConfig | EvaluationConfig) -> bool:
    """Whether tokens are drawn from a part of the vocabulary."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def validate(config: RunConfig) -> None:
    """Raises UserError on the first impossible or contradictory field, before any long work."""

    def require(ok: bool, name: str, value: object, expected: str) -> None:
        if not ok:
            raise UserError(f"{name} = {value!r}: expected {expected}")

    if not isinstance(config.task, TaskConfig):
        raise UserError(
            f"task = {config.task!r}: expected a TaskConfig, a frozen dataclass whose build() returns the task"
        )
    for name in ("gradient_steps", "prompts_per_minibatch", "samples_per_prompt", "minibatches", "checkpoint_every"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    require(config.keep_checkpoints >= 1, "keep_checkpoints", config.keep_checkpoints, "at least 1")
    require(config.logged_samples >= 0, "logged_samples", config.logged_samples, "0 or more")
    require(0 <= config.seed < 2**32, "seed", config.seed, "0 or more and below 2**32")
    rollout, learner, evaluation, cold_start = config.rollout, config.learner, config.evaluation, config.cold_start
    require(
        0 < rollout.temperature < math.inf,
        "rollout.temperature",
        rollout.temperature,
        "above 0 and finite: a greedy policy has no IS ratio",
    )
    for name, truncated in (("rollout", rollout), ("evaluation", evaluation)):
        require(0 < truncated.top_p <= 1, f"{name}.top_p", truncated.top_p, "in (0, 1]")
        require(0 <= truncated.min_p <= 1, f"{name}.min_p", truncated.min_p, "from 0 (all) to 1")
        require(truncated.top_k >= 0, f"{name}.top_k", truncated.top_k, "0 (all) or more")
        require(truncated.support >= 0, f"{name}.support", truncated.support, "0 or more")
        if truncates(truncated):
            require(
                truncated.support >= max(truncated.top_k, 1),
                f"{name}.support",
                truncated.support,
                f"at least {max(truncated.top_k, 1)}: top_k, top_p and min_p keep some tokens, which are recorded "
                "since an importance ratio over other tokens is not the policies'",
            )
    require(0 <= rollout.uniform < 1, "rollout.uniform", rollout.uniform, "from 0 (no mixture) to below 1")
    if rollout.uniform and rollout.log_probs != "decode":
        raise UserError(
            f"rollout.uniform = {rollout.uniform} with rollout.log_probs = {rollout.log_probs!r}: a scoring pass knows "
            "nothing of the mixture that tokens were drawn from; use 'decode'"
        )
    if rollout.log_probs == "matched" and (rollout.precision != learner.precision or rollout.slots):
        raise UserError(
            f"rollout.log_probs = 'matched' with rollout.precision = {rollout.precision}, learner.precision = "
            f"{learner.precision} and rollout.slots = {rollout.slots}: give both engines one precision, and 0 slots"
        )
    require(rollout.lag >= 0, "rollout.lag", rollout.lag, "0 (learn from what was just sampled) or more")
    require(rollout.partial >= 0, "rollout.partial", rollout.partial, "0 (none) or more")
    if rollout.partial and rollout.lag < 2:
        raise UserError(
            f"rollout.partial = {rollout.partial} with rollout.lag = {rollout.lag}: responses are drawn over "
            "lag global steps; give a lag of 2 or more, or use partial = 0"
        )
    if rollout.partial and (rollout.attempts > 1 or rollout.slots or rollout.log_probs != "decode"):
        raise UserError(
            f"rollout.partial = {rollout.partial} with rollout.attempts = {rollout.attempts}, rollout.slots = "
            f"{rollout.slots} and rollout.log_probs = {rollout.log_probs!r}: rounds go with 1 attempt, 0 slots and "
            "'decode'"
        )
    require(rollout.devices >= 0, "rollout.devices", rollout.devices, "0 (none set aside) or more")
    if rollout.devices and not rollout.lag:
        raise UserError(
            f"rollout.devices = {rollout.devices} with rollout.lag = 0: each step would wait for its own batch while "
            "the other devices idle; give a lag of 1 or more, or set no devices aside"
        )
    require(
        rollout.waves >= 1 and config.prompts_per_step % rollout.waves == 0,
        "rollout.waves",
        rollout.waves,
        f"a divisor of the prompts of a global step, {config.prompts_per_step}",
    )
    if rollout.waves > 1 and (rollout.partial or rollout.slots):
        raise UserError(
            f"rollout.waves = {rollout.waves} with rollout.partial = {rollout.partial} and rollout.slots = "
            f"{rollout.slots}: waves are of whole responses, and slots keep few in flight anyway; use 1 wave, or 0 of "
            "both"
        )
    require(rollout.slots >= 0, "rollout.slots", rollout.slots, "0 (all at once) or more")
    require(rollout.response_length >= 0, "rollout.response_length", rollout.response_length, "0 or more")
    require(rollout.prompt_length >= 0, "rollout.prompt_length", rollout.prompt_length, "0 or more")
    require(rollout.attempts >= 1, "rollout.attempts", rollout.attempts, "at least 1")
    if (rollout.overlong == "penalise") != (rollout.overlong_margin > 0) or rollout.overlong_margin < 0:
        raise UserError(
            f"rollout.overlong_margin = {rollout.overlong_margin} and rollout.overlong = {rollout.overlong!r}: "
            "'penalise' needs a margin of at least 1 token, and nothing else takes one"
        )
    for name, (low, high, expected) in LEARNER_RANGES.items():
        value = getattr(learner, name)
        require(low <= value <= high, f"learner.{name}", value, expected)
    require(evaluation.every >= 0, "evaluation.every", evaluation.every, "0 or more")
    require(evaluation.prompts >= 1, "evaluation.prompts", evaluation.prompts, "at least 1")
    require(evaluation.samples >= 1, "evaluation.samples", evaluation.samples, "at least 1")
    require(evaluation.temperature >= 0, "evaluation.temperature", evaluation.temperature, "0 (greedy) or more")
    require(0 <= cold_start.target_accuracy <= 1, "cold_start.target_accuracy", cold_start.target_accuracy, "in [0, 1]")
    require(0 <= cold_start.seed < 2**32 - 1, "cold_start.seed", cold_start.seed, "0 or more and below 2**32 - 1")
    require(cold_start.max_steps >= 0, "cold_start.max_steps", cold_start.max_steps, "0 or more")
    require(cold_start.batch_size >= 1, "cold_start.batch_size", cold_start.batch_size, "at least 1")
    require(0 < cold_start.learning_rate <= 1e3, "cold_start.learning_rate", cold_start.learning_rate, "above 0")
    require(cold_start.check_prompts >= 1, "cold_start.check_prompts", cold_start.check_prompts, "at least 1")
    require(cold_start.check_every >= 1, "cold_start.check_every", cold_start.check_every, "at least 1")
    formats = (learner.precision.weights, learner.precision.activations, learner.precision.kv_cache)
    if formats != ("none",) * 3:
        raise UserError(
            f"learner.precision: the training engine is not quantised, but its formats are {', '.join(formats)}: "
            "set them to none and choose learner.precision.dtype"
        )
    if learner.precision.dtype == "float16":
        raise UserError(
            "learner.precision.dtype = 'float16': gradients below 6e-8 would vanish, since the loss is not scaled; "
            "choose float32 or bfloat16 (float16 is for rollout.precision)"
        )
    config.model.validate()
    learner.precision.validate(config.model, "learner.precision")
    rollout.precision.validate(config.model, "rollout.precision")
    validate_monitor(config.monitor)
    minibatch = config.prompts_per_minibatch * config.samples_per_prompt
    require(
        learner.micro_batches >= 1 and minibatch % learner.micro_batches == 0,
        "learner.micro_batches",
        learner.micro_batches,
        f"a divisor of the mini-batch, {minibatch} responses",
    )
    require(
        learner.score_micro_batches >= 1 and config.responses_per_step % learner.score_micro_batches == 0,
        "learner.score_micro_batches",
        learner.score_micro_batches,
        f"a divisor of the global batch, {config.responses_per_step} responses",
    )
    for name, known in (
        ("remat", get_args(Remat)),
        ("replay", ("live", "r2", "r3")),
        ("moments_dtype", ("float32", "bfloat16")),
        ("replay_of", ("recorded", "permuted", "initial")),
    ):
        value = getattr(learner, name)
        require(value in known, f"learner.{name}", value, f"one of {', '.join(known)}")
    if learner.packing and config.kernels.attention == "cudnn":
        raise UserError(
            "learner.packing = True with kernels.attention = 'cudnn', which takes one sequence a row: use "
            "packing = False, or 'reference'"
        )
    require(learner.unroll >= 1, "learner.unroll", learner.unroll, "at least 1")
    if learner.replay != "live" and not config.model.num_moe_layers:
        raise UserError(
            f"learner.replay = {learner.replay!r}, but the model is dense: use replay = 'live', or give it experts"
        )
    if learner.replay_of != "recorded" and (learner.replay != "r3" or rollout.partial):
        raise UserError(
            f"learner.replay_of = {learner.replay_of!r} with learner.replay = {learner.replay!r} and rollout.partial = "
            f"{rollout.partial}: it says what R3 replays of whole responses; use replay = 'r3' and partial = 0"
        )
    if (learner.load_balance or learner.router_z) and not config.model.num_moe_layers:
        raise UserError("learner.load_balance, learner.router_z: the model is dense and has no router; set them to 0")
