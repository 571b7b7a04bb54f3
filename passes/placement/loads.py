"""Expert loads from files: counts of tokens per layer and expert, in one scenario or several, and tokens' routing."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError

KEYS = ("logical_count", "load", "loads", "counts")
LARGEST = 1 << 30  #: bytes of a file, and of an array in it


@dataclass(frozen=True)
class Loads:
    """What was measured.

    Args:
        counts: [scenarios, layers, experts] float64, tokens that each expert got.
        names: of the scenarios.
        layers: the number of each layer in the model. Dense layers, which have no tokens at all, are left out.
    """

    counts: NDArray[np.float64]
    names: tuple[str, ...]
    layers: tuple[int, ...]


def read_loads(paths: Sequence[str | Path]) -> Loads:
    """Read .json, .npy or .npz files, whose scenarios are all planned for.

    An array is [layers, experts] or [scenarios, layers, experts]. In .npz it is named `logical_count`, `load`, `loads`
    or `counts` (or is the only one), and `workload` may name the scenarios. JSON is the array as nested lists, or an
    object with such an entry.

    Raises:
        SparsecError: for what cannot be read, or is no load: says what and where.
    """
    if not paths:
        raise SparsecError("there is no load to plan for\n  hint: name a file of counts: --load FILE")
    read = [_scenarios(Path(path)) for path in paths]
    shape = read[0][0].shape[1:]
    for path, (counts, _) in zip(paths, read, strict=True):
        if counts.shape[1:] != shape:
            raise SparsecError(
                f"{path}: {_shape(counts)}, but {paths[0]} has {shape[0]} layers of {shape[1]} experts\n"
                "  hint: plan for one model at a time"
            )
    counts = np.concatenate([one for one, _ in read])
    names = [name for _, some in read for name in some]
    dense = counts.sum((0, 2)) == 0
    if dense.all():
        raise SparsecError(f"{paths[0]}: no layer has any tokens")
    empty = np.argwhere((counts.sum(2) == 0) & ~dense)
    if len(empty):
        scenario, layer = empty[0]
        raise SparsecError(
            f"scenario '{names[scenario]}': layer {layer} is missing (all its counts are zero), but others have it\n"
            "  hint: leave the scenario out, or record it again"
        )
    return Loads(counts[:, ~dense], tuple(names), tuple(int(layer) for layer in np.flatnonzero(~dense)))


def read_routing(path: str | Path, layers: Sequence[int], experts: int) -> NDArray[np.int64]:
    """Experts of every token: [tokens, layers, k], from .npy or .npz (`routed`). Leading axes are flattened.

    Raises:
        SparsecError: ids out of range, a wrong number of layers, or a file that cannot be read.
    """
    array, _ = _array(Path(path), ("routed", "routing"))
    if array.ndim < 3 or array.dtype.kind not in "iu":
        raise SparsecError(
            f"{path}: routing is [tokens, layers, k] of whole numbers, not {list(array.shape)} of {array.dtype}"
        )
    array = array.reshape(-1, *array.shape[-2:]).astype(np.int64)
    if array.shape[1] != len(layers):
        raise SparsecError(f"{path}: routing of {array.shape[1]} layers, but the loads have {len(layers)}")
    bad = np.argwhere((array < 0) | (array >= experts))
    if len(bad):
        token, layer, pick = bad[0]
        raise SparsecError(
            f"{path}: token {token} in layer {layer} goes to expert {array[token, layer, pick]}, "
            f"but there are {experts} (0..{experts - 1})"
        )
    return array


def _scenarios(path: Path) -> tuple[NDArray[np.float64], list[str]]:
    array, names = _array(path, KEYS)
    if array.dtype.kind not in "iuf":
        raise SparsecError(f"{path}: counts are numbers, not {array.dtype}")
    counts = array.astype(np.float64)
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or 0 in counts.shape:
        raise SparsecError(
            f"{path}: counts are [layers, experts] or [scenarios, layers, experts], not {list(array.shape)}"
        )
    if len(names) != len(counts):
        stem = path.stem
        names = [stem] if len(counts) == 1 else [f"{stem}[{index}]" for index in range(len(counts))]
    for what, bad in (("not a number", ~np.isfinite(counts)), ("negative", counts < 0)):
        if bad.any():
            scenario, layer, expert = np.argwhere(bad)[0]
            raise SparsecError(
                f"{path}: the count of expert {expert} in layer {layer} of scenario '{names[scenario]}' is {what}: "
                f"{counts[scenario, layer, expert]:g}"
            )
    return counts, names


def _array(path: Path, keys: Sequence[str]) -> tuple[NDArray[Any], list[str]]:
    """The array of a file, and the scenarios' names where it has some."""
    if not path.is_file():
        raise SparsecError(f"{path}: no such file")
    if path.stat().st_size > LARGEST:
        raise SparsecError(f"{path}: {path.stat().st_size} bytes; at most {LARGEST} are read")
    try:
        if path.suffix == ".json":
            return _of_json(path, json.loads(path.read_text()), keys)
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False)), []
        if path.suffix == ".npz":
            return _of_npz(path, keys)
    except (ValueError, KeyError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise SparsecError(f"{path}: cannot be read: {error}") from error
    raise SparsecError(f"{path}: loads are .json, .npy or .npz, not '{path.suffix}'")


def _of_npz(path: Path, keys: Sequence[str]) -> tuple[NDArray[Any], list[str]]:
    with zipfile.ZipFile(path) as archive:
        if sum(item.file_size for item in archive.infolist()) > LARGEST:
            raise SparsecError(f"{path}: unpacks to more than {LARGEST} bytes")
    with np.load(path, allow_pickle=False) as data:
        key = next((key for key in keys if key in data.files), None)
        if key is None and len(data.files) == 1:
            key = data.files[0]
        if key is None:
            raise SparsecError(f"{path}: none of its arrays ({', '.join(data.files)}) is named {', '.join(keys)}")
        names = [str(name) for name in np.atleast_1d(data["workload"])] if "workload" in data.files else []
        return np.asarray(data[key]), names


def _of_json(path: Path, data: Any, keys: Sequence[str]) -> tuple[NDArray[Any], list[str]]:
    names: Any = []
    if isinstance(data, dict):
        key = next((key for key in keys if key in data), None)
        if key is None:
            raise SparsecError(f"{path}: has no entry {', '.join(keys)}")
        data, names = data[key], data.get("workload", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list):
        raise SparsecError(f"{path}: 'workload' is a list of names")
    return np.array(data), [str(name) for name in names]


def _shape(counts: NDArray[np.float64]) -> str:
    return f"{counts.shape[1]} layers of {counts.shape[2]} experts"
