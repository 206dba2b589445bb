"""``rlstab report``: one HTML page that compares runs, and a picture of their curves beside it.

The page needs nothing but itself: pictures are inline SVG, there is no script, and its content policy forbids any
request.
"""

import datetime
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from rlstab_jax.report import pictures, sections
from rlstab_jax.report.figure import BANDS, HEAVY, LOOKS, MAKER, SMOOTH, draw_runs
from rlstab_jax.report.markup import Html, element
from rlstab_jax.report.runs import Group, Run, group_runs, read_runs
from rlstab_jax.report.style import style
from rlstab_jax.report.timeline import remarks_of
from rlstab_jax.rundir import write_aside
from rlstab_jax.types import UserError

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    paths: Sequence[Path],
    out: Path | None = None,
    over: Sequence[str] = ("seed",),
    say: Callable[[str], None] = print,
    begin: Callable[[], None] = lambda: None,
) -> tuple[Path, Path]:
    """Compares runs on one page, and in one picture.

    Args:
      paths: directories of runs, or of directories of runs.
      out: of the page; by default ``report.html`` in the directory of the only run, or in the current one. The picture
        has the same name and ends in ``.png``. An earlier report is replaced, nothing else is.
      over: config fields in which the runs of one group may differ.
      say: where one-line messages go.
      begin: is called when all input has been checked.

    Returns:
      The paths of the page and of the picture.

    Raises:
      UserError: a mistake in ``paths``, ``out`` or ``over``.
    """
    runs = read_runs(paths, say)
    groups = group_runs(runs, over)
    if out is None:
        out = runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")
    picture = out.with_suffix(".png")
    _check_target(out, picture, runs)
    begin()
    names = [group.label for group in groups]
    title = names[0] if len(names) == 1 else f"{len(runs)} runs in {len(groups)} groups"
    text = page_of(title, groups, over)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_runs({group.label: [run.metrics for run in group.runs] for group in groups}, picture, title)
    write_aside(out, text.encode())
    return out, picture


def _check_target(out: Path, picture: Path, runs: Sequence[Run]) -> None:
    """Refuses to replace what no report has written, and the picture of a run by that of several."""
    if out.is_dir():
        raise UserError(f"--out {out} is a directory: name the page, such as {out / 'report.html'}")
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: expected a name that ends in .html; the picture goes beside it")
    alone = [run.path for run in runs] == [picture.parent.resolve()]
    if picture.name == "report.png" and (picture.parent / "manifest.json").exists() and not alone:
        raise UserError(f"{picture} is the picture of a run: give another --out")
    for path in (out,) if alone and picture.name == "report.png" else (out, picture):
        if path.exists() and MAKER.encode() not in path.read_bytes()[:2000]:
            raise UserError(f"{path} is there and is no report: give another --out, or move it away")


def page_of(title: str, groups: Sequence[Group], over: Sequence[str]) -> str:
    """The whole page as text.

    Args:
      title: of the page.
      groups: of runs, each with at least one step.
      over: the config fields in which the runs of a group may differ.
    """
    figures = itertools.count()
    metrics = sections.metrics_of(groups)
    said = {run.path: remarks_of(run) for group in groups for run in group.runs}
    parts = [
        sections.overview(groups, said),
        pictures.curves_of("learning", "Learning", "", pictures.LEARNING, metrics, figures),
        pictures.curves_of("gaps", "The two gaps", pictures.NOTE_ON_GAPS, pictures.BOTH_GAPS, metrics, figures),
        pictures.routing(metrics, figures),
        pictures.curves_of(
            "trust", "Trust region and weights", pictures.NOTE_ON_TRUST, pictures.TRUST, metrics, figures
        ),
        sections.monitor(groups, said, figures),
        sections.configs(groups),
        sections.responses(groups),
    ]
    made = datetime.datetime.now(datetime.UTC)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=MAKER),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} · rlstab"),
        element("style", Html(style(len(groups)))),
    )
    body = element(
        "body",
        element("a", "To the runs", href="#runs", class_="skip"),
        element(
            "header",
            element("h1", title),
            element("p", f"Made by {MAKER} on {made:%Y-%m-%d at %H:%M} UTC.", class_="note"),
            _contents(),
            *(element("p", line) for line in how_to_read(groups, over)),
        ),
        element("main", sections.legend(groups), *parts),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _contents() -> Html:
    names = {"runs": "Runs", "learning": "Learning", "gaps": "Gaps", "routing": "Routing", "trust": "Trust region"}
    names |= {"monitor": "Monitor", "configs": "Configs", "samples": "Samples"}
    links = [element("li", element("a", text, href=f"#{name}")) for name, text in names.items()]
    return element("nav", element("ul", *links), aria_label="Sections")


def how_to_read(groups: Sequence[Group], over: Sequence[str]) -> list[str]:
    """What a group is, and what its curves are."""
    seeds = max(len(group.runs) for group in groups)
    if len(groups) == 1 and seeds == 1:
        return [HEAVY]
    fields = " and ".join(over)
    curves = BANDS if seeds > 1 else SMOOTH
    lines = [f"Runs whose configs differ only in {fields} (and in length and mesh) are one group. {curves}"]
    if len(groups) > 1:
        lines.append(
            "Charts under one heading have equal vertical axes unless these would span more than five decades."
        )
    if len(groups) > LOOKS:
        lines.append(f"Colours and dashes repeat after {LOOKS} groups: hide some to tell them apart.")
    return lines
