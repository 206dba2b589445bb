"""`rlstab diagnose`: equal engines have no gap, the parts add up, and bad input is one line and exit code 2."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from rlstab_jax.cli import main
from rlstab_jax.learner import init_state
from rlstab_jax.report.diagnose import draw_diagnosis
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.diagnose import PRECISIONS, diagnose, load_parameters, print_table
from rlstab_jax.training.engines import build, initial_params
from rlstab_jax.training.loop import RunState
from rlstab_jax.types import UserError
from tests.training.tiny_run import config

CONFIG = "tests/training/tiny_run.py"
PROMPTS = 4


def initial(engines):
    return engines.place(initial_params(engines.training, 0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A cold start's directory."""
    path = tmp_path_factory.mktemp("cold") / "start"
    with Checkpoints(path) as checkpoints:
        checkpoints.save(3, {"params": initial(build(config()))}, {})
    return path


def test_the_command_prints_writes_and_draws(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--prompts", str(PROMPTS), "--out", str(out), "--compilation-cache", "None"]
    assert main(["diagnose", str(checkpoint), CONFIG, "--precisions", "float32", "fp8_e4m3", *options]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("float32", "fp8_e4m3", "routing by MoE layer"))
    report = json.loads((out / "gaps.json").read_text())
    assert report["step"] == 3
    equal, fp8 = report["gaps"]
    assert abs(equal["k1"]) < 1e-5
    assert abs(equal["k3"]) < 1e-8
    assert equal["max_ratio"] < 1 + 1e-4
    assert equal["f2"] == equal["routing_disagreement"] == 0
    assert equal["layers"][0]["first_margin"] is None  # no token flips
    assert fp8["k3"] > 1e-5
    assert fp8["routing_k3"] == pytest.approx(fp8["k3"] - fp8["k3_replayed"], abs=1e-7)
    assert fp8["responses"] == PROMPTS * config().samples_per_prompt
    assert fp8["layers"][0]["first"] == fp8["layers"][0]["disagreement"]  # nothing lies before the first layer
    assert 0 < fp8["entropy"] < math.log(build(config()).config.model.vocab_size)
    assert (out / "gaps.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["gaps.json", "gaps.png"]


def test_in_parts_as_in_one(checkpoint):
    parts = replace(config(), learner=replace(config().learner, score_micro_batches=4))
    step, (whole,) = diagnose(config(), checkpoint, ["fp8_e4m3"], PROMPTS)
    _, (split,) = diagnose(parts, checkpoint, ["fp8_e4m3"], PROMPTS)
    assert step == 3
    for name in ("k1", "k3", "k3_replayed", "max_ratio", "f2", "entropy", "routing_disagreement"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-7)


def test_a_run_its_checkpoints_and_a_cold_start_are_all_checkpoints(checkpoint, tmp_path):
    engines = build(config())
    params = initial(engines)
    (tmp_path / "manifest.json").write_text("{}")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, RunState(init_state(params, engines.numbers), None), {})
    for path, step in ((checkpoint, 3), (tmp_path, 5), (tmp_path / "checkpoints", 5)):
        found, loaded = load_parameters(engines, path)
        assert found == step
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_dense_model_has_no_layers_to_show(tmp_path, capsys):
    learner = replace(config().learner, replay="live")
    dense = replace(config(), model=replace(config().model, num_experts=0), learner=learner)
    with Checkpoints(tmp_path / "dense") as checkpoints:
        checkpoints.save(1, {"params": initial(build(dense))}, {})
    _, (gaps,) = diagnose(dense, tmp_path / "dense", ["bfloat16"], PROMPTS)
    assert gaps.layers == ()
    assert math.isnan(gaps.k3_replayed)
    assert gaps.k3 > 0
    print_table([gaps])
    assert "MoE layer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected a checkpoint first"),
        (["{empty}", CONFIG, "--prompts", "16"], "holds no checkpoint"),
        (["{empty}/nowhere", CONFIG, "--prompts", "16"], "holds no checkpoint"),
        (["{checkpoint}"], "name the config: rlstab diagnose"),
        (["{checkpoint}", CONFIG, "--precisions", "fp4"], "unknown precision 'fp4'"),
        (["{empty}", CONFIG, "--prompts", "1000"], "1000 prompts: expected 1 to 16"),
        (["{checkpoint}", CONFIG, "--prompts", "16", "--model.embed-dim", "24"], "of another model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, words, checkpoint, tmp_path, capsys):
    filled = [a.format(empty=tmp_path, checkpoint=checkpoint) for a in arguments]
    options = ["--compilation-cache", "None"] if len(arguments) > 1 else []
    assert main(["diagnose", *filled, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_without_a_config_it_is_the_runs(tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = ["train", CONFIG, "--out", str(run), "--gradient-steps", "4", "--samples-per-prompt", "2"]
    monkeypatch.setattr("sys.argv", ["rlstab", *command])
    assert main(command) == 0
    options = ["--prompts", str(PROMPTS), "--precisions", "float32", "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gaps.json").write_text("of before")
    assert main(["diagnose", str(run), *options]) == 0
    assert (tmp_path / "out" / "gaps.json.old-1").read_text() == "of before"
    (gaps,) = json.loads((tmp_path / "out" / "gaps.json").read_text())["gaps"]
    assert gaps["responses"] == 2 * PROMPTS


def test_no_precision_is_refused(checkpoint):
    with pytest.raises(UserError, match="no precision"):
        diagnose(config(), checkpoint, [])


def test_a_picture_of_hard_cases(tmp_path):
    layer = {"disagreement": 0.0, "first": 0.0, "margin": 0.1, "first_margin": math.nan}
    row = {"k3": 0.0, "k3_replayed": math.nan, "routing_k3": math.nan, "f2": 0.0, "max_ratio": 1.0}
    for layers in ((), (layer,)):
        rows = [{"precision": name, "layers": layers, **row} for name in PRECISIONS]
        draw_diagnosis(rows, tmp_path / "gaps.png", "no gap at all")
        assert (tmp_path / "gaps.png").stat().st_size > 1000


def test_a_precision_that_the_model_does_not_allow_is_refused_before_any_work(checkpoint, monkeypatch):
    monkeypatch.setattr("rlstab_jax.models.precision.INT8_TERMS", 4)
    with pytest.raises(UserError, match=r"embed_dim.*an int32 holds the sum of 4 products.*precision int8.scales"):
        diagnose(config(), checkpoint, ("float32", "int8"), PROMPTS, begin=lambda: pytest.fail("work had begun"))
