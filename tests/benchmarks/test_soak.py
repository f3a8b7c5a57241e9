"""Loops that stay flat, short ones. `benchmarks/soak.py` is the long form."""

import pytest
import torch

import soak

FLAT = {"seconds": 0.01, "memory": 1e8, "tensors": 50, "files": 7, "threads": 1}


@pytest.mark.parametrize("subject", ["s2ft", "attach", "switch", "store", "peft"])
def test_it_stays_flat(subject):
    """Memory and time need the long form to be told from noise."""
    _, make = soak.subjects()[subject]
    found = soak.run(make, 48)
    assert [problem for problem in soak.problems(found) if problem.startswith(("tensors", "files", "threads"))] == []


def test_what_grows_is_noticed():
    def leaking(place):
        kept, file = [], place / "file"

        def turn(number):
            file.touch()
            kept.append((torch.zeros(5000), file.open()))

        return turn

    found = soak.problems(soak.run(leaking, 40))
    assert [problem.partition(" grows")[0] for problem in found[:3]] == ["memory", "tensors", "files"]


@pytest.mark.parametrize(("key", "more"), [("memory", 2000), ("tensors", 1), ("files", 0.2), ("threads", 0.1)])
def test_growth_by_the_round(key, more):
    measured = [FLAT | {"round": number, key: FLAT[key] + more * number} for number in range(1, 41)]
    (problem,) = soak.problems(measured)
    assert problem.startswith(f"{key} grows by")
    filled = [FLAT | {"round": number, key: FLAT[key] + more * min(number, 10)} for number in range(1, 41)]
    assert soak.problems(filled) == []  # in the first quarter, and no more


def test_rounds_that_get_slower():
    measured = [FLAT | {"round": number, "seconds": 0.01 + 0.001 * number} for number in range(1, 41)]
    assert soak.problems(measured) == ["a round takes 1.78 times as long"]
