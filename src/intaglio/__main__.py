"""Entry point of the `intaglio` command."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line, or say what to install where its packages are missing."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"intaglio: the command line needs {error.name!r}: pip install 'intaglio[train]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone is shown the rest
    app()


if __name__ == "__main__":
    main()
