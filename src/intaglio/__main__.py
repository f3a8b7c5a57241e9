"""Entry point of the `intaglio` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what to install where its packages are missing."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"intaglio: the command line needs {error.name!r}: pip install 'intaglio[train]'")
    app()


if __name__ == "__main__":
    main()
