"""The configuration of a run: the rooms' own configs, composed, and what belongs to the run as a whole."""

import dataclasses
from dataclasses import field
from typing import Any, Literal

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import Kernels, ModelConfig, Precision, fp8
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.rundir import MAY_CHANGE, leaves, plain
from rlstab_jax.stability.monitor import LIVE, MonitorConfig
from rlstab_jax.tasks import ArithmeticConfig, TaskConfig


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The inference engine while it samples the responses to train on."""

    precision: Precision = field(default_factory=fp8)
    """Number formats of the inference engine."""
    temperature: float = 1.0
    """Sampling temperature, at least 1e-6; the training engine scores at the same one."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Then keep the smallest set of tokens that reaches this probability."""
    min_p: float = 0.0
    """Then keep tokens at least this many times as likely as the likeliest."""
    uniform: float = 0.0
    """Share u of mu = (1 - u) softmax + u U, with U uniform over the tokens kept: a mismatch that training cannot
    remove, since the training engine's pi and evaluations are not mixed. mu's log-probs are the mixture's."""
    weight_noise: float = 0.0
    """Standard deviation of Gaussian noise on the weights that sample, in root mean squares of each matrix: a gap of
    any size, whose errors are as often up as down. Evaluations are without it."""
    weight_noise_lasts: bool = True
    """Whether that noise is the same in all of the run; or else it is drawn anew for each rollout batch."""
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
    """Responses in flight under continuous batching, in rollouts and evaluations; 0 samples the whole batch at once."""
    waves: int = 1
    """Equal parts that a batch's prompts are sampled in, one after another: less memory, the same draws. Above 1,
    evaluations sample no more responses at once either."""
    response_length: int = 0
    """Longest response, in tokens, the stop token included; 0 takes what the task needs."""
    prompt_length: int = 0
    """Space for a prompt, in tokens; 0 takes what the task needs."""
    min_new_tokens: int = 0
    """Tokens of a response before which no stop token can be drawn: both policies are distributions over the others
    there. Evaluations do likewise. A stop string ends a response at any length."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, as a stop token does, in rollouts and evaluations; what is judged is the text before.
    The host looks for them between rounds of 16 tokens; with or without ``slots``."""
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
    """Held-out accuracy (training engine, temperature 1) at which to stop. As in all of training it is the mean reward:
    where a task gives partial credit, choose it for that."""
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
    """Sampling temperature, at least 1e-6; or 0, which is greedy."""
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
    """One run. A global step samples N mini-batches of prompts x G responses and makes N updates."""

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
    def in_flight(self) -> int:
        """Responses that are sampled at once."""
        whole = self.responses_per_step
        return min(self.rollout.slots or whole, whole) // self.rollout.waves

    @property
    def needs_reference(self) -> bool:
        """Whether the parameters that RL begins with are kept."""
        return self.objective.needs_reference or self.learner.replay_of == "initial"


def may_change(config: RunConfig) -> tuple[str, ...]:
    """Fields that may differ when a run goes on."""
    # Unfinished responses in the queue have scores with live routing, or have none.
    return tuple(name for name in MAY_CHANGE if not (config.rollout.partial and name == "learner.live_gap"))


def defaults() -> dict[str, Any]:
    """The default of each field by its dotted name: what a run did whose version did not know the field."""
    return dict(leaves(plain(RunConfig())))


def truncates(sampling: RolloutConfig | EvaluationConfig) -> bool:
    """Whether tokens are drawn from a part of the vocabulary."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
