"""HTML from Python: elements whose text is escaped unless it is `Html` already."""

import html
import re
from collections.abc import Sequence
from typing import Any

VOID = ("meta", "input", "br")


class Html(str):
    """Text that is HTML already; any other string is escaped where it becomes part of an element."""


def element(tag: str, /, *children: str, **attributes: Any) -> Html:
    """An HTML element.

    Args:
      children: `Html` is kept, other text escaped.
      attributes: ``class_`` stands for class and ``aria_label`` for aria-label; True gives a bare name, None and False
        leave the attribute out.

    >>> element("p", "1 < 2", element("b", "!"), class_="note", hidden=True)
    '<p class="note" hidden>1 &lt; 2<b>!</b></p>'
    """
    given = ""
    for key, value in attributes.items():
        key = key.strip("_").replace("_", "-")
        if value is True:
            given += f" {key}"
        elif value is not None and value is not False:
            given += f' {key}="{escaped(str(value))}"'
    if tag in VOID:
        return Html(f"<{tag}{given}>")
    return Html(f"<{tag}{given}>{joined(*children)}</{tag}>")


def joined(*children: str) -> Html:
    """Children one after the other."""
    return Html("".join(child if isinstance(child, Html) else escaped(child) for child in children))


def escaped(text: str) -> str:
    """Text for HTML; what has no glyph is shown: control characters by their pictures, lone surrogates by U+FFFD.

    >>> escaped('<b>"\\x00\\n')
    '&lt;b&gt;&quot;␀\\n'
    """
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    text = re.sub(r"[\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)
    return html.escape(text, quote=True)


def subscripted(text: str) -> Html:
    """Text with the subscripts of policies.

    >>> subscripted("π_old & π_θ")
    'π<sub>old</sub> &amp; π<sub>θ</sub>'
    """
    return Html(re.sub("([μπ])_(old|θ)", r"\1<sub>\2</sub>", escaped(text)))


def section(name: str, title: str, *content: str) -> Html:
    """A section of the page, to which ``#name`` leads."""
    return element("section", element("h2", title, id=name), *content, aria_labelledby=name)


def folded(summary: str, *content: str, class_: str | None = None) -> Html:
    """What is shown when a reader asks for it."""
    return element("details", element("summary", summary), *content, class_=class_)


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], class_: str | None = None) -> Html:
    """A table whose first column names its rows; it scrolls within itself where the page is too narrow."""
    head = element("tr", *(element("th", text, scope="col") for text in heads))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", text) for text in row[1:])) for row in rows
    ]
    inner = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *body), class_=class_
    )
    return element("div", inner, class_="scroll", role="region", tabindex=0, aria_label=caption)
