"""Damage to an adapter folder, drawn by a generator: to its JSON, its safetensors files, and what stands in a file's place.

A folder is a mapping of names to bytes, or to a `Node` where it is no plain file. A function that damages says what it did, so
that a failure can be told in words.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from enum import Enum
from pathlib import Path

from lib import mutated_json
from lib.mutated_bytes import damage_bytes
from lib.mutated_tensors import damage_header, damage_tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Node = Enum("Node", "FOLDER DANGLING LOOP DEVICE PIPE")  # what may stand in a file's place
Folder = dict[str, bytes | Node]
JSON = [mutated_json.mutate] * 4 + [mutated_json.damage_text]
TENSORS = [damage_tensor] * 3 + [damage_header, damage_bytes]


def mutate(folder: Folder, draw: random.Random) -> list[str]:
    """Change a folder at one to three places; then, often, let its config name the hash of its weights as they are now."""
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        name = draw.choice([name for name in folder if name != "README.md"] or list(folder))
        content = folder[name]
        if not isinstance(content, bytes) or draw.random() < 0.04:
            done.append(_file(folder, name, draw))
        elif name.endswith(".json"):
            folder[name], said = draw.choice(JSON)(content, draw)
            done.append(f"{name}: {said}")
        else:
            folder[name], said = draw.choice(TENSORS)(content, draw)
            done.append(f"{name}: {said}")
    if draw.random() < 0.7:
        done += _seal(folder)
    return done


def _seal(folder: Folder) -> list[str]:
    """Name the right hash, as whoever made the damage on purpose would."""
    place = next((name.removesuffix(CONFIG) for name in folder if name.endswith(CONFIG)), "")
    config, weights = folder.get(place + CONFIG), folder.get(place + WEIGHTS)
    if not isinstance(config, bytes) or not isinstance(weights, bytes):
        return []
    digest = hashlib.sha256(weights).hexdigest().encode()
    folder[place + CONFIG] = re.sub(rb'"sha256":\s*"[0-9a-f]{64}"', b'"sha256": "' + digest + b'"', config)
    return ["sealed"]


def write(folder: Folder, place: Path) -> None:
    """Put a folder on the disk."""
    place.mkdir()
    for name, content in folder.items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is Node.FOLDER:
            path.mkdir()
        elif content is Node.PIPE:
            os.mkfifo(path)
        else:
            path.symlink_to({Node.DANGLING: "nowhere", Node.LOOP: path.name, Node.DEVICE: "/dev/zero"}[content])


def _file(folder: Folder, name: str, draw: random.Random) -> str:
    """A file missing, empty, or no file."""
    act = draw.choice(["missing", "empty", "twice", *Node])
    if act == "missing":
        del folder[name]
        if not folder:
            folder["README.md"] = b""
    elif act == "twice":
        folder[draw.choice([CONFIG, WEIGHTS])] = folder[name]
    else:
        folder[name] = b"" if act == "empty" else act
    return f"{name}: {act if isinstance(act, str) else act.name.lower()}"
