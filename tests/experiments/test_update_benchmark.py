"""The update benchmark: its arithmetic by hand, its loss against NumPy, and a tiny run of this engine alone."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import common, decode, update, update_peers, update_report, utilisation
from rlstab_jax.models import ModelConfig, Transformer
from rlstab_jax.models.transformer import forward, logits_of

LOAD = update.QUICK.base
OURS = {"name": "rlstab_jax", "amount": 10, "seconds": [1.0, 2.0, 5.0], "peak_bytes": 3 * 2**20, "temporary": 2**21}
PEER = {"name": "transformers, eager experts", "amount": 10, "seconds": [2.0, 2.0, 20.0], "peak_bytes": None}
ENVIRONMENT = {"date": "2026-11-30", "commit": "abc", "device": "cpu: any", "cores": 2, "python": "3.11"}
ENVIRONMENT |= {"versions": {"jax": "0.10.2"}}


def test_times_and_the_fastest_peer() -> None:
    slow = PEER | {"name": "transformers, grouped_mm", "seconds": [4.0, 4.0, 40.0]}
    missing = {"name": update_peers.TUNIX, "missing": "No module named 'tunix'"}
    cell = {"threads": 1, "differences": {PEER["name"]: 4e-6}, "contenders": [OURS, PEER, slow, missing]}
    text = update_report.PAGE.text({"peers": {"environment": ENVIRONMENT, "cells": [cell]}})
    assert "| 1 | rlstab_jax (fastest) | 2,000 [1,500, 3,500] | 5 [4, 8] |  | 3 |  |" in text
    # 1 / 2, 2 / 2, 5 / 20
    assert "| transformers, eager experts (fastest) | 2,000 [2,000, 11,000] | 5 [3, 5] | 0.50 [0.38, 0.75] |" in text
    assert "| not measured | 4e-06 |" in text
    assert "| transformers, grouped_mm | 4,000 [4,000, 22,000] | 2 [1, 2] | 0.25 [0.19, 0.38] |" in text
    assert "| Tunix model, optax | missing | No module named 'tunix' |" in text
    assert update_report.headline(cell) == ("rlstab_jax", PEER["name"], common.Spread(0.5, 0.375, 0.75))
    assert update_report.headline(cell | {"contenders": [OURS, missing]}) is None
    other = OURS | {"name": "R3", "seconds": [1.01, 2.02, 5.05]}
    replay = {"threads": 1, "contenders": [OURS | {"name": "live"}, other]}
    text = update_report.PAGE.text({"replay": {"environment": ENVIRONMENT, "cells": [replay]}})
    assert "| 1 | R3 | 2,020 [1,515, 3,535] | 5 [3, 7] | 1.010 | 2 |" in text


def test_the_loss_that_peers_are_given_is_ours() -> None:
    """- sum coefficient * sg[pi / mu] * log pi in NumPy, from our logits; and the router's gradient by differences."""
    ours = update.program("ours", LOAD)
    batch, params = update.batch_of(LOAD), decode.parameters(LOAD.model)
    model = Transformer(LOAD.model, LOAD.precision, update.KERNELS)

    @jax.jit
    def log_probs(params: dict) -> jax.Array:
        fed = jnp.asarray(batch.tokens[:, :-1])
        hidden = forward(model, {"params": params}, fed, jnp.ones(fed.shape, bool)).hidden
        logits = logits_of(model, {"params": params}, hidden.reshape(-1, hidden.shape[-1]))
        log_probs = jax.nn.log_softmax(logits).reshape(*fed.shape, -1)
        return jnp.take_along_axis(log_probs, jnp.asarray(batch.tokens)[:, 1:, None], axis=-1)[..., 0]

    def moved(size: float) -> dict:
        router = params["segment_0"]["block_0"]["moe"]["router"]["kernel"]
        block = params["segment_0"]["block_0"]
        moe = block["moe"] | {"router": {"kernel": router.at[-1, 3, 2].add(size)}}
        return params | {"segment_0": {"block_0": block | {"moe": moe}}}

    now = np.asarray(log_probs(params), np.float64)
    weight = batch.coefficient * np.exp(now - batch.rollout)
    measures: list[dict[str, float]] = []
    recorded = dataclasses.replace(ours, step=lambda: measures.append(ours.step()) or measures[-1])
    reference = update.reference_of(recorded)
    assert abs(reference.loss / -(weight * now).sum() - 1) < 1e-5
    step = 1e-3
    up, down = (np.asarray(log_probs(moved(size)), np.float64) for size in (step, -step))
    slope = -(weight * (up - down)).sum() / (2 * step)
    norm = measures[0]["learner/grad_norm"]
    assert abs(reference.gradient[3, 2] * max(1.0, norm) - slope) < 0.02 * np.abs(reference.gradient).max()
    assert reference.difference(reference.loss, reference.gradient) == 0
    assert abs(reference.difference(1.5 * reference.loss, reference.gradient) - 0.5) < 1e-9


def test_own_routes_are_replayed() -> None:
    params = decode.parameters(LOAD.model)
    live, replayed = (update.minibatch_of(dataclasses.replace(LOAD, replay=r), params) for r in ("live", "r3"))
    np.testing.assert_array_equal(replayed.rollout.routes, replayed.old.routes)
    assert live.rollout.routes is None
    assert live.old.live.shape == replayed.old.live.shape  # made up, so that the diagnostics have something to compare
    assert (np.asarray(live.old.live)[..., 0] != np.asarray(live.old.live)[..., 1]).all()


def test_flops_by_hand() -> None:
    model = ModelConfig(
        vocab_size=11,
        num_layers=2,
        embed_dim=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        num_experts=3,
        experts_per_token=2,
        expert_dim=5,
        mlp_dim=7,
        dense_layers=(1,),
    )
    # q and o 4 x 4, k and v 4 x 2; scores and values of two heads of 2 over 5 tokens on average of 9.
    attention = 2 * 16 + 2 * 8 + 2 * 4 * 5
    moe = 4 * 3 + 2 * 3 * 4 * 5
    assert utilisation.flops_per_token(model, 9) == 6 * (2 * attention + moe + 3 * 4 * 7 + 4 * 11)


def test_quick_run_writes_numbers_table_and_picture(tmp_path: Path) -> None:
    update.main(["--quick", "--tables", "peers", "packing", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "peers.json").read_text())
    (cell,) = found["cells"]
    assert cell["contenders"][0]["amount"] == cell["tokens"] == LOAD.rows * LOAD.tokens
    assert len(cell["contenders"][0]["seconds"]) == found["settings"]["repetitions"]
    assert {r["name"] for r in cell["contenders"][1:]} == {*update_peers.HUGGING_FACE, update_peers.TUNIX}
    assert all("missing" in r for r in cell["contenders"][1:])
    (cell,) = json.loads((tmp_path / "packing.json").read_text())["cells"]
    apart, packed = cell["contenders"]
    assert apart["amount"] == packed["amount"] == round(cell["mean"] * cell["rows"])
    text = (tmp_path / "README.md").read_text()
    assert "left out of a quick run" in text
    assert "Packing, lengths with a long tail" in text
    assert (tmp_path / "update.png").stat().st_size > 10_000
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "update.png", "peers.json", "packing.json"}


def test_utilisation_runs_on_any_platform(tmp_path: Path) -> None:
    update.main(["--gpu", "--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "utilisation.json").read_text())
    assert found["settings"]["kernels"]["experts"] == "tiles"  # as on CPU
    cells = found["cells"]
    assert [c["model"] for c in cells] == ["dense", "MoE"]
    load = utilisation.TINY
    for cell in cells:
        of_update, products = cell["contenders"]
        per_token = utilisation.flops_per_token(load.models[cell["model"]], load.tokens)
        assert of_update["amount"] == load.rows * load.tokens * per_token
        assert products["amount"] == load.products * 2 * load.matrix**3
    assert "| dense |" in (tmp_path / "README.md").read_text()


def test_imports_without_other_libraries() -> None:
    names = ("grain", "torch", "transformers", "tunix")
    code = f"import sys; sys.modules |= dict.fromkeys({names}); import experiments.benchmarks.update"
    subprocess.run([sys.executable, "-c", code], check=True)
