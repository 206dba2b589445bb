"""Runs that may be compared: of equal pairs, from equal cold starts."""

from dataclasses import replace

from experiments.pairing import blocks
from experiments.study import Run
from tests.experiments.test_studies import made_up


def of(*pairs: int, machine: float = 0.25) -> list[Run]:
    """Runs of these pairs, whose cold starts have the accuracy ``machine``."""
    return [replace(made_up(0.7, pair), start=(f"of {pair}", machine)) for pair in pairs]


FIRST, SECOND = range(10), range(10, 20)


def shown(**runs: list[Run]) -> list[tuple[str, dict[str, list[int]]]]:
    return [
        (block.pairs, {name: [run.pair for run in done] for name, done in block.runs.items()}) for block in blocks(runs)
    ]


def test_unequal_pairs_stand_in_blocks_of_their_own() -> None:
    """What both tens have is joined only if nothing else is: here a alone would say less than a beside b."""
    first, second = list(FIRST), list(SECOND)
    assert shown(a=of(*FIRST, *SECOND), b=of(*FIRST), c=of(*SECOND)) == [
        ("0–9", {"a": first, "b": first}),
        ("10–19", {"a": second, "c": second}),
    ]
    assert shown(a=of(*FIRST, *SECOND), b=of(*SECOND)) == [("10–19", {"a": second, "b": second})]
    assert shown(a=of(*FIRST, *SECOND), b=of(*SECOND, *FIRST)) == [
        ("0–19", {"a": first + second, "b": first + second}),
    ]
    assert shown(a=[], b=[]) == []


def test_equal_pairs_from_other_cold_starts_do_too() -> None:
    first = list(FIRST)
    assert shown(a=of(*FIRST), b=of(*FIRST, machine=0.3), c=of(*FIRST)) == [
        ("0–9 A", {"a": first, "c": first}),
        ("0–9 B", {"b": first}),
    ]
    assert [pairs for pairs, _ in shown(a=of(0, 1), b=of(0, 1, machine=0.3), c=of(0, 1, machine=0.4))] == [
        "0–1 A",
        "0–1 B",
        "0–1 C",
    ]


def test_a_block_is_of_the_pairs_that_make_the_most_runs() -> None:
    assert shown(a=of(*FIRST), b=of(0, 1, 2, 3, 4, 5), c=of(0, 1, 2, 3, 4, 5, 6)) == [
        ("0–5", {name: list(range(6)) for name in "abc"})
    ]
    assert shown(a=of(0, 1), b=of(0)) == [("0", {"a": [0], "b": [0]})]  # of equally many runs, more cells


def test_what_is_left_of_a_ten_is_drawn_if_nothing_else_shows_its_cells_or_its_collapse() -> None:
    first, second = list(FIRST), list(SECOND)
    pair = {"a": first, "b": first}
    assert shown(a=of(*FIRST), b=of(*FIRST), c=of(0, 2), d=of(8, 9)) == [
        ("0–9", pair),
        ("0, 2", {"c": [0, 2]}),
        ("8–9", {"d": [8, 9]}),
    ]
    collapsed = [replace(made_up(0.7, 11, collapsed=True), start=("of 11", 0.25))]
    assert shown(a=[*of(*FIRST), *collapsed], b=of(*FIRST)) == [("0–9", pair), ("11", {"a": [11]})]
    # Whole tens of several cells, though others have these and more.
    assert shown(a=of(*FIRST, *SECOND), b=of(*FIRST, *SECOND), c=of(*FIRST)) == [
        ("0–9", {**pair, "c": first}),
        ("10–19", {"a": second, "b": second}),
    ]
