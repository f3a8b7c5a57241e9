"""Rows reach the trainer as their files have them: text untouched, nothing invented, nothing dropped without a word."""

import csv
import gzip
import json
import os
import subprocess
import sys

import datasets
import pytest

from intaglio.runs.config import DataBlock
from intaglio.runs.data import load_examples
from intaglio.runs.reading import read_rows


def load(path, *, hold_out=False, **fields):
    return load_examples(DataBlock(train=str(path), **fields), hold_out=hold_out)


def lines(path, rows, encoding="utf-8"):
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding))
    return path


WRITTEN = ["2024-03-05", "007", "1.50", "true", "None", "NA", "", "12345678901234567890123", "1e5", " x ", "é\u2028ü"]


def test_text_of_json_is_untouched(tmp_path):
    rows = [{"prompt": value, "completion": value or "."} for value in WRITTEN]
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.json", "list.json"):
        text = json.dumps(rows, indent=1) if name == "list.json" else "\n".join(json.dumps(row) for row in rows)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        assert list(load(path).train) == rows


def test_bare_numbers_and_truths_of_json_are_text_as_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 1.50, "completion": 12345678901234567890123}\n{"prompt": true, "completion": 7}\n')
    assert [tuple(row.values()) for row in load(path).train] == [("1.50", "12345678901234567890123"), ("true", "7")]


def test_cells_are_text(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *((v, v) for v in WRITTEN if v), ('a "b", c\nd', "1,5")])
    found = [row["completion"] for row in load(path).train]
    assert found == [*(v for v in WRITTEN if v), "1,5"]


@pytest.mark.parametrize(("name", "between"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.csv", "|")])
def test_other_separators_and_a_byte_order_mark(tmp_path, name, between):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + f"prompt{between}completion\n007{between}1,50\n".encode())
    assert list(load(path).train) == [{"prompt": "007", "completion": "1,50"}]


def test_utf_16_is_read_where_a_mark_says_so(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "ä", "completion": "ö"}], "utf-16")
    assert list(load(path).train) == [{"prompt": "ä", "completion": "ö"}]


def test_nested_values_keep_their_keys_and_their_numbers(tmp_path):
    """Arrow would give each call the arguments of all others, and datasets' JSON type rounds 48.856600000000004."""

    def call(**arguments):
        turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        return {"messages": [{"role": "user", "content": "q"}, turn], "tools": [{"name": "f", "keys": list(arguments)}]}

    rows = [call(x=1, at=48.856600000000004), call(y=12345678901234567890123), call(z={"deep": [None, True]})]
    found = load(lines(tmp_path / "rows.jsonl", rows)).train
    assert list(found) == rows
    assert found[1] == rows[1]
    assert list(found.map(lambda row: {"text": json.dumps(row["messages"][1])})["text"]) == [
        json.dumps(row["messages"][1]) for row in rows
    ]


def test_parquet_invents_no_nulls(tmp_path):
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"arguments": {key: 1}}]} for key in ("x", "y")]
    rows = [{"messages": [{"role": "user", "content": "q", "tool_calls": None}, call]} for call in calls]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = [row["messages"][1]["tool_calls"][0]["arguments"] for row in load(tmp_path / "rows.parquet").train]
    assert found == [{"x": 1}, {"y": 1}]


def test_text_files_are_paragraphs(tmp_path):
    (tmp_path / "book.txt").write_text("One.\nStill one.\n\n\nTwo.\n")
    assert list(load(tmp_path / "book.txt").train) == [{"text": "One.\nStill one."}, {"text": "Two."}]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


UNDERSTOOD = {
    "parts": ([turn("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), turn("assistant", "c")], "ab"),
    "sharegpt": ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "hi"),
    "string": (json.dumps([turn("user", "hi"), turn("assistant", "yo")]), "hi"),
    "call": ([turn("user", "hi"), turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])], "hi"),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_conversations_in_other_shapes_are_understood(tmp_path, case):
    messages, asked = UNDERSTOOD[case]
    for key in ("messages", "conversations"):
        (row,) = load(lines(tmp_path / f"{key}.jsonl", [{key: messages}])).train
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert row["messages"][0]["content"] == asked
        assert isinstance(row["messages"][1]["content"], str)


GOOD = {"messages": [turn("user", "hi"), turn("assistant", "yo")]}
REFUSED = {
    "no object": ("[1, 2]", "line 2: no JSON object"),
    "torn line": ('{"messages": [{"role": "us', "line 2: no JSON object"),
    "key twice": ('{"messages": [], "messages": []}', "line 2: no JSON object .the key 'messages' stands twice"),
    "null": ({"messages": None}, "row 2: messages is empty"),
    "no turns": ({"messages": []}, "row 2: messages is empty"),
    "text": ({"messages": "hi"}, "row 2: messages is a string, and no JSON"),
    "turn is text": ({"messages": ["hi"]}, r"row 2, messages\[0\]: a turn must be an object"),
    "no role": ({"messages": [{"content": "hi"}]}, r"messages\[0\]: a turn needs a role"),
    "no content": ({"messages": [turn("user", None)]}, r"messages\[0\]: content is empty, and there are no tool_calls"),
    "number": ({"messages": [turn("user", 3)]}, "content must be a string"),
    "picture": ({"messages": [turn("user", [{"type": "image_url", "image_url": "x"}])]}, "content has a part that is no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_not_understood_are_refused_by_file_and_row(tmp_path, case):
    row, message = REFUSED[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl.*" + message):
        load(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]}],
            "one kind",
        ),
        ([{"prompt": "a", "completion": [turn("assistant", "b")]}], "must both be text"),
        ([{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}], "tools has no effect on rows of plain text"),
        ([{"prompt": "a", "completion": "b", "images": ["x"]}], "a column 'images'"),
        ([{"input_ids": [1], "completion_mask": [1]}], "a column 'input_ids'"),
        ([{"chosen": "a", "rejected": "b"}], "holds preferences"),
    ],
)
def test_what_would_be_dropped_or_mixed_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load(lines(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"prompt": "é"}'.encode("latin-1"), "not in UTF-8"),
        ("rows.csv", b"prompt,completion\na,b\nc\n", "row 2: 1 cells under 2 column names"),
        ("rows.csv", b"prompt,prompt\na,b\n", "a column name stands twice"),
        ("rows.parquet", b"PAR1", "cannot be read as Parquet"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read"),
        ("rows.doc", b"x", "no kind of file that is read"),
        ("rows.json", b'[{"prompt": "a", "completion": "b"}, {"prompt": ', "row 2: no whole JSON object"),
    ],
)
def test_files_that_are_not_what_they_are_called(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_columns_that_nobody_reads_are_counted(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "input": "x" if i < 2 else "", "n": i} for i in range(4)]
    assert load(lines(tmp_path / "rows.jsonl", rows)).unused == {"input": 2, "n": 4}


def test_a_changed_file_is_read_anew(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    first = list(load(path).train)
    lines(path, [{"prompt": "a", "completion": "c"}])
    assert first != list(load(path).train)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """120 MB of rows are read, held out and looked at in a process that may not grow by half of that."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(24_000):
            file.write(json.dumps({"messages": [turn("user", f"{i}"), turn("assistant", "x" * 5000)]}) + "\n")
    code = f"""
from intaglio.runs.config import DataBlock
from intaglio.runs.data import load_examples
examples = load_examples(DataBlock(train={str(path)!r}, test_size=10))
assert len(examples.train) == 23_990
assert sum(1 for _ in examples.train) == 23_990
anonymous = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
print(int(anonymous[0].split()[1]))
"""
    few = [{"messages": [turn("user", f"{i}"), turn("assistant", "x")]} for i in range(24_000)]
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}

    def anonymous(source):
        command = [sys.executable, "-c", code.replace(str(path), str(source))]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout)

    assert anonymous(path) - anonymous(lines(tmp_path / "few.jsonl", few)) < 60_000  # kB


def test_a_data_set_is_streamed(tmp_path):
    """A local folder stands for the hub's: nothing is copied, and held-out prompts are left out as they pass."""
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", [{"prompt": f"q{i}", "completion": "a", "answer": "z"} for i in range(6)])
    test = lines(tmp_path / "test.jsonl", [{"prompt": "q2", "completion": "a"}])
    examples = load(folder, streaming=True, test=str(test))
    assert examples.is_streamed
    assert [row["prompt"] for row in examples.train] == ["q0", "q1", "q3", "q4", "q5"]
    assert examples.some(1) == [{"prompt": "q2", "completion": "a"}]
    assert len(examples.sample(3)) == 3
    with pytest.raises(ValueError, match="streaming"):
        load(test, streaming=True)


def test_places_are_said(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert [place for place, _ in read_rows(str(path))] == ["row 1", "row 2"]
