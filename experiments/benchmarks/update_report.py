"""Tables and picture of the update benchmark, from its JSON files alone."""

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import LogLocator, StrMethodFormatter

from experiments.benchmarks.common import Spread, fastest, rates, ratio
from experiments.benchmarks.pages import (
    COLOURS,
    MARKERS,
    Cell,
    Page,
    Panel,
    Rows,
    bars,
    by_threads,
    contenders_panel,
    cost,
    lines_panel,
    mebibytes,
    speed,
    threads_of,
)


def time(result: dict[str, Any]) -> str:
    """Milliseconds of an update."""
    return Spread.of([1000 * s for s in result["seconds"]]).text(",.0f")


def share(ours: dict[str, Any], peer: dict[str, Any]) -> Spread:
    """Our time over the peer's for the same amount, paired by repetition."""
    return ratio(peer, ours)


def headline(cell: Cell) -> tuple[str, str, Spread] | None:
    """In a cell of the table `peers`: our fastest engine, that of transformers, and our time over theirs."""
    ours, peer = (fastest(cell["contenders"], of) for of in ("rlstab_jax", "transformers"))
    return None if ours is None or peer is None else (ours["name"], peer["name"], share(ours, peer))


def peers_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for cell in cells:
        best = headline(cell)
        ours = next(r for r in cell["contenders"] if best is None or r["name"] == best[0])
        for result in cell["contenders"]:
            if "missing" in result:
                rows.append([cell["threads"], result["name"], "missing", result["missing"], "", "", ""])
                continue
            mark = " (fastest)" if best is not None and result["name"] in best[:2] else ""
            ours_over_it = "" if result is ours else share(ours, result).text()
            difference = cell["differences"].get(result["name"])
            agrees = "" if difference is None else f"{difference:.0e}"
            name, memory = result["name"] + mark, mebibytes(result.get("peak_bytes"))
            rows.append([cell["threads"], name, time(result), speed(result), ours_over_it, memory, agrees])
    return [
        "threads", "engine", "ms", "tokens/s", "our time over it", "peak memory, MiB", "loss, gradient differ by",
    ], rows  # fmt: skip


def against_first(title: str, what: str) -> Rows:
    """Rows of contenders whose times are compared with the first one's."""

    def make(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
        rows: list[list[object]] = []
        for cell in cells:
            base = cell["contenders"][0]
            for result in cell["contenders"]:
                times = "" if result is base else share(result, base).text(".3f")
                memory = mebibytes(result["temporary"])
                rows.append([cell["threads"], result["name"], time(result), speed(result), times, memory])
        return ["threads", title, "ms", "tokens/s", f"time by that of {what}", "temporary memory, MiB"], rows

    return make


def growth_rows(title: str) -> Rows:
    """Rows of one engine as one of its sizes grows."""

    def make(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
        return ["threads", title, "ms", "tokens/s", "temporary memory, MiB"], [
            [cell["threads"], result["name"], time(result), speed(result), mebibytes(result["temporary"])]
            for cell in cells
            for result in cell["contenders"]
        ]

    return make


def utilisation_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    header = ["model", "tokens/s", "update, TFLOP/s", "matrix products, TFLOP/s", "utilisation", "peak memory, MiB"]
    rows: list[list[object]] = []
    for cell in cells:
        of_update, products = cell["contenders"]
        tokens = Spread.of([cell["tokens"] / s for s in of_update["seconds"]])
        speeds = [Spread.of(rates(r) / 1e12).text(",.1f") for r in (of_update, products)]
        memory = mebibytes(of_update.get("peak_bytes"))
        utilisation = ratio(of_update, products).text(".3f")
        rows.append([cell["model"], tokens.text(",.0f"), *speeds, utilisation, memory])
    return header, rows


def cost_panel(axis: Any, cells: Sequence[Cell]) -> None:
    """What the others cost beside the first."""

    def points(group: list[Cell]) -> tuple[list[str], list[Spread]]:
        base, *others = group[0]["contenders"]
        return [r["name"] for r in others], [cost(r, base) for r in others]

    lines_panel(axis, cells, points)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_ylabel(f"longer than {cells[0]['contenders'][0]['name']}, %")


def growth_panel(label: str) -> Panel:
    """Time of one engine as one of its sizes grows."""

    def draw(axis: Any, cells: Sequence[Cell]) -> None:
        for i, (threads, group) in enumerate(by_threads(cells).items()):
            found = group[0]["contenders"]
            style = {"color": COLOURS[i], "marker": MARKERS.get(threads, "x"), "label": f"threads: {threads}"}
            milliseconds = [Spread.of([1000 * s for s in r["seconds"]]) for r in found]
            bars(axis, [int(r["name"]) for r in found], milliseconds, **style)
        names = [r["name"] for r in cells[0]["contenders"]]
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
        axis.set_xticks([int(name) for name in names], names)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.minorticks_off()
        axis.legend(fontsize=8)

    return draw


ABOUT = """# Update

`python -m experiments.benchmarks.update` measures; with `--draw` it makes this page and the picture from the JSON files
alone. An update is a forward pass, its gradient and a step of Adam. Each number is a median with its quartiles over
interleaved repetitions; ratios are paired within a repetition. [`update.py`](../../update.py) says what each table
compares, [`update_peers.py`](../../update_peers.py) how the peers compute the same. Peak memory is what a run needs
beyond what its process held before; temporary memory is what the compiler plans beside a program's arguments. Nothing
is recomputed in the backward pass, and all layers are written out. Tables are of the code of their commits: compare
within one.

"""
SIZES = {
    "tokens": "tokens of each row",
    "layers": "layers",
    "experts": "experts",
    "vocabulary": "vocabulary",
    "devices": "virtual devices",
}
PAGE = Page(
    picture="update.png",
    caption="Times, and what choices cost",
    about=ABOUT,
    tables={
        "peers": ("Against its peers", peers_rows),
        "replay": ("Routing replay", against_first("routes", "live routes")),
        "micro": ("Micro-batches", against_first("micro-batches", "one")),
        "packing": ("Packing, lengths with a long tail", against_first("rows", "a row each")),
        "precision": ("Number formats", against_first("precision", "float32")),
        **{name: (f"As the {name} grow" + "s" * (name == "vocabulary"), growth_rows(of)) for name, of in SIZES.items()},
        "devices": ("As the devices grow, in a process that has eight", growth_rows(SIZES["devices"])),
        "utilisation": ("Utilisation of a GPU", utilisation_rows),
    },
    panels={
        "peers": lambda axis, cells: contenders_panel(axis, cells, threads_of),
        "replay": cost_panel,
        "micro": cost_panel,
        "packing": cost_panel,
        "precision": cost_panel,
        **{name: growth_panel(of) for name, of in SIZES.items()},
    },
)
