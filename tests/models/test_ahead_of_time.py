"""Kernels for accelerators that are not there, compiled as far as their compilers do without them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlstab_jax.models.config import has_tokamax

pytestmark = pytest.mark.optimised


def compiled_ahead_of_time(program: str, topologies: list[str], environment: dict[str, str]) -> dict[str, dict]:
    """What a program prints, in a process of its own: compilers read their environment once."""
    path = Path(__file__).with_name(program)
    root = path.parents[2]
    done = subprocess.run(
        [sys.executable, str(path), *topologies],
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report) == topologies
    return report


# libtpu asks the machine that it is on, unless told what it would find.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process of the machine locks it for all
}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; the test extra has it on Linux x86_64"
)
def test_tpu_kernels_compile_ahead_of_time() -> None:
    """For three generations."""
    report = compiled_ahead_of_time("ahead_of_time.py", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"], NO_TPU_HERE)
    assert len(report["v5e:2x2"]) == 15
    for topology, programs in report.items():
        assert {"splash", "decode_splash", "decode_flash", "megablox", "narrow"} <= set(programs)
        for name, (temporaries, largest) in programs.items():
            if "decode" in name or name == "narrow":  # no copy of keys, values or weights: the largest argument
                assert temporaries < largest / 2, (topology, name)


@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)) or not has_tokamax(),
    reason="the compiler for NVIDIA GPUs (the cuda extra) and tokamax (Python 3.12 or newer) are not both installed",
)
def test_gpu_kernels_compile_ahead_of_time() -> None:
    """For eight H100. Products by hand: a gradient adds two to each of tokamax's, and five to cuDNN's two."""
    (report,) = compiled_ahead_of_time("ahead_of_time_gpu.py", ["cuda:h100:8"], {}).values()
    experts, attention = 2 * 1024 * 1024 * 768, 4 * 8 * 128 * 132 * 133  # 1000 rows padded to 1024, 131 tokens to 132
    for name, by_hand in (
        ("tokamax, forward", experts),
        ("tokamax", 3 * experts),
        ("cudnn, forward", 2 * attention),
        ("cudnn", 7 * attention),
    ):
        assert report[name][2] == by_hand, name
    temporaries, largest, _ = report["tokamax"]
    assert temporaries < largest  # a dense product would need the rows once for each expert
    for name in ("triton", "triton, float32"):
        temporaries, largest, _ = report[name]
        assert temporaries < largest / 10, name  # nothing of the cache is copied or widened
    temporaries, largest, _ = report["triton experts"]
    assert temporaries < largest / 10  # nor of the weights
    # Nine products of D x F a row; shares are equal, and padded by an eighth.
    assert report["grouped"][2] == pytest.approx(1.125 * 9 * 2 * 1024 * 2 * 256 * 128, rel=0.01)
    assert "model, gradient over a mesh" in report
