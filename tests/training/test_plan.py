"""Plans: one made end to end for four chips that are not there, in a process of its own, and its programs by hand."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from rlstab_jax.cli import main
from rlstab_jax.models import Kernels, Precision, fp8
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.topology import Topology, topology
from rlstab_jax.stability.monitor import Check, MonitorConfig
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import build_pair
from rlstab_jax.training.plan import PHASES, _levers, _over_windows, _runs, _seconds, measure
from rlstab_jax.training.plan_flops import products
from rlstab_jax.training.plan_hlo import Cost
from rlstab_jax.training.plan_programs import Programs
from rlstab_jax.training.plan_sampling import SAMPLING, device_bytes
from tests.training import plan_config

pytestmark = pytest.mark.optimised

ROOT = Path(__file__).parents[2]
CHIP = topology("v5e:2x2")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; the test extra has it on Linux x86_64"
)


def planned(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlstab_jax.cli", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@needs_libtpu
def test_four_chips() -> None:
    """Bytes of a device by hand; nothing but JSON on standard output; the task is never built."""
    done = planned("tests/training/plan_config.py", "--topology", "v5e:2x2", "--json", "--price", "2", "--by", "1", "2")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    phases = {phase["name"]: phase for phase in plan["phases"]}
    assert list(phases) == ["prepare", "prefill", "resize", "decode", "score", "split", "update"]
    assert plan["fits"]
    assert plan["refused"] == plan["changes"] == []

    # Float32 parameters: fsdp splits by 2 what has an "embed" dimension, expert by 2 what has one of experts.
    d, heads, c, layers, vocab = 64, 4 + 2 + 2 + 4, 32, 2, 128
    attention = d * c * heads / 2 + 2 * d / 2 + 2 * c
    moe = d * 4 / 4 + 3 * 4 * d * 64 / 4
    parameters = 4 * (layers * (attention + moe) + 2 * vocab * d / 2 + d / 2)
    update = phases["update"]["memory"]
    assert update["parameters"] == parameters
    assert update["gradients"] == parameters
    assert update["optimiser"] == 2 * parameters + 4
    assert phases["decode"]["kept"]["training state"] == 3 * parameters + 4 + 4

    # The cache: 47 columns for each of a device's rows and 16 for each of its prompts, fp8 with a float32 scale.
    rows, prompts = 32 / ROW_DEVICES, 8 / ROW_DEVICES
    assert phases["decode"]["memory"]["KV cache"] == layers * 2 * 2 * (rows * 47 + prompts * 16) * (c + 4)

    config = plan_config.config()
    runs = {name: phase["runs"] for name, phase in phases.items()}
    assert runs == {"prepare": 1, "prefill": 1, "resize": 1, "decode": 47, "score": 2, "split": 2, "update": 2}
    for phase in phases.values():
        held = sum(phase["memory"].values()) + sum(phase["kept"].values())
        assert phase["needed"] == pytest.approx(held, rel=0.01)
        assert phase["total_s"] == phase["runs"] * max(phase["seconds"].values())
        assert phase["seconds"][phase["bound"]] == max(phase["seconds"].values())
    # The roofline of the run that was compiled is the sum over its phases.
    (compiled,) = [row for row in plan["by_minibatches"] if row["minibatches"] == config.minibatches]
    seconds = sum(phase["total_s"] for phase in phases.values())
    assert compiled["seconds"] * config.minibatches == pytest.approx(seconds)
    assert compiled["chip_hours"] == pytest.approx(15 * seconds * 4 / 3600)
    assert compiled["cost"] == pytest.approx(2 * compiled["chip_hours"])
    assert phases["update"]["sent"]["all-gather"] > 0
    # An update is a forward pass, that pass again, and a backward pass of twice its cost.
    assert sum(phases["update"]["products"].values()) == pytest.approx(
        4 * sum(phases["score"]["products"].values()) / config.minibatches, rel=0.1
    )


ROW_DEVICES = 4  # over fsdp and expert


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--topology v5p:3x3", "topology 'v5p:3x3' is unknown: give one of v5e:{2x2"),
        ("", "topology '' is unknown"),
        ("--topology v5e:2x2 --by 0", "expected a price of 0 or more, and N of 1 or more"),
        ("--topology v5e:2x2 --price -1", "expected a price of 0 or more, and N of 1 or more"),
        (
            "--topology v5e:2x2 --rollout.lag 2 --rollout.partial 8",
            "rollout.partial = 8: a plan is made for whole responses; use 0",
        ),
    ],
)
def test_mistakes(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "tests/training/plan_config.py"), *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--topology v5e:2x2 --mesh.fsdp 3", "needs 6 devices, but there are 4: lower a size"),
        ("--topology v5p:2x2x2 --rollout.lag 1 --rollout.devices 2", "rollout.devices = 2 with 2 processes: devices"),
    ],
)
def test_a_mesh_that_cannot_be(arguments: str, message: str) -> None:
    done = planned("tests/training/plan_config.py", *arguments.split())
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not done.stdout


def programs_of(config: RunConfig) -> Programs:
    """The programs of a config on one CPU device, which is also the one set aside, if one is; reference kernels."""
    config = dataclasses.replace(config, mesh=MeshConfig(), kernels=Kernels("reference", "dense", "reference", "dense"))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return Programs(build_pair(config, mesh, mesh if config.rollout.devices else None, "cpu", (0,), 0))


def test_packed_rows_are_planned_as_they_run() -> None:
    """As many as unpacked, which is the most: the programs gather tokens into rows and their results back."""
    config = plan_config.config()
    packing = dataclasses.replace(config, learner=dataclasses.replace(config.learner, packing=True, micro_batches=2))
    plain, packed = programs_of(config), programs_of(packing)
    for phase in ("score", "update"):
        gathers = [str(getattr(of, phase).traced.jaxpr).count("gather[") for of in (plain, packed)]
        assert gathers[1] > gathers[0], phase


def test_a_decode_step_reads_the_mean_window() -> None:
    """24 steps at a window of 24, 23 at one of 47, by hand: bytes of the cache, and products of attention."""
    programs = programs_of(plan_config.config())
    assert programs.windows == [24, 47]
    missing = 47 - (24 * 24 + 23 * 47) / 47
    rows, layers, heads, kv_heads, c = 32, 2, 4, 2, 32
    before = dict(products(programs.decode.traced.jaxpr))
    work, traffic = _over_windows(programs, programs.decode, before, 1e9, 1)
    of_a_token = 2 * layers * rows * kv_heads * (c + 4)  # keys and values in a byte each, with a scale for each head
    assert 1e9 - traffic == pytest.approx(missing * of_a_token)
    assert sum(before.values()) - sum(work.values()) == pytest.approx(2 * 2 * layers * rows * heads * c * missing)
    assert _over_windows(programs, programs.decode, before, 1e3, 1)[1] == 1e3  # a cache on the chip


def test_an_optimiser_in_the_hosts_memory() -> None:
    """Its moments take none of the device's: what is left of a training state is the parameters and two counts."""
    config = plan_config.config()
    offloading = dataclasses.replace(config.learner, offload_optimizer=True)
    here, there = (
        programs_of(dataclasses.replace(config, learner=learner)) for learner in (config.learner, offloading)
    )
    parameters = device_bytes(here.params)
    assert device_bytes(here.state) == 3 * parameters + 4 + 4
    assert device_bytes(there.state) == parameters + 4 + 4
    assert device_bytes(there.prepare.kept["optimiser"]) == 4


def test_a_float32_head() -> None:
    """Four bytes a weight in place of two in the sampler's weights; a scoring pass's products with it are float32's."""
    config, counts = plan_config.config(), []
    head = config.model.vocab_size * config.model.embed_dim
    narrow = fp8(dtype="bfloat16", quantise_lm_head=False), Precision("bfloat16")
    for rollout, learner in (narrow, [dataclasses.replace(of, float32_lm_head=True) for of in narrow]):
        programs = programs_of(
            dataclasses.replace(
                config,
                rollout=dataclasses.replace(config.rollout, precision=rollout),
                learner=dataclasses.replace(config.learner, precision=learner),
            )
        )
        rates = products(programs.score.traced.jaxpr.jaxpr)
        counts.append((device_bytes(programs.variables), rates["float32"], rates["bfloat16"]))
    (before, exact, rounded), (after, more_exact, less_rounded) = counts
    assert after - before == 2 * head
    tokens = config.responses_per_step * config.rollout.response_length
    assert more_exact - exact == rounded - less_rounded == 2 * tokens * head


def test_networks() -> None:
    """1 GB over NVLink, and at once what of it leaves the node by its adapter; a TPU has one network."""
    gpus, sent = topology("cuda:h100:64"), {"all-gather": 1e9}
    for chips, across, seconds in (
        (gpus, 0.0, 1 / 450),
        (gpus, 1e9, 1 / 50),
        (gpus, 1e8, 1 / 450),
        (CHIP, 0.0, 1 / 200),
    ):
        cost = Cost(sent=sent, across={"all-gather": across})
        assert _seconds({}, 0.0, cost, chips)["network"] == pytest.approx(seconds)


def test_what_lies_on_the_devices_besides() -> None:
    """A reference policy, batches that wait under a lag, dynamic sampling, which may sample three times, and PR2, whose
    predictors lie with the optimiser and whose batches keep what routers read."""
    config = plan_config.config()
    config = dataclasses.replace(
        config,
        objective=ObjectiveConfig("grpo", kl_coefficient=0.01),
        rollout=dataclasses.replace(config.rollout, lag=2, attempts=3),
        learner=dataclasses.replace(config.learner, replay="pr2"),
    )
    programs = programs_of(config)
    parameters, rollout, batch = map(device_bytes, (programs.params, programs.rollout, programs.whole))
    for program in (programs.decode, programs.score, programs.split, programs.update):
        kept = {name: device_bytes(tree) for name, tree in program.kept.items()}
        assert kept["reference"] == parameters
        assert kept["waiting batches"] == 2 * batch
        assert kept.get("earlier attempts") == (rollout if program.name == "decode" else None)
    observed = programs.whole.old.observed
    model = config.model
    assert observed.inputs.shape[::2] == (config.responses_per_step, model.num_moe_layers * model.embed_dim)
    predictors = device_bytes(programs.state.predictor)
    assert predictors == 4 + 3 * 4 * model.num_moe_layers * model.embed_dim * model.num_experts
    assert device_bytes(programs.update.parts["optimiser"]) == device_bytes(programs.state.opt_state) + predictors
    runs = {name: _runs(programs, name) for name in PHASES if getattr(programs, name)}
    assert runs == {
        "prepare": 1, "prefill": 3, "resize": 3, "decode": 3 * 47, "score": 3, "split": 2, "update": 2,
    }  # fmt: skip


def test_devices_set_aside() -> None:
    """Those that make batches hold parameters and a reference policy, no optimiser and no batch that waits: of these
    fields none spares them anything."""
    config = plan_config.config()
    config = dataclasses.replace(
        config,
        objective=ObjectiveConfig("grpo", kl_coefficient=0.01),
        rollout=dataclasses.replace(config.rollout, lag=1, devices=1),
    )
    programs = programs_of(config)
    parameters, batch, state = map(device_bytes, (programs.params, programs.whole, programs.state))
    reference = {"reference": parameters}
    learning = {**reference, "waiting batches": batch}
    expected = {
        "prepare": reference,
        "prefill": {"parameters": parameters, **reference},
        "score": reference,
        "split": {"training state": state, **learning},
        "update": {"global batch": batch, **learning},
    }
    for name, kept in expected.items():
        assert {name: device_bytes(tree) for name, tree in getattr(programs, name).kept.items()} == kept
    device = Topology("v5e:2x2", CHIP.chip, 1, "cpu")
    phases = [measure(programs, getattr(programs, name), device) for name in ("prefill", "split")]
    fields = [[field for field, _ in _levers(programs, phase.name)] for phase in phases]
    assert fields == [["rollout.waves"], ["learner.offload_optimizer", "learner.moments_dtype"]]


def by_slots(slots: int = 8, **rollout: Any) -> Programs:
    config = plan_config.config()
    return programs_of(dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, slots=slots, **rollout)))


def test_slots() -> None:
    """A quarter of the 32 responses in flight, four in turn in each slot: the programs that a run calls, compiled, and
    their bytes by hand."""
    programs, device = by_slots(), Topology("v5e:2x2", CHIP.chip, 1, "cpu")
    phases = {name: measure(programs, getattr(programs, name), device) for name in SAMPLING}
    assert programs.windows == [32, 63]  # room for the youngest response beside the oldest
    layers, kv_heads, c, prompt, response = 2, 2, 32, 16, 48
    of_a_token = 2 * layers * kv_heads * (c + 4)  # keys and values in a byte each, with a scale for each head
    prompts, responses = 8 * prompt * of_a_token, [8 * window * of_a_token for window in programs.windows]
    for name in ("admit", "decode"):
        assert phases[name].memory["KV cache"] == prompts + responses[1]
    assert phases["prefill"].kept["KV cache"] == prompts + responses[0]
    assert phases["resize"].memory["KV cache"] == responses[0]
    assert phases["resize"].kept["prompts' cache"] == prompts
    # Two prompts are prefilled at once: keys and values, logits, and a byte for each route.
    filled = 2 * (prompt * of_a_token + 4 * 128 + layers * prompt * 2)
    held = {name: {**phase.memory, **phase.kept} for name, phase in phases.items()}
    assert {held[name]["prefilled"] for name in SAMPLING[1:]} == {filled}
    assert phases["prefill"].kept["prefilled before"] == filled
    # Tokens, log-probs, masks and routes, and a temperature and an end for each: the rollout that is scored.
    results = 32 * (4 * (prompt + response) + 5 * response + prompt + layers * (prompt + response - 1) * 2 + 4 + 1)
    assert {held[name]["responses"] for name in SAMPLING} == {results}
    assert device_bytes(programs.rollout) == results
    runs = {name: phase.runs for name, phase in phases.items()}
    assert runs == {"prefill": 4, "admit": 16, "resize": 4, "decode": 4 * 47}
    # A step costs a quarter of what it costs with all in flight, but for the weights that it reads: none is repeated.
    whole = measure(programs_of(plan_config.config()), programs_of(plan_config.config()).decode, device)
    assert sum(phases["decode"].products.values()) < 0.3 * sum(whole.products.values())
    assert phases["decode"].repeated == whole.repeated == 1.0


def test_strings_end_responses_in_rounds() -> None:
    """With all of a wave in flight."""
    programs = by_slots(0, stop=("</answer>",), waves=2)
    assert (programs.rows, programs.responses, programs.prompts) == (16, 16, 4)
    assert {name: _runs(programs, name) for name in SAMPLING} == {
        "prefill": 2, "admit": 8, "resize": 2, "decode": 2 * 47,
    }  # fmt: skip
    assert "prefilled before" not in programs.prefill.kept
    assert device_bytes(programs.decode.kept["rollout"]) > device_bytes(programs.decode.parts["responses"]) > 0


def test_copies() -> None:
    """Of the training state, where the monitor may discard a step's updates, all the while; and of the inference
    engine's weights, which are kept for the log-probs of a scoring pass by them."""
    config = plan_config.config()
    rollout = dataclasses.replace(config.rollout, log_probs="rescore", attempts=2)
    monitor = MonitorConfig(gradient=Check(2.5, "skip"))
    plain, copying = programs_of(config), programs_of(dataclasses.replace(config, rollout=rollout, monitor=monitor))
    state = device_bytes(plain.state)
    for name in ("prepare", "prefill", "score", "split", "update"):
        assert device_bytes(getattr(copying, name).kept["previous state"]) == state
        assert "previous state" not in getattr(plain, name).kept
    assert device_bytes(copying.score.kept["weights"]) == device_bytes(copying.prefill.parts["weights"]) > 0
    assert "weights" not in plain.score.kept
    assert [_runs(programs, "prepare") for programs in (plain, copying)] == [1, 1]
