"""Native code in this process: loading libraries, calling them, threads and scratch memory.

The ABI is `struct Call` of `codegen/cpu/include/call.h`, which `Call` mirrors.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsec.runtime import code_cache

HUGE_PAGE = 2 << 20

_lock = threading.Lock()
_libraries: dict[str, Library] = {}
_forked = False


class LibraryRefused(Exception):
    """A library that cannot be loaded; says why."""


class Call(ctypes.Structure):
    """What one launch is told."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("ins", ctypes.POINTER(ctypes.c_void_p)),
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
        ("scratch", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
        ("barrier", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Args:
        run: takes a reference to a `Call`; returns 0, or nonzero if it refuses.
        scratch: takes the numbers of tokens and threads; returns the bytes of scratch memory that `run` needs.
    """

    run: Callable[[Any], int]
    scratch: Callable[[int, int], int]


@dataclass(frozen=True)
class Team:
    """The thread pool that PyTorch runs on, by the addresses of its GOMP_parallel and GOMP_barrier."""

    parallel: int
    barrier: int
    limit: int


def load(content: bytes) -> Library:
    """Load a library, once per content and process. It stays loaded.

    Raises: LibraryRefused if it cannot be loaded, or is no kernel.
    """
    digest = hashlib.sha256(content).hexdigest()
    with _lock:
        if digest not in _libraries:
            _libraries[digest] = _load(content)
        return _libraries[digest]


@cache
def team() -> Team | None:
    """The pool, in the OpenMP library that PyTorch has loaded (never a second one); None where there is none."""
    try:
        # Symbols of a handle are looked for in all that it depends on: this finds the one that PyTorch calls.
        loaded = ctypes.CDLL(torch._C.__file__, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        parallel, barrier = (_address(getattr(loaded, name)) for name in ("GOMP_parallel", "GOMP_barrier"))
        # A team may get fewer threads than it asks for under these two; kernels count on what they were told.
        limit = 1 if loaded.omp_get_dynamic() else loaded.omp_get_thread_limit()
    except (OSError, AttributeError):
        return None
    return Team(parallel, barrier, limit)


def threads() -> int:
    """Threads that a launch made now takes: PyTorch's number for the calling thread."""
    pool = None if _forked else team()
    return 1 if pool is None else max(1, min(torch.get_num_threads(), pool.limit))


class Scratch(threading.local):
    """Memory of one Python thread that launches share: anonymous, in huge pages where there are some, freed with it."""

    def __init__(self) -> None:
        self.size = 0
        self._start = 0
        self._memory: Any = None

    def at_least(self, size: int) -> int:
        """The address of `size` bytes on the boundary of a huge page. Raises: RuntimeError if there is no memory."""
        if size > self.size:
            size = -(-max(size, self.size + self.size // 4) // HUGE_PAGE) * HUGE_PAGE
            self.size, self._memory = 0, None  # gone before there is more
            try:
                memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, ValueError, OverflowError) as error:
                raise RuntimeError(f"there is no memory for {size} bytes of scratch: {error}") from None
            if hasattr(mmap, "MADV_HUGEPAGE"):
                _advise(memory)
            self._memory = ctypes.c_char.from_buffer(memory)  # holds the mapping
            self._start = -(-ctypes.addressof(self._memory) // HUGE_PAGE) * HUGE_PAGE
            self.size = size
        return self._start


def _advise(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # a kernel without huge pages: small ones do


def _load(content: bytes) -> Library:
    refused = ""
    for parent in (tempfile.gettempdir, _cache_parent):
        try:
            loaded = _open(content, parent())
            run, scratch = loaded.sparsec_run, loaded.sparsec_scratch
        except AttributeError:
            raise LibraryRefused("it is no kernel: it lacks sparsec_run or sparsec_scratch") from None
        except (OSError, code_cache.CacheRefused) as error:
            refused = refused or str(error)  # a folder mounted noexec, or not writable: try the other
            continue
        run.argtypes, run.restype = [ctypes.POINTER(Call)], ctypes.c_int32
        scratch.argtypes, scratch.restype = [ctypes.c_int64, ctypes.c_int32], ctypes.c_int64
        return Library(run, scratch)
    raise LibraryRefused(f"it cannot be loaded: {refused}")


def _open(content: bytes, parent: str) -> ctypes.CDLL:
    """Load bytes by way of a file that nobody else can reach, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sparsec-", dir=parent) as folder:
        place = Path(folder, "kernel.so")
        with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        return ctypes.CDLL(str(place), mode=os.RTLD_NOW | os.RTLD_LOCAL)


def _cache_parent() -> str:
    place = code_cache.folder()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(place)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _after_fork() -> None:
    # The pool's threads do not live in a child, and waiting for them would not end.
    global _forked, _lock
    _forked, _lock = True, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
