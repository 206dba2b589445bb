"""``rlstab eval``: a checkpoint's accuracy on a file of prompts, with n samples of each.

It leaves ``responses.jsonl``, a line for each prompt with its n responses, and ``eval.json``. Prompts are answered
batch by batch, always in the same program, and each batch is on disk before the next: an evaluation that was killed
goes on after its last whole batch and ends as one that was not.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlstab_jax.inference import prepare, sample_keys, sampler_for
from rlstab_jax.models import Transformer
from rlstab_jax.own_code import code_of
from rlstab_jax.rundir import MAY_CHANGE, append, cut_lines, json_line, open_run, plain, run_of, write_aside
from rlstab_jax.tasks import AnsweredTask, Dataset, DescribedTask, Prompt, encode_prompts
from rlstab_jax.tasks.dataset import DatasetConfig, numbered
from rlstab_jax.tasks.records import Layout, Question, read_questions
from rlstab_jax.training.collect import judge
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.diagnose import load_parameters
from rlstab_jax.training.engines import Engines, build
from rlstab_jax.training.evaluate import evaluation_sampling
from rlstab_jax.training.lock import held
from rlstab_jax.training.passes import responses_of
from rlstab_jax.training.pretrained import without_initial
from rlstab_jax.training.statistics import bootstrap, ladder, majority, pass_at_k
from rlstab_jax.types import UserError, take_rows

Engine = Literal["inference", "training"]


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What is asked of a checkpoint."""

    data: Path | None = None
    """File of prompts: .jsonl, .parquet or .array_record. Without it, the task's held-out prompts."""
    layout: Layout | None = None
    """Layout of that file: plain, gsm8k, math, dapo or aime; None for the task's own."""
    samples: int = 32
    """Responses per prompt, n."""
    prompts: int = 0
    """Take only so many prompts, the first ones; 0 takes all."""
    batch: int = 8
    """Prompts answered at a time, each with all of its samples."""
    engine: Engine = "inference"
    """Which engine answers: at the precision of rollouts, or of training. Sampling is as in the config's evaluation."""
    newest: bool = False
    """Take a run's newest checkpoint; its best one, by held-out accuracy, otherwise. Prompts that chose the best one
    flatter it."""
    right_from: float = 1.0
    """A response is right from this reward on; of several rewards, the first one counts."""


def assess(
    config: RunConfig,
    checkpoint: Path,
    asked: Assessment,
    out: Path,
    *,
    fresh: bool = False,
    begin: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a checkpoint, or goes on with the evaluation that is in ``out``.

    Args:
      config: of the run: task, model, engines, ``evaluation``'s temperature, top-k and top-p, what ends ``rollout``'s
        responses.
      checkpoint: a run's directory (its best checkpoint, or the newest, as ``asked``), or a cold start's.
      fresh: begin anew; what is in ``out`` is moved aside.
      begin: is called when the input has been checked.

    Returns:
      What ``eval.json`` says: ``accuracy`` (mean over samples), ``pass_at`` by k, ``majority``, each with a bootstrap
      interval over prompts, and counts.

    Raises:
      UserError: a mistake in the data or the numbers, no checkpoint there, another evaluation in ``out``, or a process
        that is at work there.
    """
    engines = build(_without_training(config, checkpoint, asked))
    prompts = _prompts(engines, asked)
    rows = engines.row_shards
    for name in ("samples", "batch"):
        if getattr(asked, name) < 1:
            raise UserError(f"{name} = {getattr(asked, name)}: expected at least 1")
    if not math.isfinite(asked.right_from):
        raise UserError(f"right_from = {asked.right_from}: expected a finite number")
    if asked.batch % rows:
        raise UserError(f"batch = {asked.batch}: expected a multiple of {rows}, the data-parallel devices")
    length = _longest(engines, prompts)
    encode_prompts(prompts, engines.task.tokenizer, length)  # what cannot be is said before long work
    step, params = load_parameters(engines, checkpoint, best=not asked.newest)
    where = {"checkpoint": checkpoint.absolute(), "step": step, "content": _content(engines, prompts)}
    numbers = {field.name: getattr(asked, field.name) for field in dataclasses.fields(Assessment)}  # no more than these
    with held(out):
        described = {"config": {**where, **plain(numbers), "run": config}, "code": code_of(config)}
        run = open_run(out, described, fresh, tuple(f"run.{name}" for name in MAY_CHANGE), say)
        path = run.path / "responses.jsonl"
        begin()
        done = _whole_batches(path, len(prompts), asked.batch)
        if done:
            say(f"going on after {done} prompts")
        answers, of = cut_lines(path, "batch", math.inf), len(prompts) * asked.samples
        model = engines.inference if asked.engine == "inference" else engines.training_sampler
        prepared = engines.settle(prepare(params, model.precision, engines.mesh))
        for start in range(done, len(prompts), asked.batch):
            part = slice(start, start + asked.batch)
            answered = list(_answers(engines, model, prepared, prompts[part], length, asked))
            append(path, b"".join(json_line({"batch": start // asked.batch, **row}) for row in answered))
            answers += answered
            _check_failures(engines.task, answers, of, path)
            say(f"{min(start + asked.batch, len(prompts))}/{len(prompts)} prompts")
        _check_failures(engines.task, answers, of, path)
        measured = summary(cut_lines(path, "batch", math.inf))
        result = {**where, "data": asked.data, "engine": asked.engine, **measured}
        write_aside(out / "eval.json", (json.dumps(plain(result), indent=2, allow_nan=False) + "\n").encode())
    return result


def _check_failures(task: Any, rows: Sequence[dict[str, Any]], of: int, path: Path) -> None:
    """Raises UserError where a verifier failed on more than the task allows of what it is shown of ``of`` responses: as
    soon as it did, since what comes later cannot mend it."""
    if not isinstance(task, Dataset):
        return
    failures = verifier_failures(rows)
    if not task.config.judge_truncated:
        of -= sum(response["truncated"] for row in rows for response in row["responses"])
    if failures > task.config.max_verifier_failures * of:
        first = next(response["failure"] for row in rows for response in row["responses"] if "failure" in response)
        raise UserError(
            f"verifiers failed on {failures} responses, more than task.max_verifier_failures allows of {of} to be "
            f"judged; first: {first}. {path} has them all. Mend the verifier or the data"
        )


def verifier_failures(rows: Sequence[dict[str, Any]]) -> int:
    """Responses that a verifier failed on."""
    return sum("failure" in response for row in rows for response in row["responses"])


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of ``eval.json`` from the lines of ``responses.jsonl``."""
    responses = [row["responses"] for row in rows]
    samples = len(responses[0])
    right = [[response["right"] for response in of_prompt] for of_prompt in responses]
    votes = [[response["answer"] for response in of_prompt] for of_prompt in responses]

    def over_prompts(values: Iterator[float]) -> dict[str, float]:
        return bootstrap(np.array(list(values)))

    def mean(name: str) -> float:
        return float(np.mean([[response[name] for response in of_prompt] for of_prompt in responses]))

    return {
        "prompts": len(rows),
        "samples": samples,
        "accuracy": over_prompts(float(np.mean(r)) for r in right),
        "pass_at": {k: over_prompts(pass_at_k(sum(r), samples, k) for r in right) for k in ladder(samples)},
        "majority": over_prompts(majority(v, r) for v, r in zip(votes, right, strict=True)),
        "response_length": mean("length"),
        "truncated": mean("truncated"),
        "verifier_failures": verifier_failures(rows),
    }


def _without_training(config: RunConfig, checkpoint: Path, asked: Assessment) -> RunConfig:
    """The config without what need not be there: a run's demands on its held-out prompts, its files where other prompts
    are asked, and the parameters that it began from."""
    run, task = run_of(checkpoint), config.task
    if asked.data and isinstance(task, DatasetConfig):
        task = dataclasses.replace(task, train=(), heldout=())
    return dataclasses.replace(
        without_initial(config, run),
        task=task,
        evaluation=dataclasses.replace(config.evaluation, every=0),
        cold_start=dataclasses.replace(config.cold_start, max_steps=0),
    )


def _content(engines: Engines, prompts: Sequence[Prompt]) -> str:
    """A fingerprint of what is asked, and of a tokeniser that comes from files."""
    tokenizer = engines.task.description.get("tokenizer", "") if isinstance(engines.task, DescribedTask) else ""
    asked = repr([(p.id, p.text, p.answer) for p in prompts]) + tokenizer
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _prompts(engines: Engines, asked: Assessment) -> list[Prompt]:
    task = engines.task
    if asked.data is None:
        if asked.layout is not None:
            raise UserError(f"layout = {asked.layout!r} is that of a file: give --data as well")
        source = task.split("heldout")
        prompts = [source[i] for i in range(len(source))]
    elif isinstance(task, Dataset):
        prompts = task.read(str(asked.data), asked.layout)
    else:
        prompts = numbered(_texts(asked.data, asked.layout or "plain"))
    if not prompts:
        raise UserError("the task holds out no prompts: name a file of them with --data")
    if not 0 <= asked.prompts <= len(prompts):
        raise UserError(f"prompts = {asked.prompts}: expected 0 (all) to {len(prompts)}, as many as there are")
    return prompts[: asked.prompts or None]


def _texts(path: Path, layout: Layout) -> dict[str, Question]:
    """Questions by their text, for a task that makes its own prompts."""
    found: dict[str, Question] = {}
    for question in read_questions(path, layout):
        if not isinstance(question.asked, str):
            raise UserError(f"{question.where}: the prompt is messages, but this task's prompts are text")
        found.setdefault(question.asked, question)
    if not found:
        raise UserError(f"{path}: the data set is empty, expected at least one record")
    return found


def _longest(engines: Engines, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt: whatever the training prompts are, none of these is left out."""
    return max(len(engines.task.tokenizer.encode(prompt.text)) for prompt in prompts)


def _whole_batches(path: Path, prompts: int, batch: int) -> int:
    """Cuts a batch that is not whole from the samples, and returns the number of prompts that are left."""
    rows = cut_lines(path, "batch", math.inf)
    if len(rows) % batch and len(rows) != prompts:
        rows = cut_lines(path, "batch", len(rows) // batch - 1)
    return len(rows)


def _answers(
    engines: Engines,
    model: Transformer,
    prepared: dict,
    prompts: Sequence[Prompt],
    prompt_length: int,
    asked: Assessment,
) -> Iterator[dict[str, Any]]:
    """A line of responses.jsonl for each prompt. A short last batch is filled up with its last prompt."""
    config = engines.config
    fed = [*prompts, *[prompts[-1]] * (asked.batch - len(prompts))]
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    sampling, support = evaluation_sampling(engines)
    rollout = responses_of(
        engines,
        sampler_for(engines.stop, config.rollout.slots),
        model,
        prepared,
        fed,
        sample_keys(key, 0, [prompt.id for prompt in fed], asked.samples),
        sampling,
        samples=asked.samples,
        support=support,
        prompt_length=prompt_length,
        record_routes=False,
    )
    count = len(prompts) * asked.samples
    rollout = take_rows(rollout, jnp.arange(count))
    texts, rewards = judge(engines.task, prompts, rollout, config.rollout.stop, whole=False)
    values = next(iter(rewards.components.values()), rewards.total)
    failures = {failure.row: f"{failure.reward}: {failure.message}" for failure in rewards.failures}
    lengths, truncated = np.asarray(rollout.response_mask).sum(1), np.asarray(rollout.truncated)
    unjudged = isinstance(engines.task, Dataset) and not engines.task.config.judge_truncated
    answer_of = engines.task.answer_of if isinstance(engines.task, AnsweredTask) else lambda text: text
    responses = [
        {
            "text": texts[row],
            # One that was cut off and not judged has no vote either.
            "answer": None if truncated[row] and unjudged else answer_of(texts[row]),
            "right": bool(values[row] >= asked.right_from),
            "length": int(lengths[row]),
            "truncated": bool(truncated[row]),
            **({"failure": failures[row]} if row in failures else {}),
        }
        for row in range(count)
    ]
    for number, prompt in enumerate(prompts):
        own = responses[number * asked.samples : (number + 1) * asked.samples]
        yield {"prompt": prompt.text, "reference": prompt.answer, "responses": own}


def line_of_result(result: dict[str, Any]) -> str:
    """The result in one line."""

    def shown(name: str, value: dict[str, float]) -> str:
        return f"{name} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    most = max(result["pass_at"])
    return "  ".join(
        (
            shown("accuracy", result["accuracy"]),
            shown(f"pass@{most}", result["pass_at"][most]),
            shown(f"majority@{result['samples']}", result["majority"]),
            f"{result['prompts']} prompts x {result['samples']} samples, {result['engine']} engine",
        )
    )
