"""Arrays from .npy, .npz and .json files of strangers: sizes are checked before anything of that size is made."""

from __future__ import annotations

import ast
import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError

LARGEST = 1 << 30  #: bytes of a file, and of an array in it
MOST_AXES = 8
_HEADER = 10_000  #: bytes of the header of an array
_MAGIC = b"\x93NUMPY"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Found:
    """An array of a file; the scenarios' names and the layers' numbers, where it has some."""

    array: NDArray[Any]
    names: list[str]
    layers: Any = None


def read_json(path: Path, largest: int = LARGEST, *, nan: bool = True) -> Any:
    """What a JSON file holds, with or without numbers that are none.

    Raises: SparsecError that names the file, and the line where it is broken.
    """
    data = _bytes(path, largest)
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=float if nan else _refuse)
    except UnicodeDecodeError as error:
        raise SparsecError(f"{path}: byte {error.start} is no UTF-8, so this is no JSON") from None
    except (ValueError, RecursionError) as error:
        raise SparsecError(f"{path}: is not JSON: {error}") from None


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")


def read_array(path: Path, keys: Sequence[str]) -> Found:
    """The array of a .npy file, or of that name in .npz. Raises: SparsecError that says what is wrong."""
    if path.suffix == ".npy":
        data = _bytes(path, LARGEST)
        return Found(_array(io.BytesIO(data), len(data), str(path)), [])
    try:
        with zipfile.ZipFile(io.BytesIO(_bytes(path, LARGEST))) as archive:
            return _of_zip(archive, path, keys)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise SparsecError(f"{path}: cannot be read: {error}\n  hint: write it again with numpy.savez") from None


def as_array(data: Any, where: str) -> NDArray[Any]:
    """Nested lists as an array. Raises: SparsecError where rows differ in length, or are no lists of numbers."""
    try:
        return np.array(data)
    except (ValueError, OverflowError):
        raise SparsecError(f"{where}: its lists are not all of one length") from None


def _of_zip(archive: zipfile.ZipFile, path: Path, keys: Sequence[str]) -> Found:
    members = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
    if sum(item.file_size for item in members.values()) > LARGEST:
        raise SparsecError(f"{path}: unpacks to more than {LARGEST} bytes, which are the most that are read")
    key = next((key for key in keys if key in members), None)
    if key is None and len(members) == 1:
        key = next(iter(members))
    if key is None:
        held = ", ".join(map(repr, list(members)[:8])) or "nothing"
        raise SparsecError(f"{path}: holds {held}\n  hint: name the array {' or '.join(keys)}")

    def read(name: str) -> NDArray[Any]:
        item = members[name]
        if item.compress_type not in _METHODS:
            raise SparsecError(f"{path}: '{name}' is packed by a method that numpy does not write")
        with archive.open(item) as file:
            return _array(file, item.file_size, f"{path}: '{name}'")

    names = np.atleast_1d(read("workload")) if "workload" in members else np.array([], str)
    if names.dtype.kind != "U" or names.ndim != 1:
        raise SparsecError(f"{path}: 'workload' is a list of names, not {list(names.shape)} of {names.dtype}")
    return Found(read(key), names.tolist(), read("layers").tolist() if "layers" in members else None)


def _array(file: IO[bytes], size: int, where: str) -> NDArray[Any]:
    """An array of numpy's format, whose header is believed only as far as there are bytes."""
    start = file.read(8)
    wide = 2 if start[6:7] == b"\1" else 4
    length = int.from_bytes(file.read(wide), "little")
    if start[:6] != _MAGIC or start[6:7] not in (b"\1", b"\2") or length > _HEADER:
        raise SparsecError(f"{where}: is no array\n  hint: write it with numpy.save or numpy.savez")
    try:
        header = ast.literal_eval(file.read(length).decode("latin-1").strip())
        shape, descr, fortran = header["shape"], header["descr"], bool(header["fortran_order"])
        dtype = np.dtype(descr) if isinstance(descr, str) else np.dtype(object)
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise SparsecError(f"{where}: its header is broken\n  hint: write it again with numpy.save") from None
    if dtype.kind not in "biufU":
        raise SparsecError(f"{where}: has elements of type {str(dtype)[:40]}, not numbers; objects are never unpickled")
    sizes = shape if isinstance(shape, tuple) and len(shape) <= MOST_AXES else (-1,)
    if not all(type(dim) is int and dim >= 0 for dim in sizes):
        raise SparsecError(f"{where}: its shape is {str(shape)[:80]}, which is none")
    needed, there = math.prod(sizes) * dtype.itemsize, size - 8 - wide - length
    if needed > there or needed > LARGEST:
        raise SparsecError(f"{where}: says that it is {_shown(sizes)} of {dtype}, but has only {there} bytes of that")
    if not needed:
        raise SparsecError(f"{where}: is empty, of shape [{_shown(sizes)}]")
    data = file.read(needed)
    if len(data) < needed:
        raise SparsecError(f"{where}: ends after {len(data)} of {needed} bytes\n  hint: copy or write it again")
    return np.frombuffer(data, dtype).reshape(sizes, order="F" if fortran else "C")


def _shown(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))[:80]


def _file(path: Path, largest: int) -> Path:
    """A file that is no larger. Raises: SparsecError, OSError."""
    if not path.exists():
        raise SparsecError(f"{path}: no such file")
    if not path.is_file():
        raise SparsecError(f"{path}: is no file")
    if not 0 < (size := path.stat().st_size) <= largest:
        raise SparsecError(f"{path}: is empty" if not size else f"{path}: {size} bytes; at most {largest} are read")
    return path


def _bytes(path: Path, largest: int) -> bytes:
    with _file(path, largest).open("rb") as file:
        return file.read(largest + 1)
