"""The folder that an adapter was loaded from, and whether it still holds the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

from .folder import CONFIG, PEFT_TYPE, WEIGHTS, read_config

__all__ = ["Source", "weights_size"]

Found = TypeVar("Found")


@final
@dataclass(frozen=True)
class Source:
    """An adapter folder as it was when it was loaded; nothing else is ever read in its place.

    The stamp is a hash of the content. Inode, time and size would be quicker, but a file that is written again within one tick
    of the file system's clock may have the same three, and a folder restored from a copy has others with the same content. It
    is taken where a folder is read, never for an adapter in memory. Our own folders are hashed once, while they are read: their
    config names the SHA-256 of the weights, so that the stamp needs the config alone. Weights of other folders are hashed for
    the stamp, which takes about half as long as reading them.

    Args:
        folder: absolute, without symlinks.
        nbytes: of the weights file.
        stamp: of the config, and of the weights where the config does not stand for them.
    """

    folder: Path
    nbytes: int
    stamp: str

    @classmethod
    def of(cls, folder: Path) -> Source:
        """The folder as it is now.

        Raises:
            ValueError: where it is no adapter folder.
        """
        nbytes, config = weights_size(folder), read_config(folder)
        stamp = hashlib.sha256((folder / CONFIG).read_bytes())
        if config.get("peft_type") != PEFT_TYPE or not isinstance(config.get("sha256"), str):
            stamp.update((folder / WEIGHTS).read_bytes())
        return cls(folder, nbytes, stamp.hexdigest())

    def read(self, reader: Callable[[Path], Found]) -> Found:
        """What `reader` makes of the folder.

        Raises:
            ValueError: from `reader`, or where the folder is gone or holds something else by now, or by the end of reading.
        """
        changed = ValueError(f"{self.folder}: has changed since it was first read")
        if weights_size(self.folder) != self.nbytes:  # before something huge is read
            raise changed
        try:
            return reader(self.folder)
        except (KeyError, RecursionError, OverflowError) as error:
            raise ValueError(f"{self.folder}: damaged ({type(error).__name__})") from error
        finally:  # where the files have changed, that is the better reason for whatever went wrong
            if Source.of(self.folder) != self:
                raise changed


def weights_size(folder: Path) -> int:
    """Bytes of an adapter folder's weights.

    Raises:
        ValueError: where it is no adapter folder.
    """
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder}: not an adapter folder, it has no {missing[0]}")
    return (folder / WEIGHTS).stat().st_size
