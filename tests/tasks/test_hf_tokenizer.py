"""The tokeniser of a checkpoint: ids, what stops a response, and chat templates, by hand and against transformers."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rlstab_jax.tasks.hf_tokenizer import TODAY, HFTokenizer
from rlstab_jax.types import UserError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# Statements that stand on lines of their own, which trim_blocks and lstrip_blocks remove; helpers; state in a loop.
RICH = """{{ bos_token or 'none' }}|{{ pad_token }}
{% set seen = namespace(users=0) %}
{% if tools %}
<tools>{{ tools | tojson(indent=2) }}</tools>
{% endif %}
{% macro line(message) %}[{{ message.role | upper }}] {{ message.content | trim }}{% endmacro %}
  {% for message in messages %}
    {% if message.role == 'user' %}
      {% set seen.users = seen.users + 1 %}
    {% elif message.role == 'stop' %}
      {% break %}
    {% elif message.role not in ['system', 'assistant'] %}
      {{ raise_exception('unknown role ' + message.role) }}
    {% endif %}
{% generation %}
{{ line(message) }}{{ message.extra | tojson if message.extra is defined }}
{% endgeneration %}
  {% endfor %}
{{ seen.users }} asked on {{ strftime_now('%Y') }}{% if thinking is defined and not thinking %}, no thinking{% endif %}
"""
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "  Answer <briefly> & 'well' "},
    {"role": "user", "content": "wie groß ist 12+30? ∑"},
    {"role": "assistant", "content": "42", "extra": {"b": ["<é>", 1.5, None], "a": True}},
    {"role": "user", "content": "and 6*7?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "<int>", "ü": [1, 2]}}}]


def write(directory: Path, **files: Any) -> Path:
    """A directory with tokenizer.json and JSON files by their stems."""
    directory.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["what is 12+30? the answer is 42", "wie groß ist 3*4?"] * 9, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    default = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}}
    for stem, value in (default | files).items():
        (directory / f"{stem}.json").write_text(json.dumps(value))
    return directory


def test_text_and_ids(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(write(tmp_path))
    for text in ("what is 12+30?", "naïve ∑ 数\n\t ", "", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>") == [2]  # spelled out, it is the token itself
    assert max(tokenizer.encode("what is 12+30?")) < tokenizer.vocab_size
    four, two = tokenizer.encode("4"), tokenizer.encode("2")
    assert tokenizer.decode([*four, 0, 2, *two]) == "4<|endoftext|><|im_end|>2"
    assert tokenizer.decode([*four, 100_000, *two, 99_999]) == "4<unknown token 100000>2<unknown token 99999>"
    with pytest.raises(UserError, match="half of a character"):
        tokenizer.encode("2 \ud83d 4")


@pytest.mark.parametrize(
    ("files", "stop", "pad"),
    [
        ({}, (2,), 2),
        ({"config": {"eos_token_id": 0, "pad_token_id": 1}}, (0,), 1),
        ({"generation_config": {"eos_token_id": [2, 0], "pad_token_id": 0}, "config": {"eos_token_id": 1}}, (2, 0), 0),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 1}}, (1,), 1),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}}, (2,), 0),
    ],
)
def test_what_stops_a_response(tmp_path: Path, files: dict, stop: tuple[int, ...], pad: int) -> None:
    tokenizer = HFTokenizer(write(tmp_path, **files))
    assert (tokenizer.stop_ids, tokenizer.pad_id) == (stop, pad)


def test_what_decides_ids_and_stops_has_a_fingerprint(tmp_path: Path) -> None:
    one = write(tmp_path / "one", generation_config={"eos_token_id": 0})
    other = write(tmp_path / "other", generation_config={"eos_token_id": 1})
    assert HFTokenizer(one).fingerprint != HFTokenizer(other).fingerprint
    assert HFTokenizer(one).fingerprint == HFTokenizer(write(tmp_path / "same", config={"eos_token_id": 0})).fingerprint


def test_stop_tokens_of_ones_own(tmp_path: Path) -> None:
    """They come first; the files' own still stop, once each."""
    write(tmp_path, generation_config={"eos_token_id": 0})
    assert HFTokenizer(tmp_path, stop=("<|im_end|>",)).stop_ids == (2, 0)
    assert HFTokenizer(tmp_path, stop=("<|endoftext|>",)).stop_ids == (0,)
    with pytest.raises(UserError, match=r"tokenizer\.json: the stop token '</s>' is none of its tokens"):
        HFTokenizer(tmp_path, stop=("</s>",))


def templated(directory: Path, template: str, today: datetime.date = TODAY, **names: Any) -> HFTokenizer:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    return HFTokenizer(write(directory, tokenizer_config=config | names), today=today)


def test_chat_by_hand(tmp_path: Path) -> None:
    tokenizer = templated(tmp_path, CHATML)
    talk = [{"role": "user", "content": "6*7?"}]
    asked = "<|im_start|>user\n6*7?<|im_end|>\n"
    assert tokenizer.chat(talk) == asked + "<|im_start|>assistant\n"
    assert tokenizer.chat(talk, add_generation_prompt=False) == asked
    ids = tokenizer.encode(tokenizer.chat(talk))
    assert [i for i in ids if i < 3] == [1, 2, 1]  # the template's markers are single tokens
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert HFTokenizer(tmp_path).chat(talk) == "6*7?!"  # the file goes before the entry


def test_rich_template_by_hand(tmp_path: Path) -> None:
    tokenizer = templated(tmp_path, RICH, pad_token="<|endoftext|>")
    expected = (
        "none|<|endoftext|>\n[SYSTEM] Answer <briefly> & 'well'\n[USER] wie groß ist 12+30? ∑\n"
        '[ASSISTANT] 42{"b": ["<é>", 1.5, null], "a": true}\n[USER] and 6*7?\n'
        "2 asked on 2024, no thinking"  # a constant: a conversation has one text on all days
    )
    talk = [*TALK, {"role": "stop"}, {"role": "lost"}]
    assert tokenizer.chat(talk, thinking=False) == expected
    other = HFTokenizer(tmp_path, today=datetime.date(1999, 1, 1))
    assert other.chat(talk, thinking=False) == expected.replace("2024", "1999")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "the chat template failed.*roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "the chat template failed.*unsafe"),
        ("{% set _ = messages.append(1) %}", "the chat template failed.*(unsafe|not safely)"),
        ("{{ messages[0].content + 1 }}", "the chat template failed"),
        ("{{ 1 // 0 }}", "the chat template failed"),
        ("{% for %}", "the chat template is malformed"),
        ([{"name": "tool_use", "template": "x"}], "no chat template"),
        (None, "no chat template: neither chat_template.jinja nor in tokenizer_config.json"),
    ],
)
def test_templates_that_fail(tmp_path: Path, template: Any, message: str) -> None:
    tokenizer = templated(tmp_path, template)
    with pytest.raises(UserError, match=f"(?s){message}"):
        tokenizer.chat(TALK)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {}}, "no token stops a response: name eos_token_id in generation_config.json"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "tokenizer_config.json: its eos token None is none of"),
        ({"generation_config": {"eos_token_id": 4000}}, "generation_config.json: its eos token 4000 is none of"),
        ({"tokenizer": {"version": "1.0"}}, "tokenizer.json cannot be read"),
        ({"tokenizer_config": []}, "tokenizer_config.json: expected a JSON object, found list"),
    ],
)
def test_bad_files(tmp_path: Path, files: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HFTokenizer(write(tmp_path, **files))


def test_absent_or_torn_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json is not there"):
        HFTokenizer(tmp_path)
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(UserError, match=r"tokenizer_config\.json is no JSON"):
        HFTokenizer(tmp_path)


@pytest.mark.parametrize("template", [CHATML, RICH])
@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "thinking": False}])
def test_equals_transformers(tmp_path: Path, template: str, options: dict) -> None:
    transformers = pytest.importorskip("transformers", reason="the comparison needs the extra `parity`")
    padding = {"__type": "AddedToken", "content": "<|im_end|>", "special": True, "normalized": False}
    padding |= {"lstrip": False, "rstrip": False, "single_word": False}  # as versions before 5 save it
    ours = templated(tmp_path, template, datetime.date.today(), bos_token="<|endoftext|>", pad_token=padding)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for generate in (True, False):
        text = ours.chat(TALK, add_generation_prompt=generate, **options)
        assert text == theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generate, **options)
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
