"""The cold start: supervised training on a task's demonstrations until a chosen accuracy, cached between runs.

An unfinished one is kept beside the cache's entries, so that the next run goes on with it: on CPU bit for bit as if it
had never been stopped.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlstab_jax.learner import TrainState, init_state
from rlstab_jax.learner.loss_scale import scaled_gradient
from rlstab_jax.learner.score import policy_scores
from rlstab_jax.learner.update import LearnerConfig, LearnerNumbers, accumulate, apply_gradient
from rlstab_jax.models import Transformer
from rlstab_jax.own_code import code_of
from rlstab_jax.parallel.distributed import by_first, first
from rlstab_jax.rundir import plain, set_aside
from rlstab_jax.tasks import Dataset, DemonstratedTask, DescribedTask, Prompt, encode_prompts, prompt_iterator
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.checksum import checksums
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import Engines, beginning, initial_params
from rlstab_jax.training.evaluate import accuracy, plain_sampling
from rlstab_jax.training.interrupt import Stop
from rlstab_jax.training.lock import held
from rlstab_jax.types import Rollout, UserError, one_line

SAVE_EVERY = 300.0
"""Seconds between saves of an unfinished cold start; it is also saved when it is stopped."""


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """Parameters to begin RL with, the held-out accuracy that they reached, and the updates it took."""

    params: dict
    accuracy: float
    steps: int


def cold_start(
    engines: Engines, cache: Path | None, say: Callable[[str], None] = print, stop: Stop | None = None
) -> ColdStart | None:
    """Trains on demonstrations until the target accuracy, or takes an equal cold start from ``cache``.

    Args:
      engines: of the run; its task must have demonstrations.
      cache: a directory shared by runs; entries are named by a hash of all that determines the result. None keeps
        nothing.
      stop: when it is requested, the result is None; what has been done is kept in ``cache``.

    Raises:
      UserError: the task has no demonstrations, or the target was not reached within the given steps.
    """
    config, task = engines.config.cold_start, engines.task
    if config.max_steps == 0:
        return ColdStart(beginning(engines, config.seed, say), float("nan"), 0)
    if not isinstance(task, DemonstratedTask):
        raise UserError(
            "cold_start.max_steps is above 0, but this task has no demonstrations: set it to 0, or give the task a "
            "`demonstration` method"
        )
    _check_demonstrations(engines, task)
    params = beginning(engines, config.seed, say)
    # What is in the directory tells two beginnings apart, not its name.
    if cache is None:
        return _train(engines, task, params, say, stop or Stop())
    initial = checksums(params) if engines.config.initial else None
    entry = cache / _fingerprint(engines, initial)
    if (kept := _from_cache(engines, entry, params, say)) is not None:
        return kept
    # Whatever the steps that are allowed: with more of them it goes on.
    unfinished = cache / f"{_fingerprint(engines, initial, max_steps=0)}.unfinished"
    with _saves(unfinished, entry, say) as saves:
        if (kept := _from_cache(engines, entry, params, say)) is not None:  # made meanwhile
            return kept
        result = _train(engines, task, params, say, stop or Stop(), saves)
        if result is not None:
            _keep(entry, result, say)
    return result


def _keep(entry: Path, result: ColdStart, say: Callable[[str], None]) -> None:
    cache = entry.parent

    def make_aside() -> Path:
        cache.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=cache))

    def keep() -> None:
        try:
            os.rename(aside, entry)  # whole or not at all; of two runs that do this at once, one keeps its copy
        except OSError:
            shutil.rmtree(aside)

    aside = by_first(make_aside)
    with Checkpoints(aside, notify=say) as checkpoints:
        checkpoints.save(result.steps, {"params": result.params}, {"accuracy": result.accuracy})
    by_first(keep)


@contextlib.contextmanager
def _saves(directory: Path, entry: Path, say: Callable[[str], None]) -> Iterator[Checkpoints | None]:
    """Where a cold start is saved until it is kept as ``entry``. None while another process makes the same one."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(directory))
            alone = True
        except UserError:
            say("cold start: another process makes the same one and saves it; this one is not saved before its end")
            alone = False
        if not alone:
            yield None
            return
        try:
            with Checkpoints(directory, keep_last=1, keep_best=False, notify=say) as checkpoints:
                yield checkpoints
        finally:
            if first() and (entry.exists() or not any(directory.glob("[0-9]*"))):
                shutil.rmtree(directory, ignore_errors=True)


def _from_cache(engines: Engines, entry: Path, template: dict, say: Callable[[str], None]) -> ColdStart | None:
    """What is kept in ``entry``; None if it is not there, or cannot be used, which is said, and it is set aside."""
    if not by_first(entry.exists):
        return None
    try:
        with Checkpoints(entry, read_only=True, notify=lambda line: None) as checkpoints:
            restored, why = checkpoints.restore({"params": template}), f"{entry} holds no checkpoint"
    except UserError as error:
        restored, why = None, str(error)
    if restored is None:
        aside = by_first(lambda: set_aside(entry))
        say(f"cold start: it is made again, since the kept one cannot be used and is now {aside}: {why}")
        return None
    steps, state, progress = restored
    say(f"cold start: accuracy {progress['accuracy']:.3f} after {steps} updates, from {entry}")
    return ColdStart(engines.place(state["params"]), progress["accuracy"], steps)


def _fingerprint(engines: Engines, initial: dict[str, int] | None = None, **but: Any) -> str:
    """Of all that determines the result, ``but`` for fields of the cold start's config, and but for rounding: the mesh,
    tiles of logits and what is computed again change the order of sums, and runs that differ in them share it."""
    config = engines.config
    determines: dict[str, Any] = {
        "task": config.task,
        "model": config.model,
        "cold_start": dataclasses.replace(config.cold_start, **but),
        "precision": config.learner.precision,
        "kernels": config.kernels,
        "lengths": (config.rollout.prompt_length, config.rollout.response_length),
        "content": engines.task.description if isinstance(engines.task, DescribedTask) else None,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }
    if code := code_of(config.task):  # a task of one's own is known by its source, not by its fields alone
        determines["code"] = code
    if (parts := _micro_batches(config, engines.row_shards)) > 1:  # sums in another order
        determines["micro_batches"] = parts
    if config.learner.moments_dtype != "float32":
        determines["moments_dtype"] = config.learner.moments_dtype
    if initial is not None:
        determines["initial"] = initial
    return hashlib.sha256(json.dumps(plain(determines), sort_keys=True).encode()).hexdigest()[:16]


def _train(
    engines: Engines,
    task: DemonstratedTask,
    params: dict,
    say: Callable[[str], None],
    stop: Stop,
    saves: Checkpoints | None = None,
) -> ColdStart | None:
    config = engines.config.cold_start
    learner = LearnerConfig(learning_rate=config.learning_rate, warmup_steps=0)
    numbers = learner.numbers()
    kept = engines.config.learner
    fresh = partial(init_state, numbers=numbers, moments_dtype=kept.moments_dtype, precision=kept.precision)
    template = engines.placed_like(lambda: fresh(initial_params(engines.training, 0)))
    saves, begun = _unfinished(saves, template, say)
    prompts = prompt_iterator(task.split("train"), config.batch_size, seed=config.seed + 1)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    # Not as the config's evaluations draw: runs that differ in those share a cold start.
    check = partial(
        accuracy,
        engines,
        engines.training_sampler,
        key=key,
        prompts=config.check_prompts,
        samples=1,
        sampling=plain_sampling(engines),
    )
    logits_per_chunk = kept.logits_per_chunk
    micro_batches = _micro_batches(engines.config, engines.row_shards)
    step, best, saved = 0, 0.0, time.monotonic()
    if begun is None:
        state = engines.begin(fresh, params)
    else:
        jax.tree.map(lambda leaf: leaf.delete(), params)  # there may be no room for them
        step, state, progress = begun
        state, best = engines.place(state), progress["best"]
        prompts.set_state(progress["prompts"])
        say(f"cold start: going on after {step} updates")

    def save(last: bool = False) -> None:
        nonlocal saves
        try:
            if saves is not None and step:
                saves.save(step, state, {"best": best, "prompts": prompts.get_state()})
            if saves is not None and last:
                saves.wait()
        except UserError as error:  # a full disk, or another process where the file system has no locks
            if jax.process_count() > 1:  # the others may have saved, and wait for this one
                raise
            say(f"cold start: it cannot be saved before its end: {error}")
            saves = None

    def due() -> bool:
        return time.monotonic() - saved > SAVE_EVERY

    while step < config.max_steps:
        step += 1
        batch = demonstrations(engines, task, next(prompts), seed=step)
        rows = engines.place_rows(batch)
        state, _ = supervised_update(engines.training, state, rows, numbers, logits_per_chunk, micro_batches)
        if engines.mesh.size > 1:
            state = engines.settle(engines.place(state))
        if step % config.check_every == 0 or step == config.max_steps:
            reached = check(state.params).mean
            best = max(best, reached)
            if reached >= config.target_accuracy:
                say(f"cold start: accuracy {reached:.3f} after {step} updates")
                return ColdStart(state.params, reached, step)
        if by_first(due):  # after the check, which whoever goes on does not repeat
            save()
            saved = time.monotonic()
        if stop.agreed():
            save(last=True)
            return None
    save(last=True)
    raise UserError(
        f"cold start: accuracy {best:.3f} after cold_start.max_steps = {config.max_steps} updates, short of "
        f"cold_start.target_accuracy = {config.target_accuracy}: raise the steps, or lower the target"
    )


def _unfinished(
    saves: Checkpoints | None, template: TrainState, say: Callable[[str], None]
) -> tuple[Checkpoints | None, tuple[int, TrainState, dict[str, Any]] | None]:
    """Where to save, and what was saved there. What cannot be used is said, and stays as it is if it is not damaged."""
    if saves is None:
        return None, None
    try:
        return saves, saves.restore(template)
    except UserError as error:
        say(f"cold start: it begins anew: {error}")
    if saves.steps():
        say(f"cold start: it is not saved before its end; remove {saves.directory}")
        return None, None
    return saves, None


def demonstrations(engines: Engines, task: DemonstratedTask, prompts: list[Prompt], seed: int) -> Rollout:
    """Prompts with demonstrated answers, each ended by a stop token, in the layout of a rollout.

    Raises UserError for an answer that is longer than the response's space.
    """
    rollout, tokenizer = engines.config.rollout, task.tokenizer
    tokens, prompt_mask = encode_prompts(prompts, tokenizer, rollout.prompt_length)
    responses = np.full((len(prompts), rollout.response_length), tokenizer.pad_id, np.int32)
    mask = np.zeros(responses.shape, bool)
    for row, prompt in enumerate(prompts):
        ids = _demonstrated(engines, task, prompt, seed)
        responses[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return Rollout(
        tokens=jnp.asarray(np.concatenate([tokens, responses], axis=1)),
        prompt_mask=jnp.asarray(prompt_mask),
        response_mask=jnp.asarray(mask),
        log_probs=jnp.zeros(mask.shape, jnp.float32),
        truncated=jnp.zeros(len(prompts), bool),
        routes=None,
        temperature=jnp.ones(len(prompts), jnp.float32),
    )


def _demonstrated(engines: Engines, task: DemonstratedTask, prompt: Prompt, seed: int) -> list[int]:
    of = f"the demonstration of prompt {prompt.id} ({prompt.text[:60]!r})"
    try:
        ids = [*task.tokenizer.encode(task.demonstration(prompt, seed)), task.tokenizer.stop_ids[0]]
    except UserError:
        raise
    except Exception as error:  # whatever a user's method may raise
        raise UserError(f"{of} failed: {one_line(error)}") from error
    length = engines.config.rollout.response_length
    if len(ids) > length:
        raise UserError(
            f"{of} has {len(ids)} tokens, but rollout.response_length = {length}: raise it, use 0, or leave the "
            "record out"
        )
    return ids


def _check_demonstrations(engines: Engines, task: DemonstratedTask) -> None:
    """Raises UserError where a record of files demonstrates nothing, or more than the response's space holds: before
    the first update, since its batch may come hours later."""
    if isinstance(task, Dataset):
        source = task.split("train")
        for i in range(len(source)):
            _demonstrated(engines, task, source[i], seed=0)


def _micro_batches(config: RunConfig, row_shards: int) -> int:
    """Into how many parts a batch of demonstrations is split: where RL's mini-batches are split, no part has more rows
    than theirs, if the sizes allow it."""
    learner, batch = config.learner, config.cold_start.batch_size
    if learner.micro_batches == 1:
        return 1
    rows = config.prompts_per_minibatch * config.samples_per_prompt // learner.micro_batches
    fitting = (size for size in range(rows, 0, -1) if batch % size == 0 and size % row_shards == 0)
    return batch // next(fitting, batch)


@partial(jax.jit, static_argnames=("model", "logits_per_chunk", "micro_batches"), donate_argnames="state")
def supervised_update(
    model: Transformer,
    state: TrainState,
    batch: Rollout,
    numbers: LearnerNumbers,
    logits_per_chunk: int,
    micro_batches: int = 1,
) -> tuple[TrainState, Float[Array, ""]]:
    """One step on the mean negative log-likelihood of the response tokens; returns that loss too, in nats."""
    tokens = batch.response_mask.sum()

    def loss(params: dict, part: Rollout) -> tuple[Array, dict]:
        scores, _ = policy_scores(model, {"params": params}, part, None, logits_per_chunk)
        return -scores.log_probs.sum() / tokens, {}

    def gradients(scale: Array | None) -> tuple[Array, dict, dict, None]:
        return *accumulate(loss, state.params, batch, micro_batches, scale), None

    value, _, gradient, _, loss_scale = scaled_gradient(state.loss_scale, gradients)
    state, _ = apply_gradient(state, gradient, numbers)
    return dataclasses.replace(state, loss_scale=loss_scale), value
