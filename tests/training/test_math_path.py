"""The path of a user, by the commands of the README: a model of transformers is imported, learns word problems from a
file, is evaluated and exported, and answers in transformers as it does here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import word_problems
from rlstab_jax.cli import main
from rlstab_jax.rundir import read_manifest, read_metrics
from rlstab_jax.tasks.hf_tokenizer import HFTokenizer

torch = pytest.importorskip("torch", reason="the comparison with transformers needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="the comparison with transformers needs the extra `parity`")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CONFIG = Path(__file__).parents[2] / "configs" / "math.py"
DATA = Path("word_problems")
# Sums and differences of 1 to 3: who knows the sign alone is right on 6 of 15 at best.
LARGEST, CHANCE, REACHED = 3, 6 / 15, 0.65
SMALL = (
    "--cold-start.target-accuracy", REACHED, "--cold-start.max-steps", 300, "--cold-start.batch-size", 64,
    "--cold-start.check-prompts", 96, "--cold-start.learning-rate", 5e-3,
    "--minibatches", 2, "--prompts-per-minibatch", 8, "--samples-per-prompt", 4, "--evaluation.every", 0,
)  # fmt: skip


def rlstab(patch: pytest.MonkeyPatch, *arguments: object) -> None:
    """A command, as the shell would run it."""
    command = [str(argument) for argument in arguments]
    patch.setattr("sys.argv", ["rlstab", *command])
    assert main(command) == 0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of it happened."""
    folder = tmp_path_factory.mktemp("path")
    uncached = ("--compilation-cache", "None")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        word_problems.write(DATA, largest=LARGEST, heldout=96, hidden_size=32, num_experts=4, moe_intermediate_size=32)
        rlstab(patch, "import-hf", DATA / "model", DATA / "imported")
        rlstab(patch, "train", CONFIG, "--steps", 8, *SMALL, *uncached)
        run = Path("runs/math-seed0")
        rlstab(patch, "eval", run, "--data", DATA / "heldout.jsonl", "--samples", 4, "--batch", 48, *uncached)
        rlstab(
            patch, "eval", run, "--data", DATA / "heldout.jsonl", "--out", "runs/greedy", "--engine", "training",
            "--samples", 1, "--batch", 48, "--evaluation.temperature", 0, *uncached,
        )  # fmt: skip
        rlstab(patch, "export-hf", run, DATA / "exported")
    return folder


def test_the_run_learns_from_the_file(folder: Path) -> None:
    """Demonstrations teach it to read numbers; RL goes on from there, and math-verify judges every response."""
    run = folder / "runs" / "math-seed0"
    task = read_manifest(run)["resolved"]["task"]
    assert (task["train_prompts"], task["heldout_prompts"]) == (len(lines(folder / DATA / "train.jsonl")), 96)
    metrics = read_metrics(run)
    np.testing.assert_array_equal(metrics["reward/mean"], metrics["reward/component/math"])
    assert not metrics["reward/verifier_failures"].any()
    assert (metrics["learner/grad_norm"] > 0).all()
    measured = json.loads((folder / "runs" / "eval-math-seed0-heldout-inference" / "eval.json").read_text())
    assert measured["step"] == len(metrics["reward/mean"]) == 4
    assert measured["prompts"] == 96
    assert measured["accuracy"]["low"] > CHANCE
    assert measured["accuracy"]["mean"] <= measured["pass_at"]["4"]["mean"]


def test_transformers_gives_the_same_answers(folder: Path) -> None:
    """Prompt for prompt and token for token, greedily, in float32, from the files of the export alone."""
    exported = folder / DATA / "exported"
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype="float32").eval()
    ours = HFTokenizer(exported)
    assert [tokenizer.decode([i]) for i in ours.stop_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert HFTokenizer(folder / DATA / "imported").stop_ids == ours.stop_ids[1:]
    problems = lines(folder / DATA / "heldout.jsonl")
    answered = lines(folder / "runs" / "greedy" / "responses.jsonl")
    assert len({row["responses"][0]["text"] for row in answered}) > 3
    for problem, row in list(zip(problems, answered, strict=True))[:24]:
        shown = [{"role": "user", "content": problem["prompt"]}]
        ids = tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        assert ids[0].tolist() == ours.encode(row["prompt"])
        (answer,) = model.generate(ids, do_sample=False, max_new_tokens=16)[:, ids.shape[1] :].tolist()
        (response,) = row["responses"]
        assert len(answer) == response["length"]
        assert (answer[-1] in ours.stop_ids) != response["truncated"]
        assert tokenizer.decode(answer if response["truncated"] else answer[:-1]) == response["text"]
