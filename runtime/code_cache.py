"""Native code that this user's compiler made: found by what it was made of, and known by its own hash.

    <folder>/<key>.key       64 hexadecimal digits: the SHA-256 of the library made of what `key` stands for
    <folder>/<sha256>.so     that library

A library that lies here was compiled by this user on this machine, which is why the runtime runs it without asking.
The folder is `$SPARSEC_CACHE`, or `sparsec/kernels` in `$XDG_CACHE_HOME` or `~/.cache`. It must belong to the user and
be writable by nobody else. Files are written whole or not at all, and hashed again when read, so any number of
processes may use it at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_LIBRARY = 64 << 20
"""Most bytes of a library: a kernel has some hundred thousand."""

_HASH = re.compile(rb"[0-9a-f]{64}")
_log = logging.getLogger("sparsec")
_made: set[str] = set()  # by this process, whether or not the folder could keep it
_said: set[str] = set()


class CacheRefused(Exception):
    """The folder cannot be used; says why."""


def folder() -> Path:
    """Where libraries are kept. Raises: CacheRefused if there is no home to keep them in."""
    if given := os.environ.get("SPARSEC_CACHE"):
        return Path(given)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise CacheRefused("there is no home folder to keep compiled kernels in: set SPARSEC_CACHE") from None
    return home / "sparsec" / "kernels"


def get(key: str) -> bytes | None:
    """The library that was made of what `key` (a hash) stands for; None if there is none, or it was damaged."""
    with suppress(OSError, CacheRefused), _opened(create=False) as place:
        digest = _read(place, f"{key}.key", 64)
        if digest is not None and _HASH.fullmatch(digest):
            name = f"{digest.decode()}.so"
            content = _read(place, name, MAX_LIBRARY)
            if content is not None and hashlib.sha256(content).hexdigest().encode() == digest:
                return content
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=place)
        with suppress(FileNotFoundError):
            os.unlink(f"{key}.key", dir_fd=place)
    return None


def put(key: str, content: bytes) -> None:
    """Keep a library that was made just now. If the folder cannot, that is logged and the process alone knows it."""
    digest = hashlib.sha256(content).hexdigest()
    _made.add(digest)
    try:
        with _opened(create=True) as place:
            _write(place, f"{digest}.so", content)
            _write(place, f"{key}.key", digest.encode())
    except (OSError, CacheRefused) as error:
        why = f"compiled kernels are not kept: {error}"
        if why not in _said:
            _said.add(why)
            _log.warning(why)


def made_here(digest: str) -> bool:
    """Whether the library of that SHA-256 was compiled by this user."""
    if digest in _made:
        return True
    if not _HASH.fullmatch(digest.encode()):
        return False
    with suppress(OSError, CacheRefused), _opened(create=False) as place:
        content = _read(place, f"{digest}.so", MAX_LIBRARY)
        if content is not None and hashlib.sha256(content).hexdigest() == digest:
            _made.add(digest)
            return True
    return False


@contextmanager
def _opened(create: bool) -> Generator[int]:
    """The folder as a descriptor, so that what was checked is what is used. Raises: CacheRefused, OSError."""
    path = folder()
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(place)
        if found.st_uid != os.geteuid():
            raise CacheRefused(f"{path} belongs to another user: set SPARSEC_CACHE to a folder of yours")
        if found.st_mode & 0o022:
            raise CacheRefused(f"others can write to {path}: chmod go-w {path}")
        yield place
    finally:
        os.close(place)


def _read(place: int, name: str, limit: int) -> bytes | None:
    """A file of at most `limit` bytes; None if it is missing, larger, or no plain file."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        content = file.read(limit + 1)
    return content if len(content) <= limit else None


def _write(place: int, name: str, content: bytes) -> None:
    partial = f".{secrets.token_hex(8)}"
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=place)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.rename(partial, name, src_dir_fd=place, dst_dir_fd=place)
    except BaseException:
        os.unlink(partial, dir_fd=place)
        raise
