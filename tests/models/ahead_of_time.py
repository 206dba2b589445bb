"""Run by test_ahead_of_time.py: compiles for TPUs that are not there, and prints each program's memory.

The output is one JSON object: {topology: {program: [bytes of temporaries, bytes of the largest argument]}}. The first
topology named compiles all programs, the others one of each kernel.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from rlstab_jax.models import Kernels, ModelConfig, Precision, Transformer
from rlstab_jax.models.attention_tpu import decode_flash, decode_splash, splash
from rlstab_jax.models.decode import decode_step
from rlstab_jax.models.grouped_dots import megablox, narrow
from rlstab_jax.models.huggingface import parameter_shapes
from rlstab_jax.models.layers import KeyValues, Past, rotations
from rlstab_jax.models.precision import Stored
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.models.transformer import forward
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import INFERENCE, TRAINING, Rules, partition_spec, shardings

BF16 = jnp.bfloat16
KERNELS = Kernels("splash", "megablox", "splash", "megablox")
CACHES = {"none": "splash", "float8_e4m3fn": "flash"}  # formats, and the kernel that decodes with them
MODEL = ModelConfig(
    vocab_size=128,
    num_layers=2,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    num_experts=4,
    experts_per_token=2,
    expert_dim=96,
)


def gradient(f: Callable, of: int) -> Callable:
    """The gradient of a scalar of ``f`` by its first ``of`` arguments."""
    return jax.grad(lambda *args: jnp.sum(jnp.square(f(*args).astype(jnp.float32))), argnums=tuple(range(of)))


def sequences(heads: int, kv_heads: int, time: int, c: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    shapes = [(4, heads, time, c), (4, kv_heads, time, c), (4, kv_heads, time, c)]
    return [*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((4, time), bool)]


def cache(batch: int, kv_heads: int, time: int, c: int, dtype: Any) -> tuple:
    return jax.ShapeDtypeStruct((batch, kv_heads, c, time), dtype), jax.ShapeDtypeStruct(
        (batch, kv_heads, time, c), dtype
    )


def stored(batch: int, kv_heads: int, time: int, c: int, dtype: Any) -> tuple[Stored, Stored]:
    """`cache`, and the scales of one of bytes."""
    narrow = dtype == jnp.uint8
    scales = [jax.ShapeDtypeStruct((batch, kv_heads, *shape), jnp.float32) for shape in ((1, time), (time, 1))]
    k, v = cache(batch, kv_heads, time, c, dtype)
    return (Stored(k, scales[0]), Stored(v, scales[1])) if narrow else (Stored(k), Stored(v))


def narrow_rows(rows: int) -> list[jax.ShapeDtypeStruct]:
    """Of the experts' last product at the sizes of Qwen3-30B-A3B, a quarter of its experts."""
    shapes = (rows, 768), (32, 768, 2048)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn) for shape in shapes]
    return [*operands, jax.ShapeDtypeStruct((32,), jnp.int32)]


def a_decode_step(dtype: Any, make: Callable = cache, of_cache: Any = None) -> list:
    """128 rows of 32 prompts, 32 heads over 4. Keys and values are too large for the memory on the chip."""
    masks = jax.ShapeDtypeStruct((32, 512), bool), jax.ShapeDtypeStruct((128, 4096), bool)
    q = jax.ShapeDtypeStruct((128, 32, 1, 128), dtype)
    of_cache = of_cache or dtype
    return [q, make(32, 4, 512, 128, of_cache), make(128, 4, 4096, 128, of_cache), *masks]


def model_gradient(
    variables: dict,
    tokens: jax.Array,
    mask: jax.Array,
    mesh: Mesh | None = None,
    kernels: Kernels = KERNELS,
    dtype: str = "float32",
) -> Any:
    """Scanned and recomputed layers, as the training engine has them, with products in ``dtype``."""
    model = Transformer(MODEL, Precision(dtype), kernels, remat="full", mesh=mesh)
    return jax.grad(lambda v: jnp.sum(jnp.square(forward(model, v, tokens, mask).hidden.astype(jnp.float32))))(
        variables
    )


def model_decode(
    layers: list[dict], pasts: list[Past], x: jax.Array, kv_cache: Any = "none", mesh: Mesh | None = None
) -> Any:
    """Steps in a loop that carries the cache, as the sampler has them."""
    kernels = replace(KERNELS, decode_attention=CACHES[kv_cache])
    model = Transformer(MODEL, Precision("bfloat16", kv_cache=kv_cache), kernels, mesh=mesh, rules=INFERENCE)
    turns = rotations(4096 + 256, MODEL)

    def step(i: jax.Array, carry: tuple) -> tuple:
        pasts, x = carry
        turn, fed = turns.at(jnp.full((x.shape[0], 1), i)), jnp.ones(x.shape[0], bool)
        x, pasts, _ = decode_step(model, layers, x, turn, fed, pasts)
        return [past.replace(column=past.column + 1) for past in pasts], x

    return jax.lax.fori_loop(0, 8, step, (pasts, x))


def model_arguments(kv_cache: str = "none") -> tuple[list, list]:
    """Of `model_gradient` and of `model_decode`: 128 rows of 32 prompts of 256 tokens, a window of 4096."""
    tokens = jax.ShapeDtypeStruct((2, 100), jnp.int32), jax.ShapeDtypeStruct((2, 100), bool)
    variables = {"params": parameter_shapes(MODEL)}
    ((kinds, _),) = MODEL.segments
    assert len(kinds) == 1
    block = variables["params"]["segment_0"]["block_0"]
    layer = {"params": jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), block)}

    def key_values(batch: int, time: int) -> KeyValues:
        dtype = BF16 if kv_cache == "none" else jnp.uint8
        return KeyValues(*stored(batch, MODEL.num_kv_heads, time, MODEL.head_dim, dtype))

    masks = jax.ShapeDtypeStruct((32, 256), bool), jax.ShapeDtypeStruct((128, 4096), bool)
    past = Past(key_values(32, 256), key_values(128, 4096), *masks, jax.ShapeDtypeStruct((), jnp.int32))
    x = jax.ShapeDtypeStruct((128, MODEL.embed_dim), BF16)
    return [variables, *tokens], [[layer] * 2, [past] * 2, x]


def programs() -> dict[str, tuple[Callable, list]]:
    rows = jax.ShapeDtypeStruct((1000, 1024), BF16), jax.ShapeDtypeStruct((16, 1024, 768), BF16)
    sizes = jax.ShapeDtypeStruct((16,), jnp.int32)
    (of_gradient, of_decode), (_, of_narrow_decode) = (model_arguments(kv_cache) for kv_cache in CACHES)
    return {
        "splash": (gradient(splash, 3), sequences(8, 2, 512, 128, BF16)),
        "splash, float32, odd sizes": (gradient(splash, 3), sequences(6, 2, 300, 64, jnp.float32)),
        "decode_splash": (decode_splash, a_decode_step(BF16)),
        "decode_splash, float32": (decode_splash, a_decode_step(jnp.float32)),
        "decode_flash": (partial(decode_flash, format="float8_e4m3fn"), a_decode_step(BF16, stored, jnp.uint8)),
        "decode_flash, float32": (decode_flash, a_decode_step(jnp.float32, stored)),
        "megablox": (gradient(megablox, 2), [*rows, sizes]),
        "narrow": (narrow, narrow_rows(512)),
        "narrow, a prefill": (narrow, narrow_rows(2**17)),
        "model, gradient": (model_gradient, of_gradient),
        "model, decode": (model_decode, of_decode),
        "model, decode, fp8": (partial(model_decode, kv_cache="float8_e4m3fn"), of_narrow_decode),
    }


def memory(f: Callable, arguments: list, sharding: Any, donated: tuple[int, ...] = ()) -> list[int]:
    """Bytes of temporaries and of the largest argument on one device. ``sharding``: of all arguments, or of each."""
    if isinstance(sharding, Sharding):
        sharding = jax.tree.map(lambda _: sharding, arguments)
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), arguments, sharding)
    compiled = jax.jit(f, donate_argnums=donated).lower(*placed).compile()
    leaves = jax.tree.leaves(placed)
    largest = max(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    return [compiled.memory_analysis().temp_size_in_bytes, largest]


def four(devices: Sequence) -> Mesh:
    """Four chips, each with its rows, heads, experts and part of their hidden units."""
    return make_mesh(MeshConfig(expert=2, tensor=2), devices[:4])


def parameters(mesh: Mesh, names: dict, rules: Rules) -> dict:
    return {"params": shardings(mesh, names, rules)}


def of_rows(mesh: Mesh, tree: Any) -> Any:
    def of(a: jax.ShapeDtypeStruct) -> NamedSharding:
        names = ("batch", "kv_heads", None, None) if a.ndim == 4 else ("batch", None)[: a.ndim]
        return NamedSharding(mesh, partition_spec(names, INFERENCE))

    return jax.tree.map(of, tree)


def gradient_over(mesh: Mesh, **how: Any) -> list[int]:
    """`memory` of `model_gradient` on a mesh."""
    (variables, *tokens), _ = model_arguments()
    places = [parameters(mesh, logical_axes(variables["params"]), TRAINING), *of_rows(mesh, tokens)]
    return memory(partial(model_gradient, mesh=mesh, **how), [variables, *tokens], places)


def decode_over(mesh: Mesh, kv_cache: str) -> list[int]:
    """`memory` of `model_decode` on a mesh."""
    (variables, *_), (layers, *others) = model_arguments(kv_cache)
    axes = logical_axes(variables["params"])["segment_0"]["block_0"]
    of_layer = jax.tree.map(lambda names: names[1:], axes, is_leaf=lambda n: type(n) is tuple)
    places = [[parameters(mesh, of_layer, INFERENCE)] * len(layers), *of_rows(mesh, others)]
    return memory(partial(model_decode, kv_cache=kv_cache, mesh=mesh), [layers, *others], places, (1,))


if __name__ == "__main__":
    report: dict[str, dict[str, list[int]]] = {}
    for name in sys.argv[1:]:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        one = SingleDeviceSharding(devices[0])
        chosen = ("splash", "decode_splash", "decode_flash", "megablox", "narrow") if report else programs()
        donated = {"model, decode": (1,), "model, decode, fp8": (1,)}
        report[name] = {label: memory(*programs()[label], one, donated.get(label, ())) for label in chosen}
        if len(report) == 1:
            mesh = four(devices)
            report[name]["model, gradient over a mesh"] = gradient_over(mesh)
            report[name] |= {f"model, decode over a mesh, {cached}": decode_over(mesh, cached) for cached in CACHES}
    print(json.dumps(report))
