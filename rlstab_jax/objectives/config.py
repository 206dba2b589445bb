"""How a run's config names its objective: a recipe, the numbers that differ from its defaults, and regularisers."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import tyro

from rlstab_jax.objectives import recipes, regularisers
from rlstab_jax.objectives.core import Objective, Regulariser, piece
from rlstab_jax.types import UserError

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

    Attributes:
      name: one of `recipes`; ignored where ``recipe`` is given.
      recipe: a function of one's own that returns an `Objective`, called with the numbers below that are set.
      eps_low, eps_high: clip range. delta: DPPO's threshold (nats for its KL). dual_clip: ratio.
      cap: truncation of the weight. cap_on: what it applies to. band_low, band_high: IcePop's band.
      importance_sampling, length_normalise: MiniRL's ablations. baseline: REINFORCE's. length: Dr.GRPO's, in tokens.
      floor: RSPO's smallest router-shift weight.
      kl_coefficient: of a KL to the reference policy; 0 for none, and then no reference is scored.
      kl_in: a penalty in the "loss" by ``kl_estimator`` (see `regularisers`), or in the "reward" of the sequence.
      entropy_coefficient: of the entropy; positive keeps it up.
    """

    name: RecipeName = "minirl"
    recipe: Annotated[Callable[..., Objective] | None, tyro.conf.Suppress] = None
    eps_low: float | None = None
    eps_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    cap: float | None = None
    cap_on: Literal["product", "discrepancy"] | None = None
    band_low: float | None = None
    band_high: float | None = None
    importance_sampling: bool | None = None
    length_normalise: bool | None = None
    baseline: float | None = None
    length: float | None = None
    floor: float | None = None
    kl_coefficient: float = 0.0
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: Estimator = "k2"
    entropy_coefficient: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient != 0

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coefficient != 0


INFINITY = float("inf")
TINY = 1e-12
_RANGES = {
    "eps_low": (0.0, INFINITY, "0 or more; inf clips nothing"),
    "eps_high": (0.0, INFINITY, "0 or more; inf clips nothing"),
    "delta": (0.0, INFINITY, "0 or more; inf stops nothing"),
    "dual_clip": (1.0, INFINITY, "1 or more; inf stops nothing"),
    "cap": (TINY, INFINITY, "above 0; inf truncates nothing"),
    "band_low": (0.0, INFINITY, "0 or more"),
    "band_high": (0.0, INFINITY, "0 or more"),
    "baseline": (-1e30, 1e30, "a finite reward"),
    "length": (TINY, 1e30, "above 0, in tokens"),
    "floor": (TINY, 1.0, "above 0, at most 1"),
    "kl_coefficient": (0.0, 1e30, "0 (none) or more"),
    "entropy_coefficient": (-1e30, 1e30, "a finite number"),
}  # of what a config can set; NaN is in none of them
_NOT_OF_THE_RECIPE = ("name", "recipe", "kl_coefficient", "kl_in", "kl_estimator", "entropy_coefficient")


def build(config: ObjectiveConfig) -> Objective:
    """The objective that a config names. Raises UserError on a number that its recipe does not take, or that is outside
    its range.
    """
    for name, (low, high, expected) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"objective.{name} = {value}: expected {expected}")
    recipe = config.recipe or getattr(recipes, config.name)
    numbers = {field.name: getattr(config, field.name) for field in fields(config)}
    numbers = {name: value for name, value in numbers.items() if name not in _NOT_OF_THE_RECIPE and value is not None}
    taken = set(inspect.signature(recipe).parameters)
    if unknown := sorted(numbers.keys() - taken):
        label = "recipe" if config.recipe else config.name
        known = ", ".join(sorted(taken)) or "none"
        raise UserError(f"objective.{unknown[0]}: {label} has no such number; it takes: {known}")
    return _regularised(recipe(**numbers), config)


def _regularised(objective: Objective, config: ObjectiveConfig) -> Objective:
    if config.kl_estimator != "k2" and not (config.needs_reference and config.kl_in == "loss"):
        raise UserError("objective.kl_estimator: there is no KL in the loss; set kl_coefficient, and kl_in to 'loss'")
    if config.kl_in == "reward" and not config.needs_reference:
        raise UserError("objective.kl_in: set to 'reward', but kl_coefficient is 0; set a coefficient")
    added = []
    if config.needs_reference and config.kl_in == "loss":
        name = config.kl_estimator.removeprefix("corrected_")
        term = piece({"k1": regularisers.k1, "k2": regularisers.k2, "k3": regularisers.k3}[name])
        if config.kl_estimator.startswith("corrected_"):
            term = piece(regularisers.corrected, term=term)
        added.append(Regulariser(term, config.kl_coefficient))
    if config.needs_entropy:
        added.append(Regulariser(piece(regularisers.negative_entropy), config.entropy_coefficient))
    objective = replace(objective, regularisers=(*objective.regularisers, *added))
    if config.needs_reference and config.kl_in == "reward":
        penalty = piece(regularisers.kl_in_reward, coefficient=config.kl_coefficient)
        objective = replace(objective, reward=penalty)
    return objective
