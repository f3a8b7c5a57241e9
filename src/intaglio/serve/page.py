"""The page at `/`: one file, read once, with headers that let it run nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

__all__ = ["HEADERS", "PAGE"]

PAGE = files(__name__.rpartition(".")[0]).joinpath("page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """CSP sources that allow exactly the inline blocks of this file."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
