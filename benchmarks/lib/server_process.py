"""The server that a benchmark talks to, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx


class Server:
    """`intaglio serve` in a process of its own, on 127.0.0.1, for the length of a block.

    Args:
        place: the folder it runs in.
        arguments: of the command.
        key: that callers must give.
    """

    def __init__(self, place: Path, *arguments: object, key: str) -> None:
        command = [sys.executable, "-m", "intaglio", "serve", *map(str, arguments), "--port", "0"]
        environment = os.environ | {"INTAGLIO_API_KEY": key}
        self._process = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
        self.code: int | None = None

    def __enter__(self) -> Server:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if " at http://" in line:
                self.url = line.split(" at ")[1].split()[0]
            if "Uvicorn running" in line or "startup complete" in line:
                break
        threading.Thread(target=self._watch_log).start()
        return self

    def _watch_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "Traceback" in line or "ERROR" in line:
                print(line, end="", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self.code = self._process.wait(timeout=60)

    def rss(self) -> float:
        """Resident memory in MB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    def metrics(self) -> dict[str, float]:
        """Gauges and counters that have no model."""
        lines = httpx.get(self.url + "/metrics", trust_env=False).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("intaglio_") and "{" not in line)
        return {name: float(value) for name, value in pairs}
