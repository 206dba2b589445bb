"""The programs that make a batch, compiled ahead of time for devices that are not there; see `plan_programs`.

Sampling is one program in a run (`sample_batch`) of five windows, each with all layers unrolled; it is compiled in the
parts that it is made of: `prefill`, `resize` and `decode` at its last and largest window. Under continuous batching a
run calls programs of their own for these, and one that admits waiting prompts to slots. Rows of the cache are taken to
lie over the data-parallel devices, where their prompts are put, and its heads over ``tensor``.
"""

import dataclasses
import math
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlstab_jax.inference import prepare
from rlstab_jax.inference.continuous import (
    ROUND,
    admit,
    admitted_at_once,
    begin_slots,
    chunk_prompts,
    decode_round,
    round_windows,
)
from rlstab_jax.inference.slots import (
    Prefill,
    Slots,
    decode,
    empty_records,
    empty_responses,
    prefill,
    resize,
    windows,
)
from rlstab_jax.parallel.host_memory import HOST
from rlstab_jax.parallel.sharding import Layout
from rlstab_jax.stability.monitor import Monitor
from rlstab_jax.training.config import truncates
from rlstab_jax.training.engines import EnginePair, initial_params, row_sharding
from rlstab_jax.training.loop import first_train_state
from rlstab_jax.training.queue import blank
from rlstab_jax.types import Rollout

SAMPLING = ("prefill", "admit", "resize", "decode")
"""The phases that make a batch's responses; `admit` is of rounds."""


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


def placed(mesh: Mesh, shapes: Any, *axes: Any, row: bool = False) -> Any:
    """``shapes`` with their rows over the data-parallel devices (``row``), or with a spec for each dimension."""

    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = row_sharding(mesh, leaf) if row else NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(of, shapes)


@dataclasses.dataclass(frozen=True)
class SamplingPrograms:
    """The programs that make a batch of ``engines``, and what lies on the devices meanwhile."""

    engines: EnginePair

    @property
    def making(self) -> EnginePair:
        """On the devices that make batches: those set aside for it, or all."""
        return self.engines.making

    @property
    def aside(self) -> bool:
        return self.engines.rollout_mesh is not None

    def placed(self, shapes: Any, *axes: Any, row: bool = False) -> Any:
        """On the devices that make batches."""
        return placed(self.making.mesh, shapes, *axes, row=row)

    @cached_property
    def params(self) -> dict:
        """On the devices that make batches."""
        return self.making.placed_like(lambda: initial_params(self.engines.training, 0))

    @cached_property
    def state(self) -> Any:
        engines = self.engines
        return engines.placed_like(lambda: first_train_state(engines, initial_params(engines.training, 0)))

    @property
    def _optimiser(self) -> Any:
        """What an update needs besides parameters and batch; PR2's predictors among it."""
        return self.state.opt_state, self.state.predictor

    @property
    def rows(self) -> int:
        """Responses in flight at once."""
        return self.engines.config.in_flight

    @property
    def by_rounds(self) -> bool:
        """Whether the host looks at the responses between rounds of decoding: for free slots, or for strings."""
        rollout = self.engines.config.rollout
        return bool(rollout.slots or rollout.stop)

    @property
    def responses(self) -> int:
        """Of a wave."""
        config = self.engines.config
        return config.responses_per_step // config.rollout.waves

    @property
    def prompts(self) -> int:
        """That are prefilled at once."""
        samples = self.engines.config.samples_per_prompt
        return chunk_prompts(self.rows, samples, self.making.row_shards) if self.by_rounds else self.rows // samples

    @cached_property
    def prepare(self) -> Program:
        precision = self.engines.config.rollout.precision
        traced = prepare.trace(self.params, precision=precision, mesh=self.making.mesh)
        return Program("prepare", traced, {"parameters": self.params}, self._beside_making)

    @cached_property
    def variables(self) -> dict:
        """The inference engine's weights."""
        return self.prepare.result

    @cached_property
    def rollout(self) -> Any:
        """Of the whole global step."""
        config, engines = self.engines.config, self.making
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
    def _beside_making(self) -> dict[str, Any]:
        """What lies on the devices that make batches, besides the parameters that make them."""
        if self.aside:
            return {"reference": self.params} if self.engines.config.needs_reference else {}
        return {"optimiser": self._optimiser, **self._throughout}

    @property
    def _attempts(self) -> dict[str, Any]:
        """Of dynamic sampling, while a later attempt samples: what came of those before."""
        return {"earlier attempts": self.rollout} if self.engines.config.rollout.attempts > 1 else {}

    @property
    def _beside_sampling(self) -> dict[str, Any]:
        """What lies on the devices while responses are sampled: the training state, and the waves before."""
        of_making = {"parameters": self.params, **self._beside_making}
        kept = (of_making if self.aside else {"training state": self.state, **self._throughout}) | self._attempts
        if self.engines.config.rollout.waves > 1:
            kept["rollout"] = self.rollout
        return kept

    @property
    def _fed(self) -> tuple[Any, Any]:
        """Prompts that are prefilled at once and their mask, which a host that makes rounds feeds to each device."""
        shape = (self.prompts, self.engines.config.rollout.prompt_length)
        tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
        return self.placed((tokens, mask), row=not self.by_rounds)

    @cached_property
    def prefill(self) -> Program:
        traced = jax.jit(prefill, static_argnums=0).trace(self.making.inference, self.variables, *self._fed)
        parts = {"weights": self.variables, "prompts": self._fed}
        kept = self._beside_sampling
        if self.by_rounds:
            slots = self.slots(self.windows[0])
            kept |= {"KV cache": (slots.prompt, slots.response), "responses": self.results}
            if self.responses > self.rows:
                kept["prefilled before"] = self._lying(traced.out_info)
        return Program("prefill", traced, parts, kept)

    @property
    def _prefilled(self) -> dict[str, Any]:
        """Of rounds: keys and values of the prompts whose responses wait for slots, or are in them."""
        if not self.by_rounds:
            return {}
        program = self.prefill
        return {"prefilled": program.result if program.compiles else self._lying(program.traced.out_info)}

    def _lying(self, filled: Prefill) -> Prefill:
        """Where the compiler is taken to put them, if it is not asked."""
        caches = self.placed(filled.keys_values, Layout(self.making.mesh).rows, "tensor")
        others = self.placed(dataclasses.replace(filled, keys_values=[]), row=True)
        return dataclasses.replace(others, keys_values=caches)

    @cached_property
    def admit(self) -> Program | None:
        """Of rounds: gives free slots to waiting prompts."""
        if not self.by_rounds:
            return None
        config, engines, count = self.engines.config, self.making, admitted_at_once(self.rows)
        slots, filled = self.slots(self.windows[-1]), self._prefilled["prefilled"]
        numbers = [self.placed(jax.ShapeDtypeStruct((count,), jnp.int32)) for _ in range(3)]
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.responses))
        sampling = jax.eval_shape(lambda: engines.sampling.per_row(self.responses))
        traced = admit.trace(
            engines.inference.layout, slots, self.results, filled, self._fed[1], *numbers, self.placed(keys),
            self.placed(sampling), config.rollout.response_length, self.support,
        )  # fmt: skip
        cache = (slots.prompt, slots.response)
        parts = {"KV cache": cache, "responses": self.results, "prefilled": filled}
        return Program("admit", traced, parts, {"weights": self.variables, **self._beside_sampling})

    @cached_property
    def windows(self) -> list[int]:
        length = self.engines.config.rollout.response_length
        return round_windows(length) if self.by_rounds else windows(length - 1)

    def _begun(self, window: int) -> tuple[Slots, Rollout]:
        """Of rounds: idle slots with a window of that length, and the buffers of a wave's results."""
        config, engines = self.engines.config, self.making
        shape = (self.responses // config.samples_per_prompt, config.rollout.prompt_length)

        def make() -> tuple[Slots, Rollout]:
            tokens = jnp.zeros(shape, jnp.int32)
            variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.variables)
            keys = jax.random.split(jax.random.key(0), self.responses)
            return begin_slots(
                engines.inference, variables, tokens, tokens > 0, engines.sampling.per_row(self.responses), keys,
                config.samples_per_prompt, config.rollout.response_length, self.rows, window, self.support, True,
            )  # fmt: skip

        return jax.eval_shape(make)

    @cached_property
    def results(self) -> Any:
        """Of rounds: the buffers that they write to."""
        return self.placed(self._begun(self.windows[0])[1], row=True)

    def slots(self, window: int) -> Slots:
        """What decoding carries, with a response window of that length."""
        engines, length = self.making, self.engines.config.rollout.prompt_length

        def make() -> Slots:
            shape = jnp.zeros((self.prompts, length), jnp.int32)
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

        shapes = self._begun(window)[0] if self.by_rounds else jax.eval_shape(make)
        places = {
            name: self.placed(getattr(shapes, name), Layout(self.making.mesh).rows, "tensor")
            for name in ("prompt", "response")
        }
        if self.by_rounds:  # what the host looks at
            places |= {name: self.placed(getattr(shapes, name)) for name in ("count", "active")}
        bare = dataclasses.replace(shapes, prompt=[], response=[])
        return dataclasses.replace(self.placed(bare, row=True), **places)

    @cached_property
    def records(self) -> Any:
        config, engines = self.engines.config, self.making
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
        kept = {"weights": self.variables, **self._prefilled, **self._beside_sampling}
        if self.by_rounds:
            kept |= {"prompts' cache": before.prompt, "responses": self.results}
            before = dataclasses.replace(before, prompt=[])
        else:
            kept["records"] = self.records
        zero = self.placed(jax.ShapeDtypeStruct((), jnp.int32))
        donated = () if self.by_rounds else 0
        traced = jax.jit(resize, static_argnames="window", donate_argnums=donated).trace(before, zero, self.windows[-1])
        return Program("resize", traced, {"KV cache": (before.prompt, before.response)}, kept)

    def decode_of(self, window: int) -> Any:
        """`decode`, or a round of it, traced on a window of that length."""
        slots, number = self.slots(window), self.placed(jax.ShapeDtypeStruct((), jnp.int32))
        if self.by_rounds:
            rows = self.placed(jax.ShapeDtypeStruct((self.rows,), jnp.int32))
            return decode_round.trace(
                self.making.inference, self.variables, slots, self.results, rows, self.support, True, ROUND
            )
        step = jax.jit(decode, static_argnames=("model", "support"), donate_argnames=("slots", "records"))
        return step.trace(self.making.inference, self.variables, slots, self.records, number, number, self.support)

    @cached_property
    def decode(self) -> Program:
        slots, traced = self.slots(self.windows[-1]), self.decode_of(self.windows[-1])
        drawn = {"responses": self.results} if self.by_rounds else {"records": self.records}
        parts = {"weights": self.variables, "KV cache": (slots.prompt, slots.response), **drawn}
        return Program("decode", traced, parts, {**self._prefilled, **self._beside_sampling})
