"""Chains of additions and multiplications modulo a small number, solved from left to right, with an exact verifier.

The prompt ``3+5*7=`` modulo 11 asks for (3 + 5) * 7 mod 11 = 1, and a full answer is, by scratchpad level,

    0   ``1``                the last result only
    1   ``81``               the running results, one after another
    2   ``+8*1``             the running results, each after its operator
    3   ``3+5=8;8*7=1;``     each step written out

Prompts are made on the fly: the i-th one is a function of (seed, i), and a hash of its text decides whether it may be
trained on.
"""

import dataclasses
import hashlib
import re
from typing import Literal

import numpy as np

from rlstab_jax.tasks.protocol import Prompt, PromptSource, Split, TaskConfig
from rlstab_jax.tasks.tokenizer import CharTokenizer
from rlstab_jax.types import UserError

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_HIDDEN = "?"
_OPERATIONS = {"+": lambda x, a: x + a, "-": lambda x, a: x - a, "*": lambda x, a: x * a}
_TRAIN_PROMPTS = 2**30  # ids below this are training prompts, those from here on are held out; all stay below 2**31
_HELDOUT_SHARE = 8  # one text in eight is never trained on
_MAX_DRAWS = 4000  # draws in vain before a space of prompts counts as exhausted


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig(TaskConfig):
    """Difficulty and size of the arithmetic task."""

    operands: tuple[int, int] = (3, 8)
    """Fewest and most operands after the first number (how many steps a chain has)."""
    operators: str = "+*"
    """The operators that chains use: any of + - *."""
    modulus: int = 11
    """Every result is taken modulo this number; numbers lie in [0, modulus)."""
    base: int = 16
    """Base in which numbers are written, 2 to 36 (0-9, then a-z)."""
    digits: int = 1
    """Digits of every number, with leading zeros; base ** digits must reach the modulus."""
    scratchpad: Literal[0, 1, 2, 3] = 2
    """What an answer shows: 0 the last result, 1 the running results, 2 each after its operator, 3 steps in full."""
    aligned: bool = True
    """Whether spaces before the "=" make all prompts equally long: each step is then equally far from its operand."""
    demonstration_noise: float = 0.2
    """Share of a demonstration's intermediate results that are replaced by random numbers, 0 to 1."""
    noise_propagates: bool = True
    """Whether a demonstration goes on from a replaced result (each later step is right by itself, the answer seldom)
    or from the true one."""
    demonstration_skips: float = 0.0
    """Share of demonstrations that go from some step, or from the first, to the last result at once, 0 to 1: answers to
    one prompt then differ in length, and shorter ones are harder to get right. Whatever is shown, the last result is
    judged."""
    unanswerable: float = 0.0
    """Share of prompts whose first number is hidden, ``?+5*7=``, 0 to 1: a guess is the best answer to them, so that no
    policy is right more often than about 1 - unanswerable * (1 - 1 / modulus)."""
    heldout_prompts: int = 256
    """Number of held-out prompts, without duplicates."""
    seed: int = 0
    """Decides which prompts there are; independent of the run's seed, so that all runs share one held-out set."""

    def build(self) -> "Arithmetic":
        return Arithmetic(self)


class Arithmetic:
    """The task of this module; implements ``DemonstratedTask``. Raises UserError for a config that cannot be met."""

    def __init__(self, config: ArithmeticConfig | None = None):
        self.config = config = config or ArithmeticConfig()
        _check(config)
        others = "=" + ";" * (config.scratchpad == 3) + " " * config.aligned + _HIDDEN * (config.unanswerable > 0)
        self.tokenizer = CharTokenizer(_DIGITS[: config.base] + config.operators + others)
        number = f"[{_DIGITS[: config.base]}]{{{config.digits}}}"
        operator = f"[{re.escape(config.operators)}]"
        self._chain = re.compile(f"({operator})({number})")
        self._response = re.compile(
            (
                f"({number})",
                f"(?:{number})*({number})",
                f"(?:{operator}{number})*{operator}({number})",
                f"(?:{number}{operator}{number}={number};)*{number}{operator}{number}=({number});",
            )[config.scratchpad]
        )
        self._train = _TrainSource(self)
        self._heldout = self._draw_heldout()
        self._train[0]  # refuse a space without training prompts now, not in the middle of a run

    @property
    def max_prompt_tokens(self) -> int:
        return self.config.digits + self.config.operands[1] * (1 + self.config.digits) + 1

    @property
    def max_response_tokens(self) -> int:
        """The longest full answer with its stop token."""
        digits, steps = self.config.digits, self.config.operands[1]
        return (digits, steps * digits, steps * (digits + 1), steps * (3 * digits + 3))[self.config.scratchpad] + 1

    def split(self, name: Split) -> PromptSource:
        """``train``: 2**30 prompts made on the fly. ``heldout``: distinct ones, none of them in ``train``."""
        return self._train if name == "train" else self._heldout

    def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
        """1 if a well-formed response stopped and its last result is the answer, else 0. Only the last one counts."""
        match = self._response.fullmatch(response)
        return float(stopped and match is not None and match[1] == prompt.answer)

    def demonstration(self, prompt: Prompt, seed: int) -> str:
        """A full answer, or with probability ``demonstration_skips`` one that goes from some step to the last result;
        the intermediate ones that it shows are random with probability ``demonstration_noise``.

        A function of (prompt, seed) alone. The last result follows from the chain: without noise it is the answer.
        """
        config, rng = self.config, np.random.default_rng((seed, prompt.id))
        chain = self._chain.findall(prompt.text, config.digits)
        value = self._first_number(prompt, chain)
        written, most = list[str](), len(chain)
        if config.demonstration_skips and len(chain) > 1 and rng.random() < config.demonstration_skips:
            most = int(rng.integers(len(chain) - 1))
        for step, (operator, operand) in enumerate(chain, start=1):
            before = value
            value = shown = _OPERATIONS[operator](value, int(operand, config.base)) % config.modulus
            if most < step < len(chain):
                continue
            if step < len(chain) and rng.random() < config.demonstration_noise:
                shown = int(rng.integers(config.modulus))
                value = shown if config.noise_propagates else value
            number = self._write(shown)
            in_full = f"{self._write(before)}{operator}{operand}={number};"
            written.append((number, number, operator + number, in_full)[config.scratchpad])
        return "".join(written if config.scratchpad else written[-1:])

    def _first_number(self, prompt: Prompt, chain: list[tuple[str, str]]) -> int:
        """As it is written; where it is hidden, the smallest from which the chain leads to the answer."""
        config = self.config
        if not prompt.text.startswith(_HIDDEN):
            return int(prompt.text[: config.digits], config.base)
        values = np.arange(config.modulus)
        for operator, operand in chain:
            values = _OPERATIONS[operator](values, int(operand, config.base)) % config.modulus
        return int(np.argmax(values == int(prompt.answer, config.base)))

    def _write(self, value: int) -> str:
        number = ""
        for _ in range(self.config.digits):
            value, digit = divmod(value, self.config.base)
            number = _DIGITS[digit] + number
        return number

    def _draw(self, rng: np.random.Generator) -> tuple[str, str]:
        """One random prompt's text and answer. Operands are never 0, so that no step is void or ends the chain."""
        config = self.config
        value = int(rng.integers(config.modulus))
        steps = int(rng.integers(config.operands[0], config.operands[1] + 1))
        text = self._write(value)
        operators = rng.integers(len(config.operators), size=steps)
        operands = rng.integers(1, config.modulus, size=steps)
        for i, operand in zip(operators.tolist(), operands.tolist(), strict=True):
            operator = config.operators[i]
            text += operator + self._write(operand)
            value = _OPERATIONS[operator](value, operand) % config.modulus
        if config.unanswerable and rng.random() < config.unanswerable:
            text = _HIDDEN * config.digits + text[config.digits :]
        if config.aligned:
            text = text.ljust(self.max_prompt_tokens - 1)
        return text + "=", self._write(value)

    def _draw_heldout(self) -> tuple[Prompt, ...]:
        rng, found, misses = np.random.default_rng((self.config.seed, 1)), dict[str, str](), 0
        while len(found) < self.config.heldout_prompts:
            text, answer = self._draw(rng)
            misses = 0 if (new := _is_heldout(text) and text not in found) else misses + 1
            if new:
                found[text] = answer
            elif misses == _MAX_DRAWS:
                raise UserError(
                    f"heldout_prompts = {self.config.heldout_prompts}, but only {len(found)} distinct ones were found: "
                    "ask for fewer, or for more operands or a larger modulus"
                )
        return tuple(Prompt(_TRAIN_PROMPTS + i, text, answer) for i, (text, answer) in enumerate(found.items()))


class _TrainSource:
    """Training prompts by number: draws from a stream keyed by (seed, number) until one is not held out."""

    def __init__(self, task: Arithmetic):
        self._task = task

    def __len__(self) -> int:
        return _TRAIN_PROMPTS

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < _TRAIN_PROMPTS:
            raise IndexError(index)
        rng = np.random.default_rng((self._task.config.seed, 0, index))
        for _ in range(_MAX_DRAWS):
            text, answer = self._task._draw(rng)
            if not _is_heldout(text):
                return Prompt(int(index), text, answer)
        raise UserError(
            "operands: all prompts of so small a space are held out; ask for more operands or a larger modulus"
        )


def _is_heldout(text: str) -> bool:
    """Decides the split by the text alone, so that no text is in both, whatever the seed."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % _HELDOUT_SHARE == 0


def _check(config: ArithmeticConfig) -> None:
    """Raises UserError for the first field whose value cannot be met."""

    def require(ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise UserError(
                f"arithmetic task, {field} = {getattr(config, field)!r}: expected {expected}; change {field}"
            )

    fewest, most = config.operands
    require(1 <= fewest <= most, "operands", "two numbers, 1 <= fewest <= most")
    operators = set(config.operators)
    require(
        0 < len(operators) == len(config.operators) and operators <= _OPERATIONS.keys(),
        "operators",
        "some of + - *, each once",
    )
    require(2 <= config.base <= len(_DIGITS), "base", f"2 to {len(_DIGITS)}")
    require(config.digits >= 1, "digits", "at least 1")
    require(config.modulus >= 2, "modulus", "at least 2")
    largest = config.base**config.digits
    require(config.modulus <= largest, "modulus", f"at most base ** digits = {largest} (or raise digits or base)")
    require(config.scratchpad in (0, 1, 2, 3), "scratchpad", "0, 1, 2 or 3")
    require(0 <= config.demonstration_noise <= 1, "demonstration_noise", "a share from 0 to 1")
    require(0 <= config.demonstration_skips <= 1, "demonstration_skips", "a share from 0 to 1")
    require(
        (config.scratchpad > 0 and most > 1) or not config.demonstration_skips,
        "demonstration_skips",
        "0 where scratchpad = 0, or operands of one step, show no intermediate results",
    )
    require(0 <= config.unanswerable <= 1, "unanswerable", "a share from 0 to 1")
    require(config.heldout_prompts >= 1, "heldout_prompts", "at least 1")
    require(config.seed >= 0, "seed", "0 or more")
