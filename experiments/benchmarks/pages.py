"""Tables, pages and pictures of benchmarks, from their JSON files alone."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments.benchmarks.common import Spread, markdown, rates, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Cell = dict[str, Any]
Rows = Callable[[Sequence[Cell]], tuple[list[str], list[list[object]]]]
Panel = Callable[[Any, Sequence[Cell]], None]
# Okabe and Ito's colours; numbers of threads are told apart by the marker as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
MARKERS = {1: "o", 2: "s", 4: "^", 8: "D"}


@dataclasses.dataclass(frozen=True)
class Page:
    """README.md and the picture of one benchmark."""

    picture: str
    """The picture's file."""
    caption: str
    """What the picture shows."""
    about: str
    """What stands before the tables."""
    tables: dict[str, tuple[str, Rows]]
    """By the name of the JSON file: a title, and what makes the rows."""
    panels: dict[str, Panel]
    """What draws a table; those that have one."""

    def text(self, results: dict[str, dict[str, Any]]) -> str:
        """All tables that have results, as Markdown, each with its machine."""
        parts = []
        for name, (title, make) in self.tables.items():
            if name not in results:
                continue
            found = results[name]["environment"]
            versions = ", ".join(f"{library} {version}" for library, version in found["versions"].items())
            machine = f"{found['device']}, {found['cores']} cores, Python {found['python']}, {versions}"
            repetitions = {len(r["seconds"]) for c in results[name]["cells"] for r in c["contenders"] if "seconds" in r}
            counts = " or ".join(str(n) for n in sorted(repetitions))
            table = markdown(*make(results[name]["cells"]))
            code = f" at {found['commit']}" * bool(found["commit"])
            measured = f"{counts} interleaved repetitions on {found['date']}{code}"
            parts.append(f"## {title}\n\n{table}\n\n{measured}. {machine}.")
        return "\n\n".join(parts)

    def write(self, folder: Path, results: dict[str, dict[str, Any]]) -> None:
        """README.md, and the picture where a table that has a panel has results."""
        drawn = any(name in results for name in self.panels)
        picture = f"![{self.caption}]({self.picture})\n\n" if drawn else ""
        write(folder / "README.md", lambda aside: aside.write_text(self.about + picture + self.text(results) + "\n"))
        if drawn:
            write(folder / self.picture, lambda aside: self.draw(aside, results))

    def draw(self, path: Path, results: dict[str, dict[str, Any]]) -> None:
        """One panel for each table that has one and results."""
        panels = [name for name in self.panels if name in results]
        columns = min(len(panels), 3)
        lines = -(-len(panels) // max(columns, 1))
        figure, axes = plt.subplots(
            lines, columns, figsize=(5.2 * columns, 4.4 * lines), layout="constrained", squeeze=False
        )
        for axis, name in zip(axes.flat, panels, strict=False):
            self.panels[name](axis, results[name]["cells"])
            axis.set_title(self.tables[name][0])
            axis.grid(alpha=0.25)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def speed(result: dict[str, Any]) -> str:
    return Spread.of(rates(result)).text(",.0f")


def mebibytes(amount: float | None) -> str:
    return "not measured" if amount is None else f"{amount / 2**20:,.0f}"


def cost(result: dict[str, Any], base: dict[str, Any]) -> Spread:
    """Percent by which a run of ``result`` takes longer than one of ``base``, paired by repetition."""
    return Spread.of(100 * (rates(base) / rates(result) - 1))


def bars(axis: Any, x: Sequence[float] | np.ndarray, spreads: Sequence[Spread], **style: Any) -> None:
    """Medians with quartiles."""
    middle, low, high = np.array(spreads).T
    axis.errorbar(x, middle, np.stack([middle - low, high - middle]), capsize=2, **style)


def contenders_panel(axis: Any, cells: Sequence[Cell], label: Callable[[Cell], str]) -> None:
    """The speed of each contender, a group of columns for each cell."""
    names = [r["name"] for r in max((c["contenders"] for c in cells), key=len)]
    for i, name in enumerate(names):
        found = [(j, r) for j, c in enumerate(cells) for r in c["contenders"] if r["name"] == name]
        found = [(j, r) for j, r in found if "missing" not in r]
        if found:
            x = np.array([j for j, _ in found]) + 0.8 * ((i + 0.5) / len(names) - 0.5)
            spreads = [Spread.of(rates(r)) for _, r in found]
            axis.bar(x, [s.median for s in spreads], 0.8 / len(names), color=COLOURS[i], label=name)
            bars(axis, x, spreads, fmt="none", ecolor="black", lw=0.8)
    axis.set_xticks(range(len(cells)), [label(c) for c in cells])
    axis.set_ylim(0, 1.45 * axis.get_ylim()[1])
    axis.set_ylabel("tokens/s")
    axis.legend(fontsize=7, loc="upper left")


def threads_of(cell: Cell) -> str:
    return f"{cell['threads']} thread{'s' * (cell['threads'] > 1)}"


def by_threads(cells: Sequence[Cell]) -> dict[int, list[Cell]]:
    return {threads: [c for c in cells if c["threads"] == threads] for threads in {c["threads"]: None for c in cells}}


def lines_panel(
    axis: Any, cells: Sequence[Cell], points: Callable[[list[Cell]], tuple[Sequence[Any], list[Spread]]]
) -> None:
    """One line for each number of threads; categories lie side by side, so that no bar hides another."""
    for i, (threads, group) in enumerate(by_threads(cells).items()):
        labels, spreads = points(group)
        style = {"color": COLOURS[i], "marker": MARKERS.get(threads, "x"), "label": f"threads: {threads}", "ls": "none"}
        bars(axis, np.arange(len(labels)) + 0.12 * i, spreads, **style)
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.4, len(labels) - 0.4)
    low, high = axis.get_ylim()
    axis.set_ylim(min(0, low), max(0, 1.1 * high))
    axis.legend(fontsize=8)
