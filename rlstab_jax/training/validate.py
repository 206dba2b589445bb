"""What a run's config may be: ranges of its numbers, then what goes together. Said before any long work."""

import math

from rlstab_jax.checks import BELOW_1, HUGE, INT32_MAX, TINY, Range, check_fields, check_ranges
from rlstab_jax.inference import sampling
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.stability.monitor import validate as validate_monitor
from rlstab_jax.tasks import TaskConfig
from rlstab_jax.training.config import RunConfig, truncates
from rlstab_jax.types import UserError

_ONE, _ANY, _NONE = (1, INT32_MAX, "at least 1"), (0, INT32_MAX, "0 or more"), (0, INT32_MAX, "0 (none) or more")
_TRUNCATION = {name: sampling.RANGES[name] for name in ("top_k", "top_p", "min_p")} | {"support": _ANY}
RANGES: dict[str, dict[str, Range]] = {
    "": {
        "gradient_steps": _ONE,
        "prompts_per_minibatch": _ONE,
        "samples_per_prompt": _ONE,
        "minibatches": _ONE,
        "checkpoint_every": _ONE,
        "keep_checkpoints": _ONE,
        "logged_samples": _ANY,
        "seed": (0, 2**32 - 1, "0 or more and below 2**32"),
    },
    "rollout": {
        "temperature": (
            sampling.COLDEST,
            HUGE,
            f"at least {sampling.COLDEST:g} and finite: log-probs of colder draws may be infinite, and a greedy policy "
            "has no IS ratio",
        ),
        **_TRUNCATION,
        "uniform": (0, BELOW_1, "from 0 (no mixture) to below 1"),
        "weight_noise": (0, HUGE, "0 (none) or more, and finite"),
        "lag": (0, INT32_MAX, "0 (learn from what was just sampled) or more"),
        "partial": _NONE,
        "devices": (0, INT32_MAX, "0 (none set aside) or more"),
        "waves": _ONE,
        "slots": (0, INT32_MAX, "0 (all at once) or more"),
        "response_length": _ANY,
        "prompt_length": _ANY,
        "min_new_tokens": _NONE,
        "attempts": _ONE,
        "overlong_margin": _ANY,
    },
    "learner": {
        "learning_rate": (TINY, 1e3, "above 0"),
        "warmup_steps": _NONE,
        "adam_b1": (0, 1 - 1e-6, "from 0 to 1 - 1e-6: in float32 what is nearer is 1, and no mean"),
        "adam_b2": (0, 1 - 1e-6, "from 0 to 1 - 1e-6: in float32 what is nearer is 1, and no mean"),
        "adam_eps": (1e-18, HUGE, "at least 1e-18: a parameter without gradient would be divided by 0"),
        "weight_decay": (0, HUGE, "0 (none) or more"),
        "load_balance": (0, HUGE, "0 (none) or more"),
        "router_z": (0, HUGE, "0 (none) or more"),
        "logits_per_chunk": (1, 2**40, "at least 1"),
        "max_grad_norm": (TINY, math.inf, "above 0, or inf for no clipping"),
        "unroll": _ONE,
        "predictor_rate": (0, 1e3, "0 (they foretell no change) or more"),
        "predictor_tokens": (1, 2**14, "from 1 to 16384"),
    },
    "evaluation": {
        "every": _ANY,
        "prompts": _ONE,
        "samples": _ONE,
        **_TRUNCATION,
    },
    "cold_start": {
        "target_accuracy": (0, 1, "in [0, 1]"),
        "seed": (0, 2**32 - 2, "0 or more and below 2**32 - 1"),
        "max_steps": _ANY,
        "batch_size": _ONE,
        "learning_rate": (TINY, 1e3, "above 0"),
        "check_prompts": _ONE,
        "check_every": _ONE,
    },
}


def validate(config: RunConfig) -> None:
    """Raises UserError on the first impossible or contradictory field, before any long work."""
    if not isinstance(config.task, TaskConfig):
        raise UserError(
            f"task = {config.task!r}: expected a TaskConfig, a frozen dataclass whose build() returns the task"
        )
    check_fields(config)
    for where, ranges in RANGES.items():
        check_ranges(getattr(config, where) if where else config, ranges, where)
    sampling.check_temperature("evaluation.temperature", config.evaluation.temperature)
    config.model.validate()
    config.learner.precision.validate(config.model, "learner.precision")
    config.rollout.precision.validate(config.model, "rollout.precision")
    validate_monitor(config.monitor)
    _log_probs(config)
    _asynchronous(config)
    _rollout(config)
    _learner(config)
    _replay(config)


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"{name} = {value!r}: expected {expected}")


def _log_probs(config: RunConfig) -> None:
    """That the ratios are of the distributions that tokens were drawn from."""
    rollout, learner = config.rollout, config.learner
    for name, truncated in (("rollout", rollout), ("evaluation", config.evaluation)):
        least = max(truncated.top_k, 1)
        _require(
            not truncates(truncated) or truncated.support >= least,
            f"{name}.support",
            truncated.support,
            f"at least {least}: top_k, top_p and min_p keep some tokens, which are recorded since an importance ratio "
            "over other tokens is not the policies'",
        )
    if rollout.uniform and rollout.log_probs != "decode":
        raise UserError(
            f"rollout.uniform = {rollout.uniform} with rollout.log_probs = {rollout.log_probs!r}: a scoring pass knows "
            "nothing of the mixture that tokens were drawn from; use 'decode'"
        )
    if rollout.log_probs == "matched" and rollout.weight_noise:
        raise UserError(
            f"rollout.weight_noise = {rollout.weight_noise} with rollout.log_probs = 'matched': noise on the weights "
            "that sample makes a gap, and matched engines have none; use 0, or 'decode'"
        )
    if rollout.log_probs == "matched" and (rollout.precision != learner.precision or rollout.slots):
        raise UserError(
            f"rollout.log_probs = 'matched' with rollout.precision = {rollout.precision}, learner.precision = "
            f"{learner.precision} and rollout.slots = {rollout.slots}: give both engines one precision, and 0 slots"
        )


def _asynchronous(config: RunConfig) -> None:
    """Lag, partial rollouts, devices set aside."""
    rollout = config.rollout
    steps = -(-config.gradient_steps // config.minibatches)
    if rollout.lag > steps:
        raise UserError(
            f"rollout.lag = {rollout.lag}, but the run has {steps} global steps: batches would be sampled that none "
            "learns from; lower it, or raise gradient_steps"
        )
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
    if rollout.devices and not rollout.lag:
        raise UserError(
            f"rollout.devices = {rollout.devices} with rollout.lag = 0: each step would wait for its own batch while "
            "the other devices idle; give a lag of 1 or more, or set no devices aside"
        )
    if not rollout.devices and rollout.mesh != MeshConfig():
        raise UserError(
            f"rollout.mesh = {rollout.mesh} with rollout.devices = 0: it splits the devices set aside, and none are; "
            "set rollout.devices, or use mesh, which splits all"
        )
    if rollout.attempts > 1 and config.samples_per_prompt == 1:
        raise UserError(
            f"rollout.attempts = {rollout.attempts} with samples_per_prompt = 1: the rewards of a group of one are all "
            "equal, so that every group would be replaced; use 1 attempt, or more samples"
        )


def _rollout(config: RunConfig) -> None:
    """Waves, stop strings and overlong responses."""
    rollout = config.rollout
    if rollout.stop and (rollout.partial or rollout.log_probs == "matched"):
        raise UserError(
            f"rollout.stop = {rollout.stop} with rollout.partial = {rollout.partial} and rollout.log_probs = "
            f"{rollout.log_probs!r}: the host sees no text while these draw; use (), or partial = 0 and 'decode' or "
            "'rescore'"
        )
    _require(
        config.prompts_per_step % rollout.waves == 0,
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
    if (rollout.overlong == "penalise") != (rollout.overlong_margin > 0):
        raise UserError(
            f"rollout.overlong_margin = {rollout.overlong_margin} and rollout.overlong = {rollout.overlong!r}: "
            "'penalise' needs a margin of at least 1 token, and nothing else takes one"
        )


def _learner(config: RunConfig) -> None:
    """Batches that are cut into equal parts, and what the learner computes with."""
    learner = config.learner
    minibatch = config.prompts_per_minibatch * config.samples_per_prompt
    for name, whole, responses in (
        ("micro_batches", "mini-batch", minibatch),
        ("score_micro_batches", "global batch", config.responses_per_step),
    ):
        parts = getattr(learner, name)
        divides = parts >= 1 and responses % parts == 0
        _require(divides, f"learner.{name}", parts, f"a divisor of the {whole}, {responses} responses")
    if learner.packing and config.kernels.attention == "cudnn":
        raise UserError(
            "learner.packing = True with kernels.attention = 'cudnn', which takes one sequence a row: use "
            "packing = False, or 'reference'"
        )


def _replay(config: RunConfig) -> None:
    """Routes to replay, and losses of a router, where there are any."""
    learner = config.learner
    if learner.replay != "live" and not config.model.num_moe_layers:
        raise UserError(
            f"learner.replay = {learner.replay!r}, but the model is dense: use replay = 'live', or give it experts"
        )
    if learner.replay_of != "recorded" and (learner.replay != "r3" or config.rollout.partial):
        raise UserError(
            f"learner.replay_of = {learner.replay_of!r} with learner.replay = {learner.replay!r} and rollout.partial = "
            f"{config.rollout.partial}: it says what R3 replays of whole responses; use replay = 'r3' and partial = 0"
        )
    if learner.replay == "pr2" and (config.rollout.partial or config.rollout.log_probs == "matched"):
        raise UserError(
            f"learner.replay = 'pr2' with rollout.partial = {config.rollout.partial} and rollout.log_probs = "
            f"{config.rollout.log_probs!r}: routes are foretold in one scoring pass of whole responses; use partial = "
            "0, and 'decode' or 'rescore'"
        )
    if learner.replay == "pr2" and config.minibatches == 1 and not config.rollout.lag:
        raise UserError(
            "learner.replay = 'pr2' with minibatches = 1 and rollout.lag = 0: nothing changes between the old pass and "
            "the update, so that there is nothing to foretell; use 'r2', which is the same then"
        )
    if (learner.load_balance or learner.router_z) and not config.model.num_moe_layers:
        raise UserError("learner.load_balance, learner.router_z: the model is dense and has no router; set them to 0")
