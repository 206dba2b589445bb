"""A matplotlib figure as SVG within an HTML page: small, in the page's colours and letters, light and dark.

Text stays text. Colours become CSS variables: ``--c0`` to ``--c5`` for the curves' colours, ``--grid``, ``--paper``,
and black becomes ``currentColor``. Curves of groups carry the classes ``curve`` and ``g0``, ``g1``, ...
"""

import io
import re
from typing import TYPE_CHECKING

from rlstab_jax.report.figure import COLOURS
from rlstab_jax.report.markup import Html, escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = {colour.lower(): f"var(--c{i})" for i, colour in enumerate(COLOURS)} | {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    "#e6e6e6": "var(--grid)",
    "#737373": "var(--faint)",
}


def inline(figure: "Figure", number: int, description: str) -> Html:
    """The figure as an ``svg`` element.

    Args:
      figure: its background is dropped.
      number: of the figure on the page, which keeps the ids of two figures apart.
      description: what a reader who does not see it is told.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    # A fixed salt: the same runs give the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlstab"}):
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    start = text.index(">", text.index("<svg")) + 1
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None  # matplotlib always writes one
    body = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", text[start:], flags=re.S
    )
    body = re.sub(r'<g id="(g\d+)">', r'<g class="curve \1">', body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    seen: set[str] = set()  # matplotlib defines a marker again where another curve uses it

    def own(match: re.Match[str]) -> str:
        repeated = match[1] in seen
        seen.add(match[1])
        return "" if repeated else f' id="f{number}-{match[1]}"'

    body = re.sub(r' id="([^"]*)"', own, body)
    body = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#f{number}-\1"', body).replace("xlink:href", "href")
    body = re.sub(r"url\(#([^)]*)\)", rf"url(#f{number}-\1)", body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda match: VARIABLES.get(match[0], match[0]), body)
    body = re.sub(r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d)\d+", r"\1", match[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return Html(f'<svg {size[0]} role="img" aria-label="{escaped(description)}">{body.strip()}')
