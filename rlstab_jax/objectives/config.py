"""How a run's config names its objective: a recipe, the numbers that differ from its defaults, and regularisers."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import FunctionType
from typing import Annotated, Literal

import tyro

from rlstab_jax.checks import HUGE, TINY, check_fields, check_ranges
from rlstab_jax.objectives import fit, recipes, regularisers
from rlstab_jax.objectives.core import Objective, Regulariser, piece
from rlstab_jax.types import UserError, one_line

RecipeName = Literal[
    "minirl",
    "reinforce",
    "rloo",
    "sequence_is",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "tis",
    "icepop",
    "dppo_tv",
    "dppo_kl",
    "rspo",
]
Estimator = Literal["k1", "k2", "k3", "corrected_k1", "corrected_k3"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """An objective by name. A number left at None is the recipe's own default; one that the recipe does not take is an
    error.

    >>> build(ObjectiveConfig("minirl", eps_high=0.3)).trust.keywords["eps_high"]
    0.3
    """

    name: RecipeName = "minirl"
    """A recipe; not to be set beside a function of one's own."""
    recipe: Annotated[Callable[..., Objective] | None, tyro.conf.Suppress] = None
    """A function of one's own that returns an `Objective`, called with the numbers below that are set."""
    eps_low: float | None = None
    """Clip range below 1; inf for none. None is the recipe's own number, here and below."""
    eps_high: float | None = None
    """Clip range above 1; inf for none."""
    delta: float | None = None
    """DPPO's threshold: a probability, or nats for its KL."""
    dual_clip: float | None = None
    """Ratio above which tokens of negative advantage have no gradient; inf for none."""
    cap: float | None = None
    """Truncation of the importance weight; inf for none."""
    cap_on: Literal["product", "discrepancy"] | None = None
    """What MiniRL's cap applies to: pi_theta/mu_old, or its factor pi_old/mu_old."""
    band_low: float | None = None
    """IcePop's band of pi_old/mu_old, from here."""
    band_high: float | None = None
    """To here."""
    importance_sampling: bool | None = None
    """MiniRL's: False leaves the training-inference correction out of the weight."""
    length_normalise: bool | None = None
    """MiniRL's: True divides by the length of each response."""
    baseline: float | None = None
    """REINFORCE's, in units of the reward."""
    length: float | None = None
    """Dr.GRPO's constant length, in tokens."""
    floor: float | None = None
    """RSPO's smallest router-shift weight."""
    kl_coefficient: float = 0.0
    """Of a KL to the policy that RL began with; 0 for none, and then no reference is kept or scored, unless ``recipe``
    reads one."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL is: a penalty in the loss, or in the reward of the sequence."""
    kl_estimator: Estimator = "k2"
    """Of the KL in the loss; see `regularisers`."""
    entropy_coefficient: float = 0.0
    """Of the entropy; positive keeps it up."""

    @property
    def needs_reference(self) -> bool:
        """Whether it has a KL, or a recipe of one's own reads the reference."""
        return self.kl_coefficient != 0 or (self.recipe is not None and _reads_reference(self))

    @property
    def label(self) -> str:
        """Its name, or that of the recipe of one's own."""
        return getattr(self.recipe, "__name__", "recipe") if self.recipe else self.name


RANGES = {
    "eps_low": (0.0, math.inf, "0 or more; inf clips nothing"),
    "eps_high": (0.0, math.inf, "0 or more; inf clips nothing"),
    "delta": (0.0, math.inf, "0 or more; inf stops nothing"),
    "dual_clip": (1.0, math.inf, "1 or more; inf stops nothing"),
    "cap": (TINY, math.inf, "above 0; inf truncates nothing"),
    "band_low": (0.0, math.inf, "0 or more"),
    "band_high": (0.0, math.inf, "0 or more"),
    "baseline": (-HUGE, HUGE, "a finite reward"),
    "length": (TINY, HUGE, "above 0, in tokens"),
    "floor": (TINY, 1.0, "above 0, at most 1"),
    "kl_coefficient": (0.0, HUGE, "0 (none) or more"),
    "entropy_coefficient": (-HUGE, HUGE, "a finite number"),
}  # of what a config can set
_NOT_OF_THE_RECIPE = ("name", "recipe", "kl_coefficient", "kl_in", "kl_estimator", "entropy_coefficient")


def build(config: ObjectiveConfig) -> Objective:
    """The objective that a config names. Raises UserError on a number that its recipe does not take, or that is outside
    its range.
    """
    check_fields(config, "objective")
    check_ranges(config, RANGES, "objective")
    if config.recipe is not None and config.name != ObjectiveConfig.name:
        raise UserError(
            f"objective.name = {config.name!r}, but the config has a recipe of its own, {config.label}: leave one out"
        )
    recipe = config.recipe or getattr(recipes, config.name)
    if not isinstance(recipe, FunctionType | functools.partial):
        given = "an Objective" if isinstance(recipe, Objective) else repr(recipe)
        raise UserError(f"objective.recipe is {given}: expected the function that returns one, not called yet")
    numbers = {field.name: getattr(config, field.name) for field in fields(config)}
    numbers = {name: value for name, value in numbers.items() if name not in _NOT_OF_THE_RECIPE and value is not None}
    parameters = inspect.signature(recipe).parameters
    taken, any_name = set(parameters), any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if (unknown := sorted(numbers.keys() - taken)) and not any_name:
        known = ", ".join(sorted(taken)) or "none"
        raise UserError(f"objective.{unknown[0]}: {config.label} has no such number; it takes: {known}")
    try:
        objective = recipe(**numbers)
    except UserError:
        raise
    except Exception as error:  # e.g. a number without a default
        raise UserError(f"objective: {config.label} cannot be called: {one_line(error)}") from error
    if not isinstance(objective, Objective):
        raise UserError(f"objective: {config.label} returned {objective!r}, expected an Objective")
    fit.check_regularisers(objective)
    return _regularised(objective, config)


@functools.cache
def _reads_reference(config: ObjectiveConfig) -> bool:
    return fit.reads(build(config), "reference")


def _regularised(objective: Objective, config: ObjectiveConfig) -> Objective:
    if config.kl_estimator != "k2" and not (config.kl_coefficient and config.kl_in == "loss"):
        raise UserError("objective.kl_estimator: there is no KL in the loss; set kl_coefficient, and kl_in to 'loss'")
    if config.kl_in == "reward" and not config.kl_coefficient:
        raise UserError("objective.kl_in: set to 'reward', but kl_coefficient is 0; set a coefficient")
    added = []
    if config.kl_coefficient and config.kl_in == "loss":
        name = config.kl_estimator.removeprefix("corrected_")
        term = piece({"k1": regularisers.k1, "k2": regularisers.k2, "k3": regularisers.k3}[name])
        if config.kl_estimator.startswith("corrected_"):
            term = piece(regularisers.corrected, term=term)
        added.append(Regulariser(term, config.kl_coefficient))
    if config.entropy_coefficient:
        added.append(Regulariser(piece(regularisers.negative_entropy), config.entropy_coefficient))
    objective = replace(objective, regularisers=(*objective.regularisers, *added))
    if config.kl_coefficient and config.kl_in == "reward":
        penalty = piece(regularisers.kl_in_reward, coefficient=config.kl_coefficient, before=objective.reward)
        objective = replace(objective, reward=penalty)
    return objective
