"""A plan as tables and as JSON: by phase, and by N."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rlstab_jax.training.plan import Phase, Plan
from rlstab_jax.training.plan_programs import LEARNING
from rlstab_jax.training.plan_sampling import SAMPLING

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PerN:
    """What a run is with N updates for each rollout batch, scaled from the phases that were compiled."""

    minibatches: int
    responses: int
    """Of a global step."""
    waves: int | None
    """Equal parts that they are sampled in, as few as fit; None where none do."""
    needed: float
    """Bytes of a device at the peak of all phases."""
    seconds: float
    """Roofline of a gradient step, with its share of sampling and scoring."""
    sampling: float
    """Share of it that is sampling."""
    idle: float
    """Share of the devices' time in which those that make batches wait for those that learn, or the other way round."""
    chip_hours: float
    """Of the run."""
    cost: float | None
    """At the price of a chip-hour."""


def by_minibatches(plan: Plan, minibatches: Sequence[int], price: float | None) -> list[PerN]:
    """The table over N. Parts of a batch that are scored or learn at once stay as large as they are, so that
    learner.score_micro_batches grows with N; waves are as few as fit.

    A decode step reads the weights once, whatever the rows: the rest of it, like all other phases, grows with the rows.
    """
    return [_with(plan, n, price) for n in minibatches]


def _with(plan: Plan, n: int, price: float | None) -> PerN:
    config, factor = plan.config, n / plan.config.minibatches
    responses = config.prompts_per_minibatch * n * config.samples_per_prompt
    waves = _waves(plan, config.prompts_per_minibatch * n, factor)
    if waves is None:
        cost = None if price is None else math.inf
        return PerN(n, responses, None, math.inf, math.inf, math.nan, math.nan, math.inf, cost)
    growth = _growth(plan, factor, waves)
    repeats = factor / growth  # as many responses in flight, one after another
    sampled = sum(
        sampling_seconds(phase, plan, growth) * phase.runs * repeats for phase in plan.phases if phase.name in SAMPLING
    )
    sampled += sum(phase.total for phase in plan.phases if phase.name == "prepare")
    made = sampled + sum(phase.total * factor for phase in plan.phases if phase.name == "score")
    learnt = sum(phase.total * factor for phase in plan.phases if phase.name in LEARNING)
    step, idle = made + learnt, 0.0
    if plan.aside:  # at the same time
        step = max(made, learnt)
        idle = 1 - (plan.aside * made + (1 - plan.aside) * learnt) / step
    # The last global step is never cut.
    steps = math.ceil(config.gradient_steps / n)
    hours = steps * step * plan.topology.chips / 3600
    needed = max(needed_with(plan, phase, growth, factor, waves) for phase in plan.phases)
    cost = None if price is None else hours * price
    return PerN(n, responses, waves, needed, step / n, sampled / step, idle, hours, cost)


def _growth(plan: Plan, factor: float, waves: int) -> float:
    """Of the responses in flight, with ``factor`` times the responses of a global step: with slots, to these."""
    whole, slots = plan.config.responses_per_step * factor, plan.config.rollout.slots
    return min(slots or whole, whole) / waves / plan.config.in_flight


def sampling_seconds(phase: Phase, plan: Plan, growth: float) -> float:
    """Roofline of a sampling phase with ``growth`` times the rows in flight: the weights are read once for all."""
    chip = plan.topology.chip
    weights = phase.memory.get("weights", 0.0) * chip.devices / chip.memory_bandwidth
    weights = min(weights, phase.seconds["memory"])
    memory = weights + (phase.seconds["memory"] - weights) * growth
    return max(memory, phase.seconds["compute"] * growth, phase.seconds["network"] * growth)


def needed_with(plan: Plan, phase: Phase, growth: float, factor: float, waves: int) -> float:
    """Bytes of a phase with ``growth`` times the rows in flight and ``factor`` times the responses of a global step."""
    if phase.needed is None:
        return math.inf
    held = {**phase.memory, **phase.kept}
    batch = held.get("global batch", held.get("rollout", 0.0))
    others = held.get("waiting batches", 0.0) + held.get("earlier attempts", 0.0)
    if phase.name not in SAMPLING:
        results = held.get("results", 0.0) if phase.name == "score" else 0.0  # of the whole batch
        return phase.needed + (batch + others + results) * (factor - 1)
    # Where devices are set aside, those that sample hold no more of it than its parameters.
    states = held.get("training state", held.get("parameters", 0.0)) + held.get("previous state", 0.0)
    fixed = held.get("weights", 0.0) + states + held.get("reference", 0.0)
    before = plan.bytes_of("score", "rollout") * factor if waves > 1 else 0.0
    written = held.get("responses", 0.0)  # of a wave, whatever the slots
    of_rows = phase.needed - fixed - batch - others - written
    temporaries = min(held.get("temporaries", 0.0), of_rows)  # with fewer rows, part of these stays
    of_rows = (of_rows - temporaries) * growth + temporaries * max(growth, 1.0)
    written *= factor * plan.config.rollout.waves / waves
    return fixed + of_rows + before + others * factor + written


def _waves(plan: Plan, prompts: int, factor: float) -> int | None:
    """The fewest waves whose rows divide over the devices and fit; with slots, which go with one, that one."""
    sampling = [phase for phase in plan.phases if phase.name in SAMPLING]
    for waves in range(1, 2 if plan.config.rollout.slots else prompts + 1):
        if prompts % waves or prompts // waves % plan.row_devices:
            continue
        growth = _growth(plan, factor, waves)
        if all(needed_with(plan, phase, growth, factor, waves) <= plan.topology.memory for phase in sampling):
            return waves
    return None


def as_json(plan: Plan, table: Sequence[PerN], price: float | None) -> dict[str, Any]:
    """The plan as plain numbers: bytes, operations, bytes per second, seconds."""
    chip = plan.topology.chip

    def numbers(phases: Sequence[Phase]) -> list[dict[str, Any]]:
        return [
            dataclasses.asdict(phase) | {"bound": phase.bound, "roofline_s": phase.roofline, "total_s": phase.total}
            for phase in phases
        ]

    return {
        "topology": {"name": plan.topology.name, "chips": plan.topology.chips, "devices": plan.topology.devices,
                     "memory": plan.topology.memory, "chip": dataclasses.asdict(chip)},
        "fits": plan.fits,
        "phases": numbers(plan.phases),
        "refused": numbers(plan.refused),
        "changes": [dataclasses.asdict(change) for change in plan.changes],
        "minibatches": plan.config.minibatches,
        "price": price,
        "by_minibatches": [dataclasses.asdict(row) for row in table],
    }  # fmt: skip


def print_plan(plan: Plan, table: Sequence[PerN], price: float | None, console: Console) -> None:
    """The plan as tables."""
    topology, chip = plan.topology, plan.topology.chip
    across = "" if chip.across is None else f", {chip.across / 1e9:.0f} beyond {chip.island} chips"
    console.print(
        f"[bold]{topology.name}[/bold]: {topology.chips} chips, {topology.devices} devices of "
        f"{topology.memory / GIB:.2f} GiB; a chip makes {chip.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{chip.narrow_float / 1e12:.0f} in fp8, {chip.int8 / 1e12:.0f} in int8, moves "
        f"{chip.memory_bandwidth / 1e9:.0f} GB/s, sends {chip.interconnect / 1e9:.0f} GB/s{across} ({chip.source})"
    )
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    for phase, change in zip(plan.refused, plan.changes, strict=True):
        needs = "more than a device has" if phase.needed is None else f"{_gib(phase.needed)} GiB"
        tried = f"(compiled: {', '.join(change.tried)})" if change.tried else "(estimated, not compiled)"
        if change.needed is None:
            remedy = f"take a larger topology, {change.value} or so"
        else:
            remedy = f"set {change.field} = {change.value}, which needs {_gib(change.needed)} GiB; so it is above"
        console.print(
            f"[bold red]{phase.name} does not fit[/bold red] as configured, it needs {needs}: {remedy} {tried}"
        )
    if plan.fits:
        console.print("All phases fit as configured.")
    if plan.aside:
        aside = plan.config.rollout.devices
        console.print(
            f"Devices that make batches (all phases but {' and '.join(LEARNING)}): {aside}; that learn meanwhile: "
            f"{topology.devices - aside}. A global step takes as long as the longer of the two."
        )
    console.print(_minibatch_table(plan, table, price))
    console.print(NOTES, style="dim")


NOTES = (
    "Memory is the compiler's account. TFLOP are of matrix products. Time is a lower bound: the longest of computing, "
    "moving bytes and sending them, at peak rates. Decoding is the mean step of responses that are all as long as they "
    'may be; all of rollout.attempts are made. "repeated" is work done more than once, by several devices or by a '
    "dense or padded form of grouped products; tokens choose experts evenly. Not in it: evaluation, cold start, "
    "judging, checkpoints, the slower way to the host's memory, what devices set aside exchange with the others."
)


def _by_phase(plan: Plan, title: str, rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """A table with a column for each phase."""
    table = Table("", *(phase.name for phase in plan.phases), title=title, title_justify="left", padding=(0, 0, 0, 1))
    for name, cells in rows:
        if any(cells):
            table.add_row(name, *cells)
    return table


def _memory_table(plan: Plan) -> Table:
    def parts(of: Sequence[Mapping[str, float]]) -> list[tuple[str, list[str]]]:
        names = dict.fromkeys(name for memory in of for name in memory)
        return [(name, [_gib(memory.get(name, 0.0)) for memory in of]) for name in names]

    phases = plan.phases
    return _by_phase(
        plan,
        "Memory of a device, GiB",
        [
            *parts([phase.memory for phase in phases]),
            *((f"kept: {name}", cells) for name, cells in parts([phase.kept for phase in phases])),
            ("at the peak", ["?" if phase.needed is None else _gib(phase.needed) for phase in phases]),
            ("fits", ["yes" if phase.fits else "[bold red]no[/bold red]" for phase in phases]),
        ],
    )


def _time_table(plan: Plan) -> Table:
    phases = plan.phases
    rates = dict.fromkeys(rate for phase in phases for rate in phase.products)
    kinds = dict.fromkeys(kind for phase in phases for kind in phase.sent)

    def row(name: str, values: Iterable[float], unit: float = 1.0) -> tuple[str, list[str]]:
        return name, [_number(value / unit) for value in values]

    return _by_phase(
        plan,
        "One run of a phase, on one device; the last line is all its runs in a global step",
        [
            *(row(f"TFLOP {rate}", (phase.products.get(rate, 0.0) for phase in phases), 1e12) for rate in rates),
            ("repeated", [f"x{phase.repeated:.2f}" for phase in phases]),
            row("GB moved", (phase.bytes for phase in phases), 1e9),
            *(row(f"GB {kind}", (phase.sent.get(kind, 0.0) for phase in phases), 1e9) for kind in kinds),
            *(
                row(f"ms {resource}", (phase.seconds[resource] for phase in phases), 1e-3)
                for resource in ("compute", "memory", "network")
            ),
            ("bound by", [phase.bound for phase in phases]),
            ("runs", [f"{phase.runs:g}" for phase in phases]),
            row("s in all", (phase.total for phase in phases)),
        ],
    )


def _number(value: float) -> str:
    """Three digits, without an exponent where that is short."""
    if not value:
        return ""
    return f"{value:.0f}" if 1e3 <= value < 1e7 else f"{value:.3g}"


def _minibatch_table(plan: Plan, rows: Sequence[PerN], price: float | None) -> Table:
    config = plan.config
    slots = f" in {config.rollout.slots} slots" if config.rollout.slots else ""
    table = Table(
        "N", "responses", "waves", "needs GiB", "s a gradient step", "sampling", *(["idle"] if plan.aside else []),
        "chip-hours",
        title=f"By N, for {config.gradient_steps} gradient steps of {config.prompts_per_minibatch} prompts x "
        f"{config.samples_per_prompt}{slots}; compiled for N = {config.minibatches}; "
        "learner.score_micro_batches grows with N",
        title_justify="left",
    )  # fmt: skip
    if price is not None:
        table.add_column(f"cost at {price:g} a chip-hour")
    for row in rows:
        if row.waves is None:
            cells = [str(row.minibatches), str(row.responses), "none fits", *[""] * (5 if plan.aside else 4)]
        else:
            needs = f"{_gib(row.needed)}{'' if row.needed <= plan.topology.memory else ' (too much)'}"
            idle = [f"{row.idle:.0%}"] if plan.aside else []
            cells = [str(row.minibatches), str(row.responses), str(row.waves), needs, f"{row.seconds:.3g}",
                     f"{row.sampling:.0%}", *idle, f"{row.chip_hours:,.2f}"]  # fmt: skip
        table.add_row(*cells, *([f"{row.cost:,.2f}"] if row.cost is not None and row.waves else []))
    return table


def _gib(size: float) -> str:
    return "" if size == 0 else f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.1g}"
