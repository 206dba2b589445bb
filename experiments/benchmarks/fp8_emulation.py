"""How well emulated narrow products stand for those of the hardware's matrix units.

One model with one set of stored weights scores the same tokens twice, in `Precision.products` emulated and native; all
else is equal. Emulation is also compared with float32: that is the error which it is there to imitate.
Printed for each pair, over the tokens of random rows:

- size: median, mean, 99th percentile and maximum of |d|, where d is the difference of a token's log-prob;
- sign: the mean of d with its standard error over rows, and the share of tokens with d > 0;
- autocorrelation of d along the sequence, at several lags;
- routes: the share of (layer, token) whose sets of experts differ, and the same d with the first engine's routes
  replayed in the second, so that no route can flip.

    python -m experiments.benchmarks.fp8_emulation [--format float8_e4m3fn] [--layers 2] ... [--out FILE.json]

It runs on the default device and says which that was. Only a device with fp8 units has something to measure: elsewhere
the compiler widens the operands of a native product as well. For that reason the calls of cuBLAS's fp8 product in the
compiled programs are counted and printed.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlstab_jax.inference import prepare
from rlstab_jax.models import Kernels, ModelConfig, Precision, Transformer, quantised, resolve_kernels
from rlstab_jax.models.transformer import forward, logits_of

LAGS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class View:
    """What one engine makes of the tokens."""

    log_probs: np.ndarray  # of each token but the first, [row, time - 1]
    routes: np.ndarray | None  # [layer, row, time - 1, k]
    fp8_kernels: int  # calls of cuBLAS's fp8 product in the compiled program


def view(model: Transformer, variables: dict, tokens: np.ndarray, routes: np.ndarray | None = None) -> View:
    """Scores ``tokens`` [row, time], with ``routes`` replayed if given."""

    def run(variables: dict, tokens: Array, routes: Array | None) -> tuple[Float[Array, "row time"], Array | None]:
        fed, targets = tokens[:, :-1], tokens[:, 1:]
        output = forward(model, variables, fed, jnp.ones(fed.shape, bool), routes)

        def row(hidden: Array, target: Array) -> Array:  # one at a time: [row, time, vocab] never exists
            log_probs = jax.nn.log_softmax(logits_of(model, variables, hidden))
            return jnp.take_along_axis(log_probs, target[:, None], axis=-1)[:, 0]

        log_probs = jax.lax.map(lambda pair: row(*pair), (output.hidden, targets))
        return log_probs, None if output.routing is None else output.routing.used

    program = jax.jit(run).lower(variables, tokens, routes).compile()
    log_probs, used = program(variables, tokens, routes)
    kernels = program.as_text().count("matmul$f8")
    return View(np.asarray(log_probs, np.float64), None if used is None else np.asarray(used), kernels)


def autocorrelation(d: np.ndarray, lags: Sequence[int] = LAGS) -> dict[int, float]:
    """Correlation of ``d`` [row, time] with itself so many tokens later, about its mean; pooled over rows."""
    centred = d - d.mean()
    variance = np.mean(centred**2)
    if variance == 0:
        return {}
    return {k: float(np.mean(centred[:, k:] * centred[:, :-k]) / variance) for k in lags if k < d.shape[1]}


def describe(d: np.ndarray) -> dict[str, Any]:
    """Size, sign and autocorrelation of differences [row, time]."""
    size, of_rows = np.abs(d), d.mean(1)
    error = of_rows.std(ddof=1) / np.sqrt(len(of_rows)) if len(of_rows) > 1 else float("nan")
    return {
        "median": float(np.median(size)),
        "mean": float(size.mean()),
        "p99": float(np.quantile(size, 0.99)),
        "max": float(size.max()),
        "bias": float(d.mean()),
        "bias_standard_error": float(error),
        "share_positive": float((d > 0).mean()),
        "autocorrelation": autocorrelation(d),
    }


def flipped(first: View, second: View) -> float | None:
    """Share of (layer, token) whose sets of experts differ; None for a dense model."""
    if first.routes is None or second.routes is None:
        return None
    return float((np.sort(first.routes, -1) != np.sort(second.routes, -1)).any(-1).mean())


def measure(config: ModelConfig, precision: Precision, kernels: Kernels, rows: int, time: int, seed: int) -> dict:
    """All numbers. Raises UserError where ``precision`` cannot be multiplied natively."""
    native = dataclasses.replace(precision, products="native")
    config.validate()
    native.validate(config)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, time)).astype(np.int32)

    def engine(precision: Precision) -> Transformer:
        return Transformer(config, precision, kernels)

    shape = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    params = jax.jit(engine(Precision()).init)(jax.random.key(seed), *shape)["params"]
    stored = prepare(params, precision)
    exact = view(engine(Precision()), {"params": params}, tokens)
    emulated = view(engine(precision), stored, tokens)
    on_units = view(engine(native), stored, tokens)
    replayed = view(engine(native), stored, tokens, emulated.routes)
    exact_replayed = view(engine(Precision()), {"params": params}, tokens, emulated.routes)
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "jax": jax.__version__,
        "model": dataclasses.asdict(config),
        "precision": dataclasses.asdict(precision),
        "kernels": dataclasses.asdict(kernels),
        "tokens": tokens[:, 1:].size,
        "fp8_kernels": {"emulated": emulated.fp8_kernels, "native": on_units.fp8_kernels},
        "native - emulated": {
            "live": describe(on_units.log_probs - emulated.log_probs),
            "replayed": describe(replayed.log_probs - emulated.log_probs),
            "flipped": flipped(on_units, emulated),
        },
        "emulated - float32": {
            "live": describe(emulated.log_probs - exact.log_probs),
            "replayed": describe(emulated.log_probs - exact_replayed.log_probs),
            "flipped": flipped(emulated, exact),
        },
    }


def show(result: dict) -> None:
    """Prints the table."""
    print(f"device {result['device']}, jax {result['jax']}, {result['tokens']} tokens")
    counts = result["fp8_kernels"]
    print(f"cuBLAS's fp8 products in the compiled programs: emulated {counts['emulated']}, native {counts['native']}")
    if not counts["native"]:
        print("none in the native one: unless the compiler wrote such a kernel itself, fp8 units were not measured")
    print(f"{'':32}{'median|d|':>11}{'mean|d|':>11}{'p99':>11}{'max':>11}{'bias':>11}{'+-':>10}{'d > 0':>8}")
    for pair in ("native - emulated", "emulated - float32"):
        for routes in ("live", "replayed"):
            row = result[pair][routes]
            numbers = "".join(f"{row[key]:11.2e}" for key in ("median", "mean", "p99", "max", "bias"))
            print(f"{pair + ', ' + routes:32}{numbers}{row['bias_standard_error']:10.1e}{row['share_positive']:8.3f}")
            lags = ", ".join(f"{lag}: {value:+.3f}" for lag, value in row["autocorrelation"].items())
            print(f"{'':32}autocorrelation at {lags or 'no lag: all differences are equal'}")
        if result[pair]["flipped"] is not None:
            print(f"{pair:32}routes flipped: {result[pair]['flipped']:.4f}")


def main(arguments: Sequence[str] | None = None) -> dict:
    """Reads the command line, measures, prints, and writes the numbers to a file if asked."""
    parser = argparse.ArgumentParser(description="Native against emulated products of narrow numbers.")
    formats = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
    parser.add_argument("--format", choices=formats, default="float8_e4m3fn", help="of weights and activations")
    parser.add_argument("--kv-cache", choices=("none", "int8", *formats), default="none")
    parser.add_argument("--scales", choices=("channel", "block"), default="channel")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--no-router", action="store_true", help="the router is exempt")
    parser.add_argument("--no-lm-head", action="store_true", help="the LM head is exempt")
    sizes = {
        "layers": 2, "embed": 128, "heads": 4, "kv-heads": 2, "head-dim": 32, "experts": 16, "top-k": 2,
        "expert-dim": 128, "vocab": 256, "rows": 8, "time": 128, "seed": 0,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kernel", choices=("auto", "dense", "tiles", "ragged_dot"), default="auto")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    a = parser.parse_args(arguments)
    config = ModelConfig(
        vocab_size=a.vocab, num_layers=a.layers, embed_dim=a.embed, num_heads=a.heads, num_kv_heads=a.kv_heads,
        head_dim=a.head_dim, num_experts=a.experts, experts_per_token=a.top_k, expert_dim=a.expert_dim,
    )  # fmt: skip
    precision = quantised(
        a.format, kv_cache=a.kv_cache, scales=a.scales, block=a.block, dtype=a.dtype,
        quantise_router=not a.no_router, quantise_lm_head=not a.no_lm_head,
    )  # fmt: skip
    kernels = resolve_kernels(Kernels(experts=a.kernel), jax.default_backend())
    result = measure(config, precision, kernels, a.rows, a.time, a.seed)
    show(result)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        aside = a.out.with_suffix(".partial")
        aside.write_text(json.dumps(result, indent=1) + "\n")
        aside.replace(a.out)
    return result


if __name__ == "__main__":
    main()
