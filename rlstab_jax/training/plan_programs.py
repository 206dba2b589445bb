"""The programs of a run, compiled ahead of time for devices that are not there: the functions that the run calls.

Arguments are shapes with the places that a run gives them; what one program returns goes into the next where the
compiler has put it.
"""

import dataclasses
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlstab_jax.learner import Minibatch, Packing, score, update
from rlstab_jax.models.layers import PREDICTOR
from rlstab_jax.parallel.sharding import Layout
from rlstab_jax.training.engines import EnginePair
from rlstab_jax.training.loop import minibatch, rollout_advantages
from rlstab_jax.training.plan_sampling import SAMPLING, Program, SamplingPrograms, placed

LEARNING = ("split", "update")
"""The phases that learn from a batch; all others make it."""

# What is made anew when a field changes. The optimiser's state lies on the devices in every phase; of the programs of
# which it is no argument only that changes, and JAX does not compile them again.
_STATE = ("engines", "state", "_throughout", "prepare", *SAMPLING, "score", "split", "update")
_SCORING = ("engines", "score", "whole", "split", "update")
AFFECTED = {
    "rollout.waves": ("engines", "records", "results", *SAMPLING),
    "rollout.slots": ("engines", *SAMPLING),
    "learner.score_micro_batches": _SCORING,
    "learner.logits_per_chunk": _SCORING,
    "learner.micro_batches": ("engines", "update"),
    "learner.remat": ("engines", "update"),
    "learner.offload_optimizer": _STATE,
    "learner.moments_dtype": _STATE,
}


@dataclasses.dataclass(frozen=True)
class Programs(SamplingPrograms):
    """The programs of one global step of ``engines``, made when they are asked for."""

    def changed(self, engines: EnginePair, field: str) -> "Programs":
        """Those of engines whose config differs in ``field``, without compiling again what does not depend on it."""
        new = Programs(engines)
        new.__dict__.update({name: made for name, made in self.__dict__.items() if name not in AFFECTED[field]})
        return new

    def mesh(self, phase: str) -> Mesh:
        """Whose devices run it."""
        return (self.engines if phase in LEARNING else self.making).mesh

    def packing(self, mesh: Mesh, rows: int, micro_batches: int) -> Packing | None:
        """Of so many responses of full length, which fill as many rows: no batch needs more."""
        config = self.engines.config
        if not config.learner.packing:
            return None
        fed = (rows, config.rollout.prompt_length + config.rollout.response_length - 1)
        source, place = (placed(mesh, jax.ShapeDtypeStruct(fed, jnp.int32), row=True) for _ in range(2))
        return Packing(source, place, Layout(mesh).row_parts, micro_batches)

    @cached_property
    def score(self) -> Program:
        engines, config, learner = self.making, self.engines.config, self.engines.config.learner
        predictor = self._foretelling
        variables = {"params": self.params} | ({PREDICTOR: predictor} if predictor else {})
        traced = score.trace(
            engines.training,
            variables,
            self.rollout,
            replay=engines.replay,
            micro_batches=learner.score_micro_batches,
            logits_per_chunk=learner.logits_per_chunk,
            packing=self.packing(engines.mesh, config.responses_per_step, learner.score_micro_batches),
            router=engines.needs_router,
            observed_tokens=learner.predictor_tokens if predictor else 0,
        )
        kept = self._beside_making
        if config.rollout.log_probs == "rescore":  # by these, before the pass that is compiled here
            kept = {**kept, "weights": self.variables}
        return Program("score", traced, {"parameters": variables, "rollout": self.rollout}, kept)

    @property
    def _foretelling(self) -> dict | None:
        """Of PR2: the weights of the predictors, on the devices that make batches."""
        if (predictor := self.state.predictor) is None:
            return None
        shapes = predictor.weights
        return self.making.placed_like(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

    @cached_property
    def whole(self) -> Minibatch:
        """The global batch, on the devices that learn, as it is before it is split into mini-batches."""
        engines, rows = self.engines, self.engines.config.responses_per_step

        def by_rows(shapes: Any) -> Any:
            return placed(engines.mesh, shapes, row=True)

        # Where it does not compile, its results are taken to lie as its arguments do; and so they are moved.
        here = not self.aside and self.score.compiles
        old, _ = self.score.result if here else by_rows(self.score.traced.out_info)
        rollout = by_rows(self.rollout)
        rewards, groups = (by_rows(jax.ShapeDtypeStruct((rows,), dtype)) for dtype in (jnp.float32, jnp.int32))
        reference = old.log_probs if engines.config.objective.needs_reference else None
        advantage = jax.eval_shape(
            partial(rollout_advantages, engines.objective), rollout, old, reference, rewards, groups
        )
        return Minibatch(rollout, old, by_rows(advantage), groups, reference)

    @cached_property
    def split(self) -> Program:
        config = self.engines.config
        rows = jax.ShapeDtypeStruct((config.prompts_per_minibatch * config.samples_per_prompt,), jnp.int32)
        mesh = self.engines.mesh
        traced = minibatch.trace(self.whole, placed(mesh, rows), mesh)
        kept = {"training state": self.state, **self._throughout}
        return Program("split", traced, {"global batch": self.whole}, kept)

    @cached_property
    def update(self) -> Program:
        engines, learner, mesh = self.engines, self.engines.config.learner, self.engines.mesh
        part = self.split.result if self.split.compiles else placed(mesh, self.split.traced.out_info, row=True)
        traced = update.trace(
            engines.training,
            self.state,
            part,
            placed(mesh, _shapes(engines.objective)),
            placed(mesh, _shapes(engines.numbers)),
            replay=engines.replay,
            micro_batches=learner.micro_batches,
            logits_per_chunk=learner.logits_per_chunk,
            use_router_losses=bool(learner.load_balance or learner.router_z),
            packing=self.packing(mesh, part.rollout.tokens.shape[0], learner.micro_batches),
            freeze=learner.freeze,
            teach=placed(mesh, jax.ShapeDtypeStruct((), jnp.bool_)) if self.state.predictor else None,
        )
        parts = {"parameters": self.state.params, "optimiser": self._optimiser, "mini-batch": part}
        return Program("update", traced, parts, {"global batch": self.whole, **self._throughout})


def _shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)
