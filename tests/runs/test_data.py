import json

import datasets
import pytest

from intaglio.runs.config import DataBlock
from intaglio.runs.data import load_examples

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def block(**fields):
    return DataBlock.model_validate(fields)


def task(**fields):
    base = {"task": "reasoning_gym/chain_sum", "settings": SUMS, "train_size": 300, "test_size": 100}
    return load_examples(block(**(base | fields)))


def test_held_out_questions_are_new_and_distinct():
    """A small question space: without the exclusion a third of the held-out questions would be trained on."""
    examples = task(train_size=2000)
    train = {row["prompt"] for row in examples.train}
    test = [row["prompt"] for row in examples.test]
    assert len(examples.train) == 2000
    assert len(test) == len(set(test)) == 100
    assert not train & set(test)


def test_tasks_are_deterministic_and_seeds_lie_far_apart():
    assert list(task().train) == list(task().train)
    assert [r["item"] for r in task().test] == [r["item"] for r in task().test]
    # Neighbouring seeds would share 299 of 300 items if items were taken from seed + i alone.
    here, next_ = ({row["prompt"] for row in task(seed=seed, settings=SUMS | {"max_digits": 4}).test} for seed in (0, 1))
    train = {row["prompt"] for row in task(seed=0, settings=SUMS | {"max_digits": 4}).train}
    assert len(here & next_) > 50  # documented: neighbouring seeds of *one* kind do share items
    assert not train & here
    assert not train & next_


def test_the_task_verifies_answers():
    examples = task()
    row = examples.test[0]
    assert examples.verify is not None
    assert examples.verify(row["answer"], row) == 1.0
    assert examples.verify("nonsense", row) < 1.0


def test_a_space_too_small_is_refused():
    with pytest.raises(ValueError, match="too few different questions"):
        task(settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, test_size=500)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "chain_sum"}, "reasoning_gym/NAME"),
        ({"task": "reasoning_gym/chain_sun"}, "did you mean 'chain_sum'"),
        ({"settings": {"terms": 3}}, "data.settings: chain_sum refuses"),
        ({"settings": {"min_terms": 5, "max_terms": 2}}, "data.settings: chain_sum refuses"),
    ],
)
def test_bad_tasks(fields, message):
    with pytest.raises(ValueError, match=message):
        task(**fields)


ROWS = [{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(8)]


def write(path, rows):
    data = datasets.Dataset.from_list(rows)
    {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[path.suffix[1:]](str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files(tmp_path, kind):
    held_out = [{"prompt": f"new {i}", "completion": f" a{i}"} for i in range(3)]
    train, test = write(tmp_path / f"train.{kind}", ROWS), write(tmp_path / f"test.{kind}", held_out)
    examples = load_examples(block(train=train, test=test))
    assert list(examples.train) == ROWS
    assert list(examples.test) == [{"prompt": f"new {i}", "answer": f"a{i}"} for i in range(3)]
    assert examples.verify is None
    sets = examples.datasets()
    assert list(sets["train_dataset"]) == ROWS
    assert list(sets["eval_dataset"]) == list(examples.held_out) == held_out


def test_held_out_rows_leave_the_training_rows(tmp_path):
    examples = load_examples(block(train=write(tmp_path / "x.jsonl", ROWS), test_size=3))
    assert len(examples.test) == 3
    assert {r["prompt"] for r in examples.train} | {r["prompt"] for r in examples.test} == {r["prompt"] for r in ROWS}
    assert len(examples.train) == 5


def test_formats_columns_and_chat(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"hi {i}"}, *turns[1:]]}) for i in range(3)))
    examples = load_examples(block(train=str(path), test_size=1))
    assert examples.test[0]["answer"] == "ho"
    assert examples.test[0]["prompt"][0]["content"].startswith("hi")
    assert examples.train[0]["messages"][1:] == turns[1:]
    renamed = write(tmp_path / "r.jsonl", [{"question": f"q{i}", "reply": "a", "answer": "z"} for i in range(3)])
    examples = load_examples(block(train=renamed, test_size=1, columns={"prompt": "question", "completion": "reply"}))
    assert examples.train[0].keys() == {"prompt", "completion"}
    assert examples.test[0]["answer"] == "z"
    wrapped = load_examples(block(train=write(tmp_path / "w.jsonl", ROWS), test_size=1, chat=True)).train[0]
    assert wrapped["prompt"][0]["role"] == "user"
    assert wrapped["completion"] == [{"role": "assistant", "content": wrapped["completion"][0]["content"]}]
    text = load_examples(block(train=write(tmp_path / "t.jsonl", [{"text": "abc"}] * 3)))
    assert list(text.train) == [{"text": "abc"}] * 3
    assert len(text.test) == 0
    assert text.held_out is None


def test_bad_files(tmp_path):
    odd = write(tmp_path / "odd.jsonl", [{"x": 1}])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    header = tmp_path / "header.csv"
    header.write_text("prompt,completion\n")
    cases = [
        ({"train": str(tmp_path / "no.jsonl")}, "no such file"),
        ({"train": odd}, "wanted are prompt and completion"),
        ({"train": odd, "columns": {"prompt": "q"}}, "no column 'q'; it has x"),
        ({"train": str(empty)}, "holds no rows"),
        ({"train": str(header)}, "holds no rows"),
        ({"train": write(tmp_path / "few.jsonl", ROWS)}, "too few to hold out"),
        ({"train": "no-such-owner/no-such-set"}, "cannot be read"),
    ]
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            load_examples(block(**fields))


def test_files_leak_no_prompt_into_training(tmp_path):
    same = [{"prompt": "q", "completion": f"a{i}"} for i in range(5)]
    other = [{"prompt": f"p{i}", "completion": "a"} for i in range(5)]
    examples = load_examples(block(train=write(tmp_path / "x.jsonl", same + other), test_size=4))
    assert not {r["prompt"] for r in examples.train} & {r["prompt"] for r in examples.held_out}
    examples = load_examples(block(train=write(tmp_path / "y.jsonl", ROWS), test=write(tmp_path / "z.jsonl", ROWS[:2])))
    assert list(examples.train) == ROWS[2:]
    with pytest.raises(ValueError, match="nothing is left to train on"):
        load_examples(block(train=write(tmp_path / "s.jsonl", same), test_size=2))


def test_rows_all_train_where_nothing_is_held_out(tmp_path):
    examples = load_examples(block(train=write(tmp_path / "x.jsonl", ROWS)), hold_out=False)
    assert list(examples.train) == ROWS
    assert len(examples.test) == 0
    assert examples.held_out is None


def test_numbers_gaps_and_extra_columns(tmp_path):
    sums = tmp_path / "sums.csv"
    sums.write_text("prompt,completion,answer\n" + "".join(f"{i}+0,{i},{i}\n" for i in range(4)))
    for chat in (False, True):
        examples = load_examples(block(train=str(sums), test_size=2, chat=chat))
        assert {row["answer"] for row in examples.test} <= set("0123")
        assert len(examples.train) == 2
    extra = write(tmp_path / "alpaca.jsonl", [row | {"text": "all of it"} for row in ROWS])
    examples = load_examples(block(train=extra, test_size=2))
    assert len(examples.test) == 2
    assert examples.train[0].keys() == {"prompt", "completion"}
    gap = tmp_path / "gap.jsonl"
    gap.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": null}\n')
    with pytest.raises(ValueError, match="row 2: completion is empty"):
        load_examples(block(train=str(gap), test_size=1))
    with pytest.raises(ValueError, match="chat has no effect"):
        load_examples(block(train=write(tmp_path / "t.jsonl", [{"text": "abc"}]), chat=True))
