"""What a run needs of accelerators that are not there: memory, time and money, before a chip is rented.

Each program of a global step is compiled ahead of time. Memory is the compiler's own account. Time is a roofline: the
longest of computing, moving bytes between memory and chip, and sending bytes to other chips, each at the chip's peak
rate and all overlapping. No real run is as fast; what bounds it, and what changes with N, is what it is for.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlstab_jax.inference.continuous import admitted_at_once
from rlstab_jax.learner import LearnerConfig
from rlstab_jax.parallel.sharding import Layout
from rlstab_jax.parallel.topology import Topology, topology_devices
from rlstab_jax.tasks import build_task
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import EnginePair, build_pair, check_host_memory, meshes, resolved
from rlstab_jax.training.plan_flops import products, scaled
from rlstab_jax.training.plan_hlo import Cost, program_cost, round_cost
from rlstab_jax.training.plan_programs import AFFECTED, LEARNING, Programs
from rlstab_jax.training.plan_sampling import SAMPLING, Program, device_bytes
from rlstab_jax.training.pretrained import matched
from rlstab_jax.training.validate import validate
from rlstab_jax.types import UserError

PHASES = ("prepare", *SAMPLING, "score", "split", "update")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program of the global step, on one device. Bytes, operations and seconds are of one run of it."""

    name: str
    runs: float
    """In a global step; of decoding, steps."""
    memory: Mapping[str, float]
    """Bytes of the program by what they hold: its arguments and its temporaries, gradients among these."""
    kept: Mapping[str, float]
    """Bytes of what else is on the device meanwhile."""
    needed: float | None
    """Bytes at its peak, with what is kept; None where the compiler refused it without a number."""
    fits: bool
    products: Mapping[str, float]
    """Operations of matrix products by the rate of the chip that they run at; of experts' those of tokens."""
    repeated: float
    """Products that the compiled program makes, over those of the function shared by all devices: 1 where each device
    does its share, and no grouped product has become a dense one or is padded."""
    bytes: float
    """Between the memory and the chip."""
    sent: Mapping[str, float]
    """Bytes to other devices, by kind of collective."""
    seconds: Mapping[str, float]
    """At the chip's rates: compute, memory, network."""

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda resource: self.seconds[resource])

    @property
    def roofline(self) -> float:
        """Seconds of one run."""
        return max(self.seconds.values())

    @property
    def total(self) -> float:
        """Seconds in a global step."""
        return self.runs * self.roofline


@dataclasses.dataclass(frozen=True)
class Change:
    """The smallest change found that makes a phase fit."""

    phase: str
    field: str
    value: Any
    needed: float | None
    """Bytes that the phase needs then, by the compiler; None where nothing was found."""
    tried: tuple[str, ...]
    """What was compiled on the way."""


@dataclasses.dataclass(frozen=True)
class Plan:
    topology: Topology
    config: RunConfig
    """With the changes."""
    phases: tuple[Phase, ...]
    """With the changes."""
    refused: tuple[Phase, ...]
    """Those that do not fit as the config has them, and the changes before them."""
    changes: tuple[Change, ...]
    """One for each that does not fit."""
    row_devices: int
    """Devices that rows of responses are split over while they are sampled."""

    @property
    def fits(self) -> bool:
        """Whether the config fits as it is."""
        return not self.refused

    @property
    def aside(self) -> float:
        """The part of the devices that makes batches while the others learn; 0 where all do both, in turns."""
        return self.config.rollout.devices / self.topology.devices

    def bytes_of(self, phase: str, part: str) -> float:
        """Bytes of a part of a phase's memory."""
        return next(p.memory.get(part, 0.0) for p in self.phases if p.name == phase)


def make_plan(config: RunConfig, topology: Topology, say: Callable[[str], None] = lambda line: None) -> Plan:
    """Compiles the programs of ``config`` for ``topology``. No task is built if the config states its vocabulary and
    its lengths; nothing is read or computed either way.

    Raises:
      UserError: a config that cannot run there, a compiler that is not installed.
    """
    validate(config)
    model, rollout = config.model, config.rollout
    stop_ids: Sequence[int] = (0,)
    if not (model.vocab_size and rollout.prompt_length and rollout.response_length):
        task = build_task(config.task)
        if config.initial and not model.vocab_size:
            config = dataclasses.replace(config, model=matched(model, Path(config.initial)))
        config, stop_ids = resolved(config, task), task.tokenizer.stop_ids
    if config.rollout.log_probs == "matched":
        raise UserError("rollout.log_probs = 'matched': a plan is made for two engines; use 'decode' or 'rescore'")
    for field, words in (("partial", "whole responses"), ("weight_noise", "weights as they are")):
        if value := getattr(config.rollout, field):
            raise UserError(f"rollout.{field} = {value}: a plan is made for {words}; use 0")
    devices = topology_devices(topology)
    with jax.default_device(devices[0]):  # kernels may ask which one they are made for; nothing is computed on it
        return _planned(config, topology, devices, stop_ids, say)


def _planned(
    config: RunConfig,
    topology: Topology,
    devices: Sequence[Any],
    stop_ids: Sequence[int],
    say: Callable[[str], None],
) -> Plan:
    """`make_plan` of a config with its vocabulary and lengths."""

    def engines(config: RunConfig) -> EnginePair:
        validate(config)
        check_host_memory(config, devices)
        return build_pair(config, *meshes(config, devices), topology.platform, stop_ids, 0)

    programs = Programs(engines(config))
    measured: dict[str, Phase] = {}
    refused, changes = [], []
    todo = list(PHASES)
    while todo:
        program: Program | None = getattr(programs, name := todo.pop(0))
        if program is None:
            continue
        say(f"compiling {name}")
        measured[name] = phase = measure(programs, program, topology)
        if not phase.fits:
            refused.append(phase)
            change, programs = remedy(programs, phase, topology, engines, say)
            changes.append(change)
            if change.needed is not None:
                todo = [other for other in PHASES if other in (*todo, name) or other in AFFECTED[change.field]]
    phases = tuple(measured[name] for name in PHASES if name in measured)
    return Plan(topology, programs.engines.config, phases, tuple(refused), tuple(changes), programs.making.row_shards)


def measure(programs: Programs, program: Program, topology: Topology) -> Phase:
    """Compiles a program and accounts for it."""
    runs = _runs(programs, program.name)
    mesh = programs.mesh(program.name)
    devices, used = mesh.size, 1 / mesh.shape["expert"]
    work = scaled(products(program.traced.jaxpr, used=used), 1 / devices)
    kept = {name: float(device_bytes(tree)) for name, tree in program.kept.items()}
    parts = {name: float(device_bytes(tree)) for name, tree in program.parts.items()}
    try:
        compiled = program.compiled
    except Exception as error:
        if not _too_large(error):
            raise
        asked = _asked_for(error)
        needed = None if asked is None else asked + sum(kept.values())
        seconds = _seconds(work, 0.0, Cost(), topology)
        return Phase(program.name, runs, parts, kept, needed, False, work, 1.0, 0.0, {}, seconds)
    stated = compiled.memory_analysis()
    peak = float(stated.peak_memory_in_bytes)
    if topology.platform == "cpu":  # its compiler's peak leaves temporaries out
        peak += stated.temp_size_in_bytes
    other = max(stated.argument_size_in_bytes - sum(parts.values()), 0.0)
    results = float(max(stated.output_size_in_bytes - stated.alias_size_in_bytes, 0))
    temporaries = max(peak - sum(parts.values()) - other - results, 0.0)
    memory = {**parts, "other arguments": other, "results": results, "temporaries": temporaries}
    if program.name == "update":
        memory["gradients"] = min(parts["parameters"], memory["temporaries"])
        memory["temporaries"] -= memory["gradients"]
    # Decoding is counted by its steps; what a window takes besides is small.
    account = round_cost if program.name == "decode" else program_cost
    cost = account(compiled.as_text(), island=topology.chip.island)
    # Beyond what the function has, of the products that both can see: all rows of the buffers of grouped ones included.
    visible = sum(products(program.traced.jaxpr, silent=False).values()) / devices
    more = max(cost.products - visible, 0.0)
    repeated = 1 + more / sum(work.values()) if work else 1.0
    traffic = cost.bytes
    if program.name == "decode":
        work, traffic = _over_windows(programs, program, work, traffic, devices)
    needed = peak + sum(kept.values())
    seconds = _seconds(scaled(work, repeated), traffic, cost, topology)
    return Phase(
        program.name, runs, memory, kept, needed, needed <= topology.memory, work, repeated, traffic, cost.sent, seconds
    )


def _runs(programs: Programs, name: str) -> float:
    """How often a phase runs in a global step."""
    config = programs.engines.config
    waves = config.rollout.attempts * config.rollout.waves
    in_turn = -(-programs.responses // programs.rows)  # in a slot
    if name == "decode":  # a wave ends when the longest of its responses does
        return waves * in_turn * (config.rollout.response_length - 1)
    # Where replay alters the old pass it runs once more, with live routes, to measure what that changes.
    passes = 2 if programs.engines.replay.alters_old and config.learner.live_gap else 1
    passes += config.rollout.log_probs == "rescore"
    passes += config.learner.replay_of == "initial"
    passes += config.objective.needs_reference
    prompts = programs.responses // config.samples_per_prompt
    each = {
        "prefill": waves * -(-prompts // programs.prompts),
        "admit": waves * -(-programs.responses // admitted_at_once(programs.rows)),
        "resize": waves * in_turn * (len(programs.windows) - 1),
    }
    return {**each, "score": passes, "split": config.minibatches, "update": config.minibatches}.get(name, 1)


def _over_windows(programs: Programs, program: Program, work: Any, traffic: float, devices: int) -> tuple[Any, float]:
    """Of a decode step at the mean window: what is compiled is the largest, and the cache is read as far as it goes."""
    lengths = programs.windows
    steps = [after - before for before, after in zip([0, *lengths], lengths, strict=False)]
    mean = sum(count * length for count, length in zip(steps, lengths, strict=True)) / lengths[-1]
    missing = 1 - mean / lengths[-1]
    cache = device_bytes(programs.slots(lengths[-1]).response)
    if traffic >= cache:  # else it lies on the chip, where reading it is no traffic
        traffic -= missing * cache
    if len(lengths) > 1:
        used = 1 / programs.making.mesh.shape["expert"]
        shortest = scaled(products(programs.decode_of(lengths[0]).jaxpr, used=used), 1 / devices)
        share = missing / (1 - lengths[0] / lengths[-1])
        work = {rate: work[rate] - share * (work[rate] - shortest.get(rate, 0.0)) for rate in work}
    return work, traffic


def _seconds(work: Mapping[str, float], traffic: float, cost: Cost, topology: Topology) -> dict[str, float]:
    chip = topology.chip
    compute = sum(count / getattr(chip, rate) for rate, count in work.items())
    network = sum(cost.sent.values()) / chip.interconnect
    if chip.across is not None:  # at the same time
        network = max(network, sum(cost.across.values()) / chip.across)
    # A chip's rates are shared by its devices.
    times = {"compute": compute, "memory": traffic / chip.memory_bandwidth, "network": network}
    return {resource: seconds * chip.devices for resource, seconds in times.items()}


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _too_large(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error)


def _asked_for(error: Exception) -> float | None:
    """Bytes that a refused program asked for, where the compiler says it."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of|\(?([\d.]+)([KMGT])\)? exceeds", str(error))
    if not found:
        return None
    number, unit = (group for group in found.groups() if group)
    return float(number) * _UNITS[unit]


def remedy(
    programs: Programs,
    phase: Phase,
    topology: Topology,
    engines: Callable[[RunConfig], EnginePair],
    say: Callable[[str], None],
) -> tuple[Change, Programs]:
    """The change of least harm that alone makes a phase fit: estimated, then compiled; the next one where that fails.

    Of a field three values are compiled at most. Where no field is enough, the next larger topologies are named by
    division, and not compiled.

    Args:
      engines: those of a config; it raises UserError for one that cannot run on the topology, which is no remedy then.
    """
    config, tried = programs.engines.config, []
    for field, values in _levers(programs, phase.name):
        needs = {value: _at_least(programs, phase, field, value) for value in values}
        likely = [value for value, least in needs.items() if least <= topology.memory]
        for value in dict.fromkeys([*likely[:2], *likely[-1:]]):
            try:
                changed = programs.changed(engines(_set(config, field, value)), field)
            except UserError:
                continue
            say(f"{phase.name} does not fit: trying {field} = {value}")
            tried.append(f"{field} = {value}")
            program = getattr(changed, phase.name)
            after = measure(changed, program, topology) if program is not None else None
            if after is None or after.fits:
                return Change(phase.name, field, value, after.needed if after else 0.0, tuple(tried)), changed
    # One step at least, and no more where the compiler gave no number to divide.
    larger, needed = topology.larger or topology, phase.needed or 0.0
    while (following := larger.larger) is not None and needed > larger.memory * (larger.devices / topology.devices):
        larger = following
    return Change(phase.name, "topology", larger.name, None, tuple(tried)), programs


PARTS = ("rollout.waves", "learner.score_micro_batches", "learner.micro_batches")
STATE = ("learner.offload_optimizer", "learner.moments_dtype")


def _levers(programs: Programs, phase: str) -> list[tuple[str, list[Any]]]:
    """Fields that a phase's memory depends on, each with values that need less than the config's.

    In the order of the harm that they do: parts of a batch and smaller tiles of logits cost little time, computing
    again and the way to the host's memory more, and rounded moments change the numbers.
    """
    config, mesh = programs.engines.config, programs.mesh(phase)
    rows = Layout(mesh).row_parts
    learner, minibatch = config.learner, config.prompts_per_minibatch * config.samples_per_prompt

    def parts(field: str, whole: int) -> tuple[str, list[Any]]:
        """Those that the batch and the devices divide by."""
        more = range(_get(config, field) + 1, whole + 1)
        return field, [parts for parts in more if whole % parts == 0 and whole // parts % rows == 0]

    smallest = LearnerConfig.logits_per_chunk * mesh.size  # below it, devices' units would idle
    tiles = [learner.logits_per_chunk // 4**i for i in range(1, 20)]
    head = ("learner.logits_per_chunk", [tile for tile in tiles if tile >= smallest])
    again: dict[str, list[Any]] = {"none": ["dots", "full"], "dots": ["full"]}
    own: list[tuple[str, list[Any]]] = []
    if phase in SAMPLING and programs.by_rounds:
        halves = [programs.rows // 2**i for i in range(1, 20)]
        own = [("rollout.slots", [slots for slots in halves if slots and slots % rows == 0])]
    elif phase in SAMPLING:
        own = [parts("rollout.waves", config.prompts_per_step)]
    elif phase == "score":
        own = [parts("learner.score_micro_batches", config.responses_per_step), head]
    elif phase == "update":
        own = [parts("learner.micro_batches", minibatch), head, ("learner.remat", again.get(learner.remat, []))]
    if programs.aside and phase not in LEARNING:
        return own
    offload: list[Any] = [] if learner.offload_optimizer else [True]
    narrow: list[Any] = [] if learner.moments_dtype == "bfloat16" else ["bfloat16"]
    return [*own, *zip(STATE, (offload, narrow), strict=True)]


def _at_least(programs: Programs, phase: Phase, field: str, value: Any) -> float:
    """Bytes that a phase needs, at about the least, with a field changed.

    A part of a batch needs the part of what is no argument. Other fields may spare all of that in their own phase; of
    the optimiser's state the bytes are known, and an update alone has more of it than lies there.
    """
    if phase.needed is None:  # nothing to divide: the compiler is to say
        return 0.0
    grows = ("temporaries", "KV cache", "records", "prompts", "prefilled", "prefilled before", "prompts' cache")
    fixed = sum(size for name, size in {**phase.memory, **phase.kept}.items() if name not in grows)
    if field == "rollout.slots":
        return fixed + max(phase.needed - fixed, 0.0) * value / programs.rows
    if field in PARTS:
        return fixed + max(phase.needed - fixed, 0.0) * _get(programs.engines.config, field) / value
    if field not in STATE:
        return fixed
    spared = device_bytes(programs.state.opt_state) * (1 + ("previous state" in phase.kept))
    return (fixed if phase.name == "update" else phase.needed) - spared * (1.0 if value is True else 0.5)


def _get(config: Any, field: str) -> Any:
    for name in field.split("."):
        config = getattr(config, name)
    return config


def _set(config: Any, field: str, value: Any) -> Any:
    head, _, rest = field.partition(".")
    return dataclasses.replace(config, **{head: _set(getattr(config, head), rest, value) if rest else value})
