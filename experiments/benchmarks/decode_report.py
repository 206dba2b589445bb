"""Tables and picture of the decode benchmark, from its JSON files alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments.benchmarks.common import Spread, fastest, markdown, rates, ratio, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Cell = dict[str, Any]
# Okabe and Ito's colours; one and two threads, told apart by the marker as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = {1: "o", 2: "s", 4: "^", 8: "D"}


def speed(result: dict[str, Any]) -> str:
    return Spread.of(rates(result)).text(",.0f")


def mebibytes(result: dict[str, Any]) -> str:
    return "not measured" if result.get("peak_bytes") is None else f"{result['peak_bytes'] / 2**20:,.0f}"


def cost(result: dict[str, Any], base: dict[str, Any]) -> Spread:
    """Percent by which a run of ``result`` takes longer than one of ``base``, paired by repetition."""
    return Spread.of(100 * (rates(base) / rates(result) - 1))


def headline(cell: Cell) -> tuple[str, Spread] | None:
    """The fastest way of transformers in a cell of the table `peers`, and how many times as fast ours is."""
    peer = fastest([r for r in cell["contenders"][1:] if r["name"].startswith("transformers")])
    return None if peer is None else (peer["name"], ratio(cell["contenders"][0], peer))


def peers_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for cell in cells:
        ours, best = cell["contenders"][0], headline(cell)
        for result in cell["contenders"]:
            here: list[object] = [cell["threads"], cell["batch"]]
            if "missing" in result:
                rows.append([*here, result["name"], "missing", result["missing"], "", ""])
                continue
            mark = " (fastest)" if best is not None and result["name"] == best[0] else ""
            times = "" if result is ours else ratio(ours, result).text() + mark
            difference = cell["differences"].get(result["name"])
            logits = "" if difference is None else f"{difference:.0e}"
            rows.append([*here, result["name"], speed(result), times, mebibytes(result), logits])
    header = ["threads", "batch", "engine", "tokens/s", "ours is times as fast", "peak memory, MiB", "logits differ by"]
    return header, rows


def recording_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for cell in cells:
        with_routes, without = cell["contenders"]
        memory = [mebibytes(with_routes), mebibytes(without)]
        percent = cost(with_routes, without).text("+.1f")
        rows.append([cell["threads"], cell["batch"], speed(with_routes), speed(without), percent, *memory])
    return [
        "threads", "batch", "recorded, tokens/s", "not recorded, tokens/s", "recording costs, %",
        "recorded, MiB", "not recorded, MiB",
    ], rows  # fmt: skip


def precision_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for cell in cells:
        base = cell["contenders"][0]
        for result in cell["contenders"]:
            if "missing" in result:
                rows.append([cell["threads"], cell["batch"], result["name"], "missing", result["missing"], ""])
                continue
            times = ratio(result, base).text()
            rows.append([cell["threads"], cell["batch"], result["name"], speed(result), times, mebibytes(result)])
    return ["threads", "batch", "precision", "tokens/s", "times as fast as float32", "peak memory, MiB"], rows


def batch_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    return ["threads", "batch", "tokens/s", "peak memory, MiB"], [
        [cell["threads"], result["name"], speed(result), mebibytes(result)]
        for cell in cells
        for result in cell["contenders"]
    ]


def length_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    header = [
        "threads", "batch", "response buffer", "mean length", "longest", "used share of steps", "tokens/s",
        "peak memory, MiB",
    ]  # fmt: skip
    rows: list[list[object]] = []
    for cell in cells:
        (result,) = cell["contenders"]
        lengths = [cell["buffer"], f"{cell['mean']:.1f}", cell["longest"], f"{cell['mean'] / cell['longest']:.2f}"]
        rows.append([cell["threads"], cell["batch"], *lengths, speed(result), mebibytes(result)])
    return header, rows


def continuous_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    header = [
        "threads", "prompts", "slots", "mean length", "longest", "continuous, tokens/s", "plain, tokens/s",
        "continuous is times as fast", "rows equal", "continuous, MiB", "plain, MiB",
    ]  # fmt: skip
    rows: list[list[object]] = []
    for cell in cells:
        continuous, plain = cell["contenders"]
        sizes = [cell["prompts"], cell["slots"], f"{cell['mean']:.1f}", cell["longest"]]
        speeds = [speed(continuous), speed(plain), ratio(continuous, plain).text(), f"{cell['equal_rows']:.1%}"]
        rows.append([cell["threads"], *sizes, *speeds, mebibytes(continuous), mebibytes(plain)])
    return header, rows


def bandwidth_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    header = [
        "batch", "bytes moved per token", "decode, GB/s", "copy, GB/s", "share of the copy bandwidth", "tokens/s",
    ]  # fmt: skip
    rows: list[list[object]] = []
    for cell in cells:
        decode, copy = cell["contenders"]
        tokens = Spread.of([cell["tokens"] / s for s in decode["seconds"]])
        speeds = [Spread.of(rates(r) / 1e9).text(",.1f") for r in (decode, copy)]
        per_token = f"{decode['amount'] / cell['tokens']:,.0f}"
        rows.append([cell["batch"], per_token, *speeds, ratio(decode, copy).text(), tokens.text(",.0f")])
    return header, rows


Rows = Callable[[Sequence[Cell]], tuple[list[str], list[list[object]]]]
TABLES: dict[str, tuple[str, Rows]] = {
    "peers": ("Against its peers", peers_rows),
    "recording": ("What recording routes costs", recording_rows),
    "precision": ("Number formats", precision_rows),
    "batch": ("Batch size", batch_rows),
    "length": ("Response length, with a long tail", length_rows),
    "continuous": ("Continuous batching", continuous_rows),
    "bandwidth": ("Bytes moved on a GPU", bandwidth_rows),
}


def tables(results: dict[str, dict[str, Any]]) -> str:
    """All tables that have results, as Markdown, each with its machine."""
    parts = []
    for name, (title, make) in TABLES.items():
        if name not in results:
            continue
        found = results[name]["environment"]
        versions = ", ".join(f"{library} {version}" for library, version in found["versions"].items())
        machine = f"{found['device']}, {found['cores']} cores, Python {found['python']}, {versions}"
        repetitions = {len(r["seconds"]) for c in results[name]["cells"] for r in c["contenders"] if "seconds" in r}
        counts = " or ".join(str(n) for n in sorted(repetitions))
        table = markdown(*make(results[name]["cells"]))
        parts.append(f"## {title}\n\n{table}\n\n{counts} interleaved repetitions. {machine}.")
    return "\n\n".join(parts)


ABOUT = """# Decode

`python -m experiments.benchmarks.decode` measures; with `--draw` it makes this page and the picture from the JSON files
alone. Each number is a median with its quartiles over interleaved repetitions; ratios are paired within a repetition.
[`decode.py`](../../decode.py) says what each table compares, [`peers.py`](../../peers.py) how the peers get the same
weights and how they are installed. Peak memory is what a run needs beyond what its process held before, weights
included in the latter.

![Speeds, and what choices cost](decode.png)

"""


def write_report(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Writes README.md and decode.png."""
    write(folder / "README.md", lambda aside: aside.write_text(ABOUT + tables(results) + "\n"))
    write(folder / "decode.png", lambda aside: draw(aside, results))


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """One panel for each table on the CPU that has results."""
    panels = [name for name in PANELS if name in results]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // max(columns, 1))
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 4.4 * lines), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes.flat, panels, strict=False):
        PANELS[name](axis, results[name]["cells"])
        axis.set_title(TABLES[name][0])
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(axis: Any, x: Sequence[float] | np.ndarray, spreads: Sequence[Spread], **style: Any) -> None:
    """Medians with quartiles."""
    middle, low, high = np.array(spreads).T
    axis.errorbar(x, middle, np.stack([middle - low, high - middle]), capsize=2, **style)


def peers_panel(axis: Any, cells: Sequence[Cell]) -> None:
    names = [r["name"] for r in cells[0]["contenders"]]
    for i, name in enumerate(names):
        found = [(j, c["contenders"][i]) for j, c in enumerate(cells) if "missing" not in c["contenders"][i]]
        if found:
            x = np.array([j for j, _ in found]) + 0.8 * ((i + 0.5) / len(names) - 0.5)
            spreads = [Spread.of(rates(r)) for _, r in found]
            axis.bar(x, [s.median for s in spreads], 0.8 / len(names), color=COLOURS[i], label=name)
            bars(axis, x, spreads, fmt="none", ecolor="black", lw=0.8)
    plural = [f"{c['threads']} thread{'s' * (c['threads'] > 1)}\nbatch {c['batch']}" for c in cells]
    axis.set_xticks(range(len(cells)), plural)
    axis.set_ylim(0, 1.45 * axis.get_ylim()[1])
    axis.set_ylabel("tokens/s")
    axis.legend(fontsize=7, loc="upper left")


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
    axis.set_ylim(min(0, low), 1.1 * high)
    axis.legend(fontsize=8)


def recording_panel(axis: Any, cells: Sequence[Cell]) -> None:
    lines_panel(axis, cells, lambda g: ([f"batch {c['batch']}" for c in g], [cost(*c["contenders"]) for c in g]))
    axis.axhline(0, color="black", lw=0.8)
    axis.set_ylabel("longer with routes recorded, %")


def precision_panel(axis: Any, cells: Sequence[Cell]) -> None:
    def points(group: list[Cell]) -> tuple[list[str], list[Spread]]:
        present = [r for r in group[0]["contenders"] if "missing" not in r]
        return [r["name"] for r in present], [Spread.of(rates(r)) for r in present]

    lines_panel(axis, cells, points)
    axis.tick_params(axis="x", labelrotation=30, labelsize=8)
    axis.set_ylabel("tokens/s")


def batch_panel(axis: Any, cells: Sequence[Cell]) -> None:
    for i, (threads, group) in enumerate(by_threads(cells).items()):
        found = group[0]["contenders"]
        style = {"color": COLOURS[i], "marker": MARKERS.get(threads, "x"), "label": f"threads: {threads}"}
        bars(axis, [int(r["name"]) for r in found], [Spread.of(rates(r)) for r in found], **style)
    axis.set(xscale="log", yscale="log", xlabel="rows", ylabel="tokens/s")
    axis.set_xticks([int(r["name"]) for r in cells[0]["contenders"]], [r["name"] for r in cells[0]["contenders"]])
    axis.minorticks_off()
    axis.legend(fontsize=8)


def length_panel(axis: Any, cells: Sequence[Cell]) -> None:
    def points(group: list[Cell]) -> tuple[list[str], list[Spread]]:
        return [str(c["buffer"]) for c in group], [Spread.of(rates(c["contenders"][0])) for c in group]

    lines_panel(axis, cells, points)
    axis.set(xlabel="response buffer", ylabel="tokens/s of responses")


def continuous_panel(axis: Any, cells: Sequence[Cell]) -> None:
    def points(group: list[Cell]) -> tuple[list[str], list[Spread]]:
        results = group[0]["contenders"]
        return [r["name"] for r in results], [Spread.of(rates(r)) for r in results]

    lines_panel(axis, cells, points)
    axis.set_ylabel("tokens/s")


PANELS: dict[str, Callable[[Any, Sequence[Cell]], None]] = {
    "peers": peers_panel,
    "recording": recording_panel,
    "precision": precision_panel,
    "batch": batch_panel,
    "length": length_panel,
    "continuous": continuous_panel,
}
