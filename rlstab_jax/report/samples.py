"""Which of the responses that a run logged are worth a reader's time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlstab_jax.report.markup import Html, element, joined, table

STEPS = 4  # of each run, evenly spread from the first to the last
LONGEST = 1500  # characters of a text that are shown


def chosen(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of `STEPS` steps the responses with the highest and with the lowest reward, one if all are equal."""
    steps = sorted({sample["global_step"] for sample in samples})
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, STEPS).round().astype(int))] if steps else []
    picked = []
    for step in shown:
        here = sorted((s for s in samples if s["global_step"] == step), key=lambda sample: -_reward(sample))
        picked += here[:1] if _reward(here[0]) == _reward(here[-1]) else [here[0], here[-1]]
    return picked


def _reward(sample: Mapping[str, Any]) -> float:
    """The reward; one that was no finite number comes last."""
    reward = sample.get("reward")
    return -np.inf if reward is None else float(reward)


def samples_table(run: str, samples: Sequence[Mapping[str, Any]]) -> Html:
    """Samples of a run, such as `chosen` picks, as a table."""
    rows = [
        [
            str(sample["global_step"]),
            _text(sample.get("prompt")),
            joined(_text(sample.get("response")), _failure(sample)),
            _text(sample.get("answer")),
            "not finite" if sample.get("reward") is None else f"{sample['reward']:.3g}",
        ]
        for sample in samples
    ]
    return table(f"Responses of {run}", ["global step", "prompt", "response", "answer", "reward"], rows, "samples")


def _text(value: Any) -> Html:
    text = "" if value is None else str(value)
    more = len(text) - LONGEST
    cut = element("em", f" … {more:,} more characters") if more > 0 else Html()
    return element("div", text[:LONGEST] if more > 0 else text, cut, class_="text", dir="auto")


def _failure(sample: Mapping[str, Any]) -> Html:
    failure = sample.get("failure")
    return element("em", f"no verdict: {str(failure)[:LONGEST]}") if failure else Html()
