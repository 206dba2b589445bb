"""A task made of files: prompts of a data set, a tokeniser, and verifiers that judge the responses."""

import dataclasses
import datetime
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from rlstab_jax.tasks.extract import EXTRACTORS, Extract
from rlstab_jax.tasks.hf_tokenizer import TODAY, HFTokenizer
from rlstab_jax.tasks.protocol import ChatTokenizer, Prompt, PromptSource, Rewards, Split, TaskConfig, Tokenizer
from rlstab_jax.tasks.records import Fields, Layout, Question, read_questions
from rlstab_jax.tasks.tokenizer import CharTokenizer
from rlstab_jax.tasks.verify import MathVerify, Reward, check_failures, check_rewards_config, judge
from rlstab_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class DatasetConfig(TaskConfig):
    """Files of prompts with reference answers. Each prompt is kept once, and none is both trained on and held out."""

    train: tuple[str, ...] = ()
    """Files to train on: .jsonl, .parquet or .array_record; none where a checkpoint is only evaluated."""
    heldout: tuple[str, ...] = ()
    """Files of held-out prompts; without any, ``heldout_share`` of the training files."""
    heldout_share: float = 0.05
    """Share of the training files that is held out where ``heldout`` names none, chosen by a hash of the text."""
    layout: Layout = "plain"
    """What a record looks like: by ``fields``, or as GSM8K, MATH, DAPO-Math-17k or AIME are published."""
    heldout_layout: Layout | None = None
    """The same for the files of ``heldout``; None for ``layout``."""
    fields: Fields = Fields()
    """Names of the fields of plain records."""
    template: str = "{prompt}"
    """What the model is shown of a question that is text; ``{prompt}`` stands for it. No special token is added."""
    tokenizer: str = ""
    """Directory of a Hugging Face tokeniser; empty for one token a character of ``alphabet``."""
    alphabet: str = ""
    """Characters of the character tokeniser."""
    chat: bool = False
    """Whether prompts go through the tokeniser's chat template, text as one message of the user."""
    chat_date: str = TODAY.isoformat()
    """The date that a chat template may print as today's, YYYY-MM-DD. A constant: prompts are known by their text, and
    were they others each day, so would be the split, the ids and the draws."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response besides the tokeniser's own; the first one ends demonstrations. A base model's files
    rarely name the one that ends a turn of its chat template."""
    max_prompt_tokens: int = 0
    """Longer prompts are left out, and counted; 0 keeps all."""
    response_tokens: int = 1024
    """Space for a response, in tokens, where rollout.response_length does not say."""
    rewards: Annotated[tuple[Reward, ...], tyro.conf.Suppress] = (Reward("math", MathVerify()),)
    """Verifiers, and their weights in the reward."""
    judge_truncated: bool = False
    """Whether a response that met the length limit is judged like any other; if not, see ``truncated_reward``."""
    truncated_reward: float | None = None
    """Reward of a response that met the length limit. None is 0, and refuses verifiers that give less than that: not to
    stop would be better than a wrong answer."""
    max_verifier_failures: float = 0.1
    """A run stops when a verifier fails on more than this share of the responses of a batch that it was shown; a
    failure's reward is 0."""
    answer_in: Extract = "any"
    """Where the answer of a response is, for majority votes."""

    def build(self) -> "Dataset":
        return Dataset(self)


class Dataset:
    """The task of this module; implements ``DemonstratedTask``, ``BatchTask``, ``DescribedTask``, ``AnsweredTask``.

    Prompts lie in memory, in the order of a hash of their text: ids, order and split do not depend on the order of the
    records or on how they are spread over files. Raises UserError for whatever is wrong with a file or a field.
    """

    def __init__(self, config: DatasetConfig):
        _check(config)
        self.config = config
        self.tokenizer = _tokenizer(config)
        self.max_prompt_tokens = 1  # grows as prompts are read
        self._left_out: Counter[str] = Counter()
        train = self._read(config.train, config.layout, "training")
        if config.heldout:
            heldout = self._read(config.heldout, config.heldout_layout or config.layout, "held-out")
            self._left_out["training prompts that are held out"] = len(train.keys() & heldout.keys())
        else:
            heldout = {text: question for text, question in train.items() if _is_heldout(text, config.heldout_share)}
        train = {text: question for text, question in train.items() if text not in heldout}
        if config.train and not train:
            remedy = "give other task.heldout files" if config.heldout else "lower task.heldout_share"
            raise UserError(f"{', '.join(config.train)}: all prompts are held out; {remedy}")
        ids = prompt_ids((*train, *heldout))
        self._splits = {"train": _prompts(train, ids), "heldout": _prompts(heldout, ids)}
        self._questions = {ids[text]: question for part in (train, heldout) for text, question in part.items()}

    @property
    def max_response_tokens(self) -> int:
        return self.config.response_tokens

    @property
    def description(self) -> dict[str, Any]:
        """Numbers of prompts, those left out by reason, and fingerprints: of all texts and answers, of what a cold
        start learns from, and of a tokeniser that comes from files."""
        content = hashlib.sha256(
            repr(sorted((n, p.text, p.answer) for n, s in self._splits.items() for p in s)).encode()
        )
        shown = sorted((id_, question.demonstration) for id_, question in self._questions.items())
        counts = {f"{name}_prompts": len(part) for name, part in self._splits.items()}
        return {
            **counts,
            "left_out": {reason: count for reason, count in self._left_out.items() if count},
            "fingerprint": content.hexdigest()[:16],
            "demonstrations": hashlib.sha256(repr(shown).encode()).hexdigest()[:16],
            **({"tokenizer": self.tokenizer.fingerprint} if isinstance(self.tokenizer, HFTokenizer) else {}),
        }

    def remarks(self) -> list[str]:
        counts = f"data: {len(self.split('train'))} prompts to train on, {len(self.split('heldout'))} held out"
        return [counts] + [f"data: left out: {count} {reason}" for reason, count in self._left_out.items() if count]

    def split(self, name: Split) -> PromptSource:
        return self._splits[name]

    def read(self, path: str, layout: Layout | None = None) -> list[Prompt]:
        """The prompts of another file, in its order, each once; made and numbered like those of the task."""
        return numbered(self._unique([path], layout or self.config.layout)[0])

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[tuple[str, bool]]) -> Rewards:
        """See `verify.judge`. No verifier is shown a response that did not stop, unless ``judge_truncated``.

        Raises UserError for a reward below 0 where ``truncated_reward`` is not given.
        """
        config = self.config
        shown = [row for row, (_, stopped) in enumerate(responses) if stopped or config.judge_truncated]
        judged = judge(
            config.rewards,
            [prompts[row] for row in shown],
            [responses[row][0] for row in shown],
        )

        if config.truncated_reward is None and not config.judge_truncated and (judged.total < 0).any():
            raise UserError(
                f"a response was judged to be worth {judged.total.min():g}, less than the 0 of one that meets the "
                "length limit, so that never to stop would pay: set task.truncated_reward, e.g. to your lowest reward, "
                "or task.judge_truncated"
            )

        def spread(values: np.ndarray, others: float = 0.0) -> np.ndarray:
            whole = np.full(len(responses), others)
            whole[shown] = values
            return whole

        return Rewards(
            spread(judged.total, config.truncated_reward or 0.0),
            {name: spread(values) for name, values in judged.components.items()},
            tuple(dataclasses.replace(failure, row=shown[failure.row]) for failure in judged.failures),
            judged.gave_up,
            judged.shown,
        )

    def check(self, judged: Rewards, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where a verifier failed on too many of a whole batch; ``prompts`` has one each response."""
        check_failures(judged, prompts, self.config.max_verifier_failures)

    def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
        return float(self.rewards([prompt], [(response, stopped)]).total[0])

    def answer_of(self, response: str) -> str | None:
        return EXTRACTORS[self.config.answer_in](response)

    def demonstration(self, prompt: Prompt, seed: int) -> str:
        """The record's own full answer, whatever the seed. Raises UserError for a record without one."""
        question = self._questions[prompt.id]
        if not question.demonstration:
            raise UserError(
                f"{question.where}: the record demonstrates no answer, which a cold start needs: name its field in "
                "task.fields.demonstration, or set cold_start.max_steps to 0"
            )
        return question.demonstration

    def _read(self, paths: Sequence[str], layout: Layout, kind: str) -> dict[str, Question]:
        """Questions by their text, none twice, too long ones left out; what is left out is counted."""
        limit, kept = self.config.max_prompt_tokens or math.inf, {}
        questions, repeated = self._unique(paths, layout)
        for text, question in questions.items():
            try:
                tokens = len(self.tokenizer.encode(text))
            except UserError as error:
                raise UserError(f"{question.where}: {error}") from None
            if tokens <= limit:
                kept[text] = question
                self.max_prompt_tokens = max(self.max_prompt_tokens, tokens)
        if paths and not kept:
            raise UserError(
                f"{', '.join(paths)}: all prompts have more than task.max_prompt_tokens = {limit} tokens: raise it"
            )
        self._left_out[f"{kind} records whose prompt was there already"] = repeated
        self._left_out[f"{kind} prompts of more than {limit} tokens"] = len(questions) - len(kept)
        return kept

    def _unique(self, paths: Sequence[str], layout: Layout) -> tuple[dict[str, Question], int]:
        """Questions by their text, of equal ones the first, and how many others there were."""
        found: dict[str, Question] = {}
        records = 0
        for path in paths:
            before = records
            for question in read_questions(path, layout, self.config.fields):
                records += 1
                try:
                    found.setdefault(self._shown(question), question)
                except UserError as error:  # of the tokeniser's chat template, too
                    raise UserError(f"{question.where}: {error}") from None
            if records == before:
                raise UserError(f"{path}: the data set is empty, expected at least one record")
        return found, records - len(found)

    def _shown(self, question: Question) -> str:
        """What the model is shown of a question."""
        config, asked = self.config, question.asked
        if isinstance(asked, str):
            asked = ({"role": "user", "content": config.template.replace("{prompt}", asked)},)
        if isinstance(self.tokenizer, ChatTokenizer) and config.chat:
            return self.tokenizer.chat(list(asked))
        if len(asked) > 1:
            raise UserError(f"the prompt has {len(asked)} messages, which only a chat template joins: set task.chat")
        return asked[0]["content"]


def numbered(questions: dict[str, Question]) -> list[Prompt]:
    """Prompts of their texts, in their order."""
    ids = prompt_ids(questions)
    return [Prompt(ids[text], text, question.answer) for text, question in questions.items()]


def prompt_ids(texts: Iterable[str], bits: int = 31) -> dict[str, int]:
    """A number of ``bits`` bits for each text: a hash of it, or of it with the next salt where that one is taken.

    Texts choose in the order of a longer hash, so that ids depend on the set of texts and not on their order; all but
    colliding ones (about n^2 / 2^32 of n) depend on the text alone.
    """
    ids: dict[str, int] = {}
    taken: set[int] = set()
    for text in sorted(set(texts), key=lambda text: (_hash(text), text)):
        salt = 0
        while (number := _hash(text, salt) >> (64 - bits)) in taken:
            salt += 1
        taken.add(number)
        ids[text] = number
    return ids


def _hash(text: str, salt: int = 0) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=str(salt).encode()).digest())


def _is_heldout(text: str, share: float) -> bool:
    """Decides the split by the text alone; by other bits of the hash than the id's."""
    return _hash(text, salt=-1) < share * 2**64


def _prompts(questions: dict[str, Question], ids: dict[str, int]) -> tuple[Prompt, ...]:
    """Sorted by id, which is an order by hash."""
    return tuple(sorted((Prompt(ids[t], t, q.answer) for t, q in questions.items()), key=lambda prompt: prompt.id))


def _tokenizer(config: DatasetConfig) -> Tokenizer:
    if not config.tokenizer:
        return CharTokenizer(config.alphabet)
    return HFTokenizer(config.tokenizer, config.stop, datetime.date.fromisoformat(config.chat_date))


def _check(config: DatasetConfig) -> None:
    """Raises UserError for the first field whose value cannot be met."""

    def require(ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise UserError(f"task.{field} = {getattr(config, field)!r}: expected {expected}")

    require(0 <= config.heldout_share < 1, "heldout_share", "a share from 0 to below 1")
    require("{prompt}" in config.template, "template", "a text with {prompt} in it")
    require(
        bool(config.tokenizer) != bool(config.alphabet), "tokenizer", "either a directory, or task.alphabet instead"
    )
    require(len(set(config.alphabet)) == len(config.alphabet), "alphabet", "each character once")
    require(not config.chat or bool(config.tokenizer), "chat", "False, without a tokenizer that has a chat template")
    try:
        datetime.date.fromisoformat(config.chat_date)
    except ValueError:
        require(False, "chat_date", "a date as YYYY-MM-DD")
    require(not config.stop or bool(config.tokenizer), "stop", "(), without a tokenizer that has special tokens")
    require(config.max_prompt_tokens >= 0, "max_prompt_tokens", "0 (no limit) or more")
    require(config.response_tokens >= 1, "response_tokens", "at least 1")
    require(math.isfinite(config.truncated_reward or 0.0), "truncated_reward", "a finite number, or None")
    require(0 <= config.max_verifier_failures <= 1, "max_verifier_failures", "a share from 0 to 1")
    check_rewards_config(config.rewards)
