"""The decode benchmark: its arithmetic by hand, and a tiny run of this engine alone."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import bandwidth, common, decode, decode_report, pages, peers
from rlstab_jax.models import ModelConfig, Precision

OURS = {"name": "rlstab_jax", "amount": 10, "seconds": [1.0, 2.0, 5.0], "peak_bytes": 3 * 2**20}
PEER = {"name": "transformers, eager experts", "amount": 20, "seconds": [4.0, 4.0, 40.0], "peak_bytes": None}
ENVIRONMENT = {"date": "2026-11-30", "commit": "abc", "device": "cpu: any", "cores": 2, "python": "3.11"}
ENVIRONMENT |= {"versions": {"jax": "0.10.2"}}


def test_rates_and_paired_ratios() -> None:
    np.testing.assert_allclose(common.rates(OURS), [10, 5, 2])
    assert common.ratio(OURS, PEER) == common.Spread(median=2, low=1.5, high=3)  # 10 / 5, 5 / 5, 2 / 0.5
    assert common.ratio(OURS, PEER).text(".1f") == "2.0 [1.5, 3.0]"
    slower = OURS | {"name": "rlstab_jax, 2 virtual devices", "seconds": [2.0, 4.0, 10.0]}
    assert common.fastest([{"name": "rlstab_jax, 4", "missing": "why"}, slower, OURS, PEER], "rlstab_jax") is OURS
    assert common.fastest([{"name": "x", "missing": "why"}], "x") is None
    twice = OURS | {"seconds": [2.0, 4.0, 10.0]}
    assert pages.cost(twice, OURS) == common.Spread(100, 100, 100)


def test_repetitions_are_interleaved_and_the_first_run_is_not_timed() -> None:
    calls: list[str] = []

    def contender(name: str) -> common.Contender:
        return common.Contender(name, lambda: calls.append(name), 1)

    results = common.measure([contender("a"), common.Missing("b", "not installed"), contender("c")], 3, memory=False)
    assert "".join(calls) == "ac" + "ac" + "ca" + "ac"
    assert results[1] == {"name": "b", "missing": "not installed"}
    assert [len(results[i]["seconds"]) for i in (0, 2)] == [3, 3]
    assert results[0]["peak_bytes"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_peak_memory_counts_what_was_freed_again() -> None:
    found = common.peak_bytes(lambda: np.ones(2**23).sum())
    assert found is not None
    assert 60 < found / 2**20 < 80  # 64 MiB


def test_a_process_is_held_to_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(
        "import json, os, sys\n"
        "json.dump([len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'], os.environ['XLA_FLAGS'],"
        " sys.argv[1]], open(sys.argv[3], 'w'))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")
    alone = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    assert common.held_to(1, "child", ["argument"]) == [1, "1", alone, "argument"]
    with pytest.raises(common.UserError, match="--threads 10000: this process may use"):
        common.held_to(10_000, "child", [])


def test_tables_name_the_fastest_peer_and_the_missing_one() -> None:
    slow = PEER | {"name": "transformers, grouped_mm", "seconds": [8.0, 8.0, 80.0]}
    missing = {"name": peers.TUNIX, "missing": "No module named 'tunix'"}
    cell = {"threads": 1, "batch": 64, "differences": {PEER["name"]: 4e-6}, "contenders": [OURS, PEER, slow, missing]}
    text = decode_report.PAGE.text({"peers": {"environment": ENVIRONMENT, "cells": [cell]}})
    assert "| 1 | 64 | rlstab_jax (fastest) | 5 [4, 8] |  | 3 |  |" in text
    assert "| transformers, eager experts (fastest) | 5 [3, 5] | 2.00 [1.50, 3.00] | not measured | 4e-06 |" in text
    assert "| transformers, grouped_mm | 2 [1, 2] | 4.00 [3.00, 6.00] | not measured |  |" in text
    assert "| Tunix sampler | missing | No module named 'tunix' |  |  |" in text
    assert "3 interleaved repetitions on 2026-11-30 at abc. cpu: any, 2 cores, Python 3.11, jax 0.10.2." in text
    assert decode_report.headline(cell | {"contenders": [OURS, missing]}) is None


def test_lengths_have_a_long_tail() -> None:
    lengths = decode.long_tailed(20_000, 1024)
    assert lengths.min() >= 1
    assert lengths.max() == 1024
    # The mean of the lognormal is 128; 1.8% of it lies beyond the cut and is cut back.
    np.testing.assert_allclose(lengths.mean(), 125, atol=3)
    np.testing.assert_allclose(np.std(np.log(lengths)), 1, atol=0.03)
    np.testing.assert_array_equal(decode.long_tailed(8, 32), decode.long_tailed(8, 32))


def test_bytes_by_hand() -> None:
    model = ModelConfig(
        vocab_size=11, num_layers=2, embed_dim=4, num_heads=2, num_kv_heads=1, head_dim=2, num_experts=3, expert_dim=5
    )
    load = dataclasses.replace(bandwidth.TINY, model=model, batch=2, prompt=3, response=3)
    # bf16: q and o 4 x 4 each, k and v 4 x 2 each; float32: two norms of 4, two of 2, a router of 4 x 3.
    layer = 2 * (2 * 16 + 2 * 8) + 4 * (2 * 4 + 2 * 2 + 12)
    assert bandwidth.common_bytes(load) == 2 * layer + 2 * 4 * 11 + 4 * 4 + 2 * 2 * 4
    assert bandwidth.expert_bytes(load) == 2 * 3 * 4 * 5
    # Two layers, two rows, keys and values of one head of 2; five positions are read, one is written.
    assert bandwidth.cache_bytes(load, 5) == 2 * 2 * 2 * 2 * 2 * 6
    routes = np.array([[[[0, 1]] * 5, [[1, 2]] * 5], [[[0, 1]] * 5, [[1, 0]] * 5]])  # 3 is the sentinel
    routes[1, :, 4] = 3
    np.testing.assert_array_equal(bandwidth.touched(routes, 3), [[3, 3, 3, 3, 3], [2, 2, 2, 2, 0]])
    # Two steps, at positions 3 and 4, read 4 and 5 positions of the cache and 3 + 2 + 3 + 0 experts.
    expected = 2 * bandwidth.common_bytes(load) + 8 * 120 + 32 * (5 + 6)
    assert bandwidth.bytes_moved(load, routes) == expected
    assert bandwidth.common_bytes(dataclasses.replace(load, precision=Precision())) > bandwidth.common_bytes(load)


def test_quick_run_writes_numbers_table_and_picture(tmp_path: Path) -> None:
    decode.main(["--quick", "--tables", "peers", "recording", "continuous", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "peers.json").read_text())
    (cell,) = found["cells"]
    rows = cell["batch"]
    assert cell["contenders"][0]["amount"] == rows * found["settings"]["response"]
    assert len(cell["contenders"][0]["seconds"]) == found["settings"]["repetitions"]
    assert {r["name"] for r in cell["contenders"][1:]} == {*peers.HUGGING_FACE, peers.TUNIX}
    assert all("missing" in r for r in cell["contenders"][1:])
    assert found["environment"]["versions"].keys() >= {"jax", "jaxlib", "numpy"}
    (cell,) = json.loads((tmp_path / "recording.json").read_text())["cells"]
    assert [r["name"] for r in cell["contenders"]] == ["routes recorded", "not recorded"]
    percent = pages.cost(*cell["contenders"]).text("+.1f")
    (cell,) = json.loads((tmp_path / "continuous.json").read_text())["cells"]
    lengths = decode.long_tailed(cell["prompts"], cell["buffer"])
    assert cell["equal_rows"] == 1
    assert [r["amount"] for r in cell["contenders"]] == [lengths.sum()] * 2
    text = (tmp_path / "README.md").read_text()
    assert "left out of a quick run" in text
    assert percent in text
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    written = {"README.md", "decode.png", "peers.json", "recording.json", "continuous.json"}
    assert {p.name for p in tmp_path.iterdir()} == written


def test_imports_without_grain_and_tyro() -> None:
    code = "import sys; sys.modules['grain'] = sys.modules['tyro'] = None; import experiments.benchmarks.decode"
    subprocess.run([sys.executable, "-c", code], check=True)
