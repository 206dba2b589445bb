"""Run by test_ahead_of_time.py: compiles for NVIDIA GPUs that are not there, and prints what was compiled.

The output is one JSON object, {topology: {program: [bytes of temporaries, bytes of the largest argument, operations
that a plan counts]}}; the model's are not counted, and of "grouped" those of the compiled program. cuDNN itself is not
asked: it makes its kernels on the GPU.
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from rlstab_jax.models import Kernels, Precision
from rlstab_jax.models.attention import cudnn
from rlstab_jax.models.attention_gpu import decode_triton
from rlstab_jax.models.grouped_dots import tokamax, triton
from rlstab_jax.models.precision import Stored
from rlstab_jax.models.sorted_experts import grouped
from rlstab_jax.models.swiglu import ExpertWeights
from rlstab_jax.parallel.topology import topology, topology_devices, without_accelerators
from rlstab_jax.training.plan_flops import products
from rlstab_jax.training.plan_hlo import program_cost
from tests.models.ahead_of_time import (
    BF16,
    a_decode_step,
    four,
    gradient,
    gradient_over,
    memory,
    narrow_rows,
    sequences,
    stored,
)

KERNELS = Kernels("cudnn", "tokamax", "triton", "tokamax")
experts = partial(tokamax, preferred_element_type=BF16)
# 1000 rows are no multiple of what tokamax takes at once, nor are 131 tokens even, which cuDNN wants.
ROWS = [jax.ShapeDtypeStruct(shape, BF16) for shape in ((1000, 1024), (16, 1024, 768))]
SIZES = jax.ShapeDtypeStruct((16,), jnp.int32)
PROGRAMS = {
    "cudnn, forward": (cudnn, sequences(8, 2, 131, 128, BF16)),
    "cudnn": (gradient(cudnn, 3), sequences(8, 2, 131, 128, BF16)),
    "tokamax, forward": (experts, [*ROWS, SIZES]),
    "tokamax": (gradient(experts, 2), [*ROWS, SIZES]),
    "triton": (partial(decode_triton, format="float8_e4m3fn"), a_decode_step(BF16, stored, jnp.uint8)),
    "triton, float32": (decode_triton, a_decode_step(jnp.float32, stored)),
    "triton experts": (triton, narrow_rows(512)),
    "triton experts, a prefill": (triton, narrow_rows(2**17)),
}
TOKENS, K, E, D, F = 1024, 2, 16, 256, 128


def grouped_gradient(x: jax.Array, gates: jax.Array, *matrices: jax.Array) -> Any:
    """Of all experts, of which token t chooses t mod E and the next."""
    chosen = (jnp.arange(TOKENS)[:, None] + jnp.arange(K)) % E

    def total(x: jax.Array, gates: jax.Array, *matrices: jax.Array) -> jax.Array:
        weights = ExpertWeights(*(Stored(values, None) for values in matrices))
        return grouped(x, chosen, gates, weights, Precision("bfloat16")).sum()

    return jax.value_and_grad(total, argnums=range(5))(x, gates, *matrices)


def grouped_cost(sharding: SingleDeviceSharding) -> list[float]:
    matrices = [((E, *of), jnp.float32) for of in ((D, F), (D, F), (F, D))]
    shapes = [((TOKENS, D), BF16), ((TOKENS, K), jnp.float32), *matrices]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    compiled = jax.jit(grouped_gradient).lower(*arguments).compile()
    return [*memory(grouped_gradient, arguments, sharding), program_cost(compiled.as_text()).products]


if __name__ == "__main__":
    without_accelerators()
    report: dict[str, dict[str, list[float]]] = {}
    for name in sys.argv[1:]:
        devices = topology_devices(topology(name))
        with jax.default_device(devices[0]):  # tokamax asks it for its kind
            one = SingleDeviceSharding(devices[0])
            report[name] = {
                label: [*memory(f, arguments, one), sum(products(jax.jit(f).trace(*arguments).jaxpr).values())]
                for label, (f, arguments) in PROGRAMS.items()
            }
            report[name]["grouped"] = grouped_cost(one)
            report[name]["model, gradient over a mesh"] = gradient_over(
                four(devices), kernels=KERNELS, dtype="bfloat16"
            )
    print(json.dumps(report))
