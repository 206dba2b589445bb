"""What collectives make a device send, and how much of it leaves the island of devices that a fast network joins."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from rlstab_jax.training.plan_flops import added

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


def sent(kind: str, operand: float, attributes: str, island: int) -> tuple[float, float]:
    """Bytes that a device sends at least, with an ``operand`` of so many bytes, and of these the ones that leave its
    island.

    Devices of a group that share an island each take a part of what is for other islands, all of them together one
    copy; only in an all-to-all is all of it different.

    Args:
      attributes: of the instruction, which name the groups.
      island: devices of one, neighbours in the program's order; 0 where there is one network.
    """
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes)
        moved = [pair.split(",") for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))] if pairs else []
        leaves = island and any(int(source) // island != int(target) // island for source, target in moved)
        return operand, operand if leaves else 0.0
    groups = groups_of(attributes)
    devices = len(groups[0])
    if devices < 2:
        return 0.0, 0.0
    share = {"all-gather": devices - 1.0, "all-reduce": 2 * (devices - 1) / devices}.get(kind, (devices - 1) / devices)
    islands = max(len({device // island for device in group}) for group in groups) if island else 1
    together = devices / islands
    leaving = (devices - together) / (devices - 1)
    return operand * share, operand * share * leaving / (1 if kind.endswith("all-to-all") else together)


def scattered(sent: Mapping[str, float]) -> dict[str, float]:
    """A fusion that adds up over devices and keeps a slice of the sum sends half of what its ``all-reduce`` would."""
    rest = {kind: size for kind, size in sent.items() if kind != "all-reduce"}
    return added(rest, {"reduce-scatter": sent["all-reduce"] / 2}) if "all-reduce" in sent else rest


def groups_of(attributes: str) -> Sequence[Sequence[int]]:
    """The groups of a collective; their notations are ``{{0,1},{2,3}}``, ``[2,2]<=[4]``, ``[2,2]<=[2,2]T(1,0)`` and
    axes of a ``mesh['a'=2,'b'=2] {'a'}``, whose devices may be in another order: ``device_ids=([2,2]T(1,0))``."""
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found.group(1))]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+)", attributes):
        return _ordered(found.group(3)).reshape(int(found.group(1)), int(found.group(2))).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        axes, order, names = found.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        ids = re.search(r"device_ids=\((.*)\)", order)
        devices = _ordered(ids.group(1) if ids else f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
        own = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", names)]
        size = math.prod(devices.shape[axis] for axis in own)
        return np.moveaxis(devices, own, range(-len(own), 0)).reshape(-1, size).tolist()
    return [[0]]


def _ordered(text: str) -> np.ndarray:
    """Devices in an order: ``[2,4]T(1,0)``, numbers up from 0 in a shape that is transposed, or one after the other."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not shape:
        return np.array(_numbers(text))
    sizes = _numbers(shape.group(1))
    up = np.arange(math.prod(sizes)).reshape(sizes)
    return up.transpose(_numbers(shape.group(2))) if shape.group(2) else up


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
