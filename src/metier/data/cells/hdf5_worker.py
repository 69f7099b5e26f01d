"""The process that looks through an HDF5 file before anybody else opens it: little memory, and an end after seconds.

The HDF5 library goes round in circles in some damaged files, takes memory without bound for others, and follows what
points to other files; nothing in the same process can stop it. So what a reader would do is done here first: every
group, link and attribute, how each dataset is stored, and the values of those that are read at once. This file is run,
never imported by the package.

The answer is one line, `{"refused": what}` or `{}`, and none where the time or the memory did not do. An error of the
library is no reason to refuse: the reader meets it again, and says it better.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from metier.core.children import limit

WHOLE_BYTES = 64 << 20
"""Of a file up to this size every value is read; of a larger one the annotations, and where the rows begin."""
AT_ONCE_BYTES = 8 << 20
CHUNK_CACHE_BYTES = 16 << 20
LEAST_BYTES = 64 << 20
"""What unpacks to less is no bomb."""
MOST_RATIO = 1100
"""DEFLATE packs at most 1032 times. Source: zlib.net/zlib_tech.html, "Maximum Compression Factor"."""
LETTER_BYTES = 4
"""Of a text in an array of texts that are equally wide."""


class RefusedError(Exception):
    """The file is not for reading."""


def look(path: Path) -> None:
    """Go through a file as a tree; what is linked to twice is seen twice, for so its readers would see it.

    Raises:
        RefusedError: If it points to other files, or would take more memory than its size allows.
    """
    size = path.stat().st_size
    with h5py.File(path, "r", locking=False, rdcc_nbytes=CHUNK_CACHE_BYTES) as file:
        waiting: list[Any] = [file]
        while waiting:
            thing = waiting.pop()
            with _survived():
                for name in thing.attrs:
                    with _survived():
                        thing.attrs[name]
            if isinstance(thing, h5py.Group):
                waiting += _children(thing)
            elif isinstance(thing, h5py.Dataset):
                with _survived():
                    _look_at_values(thing, size)


def _children(group: h5py.Group) -> Iterator[Any]:
    with _survived():
        for name in group:
            with _survived():
                link = group.get(name, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    raise RefusedError(f"{group.name}: {name} points to another file, {link.filename}")
                yield group[name]


def _look_at_values(stored: h5py.Dataset, file_bytes: int) -> None:
    if stored.external or stored.is_virtual:
        raise RefusedError(f"{stored.name} has its values in other files")
    if not stored.shape:  # a single value, or none
        stored[()]
        return
    width = stored.dtype.itemsize
    _check_size(stored, stored.size * width, stored.id.get_storage_size())
    if not _is_read_at_once(stored, file_bytes):
        return
    longest = max((_longest(block) for block in _blocks(stored, width)), default=0)
    _check_size(stored, stored.size * longest * LETTER_BYTES, file_bytes)


def _is_read_at_once(stored: h5py.Dataset, file_bytes: int) -> bool:
    places = str(stored.name).split("/")
    return file_bytes <= WHOLE_BYTES or "obs" in places or "var" in places or places[-1] == "indptr"


def _blocks(stored: h5py.Dataset, width: int) -> Iterator[Any]:
    """The values, a few at once, cut where chunks end."""
    row_bytes = max(1, width * stored.size // max(1, stored.shape[0]))
    high = stored.chunks[0] if stored.chunks else 1
    rows = high * max(1, AT_ONCE_BYTES // (row_bytes * high))
    for start in range(0, stored.shape[0], rows):
        yield stored[start : start + rows]


def _longest(block: Any) -> int:
    """Length of the longest text; 0 for numbers."""
    return max(map(len, block.ravel()), default=0) if block.dtype == object else 0


def _check_size(stored: h5py.Dataset, unpacked: int, held: int) -> None:
    if unpacked > LEAST_BYTES and unpacked > MOST_RATIO * held:
        raise RefusedError(f"{stored.name} would take {unpacked:,} bytes, made out of {held:,}")


@contextlib.contextmanager
def _survived() -> Iterator[None]:
    """Go on after an error of the library, unless memory was what it lacked."""
    try:
        yield
    except (RefusedError, MemoryError):
        raise
    except Exception as error:
        if "alloc" in str(error):
            raise MemoryError from error


def main(path: str, seconds: int, megabytes: int) -> None:
    """Look, and answer."""
    limit(megabytes, seconds=seconds)
    answer = {}
    try:
        with _survived():
            look(Path(path))
    except RefusedError as error:
        answer = {"refused": str(error)}
    sys.stdout.buffer.write(json.dumps(answer).encode())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
