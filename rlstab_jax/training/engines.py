"""Everything of a run that does not change while it runs: task, models, objective, devices. Built and checked once."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from rlstab_jax.inference import Sampling, StopStrings, stop_strings
from rlstab_jax.learner import Minibatch, PolicyScores, TrainState, state_shardings
from rlstab_jax.learner.optimizer import check_frozen, offloaded
from rlstab_jax.learner.update import LearnerNumbers
from rlstab_jax.models import Transformer, expert_parallel, resolve_kernels
from rlstab_jax.models.huggingface import parameter_shapes
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.objectives import Objective, advantages, fit
from rlstab_jax.objectives import build as build_objective
from rlstab_jax.parallel.distributed import put
from rlstab_jax.parallel.host_memory import check_offload
from rlstab_jax.parallel.mesh import make_mesh
from rlstab_jax.parallel.process import check_devices
from rlstab_jax.parallel.sharding import INFERENCE, TRAINING, Layout, check_divides, shardings
from rlstab_jax.tasks import Task, build_task, decode_text
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.kernel_check import check_kernels
from rlstab_jax.training.pretrained import load_parameters, longest, matched
from rlstab_jax.training.validate import validate
from rlstab_jax.types import Rollout, RoutingReplay, UserError, row_axis

GROUP_RELATIVE = (
    advantages.group_mean,
    advantages.group_mean_std,
    advantages.leave_one_out,
    advantages.batch_normalised,
)
ROWS = (Minibatch, Rollout, PolicyScores)
"""Types of which every array has the rows of a batch."""


@dataclasses.dataclass(frozen=True)
class EnginePair:
    """The two engines and what they share, for any task. ``inference`` and ``training`` differ in precision alone."""

    config: RunConfig  # as resolved: kernels, vocabulary and lengths are filled in
    mesh: Mesh
    rollout_mesh: Mesh | None  # of the devices that are set aside for making batches
    inference: Transformer
    training: Transformer
    objective: Objective
    needs_router: bool  # whether the objective reads the routers' log probabilities
    numbers: LearnerNumbers
    replay: RoutingReplay
    sampling: Sampling

    @property
    def making(self) -> Self:
        """The engines that make batches: on the devices set aside, or else these."""
        if self.rollout_mesh is None:
            return self
        inference, training = (model.clone(mesh=self.rollout_mesh) for model in (self.inference, self.training))
        return dataclasses.replace(self, mesh=self.rollout_mesh, inference=inference, training=training)

    @property
    def overlaps(self) -> bool:
        """Whether batches are made while updates run. Not where virtual CPU devices do it: see `settle`."""
        return self.rollout_mesh is not None and not (_starves(self.mesh) or _starves(self.rollout_mesh))

    @property
    def training_sampler(self) -> Transformer:
        """The training engine to sample with: weights from `prepare`, and no gradient."""
        return self.training.clone(remat="none", rules=INFERENCE)

    def places(self, tree: Any) -> Any:
        """A sharding for each leaf: training states and parameters by the table ``TRAINING``, rows of a batch over the
        data-parallel devices, all else on each device.

        A dict is taken for parameters. On one device all of these are the same place, and one name for it keeps a
        function from being traced again for its own result.
        """
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        alone = self.mesh.size == 1

        def of(node: Any) -> Any:
            if isinstance(node, TrainState):
                one = jax.tree.map(lambda _: everywhere, node)
                places = one if alone else state_shardings(self.mesh, node, TRAINING)
                return offloaded(places, node) if self.config.learner.offload_optimizer else places
            if isinstance(node, dict) and not alone:
                return shardings(self.mesh, logical_axes(node), TRAINING)
            if isinstance(node, ROWS) and not alone:
                return jax.tree.map(partial(row_sharding, self.mesh), node)
            return jax.tree.map(lambda _: everywhere, node)

        return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, (TrainState, dict, *ROWS)))

    def place(self, tree: Any) -> Any:
        """Puts a state onto the mesh, a fresh one like a restored one, so that each function is compiled once."""
        return put(tree, self.places(tree))

    def begin(self, make: Callable[[dict], TrainState], params: dict) -> TrainState:
        """``place(make(params))``, of which all but the parameters is made where it is kept: moments that are kept in
        few bits, or in the host's memory, never take the room of those that are not."""

        def rest(params: dict) -> TrainState:
            return dataclasses.replace(make(params), params={})

        places = dataclasses.replace(self.places(jax.eval_shape(make, params)), params={})
        state = jax.jit(rest, out_shardings=places)(params)
        return dataclasses.replace(state, params=self.place(params))

    def placed_like(self, make: Callable[[], Any]) -> Any:
        """Shapes, dtypes and places of what ``place(make())`` would return, without computing it."""
        shapes = jax.eval_shape(make)

        def at(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(at, shapes, self.places(shapes))

    def settle(self, tree: Any) -> Any:
        """Waits for ``tree`` where several virtual CPU devices share a few cores, and returns it.

        Collectives of programs that are in flight together can starve each other of threads there, for ever.
        """
        return jax.block_until_ready(tree) if _starves(self.mesh) else tree

    @property
    def row_shards(self) -> int:
        """Devices, or groups of them, that the rows of a batch are split over."""
        return Layout(self.mesh).row_parts

    def place_rows(self, tree: Any) -> Any:
        """Puts arrays that travel onto the mesh, their rows over the data-parallel devices."""
        return put(tree, jax.tree.map(partial(row_sharding, self.mesh), tree))


def _starves(mesh: Mesh) -> bool:
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def row_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Where an array that travels lies: its rows over the data-parallel devices; a scalar on each."""
    axes: list[tuple[str, ...] | None] = [None] * np.ndim(leaf)
    if axes:
        axes[row_axis(leaf)] = Layout(mesh).rows
    return NamedSharding(mesh, PartitionSpec(*axes))


@dataclasses.dataclass(frozen=True)
class Engines(EnginePair):
    """Engines with the task that they are trained on, and the strings that end its responses, if there are any."""

    task: Task
    stop: StopStrings | None


def build(config: RunConfig) -> Engines:
    """Checks ``config`` and builds what it describes. Raises UserError before any long work."""
    validate(config)
    check_devices()
    task = build_task(config.task)
    check_host_memory(config, jax.local_devices())
    if config.initial:
        config = dataclasses.replace(config, model=matched(config.model, Path(config.initial)))
    config = resolved(config, task)
    heldout, evaluation, cold_start = len(task.split("heldout")), config.evaluation, config.cold_start
    if (
        max(evaluation.prompts * bool(evaluation.every), cold_start.check_prompts * bool(cold_start.max_steps))
        > heldout
    ):
        raise UserError(
            f"evaluation.prompts = {config.evaluation.prompts} and cold_start.check_prompts = "
            f"{config.cold_start.check_prompts}, but the task holds out {heldout} prompts: "
            "ask for fewer, or hold out more"
        )
    tokenizer, both = task.tokenizer, meshes(config, jax.devices())
    pair = build_pair(config, *both, jax.default_backend(), tokenizer.stop_ids, tokenizer.pad_id)
    texts = config.rollout.stop
    stop = stop_strings(texts, tokenizer.encode, partial(decode_text, tokenizer)) if texts else None
    return Engines(**vars(pair), task=task, stop=stop)


def check_host_memory(config: RunConfig, devices: Sequence[Any]) -> None:
    """Raises UserError where ``config`` keeps something in the host's memory, and one of ``devices`` cannot read it."""
    if config.learner.remat == "offload":
        check_offload(devices, "learner.remat = 'offload'")
    if config.learner.offload_optimizer:
        check_offload(devices, "learner.offload_optimizer = True")


def resolved(config: RunConfig, task: Task) -> RunConfig:
    """``config`` with the vocabulary and the lengths that it leaves to the task. Raises UserError where they are less
    than the task needs."""
    model, tokenizer = config.model, task.tokenizer
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {model.vocab_size} is below the tokeniser's {tokenizer.vocab_size}: raise it, or use 0"
        )
    rollout = config.rollout
    rollout = dataclasses.replace(
        rollout,
        prompt_length=rollout.prompt_length or task.max_prompt_tokens,
        response_length=rollout.response_length or task.max_response_tokens,
    )
    if rollout.prompt_length < task.max_prompt_tokens:
        raise UserError(
            f"rollout.prompt_length = {rollout.prompt_length}, but the task's prompts have up to "
            f"{task.max_prompt_tokens} tokens: raise it, or use 0"
        )
    if rollout.overlong_margin > rollout.response_length:
        raise UserError(
            f"rollout.overlong_margin = {rollout.overlong_margin} exceeds the response's space of "
            f"{rollout.response_length} tokens: lower it"
        )
    if rollout.min_new_tokens >= rollout.response_length:
        raise UserError(
            f"rollout.min_new_tokens = {rollout.min_new_tokens} leaves no room for a stop token in the response's "
            f"{rollout.response_length} tokens: lower it"
        )
    if rollout.partial and (rollout.lag - 1) * rollout.partial >= rollout.response_length:
        raise UserError(
            f"rollout.partial = {rollout.partial}: {rollout.lag - 1} rounds of so many tokens leave none of the "
            f"response's {rollout.response_length} to the last round: lower it, or the lag"
        )
    return dataclasses.replace(config, model=model, rollout=rollout)


def build_pair(
    config: RunConfig, mesh: Mesh, rollout_mesh: Mesh | None, platform: str, stop_ids: Sequence[int], pad_id: int
) -> EnginePair:
    """The engines of a resolved config on the devices of ``mesh``, which need not be there.

    Args:
      config: as `resolved` returns it.
      mesh, rollout_mesh: as of `meshes`, of any devices.
      platform: theirs, "cpu", "gpu" or "tpu".
      stop_ids, pad_id: of the tokeniser.

    Raises:
      UserError: the mesh does not divide the model or the batch, or the objective does not fit the config.
    """
    rollout, model = config.rollout, config.model
    kernels = resolve_kernels(config.kernels, platform, rollout.prompt_length + rollout.response_length)
    sampling_mesh = rollout_mesh or mesh
    making = "rollout.mesh" if rollout_mesh else "mesh"
    rows = {"mesh": Layout(mesh).row_parts, making: Layout(sampling_mesh).row_parts}
    at_once = config.prompts_per_step // rollout.waves
    batches = [
        ("prompts_per_minibatch", config.prompts_per_minibatch, "mesh"),
        ("prompts_per_minibatch x minibatches / rollout.waves", at_once, making),
        ("rollout.slots", rollout.slots, making),
    ]
    if config.evaluation.every:
        batches.append(("rollout.slots", rollout.slots, "mesh"))
    if config.cold_start.max_steps:
        batches.append(("cold_start.batch_size", config.cold_start.batch_size, "mesh"))
    for name, size, on in batches:
        parts = rows[on]
        if size % parts:
            raise UserError(
                f"{name} = {size} does not divide over {parts} data-parallel devices ({on}.data x {on}.fsdp x "
                f"{on}.expert): choose a multiple of {parts}"
            )
    _check_parts(config, rows, making)
    objective = build_objective(config.objective)
    fit.check(objective)
    needs_router = fit.reads(objective, "router")
    if needs_router and not model.num_moe_layers:
        raise UserError(
            f"objective {config.objective.label!r} reads the routers' log probabilities, but the model is dense: use "
            "another objective, or give it experts"
        )
    if config.samples_per_prompt == 1 and objective.advantage.func in GROUP_RELATIVE:
        raise UserError(
            f"samples_per_prompt = 1, but objective {config.objective.label!r} compares the responses of one prompt: "
            "all advantages would be 0; use at least 2, or an objective with another baseline"
        )
    if rollout.attempts > 1 and objective.advantage.func not in GROUP_RELATIVE:
        raise UserError(
            f"rollout.attempts = {rollout.attempts}, but under objective {config.objective.label!r} responses of equal "
            "rewards teach, too, and dynamic sampling would replace them; use 1, or an advantage within groups"
        )
    config = dataclasses.replace(config, kernels=kernels)
    learner = config.learner
    training = Transformer(model, learner.precision, kernels, learner.remat, learner.unroll, mesh)
    inference = Transformer(model, rollout.precision, kernels.for_inference(), mesh=mesh, rules=INFERENCE)
    if learner.freeze:
        check_frozen(parameter_shapes(model), learner.freeze)
    for one in {mesh, sampling_mesh}:
        if one.size > 1:
            shapes = parameter_shapes(model)
            check_divides(one, shapes, logical_axes(shapes), TRAINING)
            if model.num_moe_layers:
                for precision in (rollout.precision, learner.precision):
                    expert_parallel.shared_scales(model.expert_dim, precision, Layout(one))
    sampling = Sampling(
        temperature=np.float32(rollout.temperature),
        top_k=np.int32(rollout.top_k),
        top_p=np.float32(rollout.top_p),
        min_p=np.float32(rollout.min_p),
        uniform=np.float32(rollout.uniform) if rollout.uniform else None,
        min_new_tokens=np.int32(rollout.min_new_tokens) if rollout.min_new_tokens else None,
        stop_ids=np.array(stop_ids, np.int32),
        pad_id=np.int32(pad_id),
    )
    check_kernels(config, training, inference, sampling)
    return EnginePair(
        config=config,
        mesh=mesh,
        rollout_mesh=rollout_mesh,
        inference=inference,
        training=training,
        objective=objective,
        needs_router=needs_router,
        numbers=config.learner.numbers(),
        replay=RoutingReplay(config.learner.replay),
        sampling=sampling,
    )


def _check_parts(config: RunConfig, row_parts: dict[str, int], making: str) -> None:
    """Raises UserError unless each device has equally many rows of each part: else some would compute others' rows.

    ``row_parts`` has the row devices of each mesh by its field, ``making`` the field of that which makes batches.
    """
    learner, minibatch = config.learner, config.prompts_per_minibatch * config.samples_per_prompt
    for name, batch, micro_batches, on in (
        ("learner.micro_batches", minibatch, learner.micro_batches, "mesh"),
        ("learner.score_micro_batches", config.responses_per_step, learner.score_micro_batches, making),
    ):
        if batch % (micro_batches * row_parts[on]):
            raise UserError(
                f"{name} = {micro_batches}: {batch} responses do not divide into so many parts over {row_parts[on]} "
                f"data-parallel devices ({on}); lower it"
            )


def meshes(config: RunConfig, devices: Sequence[Any]) -> tuple[Mesh, Mesh | None]:
    """The mesh that trains, and that of the last ``rollout.devices`` of ``devices``, which makes batches, or None.

    Raises UserError where there are too few devices, or those of several processes, which are not set aside.
    """
    aside = config.rollout.devices
    if not aside:
        return make_mesh(config.mesh, devices), None
    if (processes := len({device.process_index for device in devices})) > 1:
        raise UserError(
            f"rollout.devices = {aside} with {processes} processes: devices are set aside within one process; use 0"
        )
    if aside >= len(devices):
        raise UserError(
            f"rollout.devices = {aside}, but there are {len(devices)} devices and at least one must train: lower it"
        )
    return make_mesh(config.mesh, devices[:-aside]), make_mesh(config.rollout.mesh, devices[-aside:])


@partial(jax.jit, static_argnames="model")
def initial_params(model: Transformer, seed: Int[Array, ""] | int) -> dict:
    """Random float32 parameters, from the cold start's seed."""
    model = model.clone(mesh=None)  # they depend on no activation
    return model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))["params"]


def beginning(engines: Engines, seed: int, say: Callable[[str], None] = print) -> dict:
    """The parameters that a run begins from, on the mesh: those in ``config.initial``, else random ones."""
    if not engines.config.initial and engines.mesh.size == 1:
        return engines.place(initial_params(engines.training, np.uint32(seed)))
    if not engines.config.initial:  # made where they belong: one device may not hold them all
        make = partial(initial_params, engines.training)
        return jax.jit(make, out_shardings=engines.places(jax.eval_shape(make, 0)))(np.uint32(seed))
    directory = Path(engines.config.initial)
    _, params = load_parameters(directory, engines.placed_like(lambda: initial_params(engines.training, 0)), say=say)
    say(f"beginning from the parameters in {directory}")
    rollout = engines.config.rollout
    if (tokens := rollout.prompt_length + rollout.response_length) > longest(directory):
        say(
            f"a prompt with its response may have {tokens} tokens, but the model was made for {longest(directory)} "
            "(max_position_embeddings)"
        )
    return engines.place(params)
