"""How responses of a run end: stop strings and minimal lengths, in rollouts, evaluations and what is judged."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlstab_jax.inference import StopStrings
from rlstab_jax.rundir import read_metrics
from rlstab_jax.tasks import Arithmetic, Prompt, decode_text
from rlstab_jax.training.assess import Assessment, assess
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import build
from rlstab_jax.training.run import train
from rlstab_jax.types import UserError
from tests.training import tiny_run
from tests.training.test_loop import FLOAT32, configured, no_gap

# A stop token can be the last of six alone: nearly all that stop before the limit meet a string.
STOP, ENDS = ("+", "1", "23"), {"response_length": 6, "min_new_tokens": 5}


@dataclasses.dataclass(frozen=True)
class StoppedConfig(tiny_run.LenientConfig):
    """Chains of which only the end is judged."""

    def build(self) -> "Stopped":
        return Stopped(self)


class Stopped(Arithmetic):
    """A reward for every response that stopped."""

    def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
        assert not any(text in response for text in STOP)
        return float(stopped)


def config(**rollout: Any) -> RunConfig:
    task = StoppedConfig(**vars(tiny_run.TASK))
    rollout = {"stop": STOP, "precision": FLOAT32, **ENDS, **rollout}
    return configured(task=task, rollout=rollout, learner={"replay": "live"}, evaluation={"every": 2})


def test_a_run_whose_responses_end_at_strings(tmp_path: Path) -> None:
    """They count as stopped, in rollouts and in evaluations, by slots. Equal engines have no gap, where stop tokens
    are barred neither: not pi_old, and not pi_theta in the first mini-batch. It goes on with a batch that waits, and
    `rlstab eval` ends responses likewise."""
    settings, lines, out = config(slots=5, lag=1), [], tmp_path / "run"
    for gradient_steps in (4, 6):
        assert train(dataclasses.replace(settings, gradient_steps=gradient_steps), out, say=lines.append) is None
    assert lines[-1] == "resuming after global step 2"
    columns = read_metrics(out)
    stopped = 1 - columns["response/truncated"][1:]
    np.testing.assert_allclose(columns["reward/mean"][1:], stopped, atol=1e-6)
    assert 0.1 < stopped.min() < stopped.max() < 1
    assert (columns["response/length"][1:] < 6).all()
    for row in range(1, 4):
        of_row = {name: values[row] for name, values in columns.items()}
        assert no_gap(of_row, "discrepancy")
        assert of_row["learner/broken"] == 0
    assert no_gap({name: values[1] for name, values in columns.items()}, "staleness/minibatch_00")
    assert (columns["eval/accuracy_rollout"] > 0.1).all()  # a stop token alone would end about one in 20
    np.testing.assert_array_equal(columns["eval/accuracy_rollout"], columns["eval/accuracy_training"])

    assess(settings, out, Assessment(samples=2, prompts=8), tmp_path / "eval", say=lines.append)
    rows = [json.loads(line) for line in (tmp_path / "eval" / "responses.jsonl").read_text().splitlines()]
    responses = [response for row in rows for response in row["responses"]]
    assert any(response["length"] < 6 for response in responses)
    assert all(response["right"] != response["truncated"] for response in responses)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"stop": ("!",)}, "stop string '!' cannot be tokenised: text '!': no token for '!'"),
        ({"stop": ("",)}, "stop string '' cannot be tokenised"),
        ({"stop": "+"}, r"rollout.stop = '\+': expected a tuple, each text"),
        ({"log_probs": "matched"}, r"rollout.stop = .* and rollout.log_probs = 'matched': the host sees no text while"),
        ({"lag": 2, "partial": 2}, "rollout.stop = .* with rollout.partial = 2"),
        ({"min_new_tokens": -1}, r"rollout.min_new_tokens = -1: expected 0 \(none\) or more"),
        ({"min_new_tokens": 6}, "rollout.min_new_tokens = 6 leaves no room for a stop token in the response's 6"),
    ],
)
def test_ends_that_cannot_be_are_refused(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(config(**rollout))


def test_a_tokeniser_that_fails_between_rounds_is_named() -> None:
    class Tokenizer:
        def decode(self, ids: Any) -> str:
            raise IndexError(f"no such token: {max(ids)}")

    stop = StopStrings(("+",), partial(decode_text, Tokenizer()), 1)
    with pytest.raises(UserError, match=r"Tokenizer.decode failed on \[7, 9\]: IndexError: no such token: 9"):
        stop.end([7, 9], 0)
