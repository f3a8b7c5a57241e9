"""The `intaglio` command. Heavy imports stay inside the commands, so that --help answers at once."""

from . import training as training  # isort: skip  # each module adds its commands, in the order that --help shows
from . import adapters as adapters  # isort: skip
from . import serving as serving  # isort: skip
from .app import app

__all__ = ["app"]
