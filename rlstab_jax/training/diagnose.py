"""Phase 1, before any training: the gaps between the two engines at fixed weights, for a list of number formats.

For each precision the inference engine samples responses to held-out prompts, and the training engine scores them, once
with its own routes and once with the sampler's. The weights do not move, so that all of the gap is the engines' doing:
what the loop calls the training-inference discrepancy, at its start.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlstab_jax.inference import prepare, sample_keys, sampler_for
from rlstab_jax.learner.score import policy_scores
from rlstab_jax.models import Precision, Transformer, fp8, quantised
from rlstab_jax.models.expert_parallel import shared_scales
from rlstab_jax.parallel.sharding import Layout
from rlstab_jax.rundir import plain, run_of
from rlstab_jax.stability.gaps import discrepancy, routing_discrepancy
from rlstab_jax.stability.reduce import Statistics, mean_of, merge
from rlstab_jax.stability.routing import disagreement, flips, margin_statistics, tokens_differ
from rlstab_jax.tasks import Prompt
from rlstab_jax.training import pretrained
from rlstab_jax.training.collect import judge
from rlstab_jax.training.config import RunConfig, truncates
from rlstab_jax.training.engines import Engines, build, initial_params
from rlstab_jax.training.kernel_check import check_kernels
from rlstab_jax.training.passes import responses_of
from rlstab_jax.types import Rollout, UserError, take_rows

PRECISIONS = {
    "float32": Precision(),
    "bfloat16": Precision(dtype="bfloat16"),
    "fp8_e4m3": fp8("float8_e4m3fn"),
    "fp8_e4m3_router_exempt": fp8("float8_e4m3fn", quantise_router=False),
    "fp8_e4m3_weights": Precision(weights="float8_e4m3fn"),
    "fp8_e4m3_blocks": fp8("float8_e4m3fn", scales="block"),
    "fp8_e5m2": fp8("float8_e5m2"),
    "float16": Precision(dtype="float16"),
    "int8": quantised("int8"),
    "fp4_e2m1": quantised("float4_e2m1fn"),
}


@dataclasses.dataclass(frozen=True)
class LayerGaps:
    """Routing of one MoE layer, over fed tokens, prompts included; the training engine routes live."""

    disagreement: float
    """Share of tokens whose top-k sets differ between the engines."""
    first: float
    """Share that differ with no difference before them in their row: the arithmetic of this layer's input alone."""
    margin: float
    """Mean of the k-th less the (k+1)-th router probability."""
    first_margin: float
    """The same mean over the tokens of ``first``; NaN without any."""


@dataclasses.dataclass(frozen=True)
class Gaps:
    """The gaps of one precision. KL is KL(mu_old || pi_old) by token, in nats, estimated on ``tokens`` samples."""

    precision: str
    k1: float
    """KL, mean of -log(pi_old/mu_old); live routes, as are the next three."""
    k3: float
    """KL, mean of r - 1 - log r with r = pi_old/mu_old."""
    max_ratio: float
    """Largest max(r, 1/r)."""
    f2: float
    """Share of tokens with max(r, 1/r) > 2."""
    k3_replayed: float
    """KL (k3) with the sampler's routes replayed (R3); NaN for a dense model."""
    routing_k3: float
    """k3 - k3_replayed, what the routing adds; over k3, the routing's share of the discrepancy."""
    routing_disagreement: float
    """Share of token-layers whose top-k sets differ; NaN for a dense model."""
    routing_tokens: float
    """Share of tokens of which the set of some layer differs; NaN for a dense model."""
    entropy: float
    """Of pi_old on mu_old's prefixes, over the tokens that sampling kept, nats."""
    accuracy: float
    """Mean reward of the responses."""
    length: float
    """Mean length of the responses, tokens."""
    responses: int
    tokens: int
    layers: tuple[LayerGaps, ...]


def diagnose(
    config: RunConfig,
    checkpoint: Path,
    precisions: Sequence[str],
    prompts: int = 64,
    begin: Callable[[], None] = lambda: None,
    watch: Callable[[Gaps], None] = lambda gaps: None,
) -> tuple[int, list[Gaps]]:
    """The gaps of each precision at a checkpoint's parameters.

    Args:
      config: of the run; its training engine scores, its ``rollout.precision`` is not used.
      checkpoint: a run's directory or its ``checkpoints``, or an import's or a cold start's: the weights before RL.
      precisions: names of `PRECISIONS`.
      prompts: held-out prompts, ``config.samples_per_prompt`` responses each, of the same draws in each precision.
      begin: is called when the input has been checked.
      watch: is given the gaps of each precision as they come.

    Returns:
      The step of the checkpoint (a run's best one, its newest if it has never been evaluated), and the gaps.

    Raises:
      UserError: a precision that is unknown or that the model, the mesh or a kernel does not take, no checkpoint there,
        one of another model, or more prompts than are held out.
    """
    for name in precisions:
        if name not in PRECISIONS:
            raise UserError(f"unknown precision {name!r}: choose among {', '.join(PRECISIONS)}")
    if not precisions:
        raise UserError("no precision given: name at least one")
    engines = build(pretrained.without_initial(config, run_of(checkpoint)))
    samplers = {name: _sampler(engines, name) for name in precisions}
    heldout = engines.task.split("heldout")
    rows = engines.row_shards
    if not (1 <= prompts <= len(heldout) and prompts % rows == 0):
        raise UserError(f"{prompts} prompts: expected 1 to {len(heldout)} (held out by the task), a multiple of {rows}")
    step, params = load_parameters(engines, checkpoint)
    begin()
    asked = [heldout[i] for i in range(prompts)]
    gaps = []
    for name, sampler in samplers.items():
        gaps.append(_gaps_of(engines, sampler, params, asked, name))
        watch(gaps[-1])
    return step, gaps


def _sampler(engines: Engines, name: str) -> Transformer:
    """The inference engine of one precision. Raises UserError where the model's sizes, the mesh or a kernel do not take
    it."""
    config, precision = engines.config, PRECISIONS[name]
    precision.validate(config.model, f"precision {name}")
    if config.model.num_moe_layers:
        shared_scales(config.model.expert_dim, precision, Layout(engines.mesh))
    sampler = engines.inference.clone(precision=precision)
    rollout = dataclasses.replace(config.rollout, precision=precision)
    check_kernels(dataclasses.replace(config, rollout=rollout), engines.training, sampler, engines.sampling)
    return sampler


def print_line(g: Gaps) -> None:
    """Prints that a precision is measured, with its main numbers: the last ones may take long, or fail."""
    sets = "" if math.isnan(g.routing_disagreement) else f", sets differ {g.routing_disagreement:.1%}"  # of none
    print(f"{g.precision}: k3 {g.k3:.1e} nats{sets}, accuracy {g.accuracy:.3f}")


def _of_routes(number: float, form: str) -> str:
    """A dense model has none."""
    return "-" if math.isnan(number) else form.format(number)


def print_table(gaps: Sequence[Gaps]) -> None:
    """Prints the baseline table, a row for each precision, and a second one, a row for each of its MoE layers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(title="mu_old against pi_old at fixed weights; live routing unless said", box=box.SIMPLE)
    table.add_column("precision", no_wrap=True)
    for name in ("k1", "k3", "k3\nreplayed", "routing's\nshare", "max\nratio", "F(2)"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("sets\ndiffer", "tokens\ndiffer", "entropy", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    for g in gaps:
        # Below 1e-9 nats a KL is rounding, and a share of it means nothing.
        share = _of_routes(g.routing_k3 / g.k3 if g.routing_k3 and g.k3 >= 1e-9 else math.nan, "{:.0%}")
        replayed = _of_routes(g.k3_replayed, "{:.1e}")
        numbers = (f"{g.k1:.1e}", f"{g.k3:.1e}", replayed, share, f"{g.max_ratio:.3g}", f"{g.f2:.2%}")
        routes = (_of_routes(g.routing_disagreement, "{:.1%}"), _of_routes(g.routing_tokens, "{:.1%}"))
        table.add_row(g.precision, *numbers, *routes, f"{g.entropy:.3f}", f"{g.accuracy:.3f}")
    console.print(table)
    layers = Table(title="routing by MoE layer", box=box.SIMPLE)
    layers.add_column("precision", no_wrap=True)
    for name in ("layer", "sets differ", "of them first", "margin", "margin of the first"):
        layers.add_column(name, justify="right", no_wrap=True)
    for g in gaps:
        for i, of in enumerate(g.layers):
            first = f"{of.first:.2%}", f"{of.margin:.4f}", f"{of.first_margin:.4f}"
            layers.add_row(g.precision, str(i), f"{of.disagreement:.2%}", *first)
    if layers.row_count:
        console.print(layers)
    if gaps:
        console.print(f"{gaps[0].responses} responses, about {gaps[0].tokens} tokens for each precision; KL in nats")


def write_json(path: Path, checkpoint: Path, step: int, gaps: Sequence[Gaps]) -> None:
    """Writes all numbers to ``path``, aside and renamed; a number that is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"checkpoint": checkpoint, "step": step, "gaps": list(gaps)}
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(plain(report, nonfinite=lambda _: None), indent=2, allow_nan=False) + "\n")
    os.replace(aside, path)


def load_parameters(engines: Engines, path: Path, *, best: bool = True) -> tuple[int, dict]:
    """Parameters of a run's best checkpoint (or its newest), of an import or of a cold start; see
    `pretrained.load_parameters`."""
    return pretrained.load_parameters(path, engines.placed_like(lambda: initial_params(engines.training, 0)), best=best)


def _gaps_of(engines: Engines, sampler: Transformer, params: dict, asked: list[Prompt], name: str) -> Gaps:
    config = engines.config
    rollout = _responses(engines, sampler, params, asked)
    _, rewards = judge(engines.task, asked, rollout, config.rollout.stop)
    rows = rollout.tokens.shape[0]
    part = max(1, config.responses_per_step // config.learner.score_micro_batches)
    statistics: Statistics = {}
    for start in range(0, rows, part):
        some = take_rows(rollout, jnp.arange(start, min(start + part, rows)))
        measured = engine_gaps(
            engines.training, params, some, config.model.num_experts, config.learner.logits_per_chunk
        )
        statistics = merge(statistics, measured) if statistics else measured
    value = {key: np.asarray(statistic.value()) for key, statistic in jax.device_get(statistics).items()}
    number = {key: float(x) for key, x in value.items() if x.ndim == 0}
    layers = zip(*(value[f"layers/{key.name}"] for key in dataclasses.fields(LayerGaps)), strict=True)
    mask = np.asarray(rollout.response_mask)
    return Gaps(
        precision=name,
        **{key: number[key] for key in ("k1", "k3", "max_ratio", "f2", "entropy")},
        **{key: number.get(key, np.nan) for key in ("k3_replayed", "routing_k3")},
        routing_disagreement=float(np.mean(value["layers/disagreement"])) if "k3_replayed" in number else np.nan,
        routing_tokens=number.get("tokens_differ", np.nan),
        accuracy=float(rewards.total.mean()),
        length=float(mask.sum(1).mean()),
        responses=rows,
        tokens=int(mask.sum()),
        layers=tuple(LayerGaps(*map(float, layer)) for layer in layers),
    )


def _responses(engines: Engines, sampler: Transformer, params: dict, asked: list[Prompt]) -> Rollout:
    """What an inference engine answers, with log-probs and routes; draws depend on the seed alone."""
    config = engines.config
    samples = config.samples_per_prompt
    return responses_of(
        engines,
        sampler_for(engines.stop, config.rollout.slots),
        sampler,
        prepare(params, sampler.precision, engines.mesh),
        asked,
        sample_keys(jax.random.key(config.seed), 0, [prompt.id for prompt in asked], samples),
        dataclasses.replace(engines.sampling, uniform=None),  # the precisions' gaps alone
        samples=samples,
        support=config.rollout.support if truncates(config.rollout) else 0,
    )


@partial(jax.jit, static_argnames=("model", "num_experts", "logits_per_chunk"))
def engine_gaps(
    model: Transformer, params: dict, rollout: Rollout, num_experts: int, logits_per_chunk: int
) -> Statistics:
    """Unreduced statistics of `Gaps`, and of `LayerGaps` [layer] under ``layers/``; the latter are empty if dense."""
    mask, variables = rollout.response_mask, {"params": params}
    live, routing = policy_scores(model, variables, rollout, None, logits_per_chunk)
    statistics = discrepancy(live.log_probs, rollout.log_probs, mask) | {"entropy": mean_of(live.entropy, mask)}
    if routing is None or rollout.routes is None:
        none = mean_of(jnp.zeros((0, 1)), jnp.zeros((0, 1), bool), axis=1)
        return statistics | {f"layers/{field.name}": none for field in dataclasses.fields(LayerGaps)}
    replayed, _ = policy_scores(model, variables, rollout, rollout.routes, logits_per_chunk)
    flipped = flips(rollout.routes, routing.live, routing.margin, rollout.fed_mask, num_experts)
    return statistics | {
        "k3_replayed": discrepancy(replayed.log_probs, rollout.log_probs, mask)["k3"],
        "tokens_differ": tokens_differ(rollout.routes, routing.live, rollout.fed_mask, num_experts),
        "routing_k3": routing_discrepancy(live.log_probs, replayed.log_probs, rollout.log_probs, mask)["k3"],
        "layers/disagreement": disagreement(rollout.routes, routing.live, rollout.fed_mask, num_experts),
        "layers/first": flipped["first"],
        "layers/margin": margin_statistics(routing.margin, rollout.fed_mask),
        "layers/first_margin": flipped["first_margin"],
    }
