"""What a run shows of itself while it goes on: a progress bar on a terminal, a line a step elsewhere."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any


@contextlib.contextmanager
def silence() -> Iterator[tuple[Any, Any]]:
    """`progress` of the processes that do not speak for the run."""
    yield lambda line: None, lambda metrics: None


@contextlib.contextmanager
def progress(total: int) -> Iterator[tuple[Any, Any]]:
    """A progress bar on a terminal, else a plain line a step: functions ``say(line)`` and ``watch(metrics)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    if not console.is_terminal:
        yield lambda line: print(line, flush=True), lambda metrics: print(line_of(metrics), flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("cold start", total=total)
        say = partial(bar.console.print, markup=False, highlight=False)  # brackets in a path are no markup

        def watch(metrics: dict[str, float]) -> None:
            bar.update(task, completed=metrics["progress/gradient_steps"], description=line_of(metrics, short=True))
            if "eval/accuracy_training" in metrics:
                say(line_of(metrics))

        yield say, watch


LINE = (
    ("reward", "reward/mean", ".3f"),
    ("held-out", "eval/accuracy_training", ".3f"),
    ("KL mu|old", "discrepancy/k3", ".1e"),
    ("KL old|pi", "staleness/k3", ".1e"),
    ("routes differ", "routing/rollout_vs_old", ".1%"),
    ("entropy", "policy/entropy", ".3f"),
    ("length", "response/length", ".1f"),
)


def line_of(metrics: dict[str, float], short: bool = False) -> str:
    """One step in one line."""
    shown = [(label, metrics[name], form) for label, name, form in LINE[: 3 if short else None] if name in metrics]
    text = "  ".join(f"{label} {value:{form}}" for label, value, form in shown)
    return text if short else f"step {int(metrics['progress/gradient_steps']):5d}  {text}"
