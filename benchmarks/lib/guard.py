"""An ear to what code does: files written, processes started, addresses asked, pickles read."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

FORBIDDEN = {
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
}
WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "shutil.rmtree"}


class Guard:
    """An ear to this process's audit events: what it does, for the length of a block, that no reader may do.

    Args:
        allowed: the folder that may be written to.
    """

    def __init__(self, allowed: Path) -> None:
        self._allowed, self._listens, self.heard = str(allowed), False, list[str]()
        sys.addaudithook(self._hear)

    def __enter__(self) -> None:
        self._listens, self.heard = True, []

    def __exit__(self, *_: object) -> None:
        self._listens = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._listens:
            return
        if event in FORBIDDEN:
            self.heard.append(f"{event} {arguments!r:.100}")
        elif event in WRITING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            path = arguments[0]
            if isinstance(path, str | Path) and str(path).startswith("/") and not str(path).startswith(self._allowed):
                self.heard.append(f"{event} {path}")
