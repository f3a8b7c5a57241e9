"""Runs that are killed and resumed, a few of them. `benchmarks/faults.py` is the long form."""

import json

import pytest

import faults
from faults import Case
from intaglio.hf import checkpoint
from lib import forked
from lib.interruptions import Interruption, damage
from lib.journal import Journal


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    faults.load_libraries()
    return faults.Bench(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.mark.parametrize(
    ("case", "code"),
    [
        (Case("s2ft", "float32", "torn-checkpoint", 0), -25),
        (Case("id3", "bfloat16", "between-files", 0), -9),
        (Case("lora+ist", "float32", "damaged", 0), -9),
    ],
    ids=lambda value: getattr(value, "key", ""),
)
def test_a_run_that_goes_on_ends_as_if_nothing_had_been(bench, case, code):
    result = bench.run(case)
    assert result["codes"] == [code]
    assert result["wrong"] == []


def test_another_result_is_noticed(bench, monkeypatch):
    """A resume that forgets the optimizer's step and the values in full precision is no resume."""
    monkeypatch.setattr("intaglio.hf.trainer.load_tuner_state", lambda tuner, folder: checkpoint.Path(folder))
    wrong = bench.run(Case("s2ft", "float32", "final-save", 0))["wrong"]
    assert "other adapter_model.safetensors" in wrong


def test_a_process_is_killed_where_it_is_told_to(tmp_path):
    """At one of its writes, inside a file, or by the clock; what it had written before is there."""

    def work(what):
        def write():
            faults.watch(tmp_path, what)
            for name in "ab":
                (tmp_path / name).write_bytes(bytes(1000))

        return write

    assert forked.run(work(Interruption("kill", 1))).code == -9
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert forked.run(work(Interruption("tear", 1, size=10))).code == -25
    assert (tmp_path / "b").stat().st_size == 10
    ended = forked.run(work(Interruption("full", 0, size=10)))
    assert ended.code == 70
    assert "File too large" in ended.output
    assert forked.run(lambda: forked.time.sleep(60), after=0.1).code == -9
    assert forked.run(lambda: forked.time.sleep(60), timeout=0.1).code == -9


def test_damage(tmp_path):
    path = tmp_path / "file"
    for how, left in (("flip", 8), ("cut", 4), ("empty", 0)):
        path.write_bytes(bytes(8))
        damage(path, how, 0.5)
        assert path.stat().st_size == left
        assert path.read_bytes() != bytes(8)
    damage(path, "remove", 0.5)
    assert not path.exists()


def test_results_are_kept(tmp_path):
    """A line that was torn is dropped, and what was found with other settings."""
    path = tmp_path / "results.jsonl"
    journal = Journal(path, {"seed": 1})
    journal.add("a", {"wrong": []})
    with path.open("a") as file:
        file.write('{"key": "b", "res')
    assert Journal(path, {"seed": 1}).found == {"a": {"wrong": []}}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"seed": 1}, {"key": "a", "result": {"wrong": []}}]
    assert Journal(path, {"seed": 2}).found == {}
