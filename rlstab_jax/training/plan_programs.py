"""The programs of a run, compiled ahead of time for devices that are not there: the functions that the run calls.

Arguments are shapes with the places that a run gives them; what one program returns goes into the next where the
compiler has put it. Sampling is one program in a run (`sample_batch`) of five windows, each with all layers unrolled;
it is compiled in the parts that it is made of: `prefill`, `resize` and `decode` at its last and largest window. Rows of
their cache are taken to lie over the data-parallel devices, where their prompts are put, and its heads over ``tensor``.
"""

import dataclasses
import math
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlstab_jax.inference import prepare
from rlstab_jax.inference.slots import Slots, decode, empty_records, empty_responses, prefill, resize, windows
from rlstab_jax.learner import Minibatch, Packing, score, update
from rlstab_jax.models.layers import PREDICTOR
from rlstab_jax.parallel.host_memory import HOST
from rlstab_jax.parallel.sharding import Layout
from rlstab_jax.stability.monitor import Monitor
from rlstab_jax.training.config import truncates
from rlstab_jax.training.engines import EnginePair, initial_params, row_sharding
from rlstab_jax.training.loop import first_train_state, minibatch, rollout_advantages
from rlstab_jax.training.queue import blank
from rlstab_jax.types import Rollout

# What is made anew when a field changes. The optimiser's state lies on the devices in every phase; of the programs of
# which it is no argument only that changes, and JAX does not compile them again.
_STATE = ("engines", "state", "_throughout", "prepare", "prefill", "resize", "decode", "score", "split", "update")
_SCORING = ("engines", "score", "whole", "split", "update")
AFFECTED = {
    "rollout.waves": ("engines", "rows", "records", "prefill", "resize", "decode"),
    "learner.score_micro_batches": _SCORING,
    "learner.logits_per_chunk": _SCORING,
    "learner.micro_batches": ("engines", "update"),
    "learner.remat": ("engines", "update"),
    "learner.offload_optimizer": _STATE,
    "learner.moments_dtype": _STATE,
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of the run as it is called.

    Attributes:
      name: of its phase.
      traced: `jax.stages.Traced`.
      parts: its arguments by what they are.
      kept: what else is on the devices while it runs.
    """

    name: str
    traced: Any
    parts: dict[str, Any]
    kept: dict[str, Any]

    @cached_property
    def compiled(self) -> Any:
        return self.traced.lower().compile()

    @property
    def compiles(self) -> bool:
        """Whether the compiler takes it: it refuses what is larger than a device."""
        try:
            return bool(self.compiled)
        except jax.errors.JaxRuntimeError:
            return False

    @property
    def result(self) -> Any:
        """Shapes of what it returns, at the places that the compiler has chosen."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.traced.out_info,
            self.compiled.output_shardings,
        )


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on each device; what the host's memory holds is not on it."""

    def of(leaf: Any) -> int:
        if leaf.sharding.memory_kind == HOST:
            return 0
        shape = leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize if leaf.dtype != KEY else math.prod(shape) * 8

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))


KEY = jax.eval_shape(lambda: jax.random.key(0)).dtype


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one global step of ``engines``, made when they are asked for."""

    engines: EnginePair

    def changed(self, engines: EnginePair, field: str) -> "Programs":
        """Those of engines whose config differs in ``field``, without compiling again what does not depend on it."""
        new = Programs(engines)
        new.__dict__.update({name: made for name, made in self.__dict__.items() if name not in AFFECTED[field]})
        return new

    def placed(self, shapes: Any, *axes: Any, row: bool = False) -> Any:
        """``shapes`` with their rows over the data-parallel devices (``row``), or with a spec for each dimension."""

        def of(leaf: Any) -> jax.ShapeDtypeStruct:
            mesh = self.engines.mesh
            sharding = row_sharding(mesh, leaf) if row else NamedSharding(mesh, PartitionSpec(*axes))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(of, shapes)

    @cached_property
    def params(self) -> dict:
        return self.engines.placed_like(lambda: initial_params(self.engines.training, 0))

    @cached_property
    def state(self) -> Any:
        engines = self.engines
        return engines.placed_like(lambda: first_train_state(engines, initial_params(engines.training, 0)))

    @property
    def _optimiser(self) -> Any:
        """What an update needs besides parameters and batch; PR2's predictors among it."""
        return self.state.opt_state, self.state.predictor

    @property
    def row_devices(self) -> int:
        """Devices that rows are split over."""
        return Layout(self.engines.mesh).row_parts

    @cached_property
    def rows(self) -> int:
        """Responses in flight at once."""
        config = self.engines.config
        return config.responses_per_step // config.rollout.waves

    @cached_property
    def prepare(self) -> Program:
        precision = self.engines.config.rollout.precision
        traced = prepare.trace(self.params, precision=precision, mesh=self.engines.mesh)
        kept = {"optimiser": self._optimiser, **self._throughout}
        return Program("prepare", traced, {"parameters": self.params}, kept)

    @cached_property
    def variables(self) -> dict:
        """The inference engine's weights."""
        return self.prepare.result

    @cached_property
    def rollout(self) -> Any:
        """Of the whole global step."""
        config, engines = self.engines.config, self.engines
        rows, prompt, response = config.responses_per_step, config.rollout.prompt_length, config.rollout.response_length
        records = jax.eval_shape(
            lambda: empty_records(engines.inference, engines.sampling.per_row(rows), rows, response, self.support, True)
        )
        routes = records.routes
        if routes is not None:
            shape = (routes.shape[0], rows, prompt + response - 1, routes.shape[3])
            routes = jax.ShapeDtypeStruct(shape, routes.dtype)
        shapes: dict[str, Any] = {
            "minimum": jax.eval_shape(lambda: engines.sampling.per_row(rows).minimum),
            "tokens": jax.ShapeDtypeStruct((rows, prompt + response), jnp.int32),
            "prompt_mask": jax.ShapeDtypeStruct((rows, prompt), jnp.bool_),
            "truncated": jax.ShapeDtypeStruct((rows,), jnp.bool_),
            "temperature": jax.ShapeDtypeStruct((rows,), jnp.float32),
        }
        whole = Rollout(
            response_mask=records.mask, log_probs=records.log_probs, routes=routes, support=records.support, **shapes
        )
        return self.placed(whole, row=True)

    @property
    def support(self) -> int:
        rollout = self.engines.config.rollout
        return rollout.support if truncates(rollout) else 0

    @cached_property
    def _throughout(self) -> dict[str, Any]:
        """What lies on the devices in every phase besides the training state: the parameters that RL began with, the
        batches that wait to be learnt from, and the state to go back to where the monitor may discard a step."""
        config, kept = self.engines.config, {}
        if config.needs_reference:
            kept["reference"] = self.params
        if config.rollout.lag:
            kept["waiting batches"] = self.engines.placed_like(lambda: blank(self.engines))
        if Monitor(config.monitor).may_discard:
            kept["previous state"] = self.state
        return kept

    @property
    def _attempts(self) -> dict[str, Any]:
        """Of dynamic sampling, while a later attempt samples: what came of those before."""
        return {"earlier attempts": self.rollout} if self.engines.config.rollout.attempts > 1 else {}

    @property
    def _beside_sampling(self) -> dict[str, Any]:
        """What lies on the devices while responses are sampled: the training state, and the waves before."""
        kept = {"training state": self.state, **self._throughout, **self._attempts}
        if self.engines.config.rollout.waves > 1:
            kept["rollout"] = self.rollout
        return kept

    @cached_property
    def prefill(self) -> Program:
        config = self.engines.config
        prompts = (self.rows // config.samples_per_prompt, config.rollout.prompt_length)
        tokens, mask = (self.placed(jax.ShapeDtypeStruct(prompts, dtype), row=True) for dtype in (jnp.int32, jnp.bool_))
        traced = jax.jit(prefill, static_argnums=0).trace(self.engines.inference, self.variables, tokens, mask)
        parts = {"weights": self.variables, "prompts": (tokens, mask)}
        return Program("prefill", traced, parts, self._beside_sampling)

    @cached_property
    def windows(self) -> list[int]:
        return windows(self.engines.config.rollout.response_length - 1)

    def slots(self, window: int) -> Slots:
        """What decoding carries, with a response window of that length."""
        config, engines = self.engines.config, self.engines
        prompts, length = self.rows // config.samples_per_prompt, config.rollout.prompt_length

        def make() -> Slots:
            shape = jnp.zeros((prompts, length), jnp.int32)
            variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.variables)
            caches = prefill(engines.inference, variables, shape, shape > 0).keys_values
            none = jnp.zeros(self.rows, jnp.int32)
            return Slots(
                keys=jax.random.split(jax.random.key(0), self.rows),
                sampling=engines.sampling.per_row(self.rows),
                limit=none,
                prompt_mask=shape > 0,
                count=none,
                active=none > 0,
                last=none,
                column=jnp.int32(0),
                prompt=caches,
                response=empty_responses(caches, self.rows, window),
            )

        shapes = jax.eval_shape(make)
        caches = {
            name: self.placed(getattr(shapes, name), Layout(self.engines.mesh).rows, "tensor")
            for name in ("prompt", "response")
        }
        bare = dataclasses.replace(shapes, prompt=[], response=[])
        return dataclasses.replace(self.placed(bare, row=True), **caches)

    @cached_property
    def records(self) -> Any:
        config, engines = self.engines.config, self.engines
        steps = config.rollout.response_length - 1
        make = partial(empty_records, engines.inference, support=self.support, slots=self.rows, steps=steps)
        return self.placed(
            jax.eval_shape(lambda: make(sampling=engines.sampling.per_row(self.rows), record_routes=True)), row=True
        )

    @cached_property
    def resize(self) -> Program | None:
        """From the last window but one to the last, where there are several: both caches exist at once."""
        if len(self.windows) < 2:
            return None
        before = self.slots(self.windows[-2])
        zero = self.placed(jax.ShapeDtypeStruct((), jnp.int32))
        traced = jax.jit(resize, static_argnames="window", donate_argnums=0).trace(before, zero, self.windows[-1])
        parts = {"KV cache": (before.prompt, before.response)}
        kept = {"weights": self.variables, "records": self.records, **self._beside_sampling}
        return Program("resize", traced, parts, kept)

    def decode_of(self, window: int) -> Any:
        """`decode` traced on a window of that length."""
        slots, number = self.slots(window), self.placed(jax.ShapeDtypeStruct((), jnp.int32))
        step = jax.jit(decode, static_argnames=("model", "support"), donate_argnames=("slots", "records"))
        return step.trace(self.engines.inference, self.variables, slots, self.records, number, number, self.support)

    @cached_property
    def decode(self) -> Program:
        slots, traced = self.slots(self.windows[-1]), self.decode_of(self.windows[-1])
        parts = {"weights": self.variables, "KV cache": (slots.prompt, slots.response), "records": self.records}
        return Program("decode", traced, parts, self._beside_sampling)

    def packing(self, rows: int, micro_batches: int) -> Packing | None:
        """Of so many responses of full length, which fill as many rows: no batch needs more."""
        config = self.engines.config
        if not config.learner.packing:
            return None
        fed = (rows, config.rollout.prompt_length + config.rollout.response_length - 1)
        source, place = (self.placed(jax.ShapeDtypeStruct(fed, jnp.int32), row=True) for _ in range(2))
        return Packing(source, place, self.row_devices, micro_batches)

    @cached_property
    def score(self) -> Program:
        engines, config, learner = self.engines, self.engines.config, self.engines.config.learner
        predictor = self.state.predictor
        variables = {"params": self.params} | ({PREDICTOR: predictor.weights} if predictor else {})
        traced = score.trace(
            engines.training,
            variables,
            self.rollout,
            replay=engines.replay,
            micro_batches=learner.score_micro_batches,
            logits_per_chunk=learner.logits_per_chunk,
            packing=self.packing(config.responses_per_step, learner.score_micro_batches),
            router=engines.needs_router,
            observed_tokens=learner.predictor_tokens if predictor else 0,
        )
        kept = {"optimiser": self._optimiser, **self._throughout}
        if config.rollout.log_probs == "rescore":  # by these, before the pass that is compiled here
            kept["weights"] = self.variables
        return Program("score", traced, {"parameters": variables, "rollout": self.rollout}, kept)

    @cached_property
    def whole(self) -> Minibatch:
        """The global batch, as it is before it is split into mini-batches."""
        engines, rows = self.engines, self.engines.config.responses_per_step
        # Where it does not compile, its results are taken to lie as its arguments do.
        old, _ = self.score.result if self.score.compiles else self.placed(self.score.traced.out_info, row=True)
        rewards, groups = (
            self.placed(jax.ShapeDtypeStruct((rows,), dtype), row=True) for dtype in (jnp.float32, jnp.int32)
        )
        reference = old.log_probs if engines.config.objective.needs_reference else None
        advantage = jax.eval_shape(
            partial(rollout_advantages, engines.objective), self.rollout, old, reference, rewards, groups
        )
        return Minibatch(self.rollout, old, self.placed(advantage, row=True), groups, reference)

    @cached_property
    def split(self) -> Program:
        config = self.engines.config
        rows = jax.ShapeDtypeStruct((config.prompts_per_minibatch * config.samples_per_prompt,), jnp.int32)
        traced = minibatch.trace(self.whole, self.placed(rows), self.engines.mesh)
        kept = {"training state": self.state, **self._throughout}
        return Program("split", traced, {"global batch": self.whole}, kept)

    @cached_property
    def update(self) -> Program:
        engines, learner = self.engines, self.engines.config.learner
        part = self.split.result if self.split.compiles else self.placed(self.split.traced.out_info, row=True)
        traced = update.trace(
            engines.training,
            self.state,
            part,
            self.placed(_shapes(engines.objective)),
            self.placed(_shapes(engines.numbers)),
            replay=engines.replay,
            micro_batches=learner.micro_batches,
            logits_per_chunk=learner.logits_per_chunk,
            use_router_losses=bool(learner.load_balance or learner.router_z),
            packing=self.packing(part.rollout.tokens.shape[0], learner.micro_batches),
            freeze=learner.freeze,
            teach=self.placed(jax.ShapeDtypeStruct((), jnp.bool_)) if self.state.predictor else None,
        )
        parts = {"parameters": self.state.params, "optimiser": self._optimiser, "mini-batch": part}
        return Program("update", traced, parts, {"global batch": self.whole, **self._throughout})


def _shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)
