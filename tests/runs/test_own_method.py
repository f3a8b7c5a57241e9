"""A method of a user's own package: in `attach`, in run files where the command line allows it, in the contract suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from intaglio import Delta
from intaglio.methods import build
from intaglio.runs.config import load_config
from support import tiny

TESTS = Path(__file__).parents[1]
METHOD = '''"""Entries of largest weight."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

import intaglio

print("my code runs")


@final
@dataclass(frozen=True)
class Largest(intaglio.ScoredMethod):
    """Train the largest entries. Args: as PaFi. Raises: as PaFi. Example: Largest(). Differences: none."""

    name = "largest"
    summary = "entries of largest weight"
    budget: int | float = 0.02
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def score(self, name: str, weight: Tensor) -> Tensor:
        return weight.float().abs()
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the user's package, a model and a run file."""
    place = tmp_path_factory.mktemp("place")
    (place / "my_package").mkdir()
    (place / "my_package/__init__.py").write_text("")
    (place / "my_package/my_method.py").write_text(METHOD)
    (place / "run.yaml").write_text(
        f"model: {{name: {tiny.save_folder(place / 'model')}}}\n"
        "method: {name: 'my_package.my_method:Largest', budget: 300}\n"
        "data: {task: reasoning_gym/gcd, train_size: 8, test_size: 2}\n"
        "train: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true, save_strategy: 'no'}\n"
    )
    return place


def run(place, *command, **environment):
    environment = os.environ | {"PYTHONPATH": f"{place}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *command], cwd=place, capture_output=True, text=True, env=environment, check=False)


def test_a_run_file_may_name_it_where_the_command_line_allows_it(place):
    refused = run(place, "-m", "intaglio", "train", "run.yaml")
    assert refused.returncode == 2
    assert "method.name='my_package.my_method:Largest': runs code of the package 'my_package'" in refused.stderr
    assert "--allow my_package" in refused.stderr
    assert "my code runs" not in refused.stdout + refused.stderr
    done = run(place, "-m", "intaglio", "train", "run.yaml", "--allow", "my_package")
    assert done.returncode == 0, done.stderr
    assert "my code runs" in done.stdout + done.stderr
    delta = Delta.load(place / "runs/run/adapter")
    assert delta.method["name"] == "largest"
    assert delta.selection.size == 300
    checked = run(place, "-m", "intaglio", "verify", "runs/run")  # from a folder's word, no code of a method runs
    assert checked.returncode == 0, checked.stderr
    assert "my code runs" not in checked.stdout + checked.stderr


def test_the_contract_suite_takes_it(place):
    chosen = "Largest and (gqa_llama or described or bit_for_bit)"
    command = ("-m", "pytest", "-p", "no:cacheprovider", str(TESTS / "methods/test_contract.py"), "-k", chosen)
    done = run(place, *command, INTAGLIO_CONTRACT="my_package.my_method:Largest")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "5 passed" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json:loads", "is no method: give a frozen dataclass derived from intaglio.Method"),
        ("json:absent", "cannot be imported"),
        ("json.absent:X", "cannot be imported"),
    ],
)
def test_what_is_no_method_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message):
        build({"name": name}, allowed=["json"])


def test_allowing_a_package_allows_no_other_of_a_like_name():
    with pytest.raises(ValueError, match="runs code of the package 'json2'"):
        load_config({"method": {"name": "json2.x:Y"}, "data": {"task": "reasoning_gym/gcd"}}, allow=["json"])
