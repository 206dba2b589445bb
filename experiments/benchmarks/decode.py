"""How fast the inference engine decodes on a CPU: against its peers, and what each of its own choices costs.

Tables, each with its own JSON file of raw seconds:

  peers       this engine, Hugging Face transformers (`generate`) and Tunix's sampler on the same weights, prompts and
              lengths, interleaved in one process. This engine also records log-probs and routes; the peers do what
              they do by default. Every engine draws at temperature 1 from the full vocabulary, none stops early.
              With 2 threads this engine runs on 2 virtual devices as well, each with half of the rows.
  groups      the same where 8 rows answer each prompt, as in RL: this engine computes a prompt once for its group,
              `generate` is told of them (num_return_sequences), Tunix's sampler gets every prompt 8 times
  recording   routes recorded or not
  precision   each number format of weights, activations and KV cache, and each dtype
  batch       1 to 256 rows
  length      response buffers of 32 to 1024 tokens, lengths with a long tail (lognormal, sigma 1, mean 1/8, cut)
  continuous  finished rows give their slot to waiting prompts, against plain batches in order

    python -m experiments.benchmarks.decode                        # all tables, some also with 2 threads
    python -m experiments.benchmarks.decode --tables peers         # one table; the others stay as they were measured
    python -m experiments.benchmarks.decode --draw                 # README.md and the picture from the JSON files alone
    python -m experiments.benchmarks.decode --quick --out DIR      # a smoke test: tiny, this engine only
    python -m experiments.benchmarks.decode --gpu --out DIR        # on a GPU: bytes moved against the copy bandwidth

Peers come with `pip install -e '.[bench]'`; `experiments/benchmarks/peers.py` says how Tunix joins them. A peer that
is not installed is named in the table as missing.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks import bandwidth, decode_report, peers
from experiments.benchmarks.command import Benchmark
from experiments.benchmarks.common import Contender, Missing, measure
from experiments.benchmarks.pages import Cell
from rlstab_jax.inference import Sampling, prepare, sample, sample_continuously, sample_keys
from rlstab_jax.models import Kernels, ModelConfig, Precision, Transformer, fp8, resolve_kernels
from rlstab_jax.models.precision import Format
from rlstab_jax.models.transformer import forward, logits_of
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import Layout

KERNELS = resolve_kernels(Kernels(), "cpu").for_inference()
OURS = "rlstab_jax"
FLOAT32 = Precision()


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the benchmark: `FULL` is the one that is published, `QUICK` a smoke test."""

    model: ModelConfig
    """Sizes of the model; all layers MoE, the head untied."""
    prompt: int
    """Tokens of each prompt."""
    response: int
    """New tokens of each row, where lengths are equal."""
    batches: tuple[int, ...]
    """Rows, for the tables `peers`, `groups` and `recording`."""
    group: int
    """Responses to each prompt, for the table `groups`; divides ``batches``."""
    sweep: tuple[int, ...]
    """Rows, for the table `batch`."""
    buffers: tuple[int, ...]
    """Lengths of the response buffer, for the table `length`."""
    rows: int
    """Rows of the tables `precision` and `length`, and slots of `continuous`."""
    waiting: int
    """Prompts of the table `continuous`; a multiple of ``rows``."""
    repetitions: int
    """Timed runs of each contender; long ones run fewer."""
    peers: bool
    """Whether other libraries take part."""


FULL = Scale(
    model=ModelConfig(
        vocab_size=512,
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        expert_dim=256,
        rope_theta=1e6,
    ),
    prompt=32,
    response=64,
    batches=(64, 256),
    group=8,
    sweep=(1, 4, 16, 64, 256),
    buffers=(32, 128, 512, 1024),
    rows=64,
    waiting=512,
    repetitions=9,
    peers=True,
)
QUICK = Scale(
    model=dataclasses.replace(FULL.model, num_layers=1, embed_dim=16, head_dim=8, expert_dim=16, vocab_size=32),
    prompt=4,
    response=4,
    batches=(2,),
    group=2,
    sweep=(1, 2),
    buffers=(32,),
    rows=2,
    waiting=6,
    repetitions=2,
    peers=False,
)


def parameters(config: ModelConfig, seed: int = 0) -> dict:
    """Seeded float32 parameters at the scale of the model's own initialisation, drawn by NumPy: compiles nothing."""
    generator = np.random.default_rng(seed)
    model = Transformer(config, FLOAT32, KERNELS)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "gain":
            return jnp.ones(leaf.shape, jnp.float32)
        fan_in = 1 if name == "embedding" else leaf.shape[-2]
        return jnp.asarray(generator.standard_normal(leaf.shape).astype(np.float32) * np.float32(fan_in**-0.5))

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def prompts_of(scale: Scale, rows: int) -> np.ndarray:
    """Prompts without padding, [rows, scale.prompt]."""
    return np.random.default_rng(1).integers(0, scale.model.vocab_size, (rows, scale.prompt)).astype(np.int32)


def long_tailed(rows: int, longest: int, seed: int = 0) -> np.ndarray:
    """Response lengths [rows]: lognormal of sigma 1 and mean ``longest`` / 8, cut to [1, longest]."""
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 8) - 0.5, 1.0, rows)
    return np.clip(np.round(drawn), 1, longest).astype(np.int32)


def sampling_of(lengths: np.ndarray | None) -> Sampling:
    """Temperature 1, full vocabulary, no stop token; each row as long as ``lengths`` says, or as its buffer."""
    temperature = np.float32(1.0)
    return Sampling(temperature) if lengths is None else Sampling(temperature, max_new_tokens=lengths)


def ours(
    name: str,
    scale: Scale,
    rows: int,
    response: int,
    lengths: np.ndarray | None = None,
    precision: Precision = FLOAT32,
    record_routes: bool = True,
    devices: int = 1,
    group: int = 1,
) -> Contender:
    """This engine's `sample`. It records the log-probs of its draws, and routes unless told not to."""
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    model, params = Transformer(scale.model, precision, KERNELS, mesh=mesh), parameters(scale.model)
    variables = prepare(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), precision, mesh)
    asked = rows // group
    prompts = jax.device_put(prompts_of(scale, asked), NamedSharding(mesh, PartitionSpec(Layout(mesh).rows)))
    keys = sample_keys(jax.random.key(0), 0, range(asked), group)

    def run() -> object:
        rollout = sample(
            model,
            variables,
            prompts,
            jnp.ones(prompts.shape, bool),
            keys,
            sampling_of(lengths),
            response_length=response,
            samples_per_prompt=group,
            record_routes=record_routes,
        )
        return jax.block_until_ready(rollout)

    return Contender(name, run, rows * response if lengths is None else int(lengths.sum()))


def peers_table(scale: Scale, threads: int, group: int = 1) -> list[Cell]:
    """This engine and its peers, at each batch size, of which ``group`` rows answer each prompt."""
    cells = []
    for rows in scale.batches:
        differences: dict[str, float] = {}
        others: list[Contender | Missing] = [
            Missing(name, "left out of a quick run") for name in (*peers.HUGGING_FACE, peers.TUNIX)
        ]
        if scale.peers:
            prompts = prompts_of(scale, rows // group)
            reference = prompt_logits(scale, prompts)
            params = jax.tree.map(np.asarray, parameters(scale.model))
            others, differences = peers.contenders(
                scale.model, params, prompts, scale.response, reference, threads, group
            )
        engines = [ours(OURS, scale, rows, scale.response, group=group)]
        if 1 < threads <= jax.local_device_count():
            name = f"{OURS}, {threads} virtual devices"
            engines.append(ours(name, scale, rows, scale.response, devices=threads, group=group))
        results = measure([*engines, *others], scale.repetitions)
        cells.append({"batch": rows, "differences": differences, "contenders": results})
    return cells


def groups_table(scale: Scale, threads: int) -> list[Cell]:
    return peers_table(scale, threads, scale.group)


def prompt_logits(scale: Scale, prompts: np.ndarray) -> np.ndarray:
    """This engine's logits of the prompts, [batch, prompt, vocab]."""
    model, variables = Transformer(scale.model, FLOAT32, KERNELS), {"params": parameters(scale.model)}

    @jax.jit
    def logits(variables: dict) -> jax.Array:
        hidden = forward(model, variables, jnp.asarray(prompts), jnp.ones(prompts.shape, bool)).hidden
        return logits_of(model, variables, hidden.reshape(-1, hidden.shape[-1])).reshape(*prompts.shape, -1)

    return np.asarray(logits(variables))


def recording_table(scale: Scale, threads: int) -> list[Cell]:
    """Routes recorded or not. The two are close, so that they run more often."""
    return [
        {
            "batch": rows,
            "contenders": measure(
                [
                    ours("routes recorded", scale, rows, scale.response),
                    ours("not recorded", scale, rows, scale.response, record_routes=False),
                ],
                3 * scale.repetitions,
            ),
        }
        for rows in scale.batches
    ]


def precisions() -> dict[str, Precision]:
    """Every dtype, then every format in weights, activations and KV cache alike."""
    dtypes = {dtype: Precision(dtype=dtype) for dtype in get_args(get_type_hints(Precision)["dtype"])}
    return dtypes | {format: fp8(format) for format in get_args(Format) if format != "none"}


def precision_table(scale: Scale, threads: int) -> list[Cell]:
    engines = [ours(name, scale, scale.rows, scale.response, precision=p) for name, p in precisions().items()]
    return [{"batch": scale.rows, "contenders": measure(engines, scale.repetitions)}]


def batch_table(scale: Scale, threads: int) -> list[Cell]:
    engines = [ours(str(rows), scale, rows, scale.response) for rows in scale.sweep]
    return [{"contenders": measure(engines, scale.repetitions)}]


def length_table(scale: Scale, threads: int) -> list[Cell]:
    """A plain batch runs until its longest row is done: tokens per second count the tokens of the responses alone."""
    cells = []
    for buffer in scale.buffers:
        lengths = long_tailed(scale.rows, buffer)
        engine = ours(OURS, scale, scale.rows, buffer, lengths)
        cells.append(
            {
                "buffer": buffer,
                "batch": scale.rows,
                "mean": float(lengths.mean()),
                "longest": int(lengths.max()),
                "contenders": measure([engine], max(scale.repetitions // 3, 1)),
            }
        )
    return cells


def continuous_table(scale: Scale, threads: int) -> list[Cell]:
    """Continuous batching in ``rows`` slots, against batches of as many rows in order, on the same keys and lengths."""
    buffer = scale.buffers[-1]
    lengths = long_tailed(scale.waiting, buffer)
    model, variables = Transformer(scale.model, FLOAT32, KERNELS), prepare(parameters(scale.model), FLOAT32)
    prompts = prompts_of(scale, scale.waiting)
    mask = np.ones(prompts.shape, bool)
    keys = sample_keys(jax.random.key(0), 0, range(scale.waiting), 1)
    drawn: dict[str, np.ndarray] = {}

    def continuous() -> None:
        rollout = sample_continuously(
            model, variables, prompts, mask, keys, sampling_of(lengths), response_length=buffer, slots=scale.rows
        )
        drawn["continuous"] = np.asarray(jax.block_until_ready(rollout).tokens)

    def plain() -> None:
        batches = [slice(i, i + scale.rows) for i in range(0, scale.waiting, scale.rows)]
        rollouts = [
            sample(model, variables, prompts[b], mask[b], keys[b], sampling_of(lengths[b]), response_length=buffer)
            for b in batches
        ]
        drawn["plain"] = np.concatenate([np.asarray(r.tokens) for r in jax.block_until_ready(rollouts)])

    total = int(lengths.sum())
    engines = [Contender("continuous batching", continuous, total), Contender("plain batches", plain, total)]
    results = measure(engines, max(scale.repetitions // 3, 1))
    return [
        {
            "prompts": scale.waiting,
            "slots": scale.rows,
            "buffer": buffer,
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
            # Keys, and so draws, do not depend on the slot: rows differ only where two tokens tie to rounding.
            "equal_rows": float((drawn["continuous"] == drawn["plain"]).all(1).mean()),
            "contenders": results,
        }
    ]


TABLES: dict[str, Callable[[Scale, int], list[Cell]]] = {
    "peers": peers_table,
    "groups": groups_table,
    "recording": recording_table,
    "precision": precision_table,
    "batch": batch_table,
    "length": length_table,
    "continuous": continuous_table,
}


BENCHMARK = Benchmark(
    module="experiments.benchmarks.decode",
    about=__doc__,
    results=Path("experiments/benchmarks/results/decode"),
    tables=TABLES,
    full=FULL,
    quick=QUICK,
    settings={"kernels": dataclasses.asdict(KERNELS)},
    page=decode_report.PAGE,
    threads=lambda table, asked: asked if table in ("peers", "groups", "recording", "continuous") else asked[:1],
    devices=lambda table, threads: threads if table in ("peers", "groups") else 1,
    gpu=("bandwidth", lambda quick: bandwidth.study(bandwidth.TINY if quick else bandwidth.FULL)),
)
main = BENCHMARK.main

if __name__ == "__main__":
    main()
