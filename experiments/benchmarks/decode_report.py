"""Tables and picture of the decode benchmark, from its JSON files alone."""

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import LogLocator, StrMethodFormatter

from experiments.benchmarks.common import Spread, fastest, rates, ratio
from experiments.benchmarks.pages import (
    COLOURS,
    MARKERS,
    Cell,
    Page,
    bars,
    by_threads,
    contenders_panel,
    cost,
    lines_panel,
    mebibytes,
    speed,
    threads_of,
)


def peak(result: dict[str, Any]) -> str:
    return mebibytes(result.get("peak_bytes"))


def headline(cell: Cell) -> tuple[str, str, Spread] | None:
    """In a cell of the table `peers`: our fastest engine, that of transformers, and how many times as fast ours is."""
    ours, peer = (fastest(cell["contenders"], of) for of in ("rlstab_jax", "transformers"))
    return None if ours is None or peer is None else (ours["name"], peer["name"], ratio(ours, peer))


def peers_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for cell in cells:
        best = headline(cell)
        ours = next(r for r in cell["contenders"] if best is None or r["name"] == best[0])
        for result in cell["contenders"]:
            here: list[object] = [cell["threads"], cell["batch"]]
            if "missing" in result:
                rows.append([*here, result["name"], "missing", result["missing"], "", ""])
                continue
            mark = " (fastest)" if best is not None and result["name"] in best[:2] else ""
            times = "" if result is ours else ratio(ours, result).text()
            difference = cell["differences"].get(result["name"])
            logits = "" if difference is None else f"{difference:.0e}"
            rows.append([*here, result["name"] + mark, speed(result), times, peak(result), logits])
    header = ["threads", "batch", "engine", "tokens/s", "ours is times as fast", "peak memory, MiB", "logits differ by"]
    return header, rows


def recording_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for cell in cells:
        with_routes, without = cell["contenders"]
        memory = [peak(with_routes), peak(without)]
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
            rows.append([cell["threads"], cell["batch"], result["name"], speed(result), times, peak(result)])
    return ["threads", "batch", "precision", "tokens/s", "times as fast as float32", "peak memory, MiB"], rows


def batch_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    return ["threads", "batch", "tokens/s", "peak memory, MiB"], [
        [cell["threads"], result["name"], speed(result), peak(result)]
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
        rows.append([cell["threads"], cell["batch"], *lengths, speed(result), peak(result)])
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
        rows.append([cell["threads"], *sizes, *speeds, peak(continuous), peak(plain)])
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


ABOUT = """# Decode

`python -m experiments.benchmarks.decode` measures; with `--draw` it makes this page and the picture from the JSON files
alone. Each number is a median with its quartiles over interleaved repetitions; ratios are paired within a repetition.
[`decode.py`](../../decode.py) says what each table compares, [`peers.py`](../../peers.py) how the peers get the same
weights and how they are installed. Peak memory is what a run needs beyond what its process held before, weights
included in the latter. Tables are of the code of their commits: compare within one.

"""


def peers_panel(axis: Any, cells: Sequence[Cell]) -> None:
    contenders_panel(axis, cells, lambda cell: f"{threads_of(cell)}\nbatch {cell['batch']}")


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
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
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


PAGE = Page(
    picture="decode.png",
    caption="Speeds, and what choices cost",
    about=ABOUT,
    tables={
        "peers": ("Against its peers", peers_rows),
        "groups": ("Against its peers, eight responses to each prompt", peers_rows),
        "recording": ("What recording routes costs", recording_rows),
        "precision": ("Number formats", precision_rows),
        "batch": ("Batch size", batch_rows),
        "length": ("Response length, with a long tail", length_rows),
        "continuous": ("Continuous batching", continuous_rows),
        "bandwidth": ("Bytes moved on a GPU", bandwidth_rows),
    },
    panels={
        "peers": peers_panel,
        "groups": peers_panel,
        "recording": recording_panel,
        "precision": precision_panel,
        "batch": batch_panel,
        "length": length_panel,
        "continuous": continuous_panel,
    },
)
