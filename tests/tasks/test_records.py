"""Records of data sets: three kinds of file, the published layouts, and what is refused with its place."""

import json

import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from rlstab_jax.tasks.records import Fields, read_questions, read_records
from rlstab_jax.types import UserError

RECORDS = [
    {"prompt": "1 + 1 =", "answer": "2"},
    {"prompt": [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 3 ="}], "answer": "5"},
]

PLAIN = Fields()


def written(path, records):
    """``records`` in the kind of file that the path's ending names."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in lines:
            writer.write(line.encode())
        writer.close()
    return path


def questions(path, layout="plain", fields=PLAIN):
    return list(read_questions(path, layout, fields))


@pytest.mark.parametrize(("ending", "noun"), [("jsonl", "line"), ("parquet", "row"), ("array_record", "record")])
def test_kinds_of_files(ending, noun, tmp_path):
    records = [{"prompt": f"ä{i}", "answer": i, "nested": {"a": [i]}} for i in range(5)]
    path = written(tmp_path / f"set.{ending}", records)
    assert list(read_records(path)) == [(f"{path}, {noun} {i + 1}", record) for i, record in enumerate(records)]
    assert [q.answer for q in questions(path)] == ["0", "1", "2", "3", "4"]


def test_messages_and_text(tmp_path):
    text, messages = questions(written(tmp_path / "a.jsonl", RECORDS))
    assert (text.asked, text.answer, text.demonstration) == ("1 + 1 =", "2", "")
    assert messages.asked == tuple(RECORDS[1]["prompt"])
    (huge,) = questions(written(tmp_path / "c.jsonl", [{"prompt": "10^400 =", "answer": 10**400}]))
    assert huge.answer == str(10**400)
    renamed = {"messages": RECORDS[1]["prompt"], "gold": 0.5, "how": "Half."}
    (question,) = questions(written(tmp_path / "b.jsonl", [renamed]), fields=Fields(answer="gold", demonstration="how"))
    assert (question.asked, question.answer, question.demonstration) == (messages.asked, "0.5", "Half.")


def test_gsm8k(tmp_path):
    record = {
        "question": "A box holds 12 eggs. How many do 100 hold?",
        "answer": "12*100=<<12*100=1200>>1200\n#### 1,200",
    }
    (question,) = questions(written(tmp_path / "a.jsonl", [record]), "gsm8k")
    assert (question.asked, question.answer) == (record["question"], "1200")
    assert question.demonstration == record["answer"]


def test_math(tmp_path):
    record = {
        "problem": "Halve $\\frac{3}{2}$.",
        "level": "Level 1",
        "type": "Prealgebra",
        "solution": "Not \\boxed{1} but $\\boxed{\\frac{3}{4}}$.",
    }
    with_answer = {**record, "problem": "Again.", "answer": "0.75", "unique_id": "x/1.json"}
    first, second = questions(written(tmp_path / "a.parquet", [{**record, "answer": None}, with_answer]), "math")
    assert (first.asked, first.answer, first.demonstration) == (record["problem"], "\\frac{3}{4}", record["solution"])
    assert second.answer == "0.75"


def test_dapo(tmp_path):
    record = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": "Solve it. The last line is Answer: $Answer.\n\nWhat is 17 + 17?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
    }
    (question,) = questions(written(tmp_path / "a.parquet", [record]), "dapo")
    assert question.asked == tuple(record["prompt"])
    assert question.answer == "34"


@pytest.mark.parametrize("capitals", [True, False])
def test_aime(capitals, tmp_path):
    record = {"id": 60, "problem": "Find m + n.", "solution": "It is 33.", "answer": "033", "url": "", "year": "2024"}
    if capitals:
        record = {"ID": "2024-I-1", "Problem": "Find m + n.", "Solution": "It is 33.", "Answer": 33}
    (question,) = questions(written(tmp_path / "a.jsonl", [record]), "aime")
    assert (question.asked, question.answer, question.demonstration) == ("Find m + n.", "33", "It is 33.")


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("record", "layout", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            "plain",
            "line 2: no field 'prompt', which layout 'plain' reads; its fields",
        ),
        ({"question": "q", "answer": "a"}, "plain", "its fields are: question, answer. Choose another layout"),
        ({"prompt": "q"}, "plain", "line 2: no field 'answer'"),
        ({"prompt": "q", "answer": None}, "plain", "line 2: no field 'answer'"),
        (
            {"prompt": "q", "answer": True},
            "plain",
            "line 2: answer 'answer' is True (bool), expected a text or a number",
        ),
        ({"prompt": "q", "answer": ["1"]}, "plain", "answer 'answer' is ['1'] (list), expected a text or a number"),
        ({"prompt": "q", "answer": " "}, "plain", "answer 'answer' is ' ' (str), expected a text or a number"),
        (
            {"prompt": "", "answer": "1"},
            "plain",
            "line 2: field 'prompt' is '' (str), expected a text that is not empty",
        ),
        ({"prompt": 3, "answer": "1"}, "plain", "line 2: field 'prompt' is 3 (int), expected a text"),
        ({"prompt": ["q"], "answer": "1"}, "plain", "field 'prompt' holds 'q' (str), expected messages with role"),
        ({"prompt": [], "answer": "1"}, "plain", "the last one is the user's"),
        (
            {"prompt": [{"role": "assistant", "content": "hm"}], "answer": "1"},
            "plain",
            "line 2: field 'prompt': expected messages of which the last one is the user's",
        ),
        ({"question": "q", "answer": "72"}, "gsm8k", "line 2: field 'answer' has no line '#### <number>'"),
        ({"problem": "q", "solution": "It is 1."}, "math", "line 2: field 'solution' has no \\boxed{...}"),
        ({"prompt": "q", "reward_model": {"style": "rule"}}, "dapo", "line 2: no field 'reward_model.ground_truth'"),
        ({"problem": "q", "answer": "1/2"}, "aime", "line 2: answer '1/2', expected an integer from 0 to 999"),
        ({"problem": "q", "answer": "1000"}, "aime", "line 2: answer '1000', expected an integer"),
    ],
)
def test_bad_records(record, layout, message, tmp_path):
    """The line is named, and the record before it is read."""
    before = {
        "plain": GOOD,
        "gsm8k": {"question": "q", "answer": "#### 1"},
        "math": {"problem": "q", "solution": "\\boxed{1}"},
        "dapo": {"prompt": "q", "reward_model": {"ground_truth": 1}},
        "aime": {"problem": "q", "answer": 1},
    }
    path = written(tmp_path / "a.jsonl", [before[layout], record])
    reader = read_questions(path, layout)
    next(reader)
    with pytest.raises(UserError) as error:
        next(reader)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p", ', "line 3: malformed JSON: Expecting property name"),
        (b"[1]", "line 3: expected a JSON object, found list"),
        (b'{"prompt": "\xff"}', "line 3: malformed JSON: "),
    ],
)
def test_malformed_lines(line, message, tmp_path):
    """Empty lines are passed over, and counted."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line)
    with pytest.raises(UserError) as error:
        questions(path)
    assert f"{path}, {message}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: expected a file that ends in .jsonl, .parquet, .array_record"),
        ("a.jsonl", None, "a.jsonl: there is no such file"),
        ("a.parquet", b"PAR1 no", "a.parquet: no Parquet file, or a damaged one"),
        ("a.array_record", b"no", "a.array_record: no ArrayRecord file, or a damaged one"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="a\\.") as error:
        questions(tmp_path / name)
    assert message in str(error.value)
