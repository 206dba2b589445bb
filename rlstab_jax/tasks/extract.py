"""Finding the final answer in a response's text."""

import re
from collections.abc import Callable
from typing import Literal

Extract = Literal["any", "boxed", "hashes", "phrase", "whole"]

_PHRASE = re.compile(r"(?:final|the) answer(?:\s+is\b\s*:?|\s*:)|^[^\w\n]*answer\s*:", re.IGNORECASE | re.MULTILINE)

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace is no brace


def last_boxed(text: str) -> str | None:
    r"""What is inside the last complete ``\boxed{...}``, whose braces may nest; None without one.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    opened: list[tuple[bool, int]] = []  # braces that are open: whether it is a box's, and where its inside begins
    last = None
    for brace in _BRACES.finditer(text):
        if brace[0] == "}" and opened:
            boxed, start = opened.pop()
            if boxed and (last is None or start > last[0]):
                last = start, brace.start()
        elif brace[0].endswith("{") and brace[0] != r"\{":
            opened.append((brace[0] != "{", brace.end()))
    return None if last is None else text[slice(*last)].strip()


def after_hashes(text: str) -> str | None:
    """What follows the last ``####`` on its line; None without one.

    >>> after_hashes("6 * 12 = 72\\n#### 72")
    '72'
    """
    _, hashes, rest = text.rpartition("####")
    return rest.split("\n")[0].strip() or None if hashes else None


def after_phrase(text: str) -> str | None:
    """What follows the last "final answer is" or "the answer:", or "Answer:" that begins a line, there or on the next
    line with text, up to the end of its sentence or line; None without one.

    >>> after_phrase("So the final answer is $3.5$. I hope it is correct.")
    '3.5'
    >>> after_phrase("Answer:\\n42\\nI hope it is correct.")
    '42'
    """
    ends = [match.end() for match in _PHRASE.finditer(text)]
    if not ends:
        return None
    line = text[ends[-1] :].lstrip().split("\n")[0]
    sentence = re.split(r"\.(?:\s|$)", line)[0]
    return sentence.strip("$* \t") or None


def any_of_these(text: str) -> str | None:
    r"""The last ``\boxed``, else what follows ``####``, else what follows the phrase, else None."""
    return last_boxed(text) or after_hashes(text) or after_phrase(text)


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "any": any_of_these,
    "boxed": last_boxed,
    "hashes": after_hashes,
    "phrase": after_phrase,
    "whole": lambda text: text.strip() or None,
}
