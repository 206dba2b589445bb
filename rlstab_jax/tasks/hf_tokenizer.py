"""The tokeniser of a Hugging Face checkpoint, with its chat template."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rlstab_jax.types import UserError

TODAY = datetime.date(2024, 7, 26)  # what Llama 3.2's template, which prints a date, takes where it is told none
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class HFTokenizer:
    """A `Tokenizer` of text by a directory's tokenizer.json, and of conversations by its chat template.

    Args:
      directory: of a checkpoint or of an import. Beside tokenizer.json it may have tokenizer_config.json (the names of
        special tokens; a chat template), chat_template.jinja, and generation_config.json or config.json (the ids that
        stop a response, and padding).
      stop: tokens, as text, that stop a response besides; they come first in ``stop_ids``.
      today: the date that a chat template may print, a constant, so that a conversation has one text on all days.

    Raises:
      UserError: no tokenizer.json, one that cannot be read, nothing that says which token stops a response, a stop
        token that is none, or the extra ``hf`` is not installed.
    """

    def __init__(self, directory: str | Path, stop: Sequence[str] = (), today: datetime.date = TODAY):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("tokenizer.json needs the library tokenizers: pip install 'rlstab_jax[hf]'") from error
        self.directory, self._today = Path(directory), today
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{file} is not there: give the directory of a checkpoint with its tokeniser")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"{file} cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = self._json("tokenizer_config.json")
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self._known = frozenset(ids)
        self.vocab_size = max(ids) + 1
        self.stop_ids = tuple(dict.fromkeys([*map(self._id_of, stop), *self._ids("eos")]))
        if not self.stop_ids:
            raise UserError(
                f"{self.directory}: no token stops a response: name eos_token_id in generation_config.json, or "
                "eos_token in tokenizer_config.json"
            )
        padding = self._ids("pad")
        self.pad_id = padding[0] if padding else self.stop_ids[-1]  # masks exclude it, so any id will do

    @cached_property
    def fingerprint(self) -> str:
        """Of what decides which ids a text has, and which of them stop a response."""
        content = (self.directory / "tokenizer.json").read_bytes() + repr((self.stop_ids, self.pad_id)).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. Special tokens are known where ``text`` spells them; none are added. Raises UserError
        for halves of characters (lone surrogates, which JSON can hold)."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError(f"{text[:60]!r}: no text, there is half of a character in it: mend the record") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``. Special tokens stay visible, and so do ids that a padded vocabulary has no token for."""
        text, known = [], []
        for i in map(int, ids):
            if i in self._known:
                known.append(i)
                continue
            text += [self._tokenizer.decode(known, skip_special_tokens=False), f"<unknown token {i}>"]
            known = []
        return "".join([*text, self._tokenizer.decode(known, skip_special_tokens=False)])

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **options: Any) -> str:
        """The text that the chat template makes of a conversation.

        Args:
          messages: e.g. ``[{"role": "user", "content": "2+2?"}]``, of values that JSON knows.
          add_generation_prompt: whether the text ends where the assistant's answer begins.
          options: what else the template asks for, e.g. ``enable_thinking=False``.

        Raises:
          UserError: there is no chat template, or it does not run on these messages.
        """
        names = {name: self._content(name) for name in _NAMED if self._content(name) is not None}
        template = self._template
        given: dict[str, Any] = {"tools": None, "documents": None, **names, **options}
        try:
            plain = json.loads(json.dumps({**given, "messages": list(messages)}))  # a template sees data alone
            return template.render(**plain, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program of somebody else's
            raise UserError(f"{self.directory}: the chat template failed on {str(messages)[:80]}: {error}") from error

    @cached_property
    def _template(self) -> Any:
        """The compiled template: chat_template.jinja, or else that of tokenizer_config.json."""
        import jinja2

        file = self.directory / "chat_template.jinja"
        try:
            source = file.read_text(encoding="utf-8") if file.exists() else self._config.get("chat_template")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is no text in UTF-8: {error}") from error
        if isinstance(source, list):  # several by name
            named = [entry for entry in source if isinstance(entry, dict)]
            source = {entry.get("name"): entry.get("template") for entry in named}.get("default")
        if not isinstance(source, str):
            raise UserError(f"{self.directory}: no chat template: neither {file.name} nor in tokenizer_config.json")
        try:
            return _environment(self._today).from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{self.directory}: the chat template is malformed: {error}") from error

    def _id_of(self, stop: str) -> int:
        token = self._tokenizer.token_to_id(stop)
        if token is None:
            raise UserError(f"{self.directory / 'tokenizer.json'}: the stop token {stop!r} is none of its tokens")
        return token

    def _ids(self, kind: str) -> tuple[int, ...]:
        """The ids of "eos" or "pad": of the first file that names any."""
        for file in ("generation_config.json", "config.json"):
            value = self._json(file).get(f"{kind}_token_id")
            if value is not None:
                return self._checked(file, kind, value if isinstance(value, list) else [value])
        token = self._content(f"{kind}_token")
        if token is None:
            return ()
        return self._checked("tokenizer_config.json", kind, [self._tokenizer.token_to_id(token)])

    def _checked(self, file: str, kind: str, ids: list[Any]) -> tuple[int, ...]:
        for i in ids:
            if not isinstance(i, int) or i not in self._known:
                raise UserError(f"{self.directory / file}: its {kind} token {i!r} is none of tokenizer.json's")
        return tuple(ids)

    def _content(self, name: str) -> str | None:
        """A special token by its name; tokenizer_config.json has it as text or as an object."""
        token = self._config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _json(self, name: str) -> dict[str, Any]:
        file = self.directory / name
        try:
            value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
        return value


def _environment(today: datetime.date) -> Any:
    """Where templates run, as their authors know it: a sandbox that writes to nothing, with a few helpers."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant has said; the text is the same without."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's own escapes for HTML

    def strftime_now(format: str) -> str:
        return today.strftime(format)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
