"""Damage to bytes, drawn by a generator."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable


def damage_bytes(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes flipped, cut, inserted, overwritten or moved."""
    if not content:
        return b"\x00" * 9, "nine zeros"
    at, size = draw.randrange(len(content)), draw.choice([1, 2, 8, 64, 1000])
    if draw.random() < 0.3:  # in the header
        at = draw.randrange(min(len(content), 200))
    acts: list[Callable[[], tuple[bytes, str]]] = [
        lambda: (content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :], f"bit flipped in byte {at}"),
        lambda: (content[:at] + draw.randbytes(size) + content[at + size :], f"{size} bytes overwritten at {at}"),
        lambda: (content[:at] + draw.randbytes(size) + content[at:], f"{size} bytes inserted at {at}"),
        lambda: (content[:at] + content[at + size :], f"{size} bytes lost at {at}"),
        lambda: (content[:at], f"cut at {at}"),
        lambda: (content + bytes(size), f"{size} zeros behind"),
        lambda: (content[at:] + content[:at], f"turned by {at}"),
        lambda: (
            struct.pack("<Q", draw.choice([0, 1, 2, 2**20, 10**8 + 1, 2**40, 2**63, 2**64 - 1])) + content[8:],
            "another length of the header",
        ),
    ]
    return draw.choice(acts)()
