"""The statistics by hand, and the whole script on this device at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import fp8_emulation as study

ROOT = Path(__file__).parents[2]


def test_statistics_by_hand() -> None:
    d = np.array([[1.0, -1.0, 1.0, -1.0], [3.0, 1.0, 3.0, 1.0]])
    got = study.describe(d)
    assert (got["median"], got["mean"], got["max"]) == (1, 1.5, 3)
    assert got["bias"] == 1
    assert got["bias_standard_error"] == pytest.approx(1)  # rows have means 0 and 2: std sqrt(2), over sqrt(2)
    assert got["share_positive"] == 0.75
    # About the mean 1: 0 -2 0 -2 and 2 0 2 0, mean square 2. Neighbours multiply to 0, next but one to 0 4 4 0.
    assert got["autocorrelation"] == {1: 0, 2: 1}
    assert study.describe(np.zeros((1, 4)))["autocorrelation"] == {}


def test_flipped_sets() -> None:
    def routes(*sets: list[int]) -> study.View:
        return study.View(np.zeros(0), np.array([[sets]]), 0)

    assert study.flipped(routes([0, 1], [2, 3]), routes([1, 0], [2, 4])) == 0.5
    assert study.flipped(study.View(np.zeros(0), None, 0), routes([0, 1])) is None


def test_at_a_small_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Emulation stands for this device's own products: the same numbers, up to the order of the sums."""
    sizes = "--layers 1 --embed 32 --heads 2 --kv-heads 1 --head-dim 16 --experts 4 --expert-dim 16 --vocab 32 --rows 2"
    out = tmp_path / "new" / "numbers.json"
    result = study.main([*sizes.split(), "--time", "12", "--kernel", "dense", "--dtype", "float32", "--out", str(out)])
    assert json.loads(out.read_text())["tokens"] == 22 == result["tokens"]
    assert result["native - emulated"]["replayed"]["median"] < 1e-5
    assert 1e-3 < result["emulated - float32"]["replayed"]["median"] < 0.5
    printed = capsys.readouterr().out
    assert printed.startswith("device cpu")
    assert "routes flipped" in printed


def test_needs_neither_grain_nor_tyro() -> None:
    code = "import sys; sys.modules |= dict.fromkeys(('grain', 'tyro')); import experiments.benchmarks.fp8_emulation"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
