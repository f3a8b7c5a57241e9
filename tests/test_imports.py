"""Importing is cheap and does nothing; help answers at once."""

import os
import subprocess
import sys

HEAVY = ("transformers", "peft", "trl", "datasets", "accelerate", "matplotlib", "pydantic", "typer")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_pulls_torch_at_most_and_writes_nothing():
    code = f"""
import sys, warnings, logging
before = (list(warnings.filters), list(logging.root.handlers))
import intaglio
assert "torch" not in sys.modules, "the package itself loads nothing"
assert before == (list(warnings.filters), list(logging.root.handlers))
from intaglio import attach, S2FT, Random, PaFi, SHiRA, FishMask, BitFit, Full, Delta, Selection, Tuner
loaded = [m for m in {HEAVY!r} if m in sys.modules]
assert not loaded, loaded
assert "torch" in sys.modules
"""
    assert python(code) == ""


def test_public_names_resolve():
    import intaglio

    for name in intaglio.__all__:
        assert getattr(intaglio, name) is not None
    assert set(intaglio.__all__) <= set(dir(intaglio))


def test_help_is_fast():
    """Half a second of processor time, the best of three (the machine may be busy)."""
    code = "import sys; sys.argv = ['intaglio', '--help']; from intaglio.__main__ import main; main()"
    seconds = []
    for _ in range(3):
        before = os.times()
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    for command in ("train", "evaluate", "verify", "export", "inspect", "methods"):
        assert command in out
    assert min(seconds) < 0.5, seconds
    assert python("import sys, intaglio.cli; assert 'torch' not in sys.modules") == ""


def test_version_is_the_installed_one():
    from importlib.metadata import version

    import intaglio

    assert intaglio.__version__ == version("intaglio")
