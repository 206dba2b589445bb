"""How fast the training engine updates: against its peers, and what each of its own choices costs.

An update is a forward pass, its gradient and a step of Adam. Tables, each with its own JSON file of raw seconds:

  peers       this engine, Hugging Face transformers with torch, and Tunix's model with optax: the same weights, batch
              and loss, interleaved in one process. Loss and a gradient must agree before anything is timed. This engine
              also computes entropies and its diagnostics; the peers compute the loss alone. With 2 threads it runs on 2
              virtual devices as well, each with half of the rows.
  replay      routes live, replayed from the old pass (R2), and from the rollout (R3)
  micro       the mini-batch in 1, 2 and 4 parts
  packing     short responses share rows or not; lengths with a long tail (lognormal, sigma 1, mean 1/8, cut)
  precision   float32, bfloat16, and float32 with e4m3 weights, activations and KV cache (emulated on CPUs)
  tokens, layers, experts, vocabulary
              time and temporary memory as each of them grows
  devices     1 to 8 virtual devices that share the cores, the rows split over them

    python -m experiments.benchmarks.update                        # all tables, some also with 2 threads
    python -m experiments.benchmarks.update --tables peers         # one table; the others stay as they were measured
    python -m experiments.benchmarks.update --draw                 # README.md and the picture from the JSON files alone
    python -m experiments.benchmarks.update --quick --out DIR      # a smoke test: tiny, this engine only
    python -m experiments.benchmarks.update --gpu --out DIR        # on a GPU: utilisation against its matrix rate

Peers come with `pip install -e '.[bench]'`; `experiments/benchmarks/peers.py` says how Tunix joins them. A peer that
is not installed is named in the table as missing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import decode, update_peers, update_report, utilisation
from experiments.benchmarks.command import Benchmark
from experiments.benchmarks.common import Contender, Missing, measure
from experiments.benchmarks.pages import Cell
from rlstab_jax.learner import LearnerConfig, Minibatch, PolicyScores, init_state, score, state_shardings, update
from rlstab_jax.learner.packing import plan
from rlstab_jax.models import Kernels, ModelConfig, Precision, Transformer, fp8, resolve_kernels
from rlstab_jax.objectives import coefficients, minirl
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import TRAINING, Layout
from rlstab_jax.types import Rollout, RoutingReplay, Scores, route_dtype, row_axis

OURS = "rlstab_jax"
KERNELS = resolve_kernels(Kernels(), "cpu")
LEARNER = LearnerConfig(learning_rate=1e-4, warmup_steps=0, replay="live", remat="none", unroll=4)
# Nothing is clipped nor masked, so that the loss is one that every library can be given in a few lines.
OBJECTIVE = minirl(eps_low=np.inf, eps_high=np.inf, cap=np.inf)


@dataclasses.dataclass(frozen=True)
class Load:
    """One update of this engine."""

    model: ModelConfig
    """Sizes of the model; all layers MoE, the head untied."""
    rows: int
    """Sequences of the mini-batch; a multiple of 4, which share a group."""
    tokens: int
    """Tokens that are fed of each row, all of them with a target of their own."""
    lengths: tuple[int, ...] = ()
    """How many of them each row has; empty for all."""
    precision: Precision = Precision()
    """Of the training engine."""
    micro_batches: int = 1
    """Parts that the mini-batch is computed in."""
    replay: Literal["live", "r2", "r3"] = "live"
    """Which routes are replayed."""
    unroll: int = LEARNER.unroll
    """Layers written out in each step of the loop over layers."""
    packing: bool = False
    """Whether several sequences may share a row."""
    devices: int = 1
    """Devices that the rows are split over."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the benchmark: `FULL` is the one that is published, `QUICK` a smoke test."""

    base: Load
    """What every table varies."""
    tokens: tuple[int, ...]
    """Tokens of each row, for the table of that name; so are the next ones."""
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    vocabulary: tuple[int, ...]
    devices: tuple[int, ...]
    """Their numbers; they divide the rows."""
    micro: tuple[int, ...]
    """Parts of the mini-batch."""
    long: tuple[int, int]
    """Rows of the table `packing`, and the longest that a response can be."""
    repetitions: int
    """Timed runs of each contender; the tables of one engine's sizes run a third of them."""
    peers: bool
    """Whether other libraries take part."""


FULL = Scale(
    base=Load(decode.FULL.model, rows=32, tokens=128),
    tokens=(32, 128, 512),
    layers=(1, 2, 4, 8),
    experts=(8, 32, 128),
    vocabulary=(1024, 16_384, 151_936),
    devices=(1, 2, 4, 8),
    micro=(1, 2, 4),
    long=(64, 256),
    repetitions=9,
    peers=True,
)
QUICK = Scale(
    base=Load(decode.QUICK.model, rows=4, tokens=8),
    tokens=(4, 8),
    layers=(1,),
    experts=(8,),
    vocabulary=(32,),
    devices=(1,),
    micro=(1, 2),
    long=(8, 16),
    repetitions=2,
    peers=False,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled update with a state of its own."""

    contender: Contender
    step: Callable[[], dict[str, float]]
    """Runs it once and returns the measures of that update."""
    state: Callable[[], Any]
    """The state as it is now."""
    temporary: int
    """Bytes that it needs beside its arguments, as the compiler plans it."""


def rollout_of(load: Load) -> Rollout:
    """Seeded tokens behind prompts of one token, as if mu had been uniform. No routes."""
    c = load.model
    tokens = np.random.default_rng(1).integers(0, c.vocab_size, (load.rows, load.tokens + 1)).astype(np.int32)
    lengths = np.array(load.lengths or (load.tokens,) * load.rows)
    mask = np.arange(load.tokens) < lengths[:, None]
    return Rollout(
        tokens=jnp.asarray(tokens),
        prompt_mask=jnp.ones((load.rows, 1), bool),
        response_mask=jnp.asarray(mask),
        log_probs=jnp.asarray(np.where(mask, -np.log(c.vocab_size), 0).astype(np.float32)),
        truncated=jnp.zeros(load.rows, bool),
        routes=None,
        temperature=jnp.ones(load.rows),
    )


def minibatch_of(load: Load, params: dict) -> Minibatch:
    """The rollout with made-up advantages. Routes are the model's own live ones if they are replayed, else made up."""
    rollout = rollout_of(load)
    if load.replay == "live":
        c = load.model
        shape = (c.num_moe_layers, load.rows, load.tokens)
        first, others = np.random.default_rng(2).integers(0, c.num_experts - 1, (2, *shape))
        made_up = np.stack([first, (first + 1 + others) % c.num_experts][: c.experts_per_token], -1)
        routes = jnp.asarray(made_up.astype(route_dtype(c.num_experts)))
        old = PolicyScores(rollout.log_probs, jnp.zeros(rollout.log_probs.shape), routes, routes, None)
    else:
        old, _ = score(Transformer(load.model, load.precision, KERNELS), {"params": params}, rollout)
        rollout = dataclasses.replace(rollout, routes=old.routes)
    advantage = np.random.default_rng(3).standard_normal(load.rows).astype(np.float32)
    return Minibatch(rollout, old, jnp.asarray(advantage), jnp.arange(load.rows) // 4)


def program(name: str, load: Load) -> Program:
    """Compiles the update of ``load`` from the benchmark's weights."""
    params = decode.parameters(load.model)
    mesh = make_mesh(MeshConfig(data=load.devices), jax.devices()[: load.devices])
    model = Transformer(load.model, load.precision, KERNELS, LEARNER.remat, load.unroll, mesh)
    minibatch = minibatch_of(load, params)
    packing = plan(np.asarray(minibatch.rollout.fed_mask), load.micro_batches, load.devices) if load.packing else None
    minibatch, packing = jax.device_put((minibatch, packing), jax.tree.map(over_rows(mesh), (minibatch, packing)))
    objective, numbers = jax.device_put((OBJECTIVE, LEARNER.numbers()), NamedSharding(mesh, PartitionSpec()))
    initial = init_state(params, numbers)
    state = [jax.device_put(initial, state_shardings(mesh, initial, TRAINING))]
    traced = minibatch, objective, numbers
    replay = RoutingReplay(load.replay)
    compiled = update.lower(
        model, state[0], *traced, replay=replay, micro_batches=load.micro_batches, packing=packing
    ).compile()

    def step() -> dict[str, float]:
        state[0], _, measures = jax.block_until_ready(compiled(state[0], *traced, packing=packing))
        return {name: float(value) for name, value in measures.items()}

    amount = int(minibatch.rollout.response_mask.sum())
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Program(Contender(name, step, amount), step, lambda: state[0], temporary)


def over_rows(mesh: Mesh) -> Callable[[jax.Array], NamedSharding]:
    """Where an array that travels lies: its rows over all devices."""

    def of(leaf: jax.Array) -> NamedSharding:
        axes: list[tuple[str, ...] | None] = [None] * leaf.ndim
        if axes:
            axes[row_axis(leaf)] = Layout(mesh).rows
        return NamedSharding(mesh, PartitionSpec(*axes))

    return of


def timed(programs: Sequence[Program], repetitions: int) -> list[dict[str, Any]]:
    """`measure`, with the temporary memory of each program as the compiler plans it."""
    results = measure([p.contender for p in programs], repetitions, memory=False)
    return [result | {"temporary": p.temporary} for result, p in zip(results, programs, strict=True)]


def reference_of(ours: Program) -> update_peers.Reference:
    """Loss and gradient of the first update, read off Adam's first moment, which is (1 - b1) g."""
    loss = ours.step()["learner/loss"]
    moments = next(part.mu for part in ours.state().opt_state if hasattr(part, "mu"))
    (router,) = (
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(moments) if "router" in jax.tree_util.keystr(path)
    )
    return update_peers.Reference(loss, np.asarray(router[-1]) / (1 - LEARNER.adam_b1))


def batch_of(load: Load) -> update_peers.Batch:
    """What the peers learn from."""
    minibatch = minibatch_of(load, {})
    rollout, old = minibatch.rollout, minibatch.old.log_probs
    scores = Scores(old, old, rollout.log_probs, rollout.response_mask, minibatch.groups)
    coefficient = coefficients(OBJECTIVE, scores) * minibatch.advantage[:, None]
    return update_peers.Batch(*(np.asarray(a) for a in (rollout.tokens, coefficient, rollout.log_probs)))


def peers_table(scale: Scale, threads: int) -> list[Cell]:
    """This engine and its peers."""
    load = scale.base
    ours = program(OURS, load)
    reference = reference_of(ours)
    differences: dict[str, float] = {}
    others: list[Contender | Missing] = [
        Missing(name, "left out of a quick run") for name in (*update_peers.HUGGING_FACE, update_peers.TUNIX)
    ]
    if scale.peers:
        params = jax.tree.map(np.asarray, decode.parameters(load.model))
        others, differences = update_peers.contenders(load.model, LEARNER, params, batch_of(load), reference, threads)
    engines = [ours.contender]
    if 1 < threads <= jax.local_device_count():
        name = f"{OURS}, {threads} virtual devices"
        engines.append(program(name, dataclasses.replace(load, devices=threads)).contender)
    results = measure([*engines, *others], scale.repetitions)
    return [{"tokens": load.rows * load.tokens, "differences": differences, "contenders": results}]


def replay_table(scale: Scale, threads: int) -> list[Cell]:
    """The programs are close, so that they run more often."""
    loads = {
        "live": scale.base,
        "R2": dataclasses.replace(scale.base, replay="r2"),
        "R3": dataclasses.replace(scale.base, replay="r3"),
    }
    return [{"contenders": timed([program(*item) for item in loads.items()], 3 * scale.repetitions)}]


def micro_table(scale: Scale, threads: int) -> list[Cell]:
    loads = [dataclasses.replace(scale.base, micro_batches=parts) for parts in scale.micro]
    programs = [program(str(load.micro_batches), load) for load in loads]
    return [{"contenders": timed(programs, scale.repetitions)}]


def packing_table(scale: Scale, threads: int) -> list[Cell]:
    """Tokens per second count the tokens of the responses alone. Rows are planned once, which takes no time here."""
    rows, longest = scale.long
    lengths = decode.long_tailed(rows, longest)
    load = dataclasses.replace(scale.base, rows=rows, tokens=longest, lengths=tuple(int(n) for n in lengths))
    loads = {"a row each": load, "packed": dataclasses.replace(load, packing=True)}
    results = timed([program(*item) for item in loads.items()], scale.repetitions)
    return [{"rows": rows, "mean": float(lengths.mean()), "longest": int(lengths.max()), "contenders": results}]


def precision_table(scale: Scale, threads: int) -> list[Cell]:
    formats = {"float32": Precision(), "bfloat16": Precision(dtype="bfloat16"), "float8_e4m3fn": fp8()}
    loads = {name: dataclasses.replace(scale.base, precision=precision) for name, precision in formats.items()}
    return [{"contenders": timed([program(*item) for item in loads.items()], scale.repetitions)}]


def growth_table(field: str) -> Callable[[Scale, int], list[Cell]]:
    """The table of that field of `Scale`: one of the sizes grows, the others stay."""

    def load_of(base: Load, size: int) -> Load:
        if field in ("tokens", "devices"):
            return dataclasses.replace(base, **{field: size})
        name = {"layers": "num_layers", "experts": "num_experts", "vocabulary": "vocab_size"}[field]
        base = dataclasses.replace(base, unroll=size) if field == "layers" else base  # all written out, as ever
        return dataclasses.replace(base, model=dataclasses.replace(base.model, **{name: size}))

    def table(scale: Scale, threads: int) -> list[Cell]:
        programs = [program(str(size), load_of(scale.base, size)) for size in getattr(scale, field)]
        return [{"contenders": timed(programs, max(scale.repetitions // 3, 1))}]

    return table


GROWTH = ("tokens", "layers", "experts", "vocabulary", "devices")
TABLES: dict[str, Callable[[Scale, int], list[Cell]]] = {
    "peers": peers_table,
    "replay": replay_table,
    "micro": micro_table,
    "packing": packing_table,
    "precision": precision_table,
    **{field: growth_table(field) for field in GROWTH},
}


def threads_of(table: str, asked: list[int]) -> list[int]:
    """All that were asked for only where threads matter most: virtual devices need cores, the others need less time."""
    if table in ("peers", "replay", "packing"):
        return asked
    return asked[-1:] if table == "devices" else asked[:1]


def devices_of(table: str, threads: int) -> int:
    return {"peers": threads, "devices": max(FULL.devices)}.get(table, 1)


BENCHMARK = Benchmark(
    module="experiments.benchmarks.update",
    about=__doc__,
    results=Path("experiments/benchmarks/results/update"),
    tables=TABLES,
    full=FULL,
    quick=QUICK,
    settings={"kernels": dataclasses.asdict(KERNELS), "learner": dataclasses.asdict(LEARNER)},
    page=update_report.PAGE,
    gpu=("utilisation", lambda quick: utilisation.study(utilisation.TINY if quick else utilisation.FULL)),
    threads=threads_of,
    devices=devices_of,
)
main = BENCHMARK.main

if __name__ == "__main__":
    main()
