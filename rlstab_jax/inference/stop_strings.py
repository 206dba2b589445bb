"""Texts that end a response. They are looked for on the host, between rounds of decoding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlstab_jax.types import UserError


@dataclass(frozen=True)
class StopStrings:
    """A response ends with the token that completes one of ``texts``; what was drawn after it is cut off.

    Attributes:
      texts: any of them ends a response.
      decode: token ids to text, such as a tokeniser's.
      reach: tokens that one of them can span at most.
    """

    texts: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]
    reach: int

    def end(self, ids: Sequence[int], seen: int) -> int | None:
        """How many tokens there are up to the one that completes a stop string, or None where none is completed.

        The first ``seen`` tokens are known to complete none; only as many of them are read again as one can span.
        """
        start = max(0, seen - self.reach)
        if not self._holds(ids[start:]):
            return None
        low, high = max(seen, 1), len(ids)  # the shortest beginning that holds one
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds(ids[start:middle]) else (middle + 1, high)
        return low

    def _holds(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(stop in text for stop in self.texts)


def stop_strings(
    texts: Sequence[str], encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str]
) -> StopStrings:
    """Stop strings of a tokeniser's text. Raises UserError for what is no list of texts, for an empty text, and for one
    that no response could contain."""
    if isinstance(texts, str) or not hasattr(texts, "__len__"):  # of one text, each character would be a stop string
        raise UserError(f"stop strings {texts!r}: expected a list or tuple of texts")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"stop string {text!r}: expected text, not {type(text).__name__}")
        try:
            back = decode(encode(text)) if text else ""
        except (ValueError, KeyError) as error:
            raise UserError(f"stop string {text!r} cannot be tokenised: {error}") from None
        if not text or text not in back:
            raise UserError(f"stop string {text!r} cannot be tokenised: it comes back as {back!r}; leave it out")
    # A token writes at least a byte, so a text spans no more tokens than it has bytes.
    return StopStrings(tuple(texts), decode, max((len(text.encode()) for text in texts), default=0))
