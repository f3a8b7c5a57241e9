"""Damaged adapters through every reader, a few hundred of them. `benchmarks/fuzz.py` is the long form."""

import os
import time

import pytest
import torch

import fuzz
from lib import fuzz_readers


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    fuzz.load_libraries()
    return fuzz.Fuzzer(tmp_path_factory.mktemp("fuzz"), seed=1)


def test_adapters_as_they_are_are_taken(fuzzer):
    for name, taken in fuzzer.undamaged().items():
        if name.startswith("run"):
            assert taken == ["inspect", "run.json", "doctor"]
            continue
        ours = ["Delta.load, apply_, revert_", "AdapterPool", "inspect", "PeftModel.from_pretrained"]
        expected = ["export --to delta"] if "exported" in name else [] if "lora" in name else ours
        assert set(expected) <= set(taken), name
        assert "doctor" in taken
        assert ("AdapterStore" in taken) == (not name.startswith(("entries", "whole"))), name


def test_damaged_ones_are_refused_or_taken_rightly(fuzzer):
    result = fuzzer.batch(range(200))
    assert result["wrong"] == []
    assert result["counts"]["cases"] == 200
    assert result["counts"]["Delta.load, apply_, revert_: refused"] > 100
    assert result["counts"]["PeftModel.from_pretrained: taken"] > 5


def test_damage_can_be_replayed(fuzzer):
    assert fuzzer.case(17) == fuzzer.case(17)


def leaves_the_base_changed(bench, folder):
    with torch.no_grad():
        next(bench.base.parameters()).add_(1)
    raise ValueError("refused")


def takes_other_values(bench, folder):
    bench.check({"model.norm.weight": bench.weights["model.norm.weight"] + 1}, "applied")


def writes_elsewhere(bench, folder):
    (folder.parents[1] / "elsewhere").write_bytes(b"")


def takes_long(bench, folder):
    end = time.process_time() + fuzz.SECONDS + 0.1
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (leaves_the_base_changed, "afterwards: model.embed_tokens.weight is not as it has to be"),
        (takes_other_values, "applied: model.norm.weight is not as it has to be"),
        (writes_elsewhere, "does what no reader may: open "),
        (takes_long, "takes "),
        (lambda bench, folder: {}["x"], "KeyError: 'x'"),
        (lambda bench, folder: bytes(2 << 30), "MemoryError"),
        (lambda bench, folder: os._exit(3), "the process ends with 3"),
        (lambda bench, folder: os.system("true"), "does what no reader may: os.system"),
    ],
)
def test_what_a_reader_must_not_do_is_noticed(fuzzer, monkeypatch, reader, said):
    monkeypatch.setattr(fuzz_readers, "READERS", {"bad": reader})
    (wrong,) = fuzzer.batch([1])["wrong"]
    assert said in wrong["what"]
    assert wrong["case"] == 1
