"""Many adapters of one base at once: what the server is built on, without HTTP.

The public names, loaded on first use: the modules of this package need torch alone, only the engine needs transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .mixing import Mixer
    from .sampling import Sampling
    from .store import AdapterStore

__all__ = ["AdapterStore", "Engine", "Mixer", "Sampling"]

_HOME = {"AdapterStore": "store", "Engine": "engine", "Mixer": "mixing", "Sampling": "sampling"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
