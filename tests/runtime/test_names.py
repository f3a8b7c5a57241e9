"""The four names of the package, and the paths of their modules, which documents have given."""

import subprocess
import sys

import pytest

import intaglio.runtime as runtime
from intaglio.runtime.engine import Engine, Sampling
from intaglio.runtime.mixing import Mixer
from intaglio.runtime.store import AdapterStore


def test_names_are_the_same_by_either_path():
    assert (runtime.Engine, runtime.Sampling, runtime.AdapterStore, runtime.Mixer) == (Engine, Sampling, AdapterStore, Mixer)
    assert sorted(runtime.__all__) == ["AdapterStore", "Engine", "Mixer", "Sampling"]
    with pytest.raises(AttributeError, match="no attribute 'Batch'"):
        runtime.Batch  # noqa: B018


def test_the_package_alone_loads_nothing():
    code = """
import sys
import intaglio.runtime
assert "torch" not in sys.modules
from intaglio.runtime import AdapterStore, Mixer, Sampling
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
