"""Adding is as cheap as it is said to be: a method is one file and one line, an architecture one row and one tiny config.

Each is added to a copy of the package and of its tests, exactly so; then the command line lists it, it has its public name,
and the contract suite runs over it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCORED = '''"""Entries chosen by how near the pre-trained weight is to one."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..core import scores
from ..method_kinds.entry_method import ScoredMethod


@final
@dataclass(frozen=True)
class NearOne(ScoredMethod):
    """Train the entries nearest to ±1. Args: as PaFi. Raises: as PaFi. Example: NearOne(). Differences: none."""

    name = "near_one"
    summary = "scattered entries nearest to one"
    budget: int | float = 0.05
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def score(self, name: str, weight: Tensor) -> Tensor:
        return -(scores.magnitude(weight) - 1).abs()
'''

STRUCTURED = '''"""Heads and channels ranked by the mean of the weights that read them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from ..core.probe import Probe
from ..method_kinds.unit_method import Unit, UnitMethod
from ..model.calibration import weight_norms
from ..model.structure import Layer


@final
@dataclass(frozen=True)
class Heaviest(UnitMethod):
    """Train the units of largest weight norm. Args: as UnitMethod. Raises: as S2FT. Example: Heaviest(). Differences: none."""

    name = "heaviest"
    summary = "heads and channels of largest weight norm"
    o: int | float | None = 0.5
    down: int | float | None = 0.25

    def scores(
        self, model: nn.Module, layers: list[Layer], structures: Collection[str], probe: Probe | None
    ) -> Mapping[Unit, Tensor]:
        return weight_norms(model, layers, structures)
'''
LINES = "from .near_one import NearOne as NearOne\nfrom .heaviest import Heaviest as Heaviest\n"
ROW = """    Family(
        "renamed",
        _attention("self_attn") | _separate(gate="ffn.gate", up="ffn.up", down="ffn.down"),
    ),
)
"""
CONFIG = '''

def _renamed() -> tf.PreTrainedModel:
    """A Llama whose FFN lies elsewhere, by other names."""
    model = _llama(num_key_value_heads=2)
    for layer in model.model.layers:
        mlp = layer.mlp
        for name in ("gate", "up", "down"):
            setattr(mlp, name, getattr(mlp, f"{name}_proj"))
            delattr(mlp, f"{name}_proj")
        mlp.forward = lambda x, mlp=mlp: mlp.down(mlp.act_fn(mlp.gate(x)) * mlp.up(x))
        layer.ffn, layer.mlp = mlp, None
        layer.forward = _renamed_forward.__get__(layer)
    return model


def _renamed_forward(self, hidden_states, **kwargs):
    kwargs.pop("past_key_values", None)
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + attended
    return hidden_states + self.ffn(self.post_attention_layernorm(hidden_states))


CAUSAL["renamed"] = _renamed
MODELS["renamed"] = _renamed
'''


def run(copy, *command):
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and its tests, with two methods and an architecture more."""
    copy = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("src", "tests", "docs"):
        shutil.copytree(ROOT / part, copy / part, ignore=ignored)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy)
    methods = copy / "src/intaglio/methods"
    (methods / "near_one.py").write_text(SCORED)
    (methods / "heaviest.py").write_text(STRUCTURED)
    assert len(STRUCTURED.splitlines()) <= 40
    registry = methods / "__init__.py"
    registry.write_text(registry.read_text().replace("# isort: on\n", LINES + "# isort: on\n"))
    families = copy / "src/intaglio/model/families.py"
    before, end, _ = families.read_text().rpartition(")\n")
    assert end
    families.write_text(before + ROW)
    tiny = copy / "tests/support/tiny.py"
    tiny.write_text(tiny.read_text() + CONFIG)
    return copy


def test_a_method_is_one_file_and_one_line(copy):
    """It is listed by the command line, has a public name, and is built from a run file by its own."""
    code = "import intaglio; from intaglio.methods import build; print(build({'name': 'near_one'}), intaglio.Heaviest(seed=1))"
    done = run(copy, "-c", code)
    assert "NearOne(budget=0.05" in done.stdout, done.stderr
    assert "Heaviest(" in done.stdout
    listed = run(copy, "-m", "intaglio", "methods").stdout
    assert "heads and channels of largest weight norm" in listed
    assert "near_one" in listed
    assert run(copy, "docs/tables.py").returncode == 0
    assert "| `NearOne` | `near_one` | scattered entries nearest to one |" in (copy / "README.md").read_text()


def test_the_contract_suite_runs_over_what_was_added(copy):
    """Both methods on a known architecture, and S2FT on the new one."""
    chosen = "(near_one or heaviest) and (gqa_llama or described) or renamed and s2ft-0.25 and moves"
    done = run(copy, "-m", "pytest", "-p", "no:cacheprovider", "tests/methods/test_contract.py", "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "10 passed" in done.stdout
    structure = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/test_structure.py", "-k", "renamed")
    assert structure.returncode == 0, structure.stdout[-3000:]
