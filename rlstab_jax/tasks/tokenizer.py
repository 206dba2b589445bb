"""A character tokeniser: one token a character, and two that no text can contain."""

from collections.abc import Sequence

from rlstab_jax.types import UserError


class CharTokenizer:
    """One token for each character of ``alphabet``, after padding (id 0) and stop (id 1).

    >>> tokenizer = CharTokenizer("01+=")
    >>> tokenizer.encode("1+0=")
    [3, 4, 2, 5]
    >>> tokenizer.decode([3, 1, 0])
    '1<stop><pad>'
    """

    _SPECIAL = ("<pad>", "<stop>")
    pad_id = 0
    stop_ids = (1,)

    def __init__(self, alphabet: str):
        if len(set(alphabet)) != len(alphabet):
            raise ValueError(f"a character occurs twice in the alphabet {alphabet!r}")
        self._pieces = (*self._SPECIAL, *alphabet)
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. Raises UserError at a character outside the alphabet."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            alphabet = "".join(self._pieces[len(self._SPECIAL) :])
            raise UserError(f"text {text!r}: no token for {error}; use only the characters {alphabet!r}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``. Padding and stop stay visible: a response that holds one never passes for another. So do ids
        beyond the alphabet, of a model whose vocabulary was made larger than it."""
        return "".join(self._pieces[i] if i < len(self._pieces) else f"<unknown token {i}>" for i in ids)
