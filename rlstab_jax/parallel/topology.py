"""Accelerators to plan for: their rates, and devices to compile for that are not there."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax

from rlstab_jax.types import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, dense, as its vendor states them."""

    name: str
    source: str
    """Where the numbers come from."""
    bfloat16: float
    """Products of bfloat16 or float16, operations per second."""
    narrow_float: float
    """Products of fp8, operations per second; bfloat16's where the chip has none."""
    int8: float
    """Products of int8, operations per second; bfloat16's where the vendor states none."""
    float32: float
    """Products of float32 in full precision, operations per second. TPUs make them of six bfloat16 ones."""
    memory: float
    """Bytes: of TPUs what the compiler grants a program, somewhat less than the data sheet says; of GPUs all, of which
    JAX takes a part (`Topology.memory`)."""
    memory_bandwidth: float
    """Bytes per second, reading or writing."""
    interconnect: float
    """Bytes per second out of the chip over all its links at once: half of what is stated for both directions."""
    devices: int = 1
    """JAX devices that it appears as; they share all of the above."""
    across: float | None = None
    """Bytes per second out of the chip to others than its ``island``; None where all are one network."""
    island: int = 0
    """Neighbours that ``interconnect`` joins; islands of them talk at the rate ``across``."""


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# Memory: `jit` of a program that is too large says "exceeds available HBM" (libtpu 0.0.42 and 0.0.51).
V5E = Chip("v5e", _TPU + "v5e", 197e12, 197e12, 393e12, 197e12 / 6, 15.75 * GIB, 819e9, 200e9)
# Its page states one rate for bfloat16 and fp8, which it has no units for; that of int8 is the one of its launch.
V5P = Chip("v5p", _TPU + "v5p", 459e12, 459e12, 918e12, 459e12 / 6, 95.74 * GIB, 2765e9, 600e9)
V6E = Chip("v6e", _TPU + "v6e", 918e12, 918e12, 1836e12, 918e12 / 6, 31.25 * GIB, 1638e9, 400e9)
TPU7X = Chip("tpu7x", _TPU + "tpu7x", 2307e12, 4614e12, 2307e12, 2307e12 / 6, 189.5 * GIB, 7380e9, 600e9, devices=2)
# The SXM modules; their pages state rates with sparsity, twice these. Beyond a node's 8, one 400 Gbit/s adapter a GPU
# (DGX H100 and H200).
H100 = Chip("h100", _NVIDIA + "h100/", 989.5e12, 1979e12, 1979e12, 67e12, 80e9, 3350e9, 450e9, across=50e9, island=8)
H200 = Chip("h200", _NVIDIA + "h200/", 989.5e12, 1979e12, 1979e12, 67e12, 141e9, 4800e9, 450e9, across=50e9, island=8)

# What libtpu knows by these names, from the smallest on: a plan that does not fit looks further down the line.
TPUS: dict[str, tuple[Chip, tuple[str, ...]]] = {
    "v5e": (V5E, ("2x2", "4x4", "8x8", "16x16")),
    "v5p": (V5P, ("2x2x1", "2x2x2", "2x2x4", "4x4x4", "8x8x8")),
    "v6e": (V6E, ("2x2", "4x4", "8x8")),
    "tpu7x": (TPU7X, ("2x2x1", "4x4x4")),
}
GPUS = {"h100": H100, "h200": H200}
KNOWN = ", ".join([f"{tpu}:{{{','.join(shapes)}}}" for tpu, (_, shapes) in TPUS.items()]) + ", cuda:{h100,h200}:GPUS"


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind."""

    name: str
    chip: Chip
    chips: int
    platform: str
    """"tpu" or "gpu", as `jax.default_backend()` says."""

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def memory(self) -> float:
        """Bytes of a device that arrays can have."""
        return self.chip.memory * (_preallocated() if self.platform == "gpu" else 1) / self.chip.devices

    @property
    def larger(self) -> "Topology | None":
        """The next one of the same chips."""
        kind, _, shape = self.name.partition(":")
        if kind == "cuda":
            more = self.chips * 2
            return topology(f"cuda:{self.chip.name}:{more if more <= 8 else -(-more // 8) * 8}")
        shapes = TPUS[kind][1]
        following = shapes[shapes.index(shape) + 1 :]
        return topology(f"{kind}:{following[0]}") if following else None


def _preallocated() -> float:
    """The part of a GPU's memory that JAX takes for arrays: three quarters, unless the environment says otherwise."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    name = next((name for name in names if os.environ.get(name)), "")
    text = os.environ.get(name, "0.75")
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} = {text!r}: expected a number, such as 0.75; set it, or unset the variable") from None


def topology(name: str) -> Topology:
    """The topology of a name such as ``v5p:4x4x4`` or ``cuda:h100:64``. Raises UserError that lists the known ones."""
    kind, _, rest = name.partition(":")
    if kind in TPUS and rest in TPUS[kind][1]:
        chips = 1
        for side in rest.split("x"):
            chips *= int(side)
        return Topology(name, TPUS[kind][0], chips, "tpu")
    gpu, _, count = rest.partition(":")
    if kind == "cuda" and gpu in GPUS and count.isdecimal() and _whole_nodes(int(count)):
        return Topology(name, GPUS[gpu], int(count), "gpu")
    raise UserError(f"topology {name!r} is unknown: give one of {KNOWN} (GPUS: 1 to 8, or a multiple of 8)")


def _whole_nodes(gpus: int) -> bool:
    return 0 < gpus <= 8 or (gpus > 0 and gpus % 8 == 0)


def topology_devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for, which compute nothing. Call it before JAX has looked for real ones.

    Raises:
      UserError: the compiler for them is not installed.
    """
    return _tpus(topology) if topology.platform == "tpu" else _gpus(topology)


def _tpus(topology: Topology) -> Sequence[Any]:
    from jax.experimental import topologies

    # libtpu asks the machine that it is on, unless told what it would find; and one process locks it for all others.
    told = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": topology.name.replace(":", "-"),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for variable, value in told.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except Exception as error:
        raise UserError(
            f"topology {topology.name!r}: the compiler for TPUs cannot be used ({_first_line(error)}): "
            "pip install 'rlstab_jax[tpu]'"
        ) from error
    if len(devices) != topology.devices:
        raise UserError(
            f"topology {topology.name!r}: this libtpu makes {len(devices)} devices of it, expected {topology.devices}: "
            "install the one that belongs to this jax (pip install 'rlstab_jax[tpu]')"
        )
    return list(devices)


def _gpus(topology: Topology) -> Sequence[Any]:
    from jax.experimental import topologies

    nodes, gpus = (1, topology.chips) if topology.chips <= 8 else (topology.chips // 8, 8)
    # Partitions of nodes, nodes, GPUs of a node.
    shape = f"1x{nodes}x{gpus}"
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=shape, topology=shape, target_config=_hopper(topology.chip)
        )
    except Exception as error:
        raise UserError(
            f"topology {topology.name!r}: the compiler for NVIDIA GPUs cannot be used ({_first_line(error)}): "
            "pip install 'rlstab_jax[cuda]'"
        ) from error
    return list(described.devices)


def _hopper(chip: Chip) -> str:
    """What XLA's compiler wants to know of a Hopper GPU (a ``GpuTargetConfigProto`` as text): the limits of compute
    capability 9.0 in the CUDA programming guide, and the data sheet's 132 multiprocessors and 50 MiB of cache."""
    return f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {chip.name.upper()}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          name: "NVIDIA {chip.name.upper()}" device_vendor: "NVIDIA Corporation"
          cuda_compute_capability {{ major: 9 }}
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          device_memory_size: {int(chip.memory)} memory_bandwidth: {int(chip.memory_bandwidth)}
          l2_cache_size: {50 * 2**20} device_address_bits: 64
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_core: {228 * 2**10} shared_memory_per_block: {48 * 2**10}
          shared_memory_per_block_optin: {227 * 2**10}
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        }}"""


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def without_accelerators() -> None:
    """Makes JAX look for no accelerator: planning needs none, and looking for one that is not there takes time."""
    jax.config.update("jax_platforms", "cpu")
