"""What one device does in a compiled program, read off its HLO: memory traffic, products, bytes sent to others.

Compilers' own counts take a loop's body once; here it counts as often as the loop's condition says.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from rlstab_jax.models.spread import cost_in
from rlstab_jax.training.plan_flops import added, scaled
from rlstab_jax.training.plan_sent import COLLECTIVES, scattered, sent

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip
_BYTES = {"pred": 1, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape. ``near`` ones lie in a memory on the chip."""

    dtype: str
    sizes: tuple[int, ...]
    near: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * _BYTES.get(self.dtype, _bits(self.dtype) / 8)

    @property
    def far_bytes(self) -> float:
        """Bytes in the large memory."""
        return 0.0 if self.near else self.bytes


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) * (2 if dtype.startswith("c") else 1) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @property
    def far_bytes(self) -> float:
        return sum(array.far_bytes for array in self.arrays)

    @property
    def elements(self) -> int:
        return sum(math.prod(array.sizes) for array in self.arrays)

    def called(self, attribute: str) -> str:
        """The computation that an attribute names, such as a loop's ``body``; "" where there is none."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return found.group(1) if found else ""

    @property
    def evenly(self) -> tuple[float, float] | None:
        """What the name of a loop or of a choice says of its cost; that of what is inside begins in the same way."""
        found = re.search(r'op_name="[^"]*(evenly\[[^"/]*)/(?:while|cond)"', self.attributes)
        return cost_in(found.group(1)) if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device. ``sent`` is by kind of collective, the share of its operand that must leave the device, and
    ``across`` what of it must leave its island."""

    products: float = 0.0
    bytes: float = 0.0
    sent: Mapping[str, float] = dataclasses.field(default_factory=dict)
    across: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        sent, across = added(self.sent, other.sent), added(self.across, other.across)
        return Cost(self.products + other.products, self.bytes + other.bytes, sent, across)

    def __mul__(self, times: float) -> "Cost":
        sent, across = scaled(self.sent, times), scaled(self.across, times)
        return Cost(self.products * times, self.bytes * times, sent, across)


def program_cost(text: str, rounds: float = 1.0, island: int = 0) -> Cost:
    """Cost of one run of a compiled module, given as text, whose loops of unknown length make so many ``rounds``, on
    islands of so many devices (0: all are one)."""
    return _Module(*parse(text), rounds, island).cost


def round_cost(text: str, island: int = 0) -> Cost:
    """Cost of one round of the loops of unknown length, without what comes before and after."""
    return program_cost(text, 1.0, island) + program_cost(text, 0.0, island) * -1.0


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, each with its instructions by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{\s*$", line)
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    begin = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not begin:
        return None
    rest = line[begin.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    opcode, rest = rest[:opening], rest[opening:]
    end = _closing(rest)
    operands = tuple(re.findall(r"%([\w.-]+)", rest[:end])) if opcode != "constant" else (rest[1 : end - 1],)
    if opcode == "parameter":
        operands = (rest[1 : end - 1],)
    results = arrays(shape)
    if opcode == "fusion-start":  # ((operands), results, context): a fusion in a stream of its own
        opcode, results = "fusion", results[len(operands) : -1]
    return Instruction(begin.group(2), opcode, results, operands, rest[end:], begin.group(1) is not None)


def _closing(text: str) -> int:
    """Where the parenthesis that ``text`` begins with has been closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, ``f32[2,3]{1,0:T(8,128)S(1)}`` or a tuple of such."""
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape)
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), "S(" in layout)
        for dtype, sizes, layout in found
    )


@dataclasses.dataclass(frozen=True)
class _Module:
    computations: dict[str, Computation]
    entry: str
    rounds: float
    island: int

    @property
    def cost(self) -> Cost:
        return self._cost(self.entry)

    @cached_property
    def _memo(self) -> dict[str, Cost]:
        return {}

    def _cost(self, name: str) -> Cost:
        if name not in self._memo:
            total = Cost()
            computation = self.computations[name]
            for instruction in computation.values():
                total += self._of(instruction, computation)
            self._memo[name] = total
        return self._memo[name]

    def _of(self, instruction: Instruction, computation: Computation) -> Cost:
        opcode = instruction.opcode
        if opcode == "while":
            inside = self._cost(instruction.called("body")) + self._cost(instruction.called("condition"))
            return inside * self._rounds(instruction, computation)
        if opcode == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            branches = re.findall(r"[\w.-]+", names.group(1)) if names else []
            branches = branches or [instruction.called("false_computation"), instruction.called("true_computation")]
            if instruction.evenly:
                return self._cost(branches[0])
            return max((self._cost(name) for name in branches), key=lambda cost: (cost.bytes, cost.products))
        if opcode in ("call", "async-start"):
            return self._cost(instruction.called("to_apply" if opcode == "call" else "calls"))
        inside = Cost()
        if opcode == "fusion":  # one pass over memory, whatever happens inside
            fused = instruction.called("calls")
            inside = self._cost(fused)
            if "reduce-scatter" in fused or "all-reduce-scatter" in fused:
                inside = dataclasses.replace(inside, sent=scattered(inside.sent), across=scattered(inside.across))
        traffic = 0.0 if opcode in _FREE else self._traffic(instruction, computation)
        own = Cost(_products(instruction, computation), traffic, *self._sent(instruction, computation))
        return dataclasses.replace(inside, bytes=0.0) + own

    def _sent(self, instruction: Instruction, computation: Computation) -> tuple[dict[str, float], dict[str, float]]:
        """Bytes that a collective makes a device send, and those that leave its island."""
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return {}, {}
        operand = sum(computation[name].bytes for name in instruction.operands if name in computation)
        everywhere, across = sent(kind, operand, instruction.attributes, self.island)
        return ({kind: everywhere} if everywhere else {}), ({kind: across} if across else {})

    def _rounds(self, loop: Instruction, computation: Computation) -> float:
        """How often a loop runs whose name says it, or of which the compiler does, or that counts up by one to a
        constant; ``rounds`` of any other."""
        if loop.evenly:
            return loop.evenly[0]
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return float(known.group(1))
        condition = self.computations[loop.called("condition")]
        root = next(instruction for instruction in condition.values() if instruction.root)
        root = self._unfused(root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(root.operands) != 2:
            return self.rounds
        # The body of a fused comparison has parameters for its operands.
        left, right = (condition.get(name) for name in root.operands)
        if left is None or right is None or left.opcode != "get-tuple-element" or right.opcode != "constant":
            return self.rounds
        index = re.search(r"index=(\d+)", left.attributes)
        start = 0
        carried = computation.get(loop.operands[0])
        if index and carried is not None and carried.opcode == "tuple":
            first = computation.get(carried.operands[int(index.group(1))])
            if first is not None and first.opcode == "constant":
                start = int(first.operands[0])
        return float(max(int(right.operands[0]) - start, 0))

    def _unfused(self, root: Instruction) -> Instruction:
        """A fused comparison, with the operands of the fusion."""
        if root.opcode != "fusion":
            return root
        fused = self.computations[root.called("calls")]
        inner = next(instruction for instruction in fused.values() if instruction.root)
        places = [fused[name] for name in inner.operands if name in fused]
        if any(place.opcode != "parameter" for place in places):
            return root
        return dataclasses.replace(inner, operands=tuple(root.operands[int(place.operands[0])] for place in places))

    def _traffic(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes between the large memory and the chip: operands that are read, results that are written."""
        opcode = instruction.opcode
        operands = [computation[name] for name in instruction.operands if name in computation]
        if opcode.endswith("-done"):
            return 0.0
        if opcode in ("copy-start", "slice-start"):
            # Of the source as much as of the result: (result, source, state), or ((source), result, state).
            source, target = sorted(instruction.arrays[:2], key=lambda array: array.bytes, reverse=True)
            if opcode == "copy-start":
                target, source = instruction.arrays[:2]
            return target.far_bytes + (0.0 if source.near else target.bytes)
        if opcode == "fusion":
            fused = self.computations[instruction.called("calls")]
            read = sum(self._read(fused, place, operand.far_bytes) for place, operand in enumerate(operands))
            return read + self._written(fused, instruction)
        if opcode in _SLICES:
            return instruction.far_bytes + (instruction.bytes if operands[0].far_bytes else 0.0)
        if opcode == "dynamic-update-slice":
            return operands[1].far_bytes + (operands[1].bytes if instruction.far_bytes else 0.0)
        if opcode == "scatter":
            return 2 * operands[-1].bytes if instruction.far_bytes else 0.0
        return instruction.far_bytes + sum(operand.far_bytes for operand in operands)

    def _read(self, fused: Computation, place: int, whole: float) -> float:
        """What a fusion reads of its operand: all, unless it only takes slices, or writes into it."""
        parameter = next(p for p in fused.values() if p.opcode == "parameter" and p.operands[0] == str(place))
        part, whole_on = self._part(fused, parameter.name) if whole else (0.0, False)
        return whole if whole_on else part * whole

    def _part(self, computation: Computation, name: str) -> tuple[float, bool]:
        """The part of a value that is read inside a computation of a fusion, and whether its result is all of it."""
        part, whole_on = 0.0, computation[name].root
        for user in computation.values():
            if user.opcode == "parameter" or name not in user.operands:
                continue
            first = user.operands[0] == name
            if user.opcode in _PASSING:
                found = [self._part(computation, user.name)]
            elif user.opcode in _SLICES and first:
                found = [(user.elements / computation[name].elements, False)]
            elif user.opcode == "dynamic-update-slice" and first:
                found = [(0.0, False)]
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")]
                places = [str(place) for place, operand in enumerate(user.operands) if operand == name]
                parameters = [p.name for p in inner.values() if p.opcode == "parameter" and p.operands[0] in places]
                found = [self._part(inner, parameter) for parameter in parameters]
                if any(on for _, on in found):
                    found = [(read, False) for read, _ in found] + [self._part(computation, user.name)]
            else:
                return 1.0, whole_on
            part += sum(read for read, _ in found)
            whole_on |= any(on for _, on in found)
        return min(part, 1.0), whole_on

    def _written(self, fused: Computation, instruction: Instruction) -> float:
        """What a fusion writes: its results, but of one that it updates in place the update."""
        root = next(inner for inner in fused.values() if inner.root)
        parts = [fused.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(instruction.arrays):
            return instruction.far_bytes
        total = 0.0
        for part, array in zip(parts, instruction.arrays, strict=True):
            while part is not None and part.opcode == "bitcast":
                part = fused.get(part.operands[0])
            if part is not None and part.opcode == "dynamic-update-slice":
                update = fused[part.operands[1]]
                total += min(update.bytes, array.bytes) if array.far_bytes else 0.0
            else:
                total += array.far_bytes
        return total


_SLICES = ("dynamic-slice", "slice", "gather")
_PASSING = ("bitcast", "copy", "convert", "reshape", "transpose")  # inside a fusion: nothing but another view


def _products(instruction: Instruction, computation: Computation) -> float:
    """Operations of a matrix product: two for each pair of numbers that meet."""
    operands = [computation[name].arrays for name in instruction.operands if name in computation]
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted.group(1).split(",") if axis] if contracted else []
        return 2.0 * math.prod(instruction.arrays[0].sizes) * math.prod(operands[0][0].sizes[axis] for axis in axes)
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands[0][0].sizes, operands[1][0].sizes)
    if instruction.opcode == "custom-call":  # a kernel, whose author may have stated them
        stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        return float(stated.group(1)) if stated else 0.0
    return 0.0


def _convolution(instruction: Instruction, left: Sequence[int], right: Sequence[int]) -> float:
    """Products as convolutions, which is how TPUs have them: of each spatial axis the pairs of places that meet."""
    attributes = instruction.attributes
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", attributes)
    assert labels, attributes
    of_left, of_right, of_result = labels.groups()
    result = instruction.arrays[0].sizes
    pairs = 1
    axes = [label for label in of_left if label.isdigit()]
    for position, axis in enumerate(sorted(axes)):
        pairs *= _meeting(
            left[of_left.index(axis)],
            right[of_right.index(axis)],
            result[of_result.index(axis)],
            {name: _window(attributes, name, position) for name in ("stride", "lhs_dilate", "rhs_dilate", "pad")},
        )
    return 2.0 * result[of_result.index("b")] * result[of_result.index("f")] * right[of_right.index("i")] * pairs


def _window(attributes: str, name: str, position: int) -> int:
    """A number of a convolution's window for one spatial axis; of padding the low side."""
    found = re.search(rf"[ {{]{name}=([\d_x-]+)", attributes)
    if not found:
        return 0 if name == "pad" else 1
    return int(found.group(1).split("x")[position].split("_")[0])


def _meeting(left: int, right: int, result: int, window: Mapping[str, int]) -> int:
    """Pairs of a place of the result and one of the window whose place in the input is neither padding nor a hole."""
    count, holes = 0, window["lhs_dilate"]
    for tap in range(right):
        place = np.arange(result) * window["stride"] + tap * window["rhs_dilate"] - window["pad"]
        count += int(((place >= 0) & (place <= (left - 1) * holes) & (place % holes == 0)).sum())
    return count
