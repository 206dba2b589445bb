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
    """Their pairs, from the first to the last one, 0–9; with a letter where blocks of these pairs began differently."""


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
    """Cells that may be compared by eye, ten pairs at a time: all that stands in a block is of the same pairs.

    Where a ten began from several sets of cold starts, each set is a block. Where its cells have run unequal pairs, it
    is of those that make the most runs; cells without them are left out, and other runs. Tens of the same cells are
    joined; one is left out if another block has all of its cells and more.
    """
    joined: dict[frozenset[str], dict[str, list[Run]]] = {}
    for block in map(_of_equal_pairs, _by_start(runs)):
        before = joined.get(frozenset(block), {})
        joined[frozenset(block)] = {name: before.get(name, []) + ten for name, ten in block.items()}
    largest = [block for cells, block in joined.items() if not any(cells < others for others in joined)]
    largest.sort(key=lambda block: min(run.pair for run in _all(block)))
    pairs = [span(_all(block)) for block in largest]
    letters = [f" {chr(ord('A') + pairs[:i].count(of))}" if pairs.count(of) > 1 else "" for i, of in enumerate(pairs)]
    return [Block(block, of + letter) for block, of, letter in zip(largest, pairs, letters, strict=True)]


def _of_equal_pairs(block: Mapping[str, Sequence[Run]]) -> dict[str, list[Run]]:
    """The largest part of a block of which each cell has all pairs: by runs, then by cells."""
    pairs = {name: {run.pair for run in done} for name, done in block.items()}

    def having(wanted: set[int]) -> list[str]:
        return [name for name, there in pairs.items() if wanted <= there]

    kept = max(pairs.values(), key=lambda wanted: (len(wanted) * len(having(wanted)), len(having(wanted))))
    return {name: [run for run in block[name] if run.pair in kept] for name in having(kept)}


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
