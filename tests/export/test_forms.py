"""A form of export is a file and a row: a new one is offered, checked, written and shown by the command without another edit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import intaglio
from intaglio.core.entries import Slices
from intaglio.core.selection import Selection
from intaglio.export.forms import FORMS, Options, form_of, help_of
from support import tiny
from support.exports import handmade

ONLY_NAMES = '''"""Export the names of the parameters that an adapter changes."""

import json

from .peft_folder import write_marker
from .staging import staged


def to_names(delta, model, directory, *, tokenizer=None, overwrite=False):
    """Write `names.json`."""
    with staged(directory, overwrite=overwrite) as folder:
        (folder / "names.json").write_text(json.dumps(list(delta.selection)))
        return write_marker(folder, directory, delta, {"to": "names", "parameters": len(delta.selection)})


def lines(figures):
    """What the command shows of the figures."""
    yield "names", f"of {figures['parameters']} parameters"
'''
ROW = '    Form("names", "names alone", _late("only_names:to_names"), lines=_late("only_names:lines")),\n)\nFORMS'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a copy of the package that has one form more, a base, and an adapter of it."""
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("place")
    shutil.copytree(Path(intaglio.__file__).parent, place / "src/intaglio", ignore=shutil.ignore_patterns("__pycache__"))
    folder = place / "src/intaglio/export"
    (folder / "only_names.py").write_text(ONLY_NAMES)
    rows = (folder / "forms.py").read_text()
    assert rows.count(")\nFORMS") == 1
    (folder / "forms.py").write_text(rows.replace(")\nFORMS", ROW))
    model = AutoModelForCausalLM.from_pretrained(tiny.save_folder(place / "base"))
    name = "model.layers.0.mlp.down_proj.weight"
    index = Slices(tuple(model.get_parameter(name).shape), 1, torch.tensor([1, 5]))
    handmade(model, Selection({name: index})).save(place / "adapter")
    return place


def command(place, *arguments):
    environment = os.environ | {"PYTHONPATH": str(place / "src"), "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "intaglio", "export", *map(str, arguments)]
    return subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True)


def test_a_form_is_a_file_and_a_row(place):
    arguments = ["adapter", "--to", "names", "--output", "out", "--base", "base"]
    done = command(place, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "out/names.json").read_text()) == ["model.layers.0.mlp.down_proj.weight"]
    assert "of 1 parameters" in done.stdout
    assert "earlier export; --overwrite" in command(place, *arguments).stderr


def test_the_help_names_it_and_its_options_are_checked(place):
    shown = " ".join(command(place, "--help").stdout.replace("│", " ").split())
    assert "delta (a LoRA folder back into an adapter), names (names alone)" in shown
    done = command(place, "adapter", "--to", "names", "--ragged", "--rank", 3, "--output", "never", "--base", "nobody/nothing")
    assert done.returncode == 2
    for option in ("ragged='True': has no effect with --to names; only with lora", "rank='3': has no effect with --to names"):
        assert option in " ".join(done.stderr.split())
    assert not (place / "never").exists()


def test_rows_agree_with_options():
    """Every option that a form takes is one of the command's, and every option is taken by a form."""
    assert {option for form in FORMS.values() for option in form.options} == set(vars(Options()))
    assert all(form is FORMS[name] for name, form in FORMS.items() if form.name == name)
    assert help_of("fill_layers").startswith("lora: zeros for every layer")
    with pytest.raises(ValueError, match=r"rank='2': has no effect.*only with approximate-lora; dtype='int8': known are float32"):
        form_of("lora", Options(rank=2, dtype="int8"))


def test_the_page_lists_the_forms():
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    assert re.findall(r"^\| `(\w[\w-]*)` \|", page, flags=re.MULTILINE)[: len(FORMS)] == list(FORMS)
