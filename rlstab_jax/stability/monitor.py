"""The monitor: reads a run's metrics, live or afterwards, and says in words what is wrong and what to try.

Each check compares a quantity x of a global step with the run's own early steps. On a logarithmic scale, with m the
median and s = 1.4826 MAD of log x over the baseline, a step is an *excess* where

    log x > m + max(log factor, spreads * s)        (for the entropy, which should not fall: log x < m - max(...))

so that a quantity must be beyond its usual noise *and* matter. After ``patience`` excesses in a row the check speaks,
and then is silent until the quantity has come back half the way (on the logarithmic scale) for as many steps.

What it can and cannot see was measured: experiments/results/monitor/README.md.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from rlstab_jax.checks import ABOVE_1, BELOW_1, HUGE, INT32_MAX, TINY, check_fields, check_ranges
from rlstab_jax.types import UserError

# Metrics of one global step by name, as in metrics.METRICS; absent or NaN: not measured, but for a gradient norm.
Row = Mapping[str, float]
Policy = Literal["warn", "skip", "lower", "stop"]


@dataclasses.dataclass(frozen=True)
class Check:
    """When one check speaks, and what it does then."""

    factor: float
    """How many times its baseline a quantity must be (for a fall: its inverse); inf switches the check off."""
    policy: Policy = "warn"
    """warn: say it. lower: multiply the learning rate as well. stop: end the run with a checkpoint. skip: discard the
    updates of each global step that is an excess by what updates do (not by the engines' gap, which was there before
    them), until the check speaks: an excess that lasts is none that discarding cures. Only for ratios, largest_ratio,
    routing and gradient."""


@dataclasses.dataclass(frozen=True)
class GapCheck:
    """When a check of the reward speaks, and what it does then."""

    gap: float
    """By how much two rewards must differ, each between 0 and 1; inf switches the check off."""
    policy: Literal["warn", "lower", "stop"] = "warn"
    """As in `Check`."""


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """Thresholds and policies. The defaults were chosen on runs of N = 8 updates per rollout batch, of one task."""

    baseline_steps: int = 24
    """Gradient steps, from the first, that are the baseline (at least three global steps): nothing is said in them."""
    spreads: float = 1.0
    """How many robust standard deviations of the baseline an excess must be beyond its median."""
    patience: int = 2
    """Global steps in a row that must be excesses before a check speaks, and must not be before it may speak again."""
    lower_by: float = 0.5
    """What the policy `lower` multiplies the learning rate by, each time that its check speaks."""
    ratios: Check = Check(3.0)
    """Ratio tails: the share of tokens with pi_old/mu_old beyond 2 or 1/2, the share of truncated weights."""
    largest_ratio: Check = Check(1000.0)
    """The largest pi_theta/pi_old and pi_old/mu_old of a step: single tokens, which grow rarer as a policy learns."""
    routing: Check = Check(1.25)
    """Routing drift: experts that differ between pi_old and pi_theta, or between mu_old and pi_old."""
    gradient: Check = Check(2.5)
    """Gradient spikes: the norm before clipping; not finite is always an excess."""
    length: Check = Check(1.25)
    """Length surge: mean response length, share of responses cut off at the limit."""
    entropy: Check = Check(10.0)
    """Entropy collapse."""
    healthy_kl: Check = Check(1.25)
    """Entropy falls and the reward with it, though the train-inference KL has not grown by this factor."""
    held_out: GapCheck = GapCheck(0.05)
    """The reward has gained so much more than the held-out accuracy since the baseline."""
    reward: GapCheck = GapCheck(0.05)
    """The reward is so far below the best of an earlier step."""


# What a run listens to unless told otherwise: checks and thresholds that speak on hardly any run that learns, whatever
# its updates per rollout batch, as counted on the studies' runs (experiments/results/monitor/live.csv). The others are
# off. `review` has them all, at the thresholds above.
LIVE = MonitorConfig(
    ratios=Check(12.0),
    largest_ratio=Check(math.inf),
    routing=Check(math.inf),
    gradient=Check(8.0),
    length=Check(math.inf),
    entropy=Check(100.0),
    healthy_kl=Check(math.inf),
    held_out=GapCheck(0.1),
    reward=GapCheck(math.inf),
)


class Remark(NamedTuple):
    """What the monitor has to say about a global step.

    ``step`` counts gradient steps. ``message`` is the finding with its numbers, ``advice`` what to try, ``action`` the
    check's policy.
    """

    step: int
    check: str
    message: str
    advice: str
    action: Policy

    def line(self) -> str:
        return f"monitor, gradient step {self.step}: {self.message} {self.advice}"


class Quantity(NamedTuple):
    """A metric, what a reader calls it, its direction, what to add before the logarithm (a share can be 0), and whether
    a step's updates make it, so that discarding them undoes it."""

    metric: str
    label: str
    falls: bool = False
    offset: float = 0.0
    form: str = "{:.3g}"
    of_updates: bool = False


SHARE = 1e-3
QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    "ratios": (
        Quantity("discrepancy/f2", "the share of tokens with pi_old/mu_old beyond 2 or 1/2", False, 1e-4, "{:.2%}"),
        Quantity("weight/truncated", "the share of truncated weights", False, SHARE, "{:.2%}", of_updates=True),
    ),
    "largest_ratio": (
        Quantity("staleness/max_ratio", "the largest ratio pi_theta/pi_old of a step", of_updates=True),
        Quantity("discrepancy/max_ratio", "the largest ratio pi_old/mu_old of a step"),
    ),
    "routing": (
        Quantity("routing/old_vs_target", "the share of expert sets that updates change", False, SHARE, "{:.1%}", True),
        Quantity("routing/rollout_vs_old", "the share of expert sets on which engines differ", False, SHARE, "{:.1%}"),
    ),
    "gradient": (Quantity("learner/grad_norm", "the gradient norm before clipping", of_updates=True),),
    "length": (
        Quantity("response/length", "the mean response length, in tokens,"),
        Quantity("response/truncated", "the share of responses cut off at the limit", offset=0.05, form="{:.1%}"),
    ),
    "entropy": (Quantity("policy/entropy", "the policy's entropy, in nats per token,", falls=True),),
}  # fmt: skip
SKIPPABLE = ("ratios", "largest_ratio", "routing", "gradient")
RATIO_ADVICE = (
    "Try clipping or a truncated weight (objective.eps_low, eps_high, cap), routing replay (learner.replay = r3), "
    "fewer updates per rollout batch (minibatches), or a lower learning rate."
)
ADVICE = {
    "ratios": RATIO_ADVICE,
    "largest_ratio": RATIO_ADVICE,
    "routing": "Try routing replay (learner.replay = r2 for few updates per rollout batch, r3 for many), or a lower "
    "learning rate.",
    "gradient": "Try a lower learning rate or a smaller learner.max_grad_norm; look at samples.jsonl of this step.",
    "length": "Look at samples.jsonl for repetition; see whether the verifier pays for length, and whether the "
    "objective's length normalisation is the one you want.",
    "entropy": "Check that the importance weight uses the inference engine's log-probs "
    "(objective.importance_sampling), try an entropy bonus (objective.entropy_coefficient) or a lower learning rate.",
    "healthy_kl": "The train-inference KL alone is no alarm here: check that the importance weight is in the loss "
    "(objective.importance_sampling), with R3 too.",
    "held_out": "The policy fits the training prompts or exploits the verifier: read samples.jsonl, add prompts, or "
    "stop at the best checkpoint.",
    "reward": "Go back to the best checkpoint with a lower learning rate, fewer updates per rollout batch "
    "(minibatches) or clipping, if it does not come back by itself.",
}
CHECKS = tuple(ADVICE)
RANGES = {
    "baseline_steps": (1, INT32_MAX, "at least 1"),
    "patience": (1, INT32_MAX, "at least 1"),
    "spreads": (0, HUGE, "0 or more"),
    "lower_by": (TINY, BELOW_1, "between 0 and 1"),
}
THRESHOLD = {
    Check: {"factor": (ABOVE_1, math.inf, "above 1, or inf to switch it off")},
    GapCheck: {"gap": (TINY, math.inf, "above 0, or inf to switch it off")},
}


def validate(config: MonitorConfig) -> None:
    """Raises UserError for a config that cannot be meant: a factor of at most 1, a skip that would cure nothing."""

    check_fields(config, "monitor")
    check_ranges(config, RANGES, "monitor")
    for name in CHECKS:
        check = getattr(config, name)
        check_ranges(check, THRESHOLD[type(check)], f"monitor.{name}")
        if check.policy == "skip" and name not in SKIPPABLE:
            raise UserError(
                f"monitor.{name}.policy = 'skip', but discarding one step's updates does not undo what this check "
                f"sees: use warn, lower or stop (skip is for {', '.join(SKIPPABLE)})"
            )


@dataclasses.dataclass
class MonitorState:
    """What a monitor remembers; plain JSON, so that a checkpoint can hold it."""

    early: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # the baseline's values by metric
    rows: int = 0  # training rows seen
    ready: bool = False  # whether the baseline is complete
    excesses: dict[str, int] = dataclasses.field(default_factory=dict)  # by check: how many in a row
    calm: dict[str, int] = dataclasses.field(default_factory=dict)  # by check: steps in a row that have come back
    speaking: list[str] = dataclasses.field(default_factory=list)  # checks that spoke and have not come back
    rewards: list[float] = dataclasses.field(default_factory=list)  # since the last evaluation
    best_reward: float | None = None
    first_accuracy: float | None = None
    learning_rate_scale: float = 1.0


class Monitor:
    """Judges a run row by row. Live, `rlstab_jax.training.run` honours the actions; `review` judges afterwards.

    >>> monitor = Monitor(MonitorConfig(baseline_steps=3, patience=1))
    >>> rows = [{"progress/gradient_steps": i, "reward/mean": 0.5, "learner/grad_norm": 1.0} for i in (1, 2, 3)]
    >>> [monitor.observe(row) for row in rows]
    [[], [], []]
    >>> monitor.observe({"progress/gradient_steps": 4, "reward/mean": 0.5, "learner/grad_norm": 9.0})[0].check
    'gradient'

    Args:
      config: thresholds and policies.
      saved: of an earlier `saved()`, to go on exactly there.

    Raises:
      UserError: a config that cannot be meant; see `validate`.
    """

    def __init__(self, config: MonitorConfig, saved: Mapping[str, Any] | None = None):
        validate(config)
        self.config = config
        self.state = MonitorState(**(saved or {}))
        self._baseline: dict[Quantity, tuple[float, float, int] | None] = {}  # once it is complete

    def saved(self) -> dict[str, Any]:
        """The state as JSON."""
        return dataclasses.asdict(self.state)

    @property
    def learning_rate_scale(self) -> float:
        """What to multiply the configured learning rate by from now on."""
        return self.state.learning_rate_scale

    @property
    def may_discard(self) -> bool:
        """Whether a check has the policy skip, so that the state before a global step must be kept."""
        return any(getattr(self.config, name).policy == "skip" for name in SKIPPABLE)

    def discards(self, row: Row) -> bool:
        """Whether this global step's updates are to be discarded; to be asked before `observe`, which comes anyway."""
        findings = (
            finding
            for name in SKIPPABLE
            if getattr(self.config, name).policy == "skip" and name not in self.state.speaking
            for quantity in QUANTITIES[name]
            if quantity.of_updates
            for finding in self._compare(quantity, row, getattr(self.config, name).factor)
        )
        return self.state.ready and any(finding.score > 1 for finding in findings)

    def observe(self, row: Row) -> list[Remark]:
        """Judges the next global step; returns what has to be said now, which is mostly nothing."""
        state = self.state
        accuracy = row.get("eval/accuracy_training", math.nan)
        if state.first_accuracy is None and math.isfinite(accuracy):
            state.first_accuracy = accuracy
        if not math.isfinite(row.get("reward/mean", math.nan)):
            return []  # the evaluation before the first step
        state.rows += 1
        if state.first_accuracy is not None:  # else there is nothing to compare them with
            state.rewards.append(row["reward/mean"])
        remarks = self._judge(row) if state.ready else self._learn(row)
        best = state.best_reward
        state.best_reward = row["reward/mean"] if best is None else max(best, row["reward/mean"])
        if math.isfinite(accuracy):
            state.rewards.clear()
        return remarks

    def _learn(self, row: Row) -> list[Remark]:
        """Adds a row to the baseline."""
        for metric in BASELINE:
            value = row.get(metric, math.nan)
            if math.isfinite(value):
                self.state.early.setdefault(metric, []).append(value)
        self.state.ready = self.state.rows >= 3 and row["progress/gradient_steps"] >= self.config.baseline_steps
        return []

    def _judge(self, row: Row) -> list[Remark]:
        config, state, remarks = self.config, self.state, []
        for name in CHECKS:
            check = getattr(config, name)
            finding = max(self._findings(name, row), default=None, key=lambda finding: finding.score)
            if finding is None:
                continue
            excess = finding.score > 1
            state.excesses[name] = state.excesses.get(name, 0) + 1 if excess else 0
            state.calm[name] = state.calm.get(name, 0) + 1 if finding.score < 0.5 else 0
            if name in state.speaking:
                if state.calm[name] >= config.patience:
                    state.speaking.remove(name)
            elif state.excesses[name] >= config.patience:
                state.speaking.append(name)
                if check.policy == "lower":
                    state.learning_rate_scale *= config.lower_by
                step = int(row["progress/gradient_steps"])
                kept = " It has lasted, so that updates are no longer discarded for it." * (check.policy == "skip")
                remarks.append(Remark(step, name, f"{finding.message}.{kept}", ADVICE[name], check.policy))
        return remarks

    def _findings(self, name: str, row: Row) -> Iterator["Finding"]:
        """What one check has measured in this row; nothing where its metrics are absent."""
        if name == "held_out":
            yield from self._held_out(row)
        elif name == "healthy_kl":
            yield from self._healthy_kl(row)
        elif name == "reward":
            best, reward = self.state.best_reward, row["reward/mean"]
            if best is not None:
                yield Finding((best - reward) / self.config.reward.gap, f"the reward is {reward:.3f} after {best:.3f}")
        else:
            for quantity in QUANTITIES[name]:
                yield from self._compare(quantity, row, getattr(self.config, name).factor)

    def _compare(self, quantity: Quantity, row: Row, factor: float) -> Iterator["Finding"]:
        """A quantity against its baseline: score 0 at the median, 1 at the threshold."""
        value = row.get(quantity.metric, math.nan)
        if math.isinf(factor):
            return
        if not math.isfinite(value):
            if quantity.metric == "learner/grad_norm" and quantity.metric in row:
                yield Finding(math.inf, f"{quantity.label} is not finite")
            return
        if (known := self._usual(quantity)) is None:
            return
        middle, spread, count = known
        usual = math.exp(middle) - quantity.offset
        moved = (math.log(value + quantity.offset) if value + quantity.offset > 0 else -math.inf) - middle
        score = (-moved if quantity.falls else moved) / max(math.log(factor), self.config.spreads * spread)
        shown, before = quantity.form.format(value), quantity.form.format(usual)
        times = f"{value / usual:.3g} times" if usual > quantity.offset / 10 else "after"
        yield Finding(score, f"{quantity.label} is {shown}, {times} the {before} of the first {count} global steps")

    def _usual(self, quantity: Quantity) -> tuple[float, float, int] | None:
        """Median and robust standard deviation of a quantity's logarithm over the baseline, and how many there are."""
        if quantity not in self._baseline:
            early = np.array(self.state.early.get(quantity.metric, ())) + quantity.offset
            logs = np.log(early[early > 0])
            middle = float(np.median(logs)) if len(logs) else math.nan
            spread = 1.4826 * float(np.median(np.abs(logs - middle))) if len(logs) else math.nan
            self._baseline[quantity] = (middle, spread, len(logs)) if len(logs) else None
        return self._baseline[quantity]

    def _healthy_kl(self, row: Row) -> Iterator["Finding"]:
        """The paper's R3 without importance weights: entropy and reward fall, the train-inference KL does not grow."""
        factor, best = self.config.healthy_kl.factor, self.state.best_reward
        for entropy in self._compare(QUANTITIES["entropy"][0], row, factor):
            for kl in self._compare(Quantity("discrepancy/k3", "the train-inference KL (k3)"), row, factor):
                fallen = best is not None and row["reward/mean"] < best - REWARD_FALL
                text = f"{entropy.message}, and the reward {row['reward/mean']:.3f} after {best:.3f}; yet {kl.message}"
                yield Finding(entropy.score if fallen and kl.score < 1 else 0.0, text)

    def _held_out(self, row: Row) -> Iterator["Finding"]:
        """The gain of the reward since the baseline, less that of the held-out accuracy; judged at evaluations."""
        state, accuracy = self.state, row.get("eval/accuracy_training", math.nan)
        early = state.early.get("reward/mean")
        if not early or state.first_accuracy is None or not math.isfinite(accuracy):
            return
        before, reward = float(np.median(early)), float(np.mean(state.rewards))
        gap = (reward - before) - (accuracy - state.first_accuracy)

        yield Finding(
            gap / self.config.held_out.gap,
            f"the reward on training prompts went from {before:.3f} to {reward:.3f}, the held-out accuracy from "
            f"{state.first_accuracy:.3f} to {accuracy:.3f}",
        )


class Finding(NamedTuple):
    """A measured quantity: 0 as it was early, more than 1 beyond the threshold; and how to say it."""

    score: float
    message: str


REWARD_FALL = 0.05  # of `healthy_kl`: so far below its best, the reward has fallen, not merely wavered
BASELINE = (*(q.metric for group in QUANTITIES.values() for q in group), "discrepancy/k3", "reward/mean")


def review(metrics: Mapping[str, np.ndarray], config: MonitorConfig | None = None) -> list[Remark]:
    """All that the monitor would have said of a run, from its columns as `rundir.read_metrics` gives them.

    >>> review({})
    []
    """
    monitor = Monitor(config or MonitorConfig())
    length = len(next(iter(metrics.values()), ()))
    rows = ({name: float(column[i]) for name, column in metrics.items()} for i in range(length))
    return [remark for row in rows for remark in monitor.observe(row)]
