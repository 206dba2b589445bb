"""Which runs may be compared: those of the same pairs, from the same cold starts.

A pair is a cold start and a seed. Cold starts differ by more than most methods do, and one that another kind of
processor has trained is another one. So means over unequal pairs differ where methods do not.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from experiments.study import CONFIRMATORY, Run

Runs = Mapping[str, Sequence[Run]]
Place = tuple[int, int]
TEN = CONFIRMATORY.cold_starts  # pairs from one of which to the next each cold start comes once


@dataclasses.dataclass(frozen=True)
class Block:
    """Runs to look at side by side."""

    runs: dict[str, list[Run]]
    """Of each cell."""
    pairs: str
    """Their pairs, as `span` says them; with a letter where blocks of the same pairs began differently."""


def span(runs: Sequence[Run]) -> str:
    """The pairs of some runs: 0–9, 20–29."""
    ranges: list[list[int]] = []
    for pair in sorted({run.pair for run in runs}):
        if ranges and pair == ranges[-1][1] + 1:
            ranges[-1][1] = pair
        else:
            ranges.append([pair, pair])
    return ", ".join(f"{low}–{high}" if low < high else f"{low}" for low, high in ranges)


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

    Where cells have run unequal pairs, or from unequal cold starts, those that make the most runs are a block, and what
    is left is divided likewise. Tens of the same cells are joined. A block whose cells all stand in another one, beside
    more, is left out, unless it has whole tens of several cells, or a run that collapsed: nobody is to miss a collapse
    because its run has few beside it.
    """
    joined: dict[frozenset[str], dict[str, list[Run]]] = {}
    for part in (part for ten in _by_ten(runs) for part in _of_equal_pairs(_places(ten))):
        before = joined.get(cells := frozenset(part), {})
        joined[cells] = {name: before.get(name, []) + done for name, done in part.items()}
    largest = [
        block
        for cells, block in joined.items()
        if not any(cells < others for others in joined)
        or (len(cells) > 1 and len(_all(block)) >= TEN * len(cells))
        or any(run.collapsed for run in _all(block))
    ]
    largest.sort(key=lambda block: min(run.pair for run in _all(block)))
    pairs = [span(_all(block)) for block in largest]
    letters = [f" {chr(ord('A') + pairs[:i].count(of))}" if pairs.count(of) > 1 else "" for i, of in enumerate(pairs)]
    return [Block(block, of + letter) for block, of, letter in zip(largest, pairs, letters, strict=True)]


def _by_ten(runs: Runs) -> list[dict[str, list[Run]]]:
    """The cells that have run in each ten."""
    found: dict[int, dict[str, list[Run]]] = {}
    for name, done in runs.items():
        for ten in tens(done):
            found.setdefault(ten[0].pair // TEN, {})[name] = ten
    return [found[ten] for ten in sorted(found)]


def _places(ten: Mapping[str, Sequence[Run]]) -> dict[str, dict[Place, Run]]:
    """The runs of each cell by their pair, and by the number of its cold start where equal ones began unequally."""
    seen: dict[tuple[int, str], list[float]] = {}
    placed: dict[str, dict[Place, Run]] = {}
    for name, done in ten.items():
        for run in done:
            determined, accuracy = run.start
            starts = seen.setdefault((run.pair, determined), [])
            if accuracy not in starts:
                starts.append(accuracy)
            placed.setdefault(name, {})[run.pair, starts.index(accuracy)] = run
    return placed


def _of_equal_pairs(block: Mapping[str, Mapping[Place, Run]]) -> Iterator[dict[str, list[Run]]]:
    """Divides a ten into parts of which each cell has all places, the largest one first: by runs, then by cells."""
    if not block:
        return

    def having(wanted: set[Place]) -> list[str]:
        return [name for name, there in block.items() if wanted <= there.keys()]

    kept = max(map(set, block.values()), key=lambda wanted: (len(wanted) * len(having(wanted)), len(having(wanted))))
    cells = having(kept)
    yield {name: [run for place, run in block[name].items() if place in kept] for name in cells}
    rest = {
        name: {place: run for place, run in there.items() if name not in cells or place not in kept}
        for name, there in block.items()
    }
    yield from _of_equal_pairs({name: there for name, there in rest.items() if there})


def _all(block: Mapping[str, Sequence[Run]]) -> list[Run]:
    return [run for done in block.values() for run in done]


def _one_start(starts: set[tuple[str, float]]) -> bool:
    """Whether equal cold starts began equally: machines of two kinds train different ones from one seed."""
    return len(starts) == len({determined for determined, _ in starts})
