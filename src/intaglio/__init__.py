"""Intaglio: fine-tune large language models sparsely.

The public names, loaded on first use: importing this package alone imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.version import VERSION

if TYPE_CHECKING:  # what type checkers see of `_HOME`; a test holds the two against each other
    from .adapter.delta import Delta as Delta
    from .adapter.fuse import fuse as fuse
    from .adapter.pool import AdapterPool as AdapterPool
    from .core.entries import Elements as Elements
    from .core.entries import Slices as Slices
    from .core.entries import Whole as Whole
    from .core.probe import Batches as Batches
    from .core.selection import Selection as Selection
    from .method_kinds.entry_method import EntryMethod as EntryMethod
    from .method_kinds.entry_method import ScoredMethod as ScoredMethod
    from .method_kinds.method import Method as Method
    from .method_kinds.unit_method import UnitMethod as UnitMethod
    from .methods import *  # noqa: F403
    from .runs.train import train as train
    from .training.attach import attach as attach
    from .training.tuner import Tuner as Tuner
    from .training.updates import Updates as Updates

__version__ = VERSION

_HOME = {  # all others are methods, and live in `methods`
    "attach": "training.attach",
    "Tuner": "training.tuner",
    "Updates": "training.updates",
    "Delta": "adapter.delta",
    "fuse": "adapter.fuse",
    "AdapterPool": "adapter.pool",
    "Selection": "core.selection",
    "Whole": "core.entries",
    "Slices": "core.entries",
    "Elements": "core.entries",
    "Batches": "core.probe",
    "Method": "method_kinds.method",
    "EntryMethod": "method_kinds.entry_method",
    "ScoredMethod": "method_kinds.entry_method",
    "UnitMethod": "method_kinds.unit_method",
    "train": "runs.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name == "__all__":
        return sorted([*_HOME, *_methods()])
    if not name.startswith("_") and name in _methods():
        return _methods()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOME, *_methods(), "__version__"])


def _methods() -> dict[str, Any]:
    from .methods import METHODS

    return {cls.__name__: cls for cls in METHODS.values()}
