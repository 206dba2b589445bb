"""Which runs may be compared: those of the same pairs, from the same cold starts.

A pair is a cold start and a seed. Cold starts differ by more than most methods do, and one that another kind of
processor has trained is another one. So means over unequal pairs differ where methods do not.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.study import CONFIRMATORY, Run

Runs = Mapping[str, Sequence[Run]]
TEN = CONFIRMATORY.cold_starts  # pairs from one of which to the next each cold start comes once


@dataclasses.dataclass(frozen=True)
class Block:
    """Runs to look at side by side."""

    runs: dict[str, list[Run]]
    """Of each cell."""
    pairs: str
    """Their pairs, from the first to the last one, 0–9; and whether other cold starts stand in another block."""


def span(runs: Sequence[Run]) -> str:
    """The pairs of some runs, from the first to the last one."""
    pairs = [run.pair for run in runs]
    return f"{min(pairs)}–{max(pairs)}"


def common(runs: Runs, cells: Sequence[str]) -> list[list[Run]]:
    """The runs of each cell, in rows: those of the pairs that all cells have, from one cold start."""
    by_pair = [{run.pair: run for run in runs.get(name, ())} for name in cells]
    pairs = sorted(set.intersection(*(set(found) for found in by_pair)))
    pairs = [pair for pair in pairs if _one_start({found[pair].start for found in by_pair})]
    return [[found[pair] for pair in pairs] for found in by_pair]


def tens(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of a cell, ten pairs at a time: each ten has every cold start once, and is run on one machine."""
    return [[run for run in runs if run.pair // TEN == ten] for ten in sorted({run.pair // TEN for run in runs})]


def blocks(runs: Runs) -> list[Block]:
    """Cells that may be compared by eye, ten pairs at a time.

    Where a ten began from several sets of cold starts, each set is a block. A cell is left out of a block where others
    have run more than half as many pairs again. Tens of the same cells are joined; one is left out if another block has
    all of its cells and more.
    """
    joined: dict[frozenset[str], dict[str, list[Run]]] = {}
    for block in _by_start(runs):
        most = max(map(len, block.values()))
        kept = {name: ten for name, ten in block.items() if 3 * len(ten) >= 2 * most}
        before = joined.get(frozenset(kept), {})
        joined[frozenset(kept)] = {name: before.get(name, []) + ten for name, ten in kept.items()}
    largest = [block for cells, block in joined.items() if not any(cells < others for others in joined)]
    found: list[Block] = []
    for block in sorted(largest, key=lambda block: min(run.pair for run in _all(block))):
        pairs = span(_all(block))
        again = any(other.pairs.startswith(pairs) for other in found)
        found.append(Block(block, pairs + ", other cold starts" * again))
    return found


def _all(block: Mapping[str, Sequence[Run]]) -> list[Run]:
    return [run for done in block.values() for run in done]


def _by_start(runs: Runs) -> list[dict[str, list[Run]]]:
    """Tens of cells, together where they are of the same pairs from the same cold starts."""
    found: list[dict[str, list[Run]]] = []
    for name, done in runs.items():
        for ten in tens(done):
            block = next((block for block in found if all(_side_by_side(ten, other) for other in block.values())), None)
            if block is None:
                found.append(block := {})
            block[name] = ten
    return found


def _side_by_side(a: Sequence[Run], b: Sequence[Run]) -> bool:
    starts = {run.pair: run.start for run in b}
    same_ten = a[0].pair // TEN == b[0].pair // TEN
    return same_ten and all(_one_start({run.start, starts[run.pair]}) for run in a if run.pair in starts)


def _one_start(starts: set[tuple[str, float]]) -> bool:
    """Whether equal cold starts began equally: machines of two kinds train different ones from one seed."""
    return len(starts) == len({determined for determined, _ in starts})
