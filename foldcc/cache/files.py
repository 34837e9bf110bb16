"""Files of compiled programs: one for each key, whole or not there, the oldest of which leave when there are too many."""

from __future__ import annotations

import os
import warnings
import zlib
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from foldcc.codegen.source import directory, put

BYTES = 2**30  # that all files together may have
_HEAD = b"foldcc program 1\n"


def path_of(key: str) -> Path:
    return directory() / "programs" / key


def read(key: str) -> bytes | None:
    """What was written under a key; None if nothing was, or something else is there now, which is announced."""
    try:
        found = path_of(key).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _announce(f"Compiled programs cannot be read: {error}. They are compiled again.")
        return None
    size = len(_HEAD) + 32
    head, digest, body = found[: len(_HEAD)], found[len(_HEAD) : size], found[size:]
    if head != _HEAD or sha256(body).digest() != digest:
        damaged(key, "it is not what was written")
        return None
    with suppress(OSError):  # of a directory that is only read
        os.utime(path_of(key))
    return zlib.decompress(body)


def damaged(key: str, why: str) -> None:
    """Says that a file is not used."""
    warnings.warn(
        f"A program on disk cannot be read, and is compiled again: {why}. {path_of(key)} is written anew.", stacklevel=2
    )


def write(key: str, found: bytes) -> bool:
    """Whether something is kept under a key from now on; that a directory cannot be written is said once."""
    body = zlib.compress(found, 1)
    try:
        put(path_of(key), _HEAD + sha256(body).digest() + body)
        _shrink(path_of(key).parent)
    except OSError as error:
        _announce(
            f"Compiled programs cannot be kept on disk: {error}. They are compiled again in the next process. A directory that "
            "can be written is named by the environment variable FOLDCC_CACHE, and parallelize(cache=False) keeps none."
        )
        return False
    return True


def _shrink(folder: Path) -> None:
    """Drops what was read or written least recently, while there is too much."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process has dropped it
            told = path.stat()
            found.append((told.st_mtime, told.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size


@cache
def _announce(text: str) -> None:
    warnings.warn(text, stacklevel=3)
