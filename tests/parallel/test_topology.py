"""Chips and topologies by name, and what is said where a compiler is missing. Compiling itself: tests of plans."""

import importlib.util
import subprocess
import sys

import pytest
from jax.experimental import topologies

from rlstab_jax.parallel.topology import GPUS, TPUS, topology, topology_devices
from rlstab_jax.types import UserError


@pytest.mark.parametrize(
    ("name", "chips", "devices", "memory"),
    [
        ("v5e:2x2", 4, 4, 15.75),
        ("v5p:4x4x4", 64, 64, 95.74),
        ("v6e:8x8", 64, 64, 31.25),
        ("tpu7x:2x2x1", 4, 8, 94.75),  # a chip is two devices, which share its memory
    ],
)
def test_tpus(name: str, chips: int, devices: int, memory: float) -> None:
    found = topology(name)
    assert (found.chips, found.devices, found.platform) == (chips, devices, "tpu")
    assert found.memory == pytest.approx(memory * 2**30)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX takes three quarters of a GPU's memory, or what the environment says."""
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    many = topology("cuda:h100:64")
    assert (many.chips, many.devices, many.platform, many.memory) == (64, 64, "gpu", 60e9)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert many.memory == pytest.approx(72e9)
    assert topology("v5e:2x2").memory == 15.75 * 2**30
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(UserError, match=r"XLA_CLIENT_MEM_FRACTION = 'most': expected a number, such as 0\.75"):
        _ = many.memory
    # Eight have NVLink, 900 GB/s both ways; beyond, an adapter of 400 Gbit/s each.
    assert (many.chip.interconnect, many.chip.across, many.chip.island) == (450e9, 50e9, 8)


def test_rates_are_in_order() -> None:
    """No chip is faster in wider numbers."""
    for chip in [*(chip for chip, _ in TPUS.values()), *GPUS.values()]:
        assert chip.narrow_float >= chip.bfloat16 > chip.float32
        assert chip.int8 >= chip.bfloat16
        assert chip.source.startswith("https://")


def test_the_next_larger() -> None:
    assert topology("v5p:2x2x4").larger == topology("v5p:4x4x4")
    assert topology("v5p:8x8x8").larger is None
    for few, more in ((1, 2), (3, 6), (4, 8), (5, 16), (7, 16), (8, 16), (24, 48)):
        assert topology(f"cuda:h100:{few}").larger == topology(f"cuda:h100:{more}")


TORUS = """
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.topology import topology, topology_devices, without_accelerators
without_accelerators()
for name, *sizes in (("v6e:8x8", 1, 16, 4, 1), ("v5p:4x4x4", 1, 8, 8, 1), ("v5p:8x8x8", 8, 16, 4, 1)):
    devices = topology_devices(topology(name))
    assert make_mesh(MeshConfig(*sizes), devices).devices.shape == tuple(sizes)
three = topology_devices(topology("v5e:2x2"))[:-1]
assert list(make_mesh(MeshConfig(), three).devices.flat) == list(three)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_meshes_need_not_follow_the_torus() -> None:
    """Sizes that are no products of whole sides of it, and what is left where some chips are set aside."""
    done = subprocess.run([sys.executable, "-c", TORUS], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["", "v5p", "v5p:4x4", "v7:2x2", "cuda:b300:8", "cuda:h100", "cuda:h100:0", "cuda:h100:12"]
)
def test_unknown(name: str) -> None:
    with pytest.raises(UserError, match=r"is unknown: give one of v5e:\{2x2,4x4,8x8,16x16\}, v5p.*cuda:\{h100,h200\}"):
        topology(name)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the CUDA plugin is installed")
def test_without_the_cuda_plugin() -> None:
    with pytest.raises(UserError, match=r"'cuda:h100:64'.* NVIDIA GPUs cannot .*: pip install 'rlstab_jax\[cuda\]'"):
        topology_devices(topology("cuda:h100:64"))


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(**_: object) -> None:
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.\nmore")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=r"TPUs cannot .* \(JAX TPU .* topology\.\): pip install 'rlstab_jax\[tpu\]'"):
        topology_devices(topology("v5e:2x2"))
