"""The command line of a benchmark: which tables to measure, on how many cores, in which folder."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks.common import environment, held_to, write_json
from experiments.benchmarks.pages import Cell, Page
from rlstab_jax.parallel.process import prepare_jax
from rlstab_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Tables that are measured one by one, each into a JSON file of its own, and the page that shows them.

    ``full`` and ``quick`` are dataclasses of sizes; both have ``repetitions``.
    """

    module: str
    """Of the benchmark, to start it again in a process of its own."""
    about: str
    """Its help."""
    results: Path
    """Where results are committed."""
    tables: dict[str, Callable[[Any, int], list[Cell]]]
    """What measures a table, given the sizes and the number of threads."""
    full: Any
    """The sizes that are published."""
    quick: Any
    """Those of a smoke test."""
    settings: dict[str, Any]
    """What else the JSON files say about the run."""
    page: Page
    """Shows the results."""
    gpu: tuple[str, Callable[[bool], dict[str, Any]]]
    """The name of the table that is measured on a GPU, and what measures it, quickly if told so."""
    threads: Callable[[str, list[int]], list[int]] = lambda table, asked: asked
    """With which of the numbers of threads that were asked for a table is measured."""
    devices: Callable[[str, int], int] = lambda table, threads: 1
    """The number of virtual devices of the process that measures a table."""

    def main(self, arguments: list[str] | None = None) -> None:
        options = self._parse(arguments)
        scale = self.quick if options.quick else self.full
        if options.repetitions:
            scale = dataclasses.replace(scale, repetitions=options.repetitions)
        if options.worker:
            prepare_jax()
            write_json(options.worker, self._measured(options.tables, scale, options.threads[0]))
            return
        if options.gpu:
            name, study = self.gpu
            write_json(options.out / f"{name}.json", study(options.quick))
        elif not options.draw:
            for table in options.tables:
                self._measure(table, scale, options)
        results = {p.stem: json.loads(p.read_text()) for p in sorted(options.out.glob("*.json"))}
        if not results:
            raise UserError(f"{options.out} holds no results: measure first")
        self.page.write(options.out, results)
        print(self.page.text(results))

    def _measure(self, table: str, scale: Any, options: argparse.Namespace) -> None:
        if options.quick:  # takes the cores that it finds
            runs = [self._measured([table], scale, os.cpu_count() or 1)]
        else:
            runs = [self._in_process(table, scale, count) for count in self.threads(table, options.threads)]
        cells = [cell for run in runs for cell in run["cells"][table]]
        settings = dataclasses.asdict(scale) | self.settings
        result = {"environment": runs[0]["environment"], "settings": settings, "cells": cells}
        write_json(options.out / f"{table}.json", result)

    def _measured(self, tables: list[str], scale: Any, threads: int) -> dict[str, Any]:
        """The cells of those tables in this process, by table, and the machine."""
        cells = {}
        for table in tables:
            print(f"{table}, {threads} thread{'s' * (threads > 1)}", file=sys.stderr, flush=True)
            cells[table] = [{"threads": threads} | cell for cell in self.tables[table](scale, threads)]
        return {"environment": environment(), "cells": cells}

    def _in_process(self, table: str, scale: Any, threads: int) -> dict[str, Any]:
        """`_measured` of one table, in a process of its own that is held to so many threads."""
        arguments = ["--tables", table, "--threads", str(threads), "--repetitions", str(scale.repetitions)]
        return held_to(threads, self.module, arguments, self.devices(table, threads))

    def _parse(self, arguments: list[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        tables = list(self.tables)
        parser.add_argument("--tables", nargs="+", choices=tables, default=tables, help="which to measure")
        parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="cores of each run (1 2)")
        parser.add_argument("--repetitions", type=int, default=0, help=f"timed runs ({self.full.repetitions})")
        parser.add_argument("--quick", action="store_true", help="a smoke test, under a minute")
        parser.add_argument("--gpu", action="store_true", help="only what is measured on a GPU")
        parser.add_argument("--draw", action="store_true", help="measure nothing")
        parser.add_argument("--out", type=Path, default=self.results, help="the folder to write to")
        parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
        return parser.parse_args(arguments)
