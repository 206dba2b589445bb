"""Run by test_ahead_of_time.py: compiles for NVIDIA GPUs that are not there, and prints what was compiled.

The output is one JSON object, {topology: {program: [bytes of temporaries, bytes of the largest argument, operations
that a plan counts]}}; the model's are not counted. cuDNN itself is not asked: it makes its kernels on the GPU.
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from rlstab_jax.models import Kernels
from rlstab_jax.models.attention import cudnn
from rlstab_jax.models.grouped_dots import tokamax
from rlstab_jax.parallel.topology import topology, topology_devices, without_accelerators
from rlstab_jax.training.plan_flops import products
from tests.models.ahead_of_time import BF16, four, gradient, gradient_over, memory, sequences

KERNELS = Kernels("cudnn", "tokamax", "reference", "tokamax")
experts = partial(tokamax, preferred_element_type=BF16)
# 1000 rows are no multiple of what tokamax takes at once, nor are 131 tokens even, which cuDNN wants.
ROWS = [jax.ShapeDtypeStruct(shape, BF16) for shape in ((1000, 1024), (16, 1024, 768))]
SIZES = jax.ShapeDtypeStruct((16,), jnp.int32)
PROGRAMS = {
    "cudnn, forward": (cudnn, sequences(8, 2, 131, 128, BF16)),
    "cudnn": (gradient(cudnn, 3), sequences(8, 2, 131, 128, BF16)),
    "tokamax, forward": (experts, [*ROWS, SIZES]),
    "tokamax": (gradient(experts, 2), [*ROWS, SIZES]),
}


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
            report[name]["model, gradient over a mesh"] = gradient_over(
                four(devices), kernels=KERNELS, dtype="bfloat16"
            )
    print(json.dumps(report))
